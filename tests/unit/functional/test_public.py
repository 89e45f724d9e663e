"""`openrlhf_bd.functional` as others use it: what it exports, what it needs, and the example in its docstring."""

import ast
import subprocess
import sys
import textwrap

import torch

import openrlhf_bd.functional

# Options without pydantic: any object with the attributes.
WITHOUT_PROCESSES = """
    import sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {blocked!r}:
                raise ImportError(f"{{name}} is not there")

    sys.meta_path.insert(0, Blocked())
    from types import SimpleNamespace
    import torch
    from openrlhf_bd.functional import Trajectories, bellman_loss_from_logits, top_p_candidates

    options = SimpleNamespace(**{options!r})
    z_SV = torch.randn(2, 9, requires_grad=True)
    row = Trajectories(torch.tensor([3, 0]), torch.tensor([1, -1]), torch.tensor([False, True]), torch.tensor([0, 0]))
    sets = top_p_candidates(torch.randn(2, 9), top_p=0.9)
    terms = bellman_loss_from_logits(z_SV, sets, row, options, num_tokens=2, num_rows=1, shift_constant=0.0)
    terms.loss.backward()
    print(bool(torch.isfinite(z_SV.grad).all()))
"""


def test_functional_needs_torch_and_numpy_alone() -> None:
    """Where pydantic, Ray, vLLM, DeepSpeed and Transformers are not installed, the mathematics imports and runs."""
    from openrlhf_bd.config import BellmanOptions

    blocked = {"pydantic", "ray", "vllm", "deepspeed", "transformers", "openrlhf", "pyarrow"}
    code = textwrap.dedent(WITHOUT_PROCESSES).format(blocked=blocked, options=BellmanOptions().model_dump())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


def test_example_of_the_docstring_runs() -> None:
    """The example gives a finite gradient as it stands."""
    doc = openrlhf_bd.functional.__doc__
    assert doc is not None
    lines = doc.splitlines()
    code = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line))
    assert 15 <= len([line for line in code.splitlines() if line]) <= 20
    names: dict[str, torch.Tensor] = {}
    exec(compile(ast.parse(code), "functional/__init__.py", "exec"), names)
    assert torch.isfinite(names["student_SV"].grad).all()  # type: ignore[arg-type]


def test_everything_exported_is_there() -> None:
    """Each name of __all__ is an attribute, and the list is in order."""
    exported = openrlhf_bd.functional.__all__
    assert exported == sorted(exported)
    assert all(hasattr(openrlhf_bd.functional, name) for name in exported)
