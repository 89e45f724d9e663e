"""The loss with its output head, forward and backward: sparse against the dense reference, time and peak memory.

Every figure is of the whole loss from hidden states and output embedding to their gradients, at the shape of
Qwen2.5-0.5B by default. Dense forms the logits of every state and id and lets autograd do the rest; sparse is what
training uses. Metrics of both are those that need no walk over the vocabulary (full_diagnostics False); "all metrics"
also has log-sum-exp, entropy and most probable token of each state, which a sparse walk gives in any case. The forward
KL has TRL's tiled ChunkedDivergenceFunction beside it, where TRL can be imported.

Each measurement is a fresh process; sides alternate, round after round; times are medians over rounds and repeats.
Memory is the peak of a step over what was held before it (CPU: resident memory; CUDA: the allocator's), less the
weight's gradient. The ratio of CPU time stands beside that of wall time because it suffers less from other processes.

PYTHONPATH=. python3 benchmarks/loss_head.py
PYTHONPATH=. python3 benchmarks/loss_head.py --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks._head_case import CASES, Inputs, Shape, has_trl, make_inputs, make_step, tail_error
from benchmarks._measure import describe_machine, memory_bytes, now, peak_memory_bytes, reset_peak_memory

TARGETS = {  # CPU, two threads: at least so many times as fast as dense
    "sets only, shift none": 15.0,
    "sets only, shift constant": 15.0,
    "sets only, shift topp_max": 15.0,
    "paper": 3.0,
    "paper, all metrics": 3.0,
    "robust, exact tail": 1.0,
    "robust, exact tail, all metrics": 1.0,
    "robust, sampled tail": 5.0,
}
MEMORY_TARGET = 15.0
KL = "forward KL"
MIB = 1 << 20
HOW_TO_GET_TRL = (
    "TRL is not importable, so its ChunkedDivergenceFunction was left out: pip install trl==1.16.0 transformers, or "
    "pip download --no-deps trl==1.16.0, unpack the wheel and give its folder with --trl-path"
)


def main() -> None:
    args = parse_arguments()
    shape = Shape(args.states, args.vocabulary, args.hidden, args.mean_set, args.dtype, args.device)
    if args.worker:
        print(json.dumps(work(args, shape)))
        return
    print(f"{describe_machine(torch.device(args.device))}; {shape}", flush=True)
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    trl_here = has_trl(args.trl_path)
    for number in range(args.rounds):
        for case in args.cases:
            for side in ("dense", "sparse", *(["trl"] if case == KL and trl_here else [])):
                found = run_worker(sys.argv[1:], "step", case, side)
                results.setdefault((case, side), []).append(found)
                print(f"round {number + 1}: {case}, {side}: {found}", file=sys.stderr, flush=True)
    print_table(results, args.cases)
    if KL in args.cases and not trl_here:
        print(HOW_TO_GET_TRL)
    if "robust, sampled tail" in args.cases:
        print_tail_error(run_worker(sys.argv[1:], "tail", "robust, sampled tail", "sparse"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=2048, help="positions")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896, help="hidden size")
    parser.add_argument("--mean-set", type=float, default=8.0, help="mean size of the heavy-tailed candidate sets")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each side")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps of a process")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--trl-path", help="folder with an unpacked TRL wheel")
    parser.add_argument("--worker", nargs=3, metavar=("WHAT", "CASE", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def run_worker(options: list[str], what: str, case: str, side: str) -> dict[str, Any]:
    """What a fresh process of this script with these options finds."""
    command = [sys.executable, str(Path(__file__)), *options, "--worker", what, case, side]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{case}, {side}: the process ended with exit code {done.returncode}; its message is above")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def work(args: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """In a process of its own: seconds, bytes and loss of a side, or the error of the sampled tail."""
    what, case, side = args.worker
    if side == "trl":
        has_trl(args.trl_path)
    device = torch.device(shape.device)
    if what == "tail":
        return tail_error(make_inputs(shape))
    small = make_inputs(replace(shape, vocab_size=1024, num_states=64))
    run_step(make_step(case, side, small), small)  # libraries start and kernels are compiled here
    del small
    inputs = make_inputs(shape)
    step = make_step(case, side, inputs)
    release_memory()
    before = memory_bytes(device)
    reset_peak_memory(device)
    loss = run_step(step, inputs)
    assert inputs.weight_VH.grad is not None
    gradient_bytes = inputs.weight_VH.grad.nbytes
    peak = peak_memory_bytes(device) - before - gradient_bytes
    seconds, cpu_seconds = [], []
    for _ in range(args.repeats):
        inputs.hidden_SH.grad = inputs.weight_VH.grad = None
        started, cpu_started = now(device), time.process_time()
        run_step(step, inputs)
        seconds.append(now(device) - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "bytes": peak, "loss": loss}


def release_memory() -> None:
    """Give freed memory back to the system, so that a step cannot hide its own in it."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def run_step(step: Any, inputs: Inputs) -> float:
    """One forward and backward pass, with the gradient of the loss as a trainer scales it."""
    loss = step()
    (loss * 0.5).backward()
    return float(loss.detach())


def print_table(results: dict[tuple[str, str], list[dict[str, Any]]], cases: list[str]) -> None:
    """One line a case: both sides, how many times faster and smaller, and what was to be reached."""
    print(f"{'':32s}|      time, s           | of CPU  |  memory, MiB            | to reach (CPU)")
    print(f"{'':32s}|  dense   sparse  ratio |  ratio  |  dense   sparse   ratio | time    memory")
    for case in cases:
        dense, sparse = summary(results[case, "dense"]), summary(results[case, "sparse"])
        if abs(dense["loss"] - sparse["loss"]) > 1e-3 * max(0.1, abs(dense["loss"])):
            raise SystemExit(f"{case}: the losses differ, dense {dense['loss']} and sparse {sparse['loss']}")
        target = f">= {TARGETS[case]:g}x   >= {MEMORY_TARGET:g}x" if case in TARGETS else ""
        faster, cheaper, smaller = (dense[key] / sparse[key] for key in ("seconds", "cpu_seconds", "mib"))
        print(
            f"{case:32s}| {dense['seconds']:6.2f} {sparse['seconds']:8.2f} {faster:5.1f}x | {cheaper:5.1f}x  "
            f"| {dense['mib']:6.0f} {sparse['mib']:8.1f} {smaller:6.1f}x | {target}"
        )
    if (KL, "trl") in results:
        trl, sparse = summary(results[KL, "trl"]), summary(results[KL, "sparse"])
        print(
            f"{KL}, TRL's ChunkedDivergenceFunction: {trl['seconds']:.2f} s, {trl['mib']:.0f} MiB; ours takes "
            f"{sparse['seconds'] / trl['seconds']:.2f} of its time and {sparse['mib'] / trl['mib']:.2f} of its memory"
        )


def summary(found: list[dict[str, Any]]) -> dict[str, float]:
    """Median time and memory of a side."""
    return {
        "seconds": median(s for one in found for s in one["seconds"]),
        "cpu_seconds": median(s for one in found for s in one["cpu_seconds"]),
        "mib": max(0.1, median(one["bytes"] for one in found) / MIB),
        "loss": found[0]["loss"],
    }


def print_tail_error(found: dict[str, Any]) -> None:
    """What sampling costs in accuracy."""
    print(f"sampled tail against the exact one, {found['draws']} draws (loss, and gradient of the hidden states):")
    for line in found["lines"]:
        print(
            f"  {line['num_samples']:6d} samples: bias of the loss {line['loss_bias']:+.2e} (standard error "
            f"{line['loss_error']:.0e}, exact {found['exact']:.4f}); gradient: one draw is off by "
            f"{line['gradient_one']:.1%}, the mean of all by {line['gradient_mean']:.1%} of its norm"
        )


if __name__ == "__main__":
    main()
