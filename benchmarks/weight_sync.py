"""Seconds of each phase of a weight update: from a student's DeepSpeed ranks to the vLLM engines that sample from it.

Weights are random. On GPUs they travel by NCCL, or with --shared, where engines are on the ranks' GPUs, by CUDA IPC; on
CPUs by gloo, and ranks and engines share the cores. Memory is the resident memory of an engine's process.

PYTHONPATH=. python3 benchmarks/weight_sync.py --shape qwen2.5-0.5b --zero-stage 3
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group

from benchmarks._measure import describe_machine
from benchmarks._models import SHAPES, new_model, num_parameters
from openrlhf_bd.config import Config
from openrlhf_bd.driver.cluster import ray_session
from openrlhf_bd.driver.engines import GPU_SHARE, engine_sync, rollout_engines
from openrlhf_bd.records import Rollout
from openrlhf_bd.rollout.calls import wait_for
from openrlhf_bd.store import StoreManifest, StoreWriter
from openrlhf_bd.student.actor import StudentRank
from openrlhf_bd.student.strategy import make_strategy
from openrlhf_bd.upstream import RayActorGroup

STOP = 1
PHASES = ("pause", "gather", "transfer", "load", "reset")
START_TIMEOUT_S = 900.0


def main() -> None:
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-0.5b" if on_cuda else "gpt2-quarter", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="bf16" if on_cuda else "fp32", choices=["bf16", "fp32"])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--zero-stage", type=int, default=2, choices=range(4))
    parser.add_argument("--updates", type=int, default=10, help="timed ones, after one that is not")
    parser.add_argument("--shared", action="store_true", help="engines on the ranks' GPUs")
    options = parser.parse_args()

    device = torch.device("cuda" if on_cuda else "cpu")
    num_gpus = options.ranks + (0 if options.shared else options.engines)
    with tempfile.TemporaryDirectory() as folder, ray_session(num_gpus=num_gpus):
        model = new_model(options.shape, seed=0, device=torch.device("cpu"))
        model.generation_config.eos_token_id = model.config.eos_token_id = STOP
        model.save_pretrained(Path(folder) / "student")
        print(describe_machine(device))
        print(
            f"{options.shape}, {num_parameters(model) / 1e6:.0f} million parameters in {options.dtype}; "
            f"{options.ranks} ranks with ZeRO-{options.zero_stage}, {options.engines} engines"
        )
        del model
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Start ranks and engines, update again and again, and print medians."""
    config = configuration(options, folder)
    with ranks_of(options) as (ranks, shared):
        start_ranks(ranks, config, folder)
        with rollout_engines(config, model=str(folder / "student"), shared=shared) as engines:
            sync = engine_sync(config, ranks, engines, shared=shared is not None)
            sync.sync(0)
            memory = resident_bytes(engines.handles[0])
            updates = [sync.sync(version) for version in range(1, options.updates + 1)]
            growth = (resident_bytes(engines.handles[0]) - memory) / options.updates
    total = statistics.median(update["sync_s"] for update in updates)
    phases = ", ".join(f"{name} {statistics.median(u[f'sync_{name}_s'] for u in updates):.3f}" for name in PHASES)
    print(f"an update takes {total:.3f} s ({phases}) for {updates[0]['sync_bytes'] / 1e6:.0f} MB")
    print(f"an engine holds {memory / 1e6:.0f} MB after the first update, {growth / 1e6:+.2f} MB with each further one")


def configuration(options: argparse.Namespace, folder: Path) -> Config:
    return Config.model_validate(
        {
            "algo": {"distill": {"name": "seqkd", "pretrain_coef": 0.0}},
            "actor": {"model_name_or_path": str(folder / "student"), "num_gpus_per_node": options.ranks},
            "vllm": {"num_engines": options.engines, "gpu_memory_utilization": 0.3},
            "data": {"max_len": 256},
            "teacher": {"max_num_seqs": 16},
            "train": {"batch_size": options.ranks},
            "ds": {"param_dtype": options.dtype, "zero_stage": options.zero_stage},
            "ckpt": {"output_dir": str(folder / "run")},
        }
    )


@contextmanager
def ranks_of(options: argparse.Namespace) -> Iterator[tuple[RayActorGroup, PlacementGroup | None]]:
    """The ranks' actors, and where engines find their GPUs if they share them."""
    if not options.shared:
        yield RayActorGroup(1, options.ranks, StudentRank), None
        return
    group = placement_group([{"GPU": 1, "CPU": 1}] * options.ranks, strategy="PACK")
    wait_for(group.ready(), timeout_s=START_TIMEOUT_S, what="room for the ranks")
    yield RayActorGroup(1, options.ranks, StudentRank, pg=group, num_gpus_per_actor=GPU_SHARE), group


def start_ranks(ranks: RayActorGroup, config: Config, folder: Path) -> None:
    """Let ranks load the student; the data, which they never read, is a row for each."""
    tokens = np.asarray([2, 3, STOP], np.int32)
    rows = [Rollout(f"p{row}:0", tokens, tokens, "stop") for row in range(config.train.batch_size)]
    with StoreWriter(folder / "store", StoreManifest(kind="teacher", num_prompts=len(rows))) as writer:
        writer.append(rows)
    started = ranks.async_init_model_from_pretrained(
        make_strategy(config),
        config,
        store_path=str(folder / "store"),
        pretrain_path=None,
        max_steps=1,
        stop_ids=[STOP],
    )
    wait_for(started, timeout_s=START_TIMEOUT_S, what="the ranks to load the student")


def resident_bytes(engine: Any) -> int:
    return int(ray.get(engine.ready.remote())["rss_bytes"])


if __name__ == "__main__":
    main()
