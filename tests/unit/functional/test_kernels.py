import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from openrlhf_bd.functional.kernels import ragged_dot, reference
from tests.unit.functional.kernel_cases import CASES, REPEATED, Inputs, run_in_child

Results = dict[str, Tensor | None]

# Relative to the largest value, since sums of random signs cancel: a few roundings of the type of the result.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """Results of the Triton kernels, run by its interpreter on the CPU."""
    return run_in_child("interpret", tmp_path_factory.mktemp("interpret"))


def brute_force(inputs: Inputs) -> Results:
    """Both passes in float64 from the dense [S, V] logits and autograd."""
    hidden_SH = inputs.hidden_SH.double().requires_grad_()
    weight_VH = inputs.weight_VH.double().requires_grad_()
    bias_V = torch.zeros(len(weight_VH), dtype=torch.float64) if inputs.bias_V is None else inputs.bias_V.double()
    bias_V.requires_grad_()
    offsets = inputs.offsets_S1.tolist()
    state_M = torch.tensor([s for s in range(len(offsets) - 1) for _ in range(offsets[s], offsets[s + 1])]).long()
    z_M = (hidden_SH @ weight_VH.T + bias_V)[state_M, inputs.ids_M]
    grads = torch.autograd.grad(z_M, (hidden_SH, weight_VH, bias_V), inputs.grad_M.double())
    return {
        "z": z_M.detach(),
        "grad_hidden": grads[0],
        "grad_weight": inputs.grad_weight_VH.double() + grads[1],
        "grad_bias": None if inputs.grad_bias_V is None else inputs.grad_bias_V.double() + grads[2],
    }


def assert_close(actual: Results, expected: Results) -> None:
    for name, value in expected.items():
        found = actual[name]
        if value is None or found is None:
            assert value is found, name
            continue
        assert found.shape == value.shape, name
        error = (found.double() - value).abs().max().item() if value.numel() else 0.0
        scale = value.abs().max().item() if value.numel() else 0.0
        assert error <= TOLERANCE[found.dtype] * scale, f"{name}: off by {error} where the largest value is {scale}"


def test_reference_gives_values_worked_out_by_hand() -> None:
    """Logits and gradients of two states, three tokens and two dimensions."""
    hidden = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
    ids, offsets = torch.tensor([2, 0, 2]), torch.tensor([0, 1, 3])
    # 1 - 2 + 30; 3 + 10; 3 - 4 + 30
    z = reference.ragged_dot_forward(hidden, weight, torch.tensor([10.0, 20.0, 30.0]), ids, offsets)
    assert z.tolist() == [29.0, 13.0, 29.0]
    grad_weight, grad_bias = torch.ones(3, 2), torch.zeros(3)
    grad_hidden = reference.ragged_dot_backward(
        torch.tensor([2.0, 5.0, 7.0]), hidden, weight, ids, offsets, grad_weight, grad_bias
    )
    # 2 (1, -1);  5 (1, 0) + 7 (1, -1)
    assert grad_hidden.tolist() == [[2.0, -2.0], [12.0, -7.0]]
    # Added to ones: token 0: 5 (3, 4); token 1: nothing; token 2: 2 (1, 2) + 7 (3, 4)
    assert grad_weight.tolist() == [[16.0, 21.0], [1.0, 1.0], [24.0, 33.0]]
    assert grad_bias.tolist() == [5.0, 0.0, 9.0]


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_a_dense_brute_force(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch form gives the float64 values and gradients, wherever its blocks end."""
    inputs = Inputs.of(CASES[name])
    expected = brute_force(inputs)
    assert_close(inputs.run(reference), expected)
    monkeypatch.setattr(reference, "CPU_BLOCK_ELEMENTS", len(inputs.ids_M) // 6 * CASES[name].hidden_size)
    assert_close(inputs.run(reference), expected)


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_a_dense_brute_force(name: str, interpreted: dict[str, Results]) -> None:
    """The Triton kernels give the float64 values and gradients, and result types of the torch form."""
    inputs = Inputs.of(CASES[name])
    actual = interpreted[name]
    assert_close(actual, brute_force(inputs))
    types = {key: value if value is None else value.dtype for key, value in inputs.run(reference).items()}
    assert {key: value if value is None else value.dtype for key, value in actual.items()} == types


def test_tiles_of_very_many_rows_give_the_same(interpreted: dict[str, Results]) -> None:
    """Partial sums over 128 rows instead of 32 give the float64 values too."""
    assert_close(interpreted["large tiles"], brute_force(Inputs.of(CASES["long_sets_back_to_back"])))


@pytest.mark.parametrize("name", REPEATED)
def test_two_runs_are_equal_to_the_bit(name: str, interpreted: dict[str, Results]) -> None:
    """A second run of either form gives the same bits."""
    inputs = Inputs.of(CASES[name])
    kernels = interpreted[name], interpreted[f"{name} again"]
    for first, second in (kernels, (inputs.run(reference), inputs.run(reference))):
        for key, value in first.items():
            assert value is not None
            assert torch.equal(value, second[key]), key


def test_kernels_compile_for_a_gpu(tmp_path: Any) -> None:
    """Every kernel compiles for compute capability 9.0, loads 16 bytes at a time, leaves room for 5 programs."""
    compiled = run_in_child("compile", tmp_path)
    assert len(compiled) == 30  # 5 forms of kernels, 3 hidden sizes, 2 types
    for name, figures in compiled.items():
        assert figures["spilled_bytes"] <= 32, (name, figures)
        assert figures["wide_loads"] >= 8, name
        assert figures["registers"] * 128 * 5 <= 65536, (name, figures)


def test_reference_passes_gradcheck() -> None:
    """The backward pass agrees with finite differences of the forward pass."""
    ids, offsets = torch.tensor([1, 1, 0, 3, 2]), torch.tensor([0, 2, 2, 5])

    class RaggedDot(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            ctx.save_for_backward(hidden, weight)
            return ragged_dot.ragged_dot_forward(hidden, weight, bias, ids, offsets)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
            hidden, weight = ctx.saved_tensors
            buffers = torch.zeros_like(weight), torch.zeros(4, dtype=torch.float64)
            return ragged_dot.ragged_dot_backward(grad_outputs[0], hidden, weight, ids, offsets, *buffers), *buffers

    random = torch.Generator().manual_seed(0)
    arguments = [
        torch.randn(*shape, dtype=torch.float64, generator=random, requires_grad=True)
        for shape in ((3, 5), (4, 5), (4,))
    ]
    assert torch.autograd.gradcheck(RaggedDot.apply, arguments)


def test_reference_holds_one_block_of_gathered_rows() -> None:
    """No tensor made on the way is larger than a block, however many candidates there are."""
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dim() == 2 and out.shape != (2, 64) and out.shape != (50, 64):
                largest = max(largest, out.numel())  # neither a gradient nor its view
            return out

    num_candidates, hidden = 20_000, torch.randn(2, 64)
    weight, ids = torch.randn(50, 64), torch.arange(num_candidates) % 50
    offsets = torch.tensor([0, 5, num_candidates])
    with Sizes():
        reference.ragged_dot_forward(hidden, weight, None, ids, offsets)
        reference.ragged_dot_backward(
            torch.ones(num_candidates), hidden, weight, ids, offsets, torch.zeros_like(weight), None
        )
    assert 0 < largest <= reference.CPU_BLOCK_ELEMENTS


def test_cpu_needs_no_triton() -> None:
    """On the CPU the torch form runs and triton is never imported."""
    code = (
        "import sys, torch\n"
        "from openrlhf_bd.functional.kernels.ragged_dot import ragged_dot_forward, ragged_dot_backward\n"
        "ids, offsets = torch.tensor([0, 1]), torch.tensor([0, 2])\n"
        "z = ragged_dot_forward(torch.ones(1, 2), torch.eye(2), None, ids, offsets)\n"
        "grad = ragged_dot_backward(z, torch.ones(1, 2), torch.eye(2), ids, offsets, torch.zeros(2, 2), None)\n"
        "print(z.tolist(), grad.tolist(), 'triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[1.0, 1.0] [[1.0, 1.0]] False"
