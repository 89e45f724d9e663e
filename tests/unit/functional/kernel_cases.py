"""Ragged gather-dots that the kernels are tested on, and the child process that runs them.

Triton decides at its import whether it interprets kernels on the CPU or compiles them for a GPU, so both are done in
processes of their own: `python tests/unit/functional/kernel_cases.py interpret|compile RESULT`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Sizes of the sets, hidden size, vocabulary, type of hidden states and weights, type of the gradient buffers."""

    sizes: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype = torch.float32
    buffer_dtype: torch.dtype = torch.float32
    has_bias: bool = True


RAGGED = (0, 0, 3, 1, 0, 8, 70, 2, 33, 32, 0)  # empty sets at the start, in the middle and at the end
CASES = {
    "float32": Case(RAGGED, 96, 23),
    "float16": Case(RAGGED, 96, 23, torch.float16, torch.float16),
    "bfloat16": Case(RAGGED, 96, 23, torch.bfloat16, torch.bfloat16),
    "bfloat16_into_float32": Case(RAGGED, 896, 40, torch.bfloat16),
    "float64": Case(RAGGED, 96, 23, torch.float64, torch.float64),
    "without_bias": Case(RAGGED, 896, 500, has_bias=False),
    "several_blocks_of_h": Case((1, 40, 0, 5), 2100, 7),
    "one_set_of_5000": Case((2, 5000, 3), 64, 300, has_bias=False),
    "long_sets_back_to_back": Case((65, 64, 63, 129, 31, 33, 32), 256, 50),
    "one_token_everywhere": Case((1,) * 150, 32, 1),
    "one_candidate": Case((1,), 16, 3),
    "no_candidate": Case((0, 0), 96, 5),
    "no_state": Case((), 96, 5),
}
REPEATED = ("float32", "long_sets_back_to_back")


@dataclass(frozen=True)
class Inputs:
    """Arguments of both passes. The buffers hold numbers already, which the backward pass adds to."""

    hidden_SH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    ids_M: Tensor
    offsets_S1: Tensor
    grad_M: Tensor
    grad_weight_VH: Tensor
    grad_bias_V: Tensor | None

    @staticmethod
    def of(case: Case) -> Inputs:
        """Random numbers, the same for a case in every process; ids repeat within a set and across sets."""
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        offsets_S1 = torch.tensor([0, *case.sizes]).cumsum(0)
        num_candidates, shape = sum(case.sizes), (case.vocab_size, case.hidden_size)
        return Inputs(
            hidden_SH=normal(len(case.sizes), case.hidden_size).to(case.dtype),
            weight_VH=normal(*shape).to(case.dtype),
            bias_V=normal(case.vocab_size).to(case.dtype) if case.has_bias else None,
            ids_M=torch.randint(case.vocab_size, (num_candidates,), generator=random),
            offsets_S1=offsets_S1,
            grad_M=normal(num_candidates).to(torch.float64 if case.dtype == torch.float64 else torch.float32),
            grad_weight_VH=normal(*shape).to(case.buffer_dtype),
            grad_bias_V=normal(case.vocab_size).to(case.buffer_dtype) if case.has_bias else None,
        )

    def run(self, form: object) -> dict[str, Tensor | None]:
        """Both passes of a form (a module with ragged_dot_forward and ragged_dot_backward)."""
        z_M = form.ragged_dot_forward(self.hidden_SH, self.weight_VH, self.bias_V, self.ids_M, self.offsets_S1)
        grad_weight_VH = self.grad_weight_VH.clone()
        grad_bias_V = None if self.grad_bias_V is None else self.grad_bias_V.clone()
        grad_hidden_SH = form.ragged_dot_backward(
            self.grad_M, self.hidden_SH, self.weight_VH, self.ids_M, self.offsets_S1, grad_weight_VH, grad_bias_V
        )
        return {"z": z_M, "grad_hidden": grad_hidden_SH, "grad_weight": grad_weight_VH, "grad_bias": grad_bias_V}


def run_in_child(mode: str, folder: Path) -> dict:
    """Result of `mode` in a fresh process."""
    result = folder / f"{mode}.pt"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(folder / "triton")
    if mode == "interpret":
        environment["TRITON_INTERPRET"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, mode, str(result)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(result)


def interpret() -> dict[str, dict[str, Tensor | None]]:
    """Every case through Triton's interpreter, second runs of REPEATED, and a run in the tiles of very many rows."""
    from openrlhf_bd.functional.kernels import triton_ragged_dot

    runs = {name: name for name in CASES} | {f"{name} again": name for name in REPEATED}
    results = {run: Inputs.of(CASES[name]).run(triton_ragged_dot) for run, name in runs.items()}
    triton_ragged_dot.LARGE_NUM_ROWS = 0
    results["large tiles"] = Inputs.of(CASES["long_sets_back_to_back"]).run(triton_ragged_dot)
    return results


def compile_kernels() -> dict[str, dict[str, int]]:
    """Registers, bytes spilled and 16-byte loads of each kernel as compiled for compute capability 9.0."""
    return {
        f"{name} {hidden_size} {pointer}": _compile(name.split()[0], arguments, hidden_size)
        for hidden_size in (256, 896, 8192)
        for pointer in ("*bf16", "*fp32")
        for name, arguments in _kernel_arguments(pointer).items()
    }


def _kernel_arguments(pointer: str) -> dict[str, dict[str, str | None]]:
    segments = {"source": pointer, "index": "*i64", "scale": "*fp32", "begin": "*i64", "end": "*i64"}
    segments["partial"] = "*fp32"
    rows = {"hidden": pointer, "weight": pointer, "ids": "*i64", "offsets": "*i64", "z": "*fp32"}
    rows |= {"num_candidates": "i32", "num_offsets": "i32", "search_steps": "i32"}
    return {
        "_gather_dot": {**rows, "bias": None},
        "_gather_dot with bias": {**rows, "bias": pointer},
        "_sum_tiles": {**segments, "segment": "*i32", "num_rows": "i32"},
        "_sum_segments by state": {**segments, "target": None, "out": "*fp32"},
        "_sum_segments by token": {**segments, "target": "*i32", "out": pointer},
    }


def _compile(name: str, arguments: dict[str, str | None], hidden_size: int) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget

    from openrlhf_bd.functional.kernels import triton_ragged_dot

    kernel = getattr(triton_ragged_dot, name)
    rows, block_h = triton_ragged_dot._block_shape(hidden_size)
    constants = {"H": hidden_size, "TILE": triton_ragged_dot.TILE, "ROWS": rows, "BLOCK_H": block_h}
    constants |= {f"{key}_ptr": None for key, kind in arguments.items() if kind is None}
    types = {key if kind == "i32" else f"{key}_ptr": kind for key, kind in arguments.items()}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {key: types[key] for key in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    constants = {key: value for key, value in constants.items() if key in signature}
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": triton_ragged_dot.NUM_WARPS}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(assembler), "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.findall(r"Used (\d+) registers", log)[0]),
        "spilled_bytes": int(re.findall(r"(\d+) bytes spill stores", log)[0]),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
    }


if __name__ == "__main__":
    torch.save(interpret() if sys.argv[1] == "interpret" else compile_kernels(), sys.argv[2])
