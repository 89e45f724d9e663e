"""Ragged gather-dot of the sparse head: its time beside the time that its bytes need at the device's copy bandwidth.

Sets are heavy-tailed (log-normal sizes with the given mean: a third of them 1, the largest in the hundreds), ids
log-uniform, so that few are frequent. On CUDA the Triton kernels and the torch form run on the same inputs, with the L2
cache flushed before each call, and the kernels are checked against the torch form and for bit-equal results of two
runs; elsewhere the torch form runs alone. Bytes are counted twice: `unique` has each different row once (the least
that a perfect cache would move), `gathered` a row for every candidate. Needs torch, triton and numpy.

PYTHONPATH=. python3 benchmarks/kernel_bandwidth.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openrlhf_bd.functional.kernels import reference

FLUSH_BYTES = 1 << 30  # beyond any L2 cache, and long enough on a GPU to hide the launches of the call that follows


@dataclass(frozen=True)
class Problem:
    """Inputs of both passes at one shape."""

    hidden_SH: Tensor
    weight_VH: Tensor
    ids_M: Tensor
    offsets_S1: Tensor
    grad_M: Tensor
    grad_weight_VH: Tensor

    def forward(self, form: object) -> Tensor:
        return form.ragged_dot_forward(self.hidden_SH, self.weight_VH, None, self.ids_M, self.offsets_S1)

    def backward(self, form: object, grad_weight_VH: Tensor | None) -> Tensor:
        arguments = (self.grad_M, self.hidden_SH, self.weight_VH, self.ids_M, self.offsets_S1)
        return form.ragged_dot_backward(*arguments, grad_weight_VH, None)


@dataclass(frozen=True)
class Pass:
    """One thing that is timed, and the bytes that it has to move."""

    name: str
    run: Callable[[object], Tensor]
    unique_bytes: int
    gathered_bytes: int


def make_problem(args: argparse.Namespace) -> Problem:
    """Random inputs of the shape that is asked for."""
    random = np.random.default_rng(args.seed)
    sizes_S = random.lognormal(0.0, 1.5, args.states)
    sizes_S = np.clip(sizes_S * args.mean_size / sizes_S.mean(), 1, args.vocabulary).round().astype(np.int64)
    num_candidates = int(sizes_S.sum())
    ids_M = (args.vocabulary ** random.random(num_candidates)).astype(np.int64) - 1
    torch.manual_seed(args.seed)
    dtype, device = getattr(torch, args.dtype), args.device
    return Problem(
        hidden_SH=torch.randn(args.states, args.hidden, dtype=dtype, device=device),
        weight_VH=torch.randn(args.vocabulary, args.hidden, dtype=dtype, device=device),
        ids_M=torch.from_numpy(ids_M).to(device),
        offsets_S1=torch.from_numpy(np.concatenate([[0], np.cumsum(sizes_S)])).to(device),
        grad_M=torch.randn(num_candidates, device=device),
        grad_weight_VH=torch.zeros(args.vocabulary, args.hidden, device=device),
    )


def passes_of(problem: Problem) -> list[Pass]:
    """Forward, the backward pass into the hidden states, and the whole backward pass."""
    num_states, hidden_size = problem.hidden_SH.shape
    num_candidates, num_unique = len(problem.ids_M), len(problem.ids_M.unique())
    row = hidden_size * problem.weight_VH.element_size()
    row32 = hidden_size * 4
    small = 12 * num_candidates + 8 * num_states  # ids and one number a candidate, offsets
    states, unique, gathered = num_states * row, num_unique * row, num_candidates * row
    to_hidden = small + num_states * row32
    to_weight = small + 2 * num_unique * row32  # the rows of the buffer are read and written
    return [
        Pass("forward", problem.forward, small + states + unique, small + states + gathered),
        Pass(
            "backward, hidden",
            lambda form: problem.backward(form, None),
            to_hidden + unique,
            to_hidden + gathered,
        ),
        Pass(
            "backward, both",
            lambda form: problem.backward(form, problem.grad_weight_VH),
            to_hidden + unique + to_weight + states,
            to_hidden + gathered + to_weight + gathered,
        ),
    ]


def seconds(run: Callable[[], object], repeats: int, device: str, flush: Tensor) -> float:
    """Median time of a call: by events on CUDA, where the flush keeps the device busy until all is queued."""
    run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def copy_bandwidth(device: str, repeats: int, flush: Tensor) -> float:
    """Bytes read and written a second by a copy of half of `flush` onto the other half."""
    source, target = flush.chunk(2)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), repeats, device, flush[:1])


def check(problem: Problem, kernels: object) -> None:
    """The kernels' results beside the torch form's, and two runs beside each other; raises if they disagree."""
    results = []
    for form in (kernels, kernels, reference):
        buffer_VH = torch.zeros_like(problem.grad_weight_VH)
        results.append((problem.forward(form), problem.backward(form, buffer_VH), buffer_VH))
    for name, first, second, expected in zip(("z", "grad_hidden", "grad_weight"), *results, strict=True):
        deviation = ((first - expected).abs().max() / expected.abs().max()).item()
        print(f"{name}: {deviation:.1e} of its largest value from the torch form; two runs bit-equal")
        assert torch.equal(first, second), f"{name} differs between two runs"
        assert deviation < 1e-5, f"{name} disagrees with the torch form"


def report(problem: Problem, forms: dict[str, object], args: argparse.Namespace) -> None:
    """Table of times and of their ratios to the bytes' time."""
    flush = torch.empty(FLUSH_BYTES // 4 if args.device == "cuda" else FLUSH_BYTES // 16, device=args.device)
    bandwidth = copy_bandwidth(args.device, args.repeats, flush)
    print(f"copy bandwidth: {bandwidth / 1e9:,.0f} GB/s (read and written)")
    print(f"{'pass':<18}{'form':<8}{'ms':>9}{'unique MB':>11}{'x bytes':>9}{'gathered MB':>13}{'x bytes':>9}")
    for item in passes_of(problem):
        for name, form in forms.items():
            time_s = seconds(lambda item=item, form=form: item.run(form), args.repeats, args.device, flush)
            print(f"{item.name:<18}{name:<8}{time_s * 1e3:>9.3f}", end="")
            for width, num_bytes in ((11, item.unique_bytes), (13, item.gathered_bytes)):
                print(f"{num_bytes / 1e6:>{width}.1f}{time_s * bandwidth / num_bytes:>9.2f}", end="")
            print(flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    has_cuda = torch.cuda.is_available()
    parser.add_argument("--states", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--mean-size", type=float, default=8.0, help="mean number of candidates of a state")
    parser.add_argument("--dtype", default="bfloat16" if has_cuda else "float32", help="of hidden states and weights")
    parser.add_argument("--device", default="cuda" if has_cuda else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    problem = make_problem(args)
    sizes_S = problem.offsets_S1.diff()
    print(
        f"{args.device}, {args.dtype}: S {args.states}, H {args.hidden}, V {args.vocabulary}, M {len(problem.ids_M)}"
        f" ({len(problem.ids_M.unique())} different ids, largest set {sizes_S.max().item()})"
    )
    forms: dict[str, object] = {"torch": reference}
    if args.device == "cuda":
        from openrlhf_bd.functional.kernels import triton_ragged_dot

        print(torch.cuda.get_device_name())
        check(problem, triton_ragged_dot)
        forms = {"triton": triton_ragged_dot, **forms}
    else:
        print("no CUDA device: the torch form only")
    report(problem, forms, args)


if __name__ == "__main__":
    main()
