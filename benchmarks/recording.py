"""What recording candidate sets costs while a teacher generates, beside vLLM's own log-probabilities.

plain           generation without any hook of ours
recorded        generation as a job runs it: the sets and the sampled tokens' log-probabilities are recorded in the
                worker, fetched, and made into rows
logprobs=K      vLLM returns the K most likely tokens of each position with their log-probabilities: no sets of mass p
                where they need more than K tokens. With detokenize=False (the engine has no tokenizer) and
                flat_logprobs=True, which is never slower

All sides share one engine, so its weights, cache and max_num_seqs, and the prompts and seeds; each row draws the same
number of tokens. They take turns, over and over, and the figures are medians. The teacher has Qwen2.5's shape and
random weights, with the final norm's gain on few coordinates: so the spread of the logits, and with it the size of
the sets, differs from position to position, with the mean and about the tail that sets of real teachers have.

PYTHONPATH=. python3 benchmarks/recording.py
"""

# S states, V vocabulary, H hidden size, W coordinates with a gain

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openrlhf_bd.engines.arguments import RecordOptions, default_device, engine_arguments, engine_environment
from openrlhf_bd.functional.candidates import top_p_candidates
from openrlhf_bd.records import Rollout
from openrlhf_bd.teacher.requests import RolloutRequest

VOCABULARY = 151_936
HIDDEN, FEED_FORWARD, HEADS, KV_HEADS = 896, 4864, 14, 2  # Qwen2.5-0.5B
INITIAL_STD = 0.02
WIDE_COORDINATES = 4
MEAN_SIZE, MEAN_SIZE_P = 2.4, 0.8
TOP_KS = (20, 64, 256)


@dataclass
class Side:
    """One line of the table.

    Attributes:
        name: of the line.
        run: generates once; gives the response tokens of each row.
        seconds: wall clock of each repeat.
        cpu_seconds: processor time of each repeat, of all threads.
    """

    name: str
    run: Callable[[], list[Sequence[int]]]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


def save_teacher(folder: Path, *, num_layers: int, device: str) -> None:
    """A model of random weights whose p = 0.8 sets have MEAN_SIZE tokens on average."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
        initializer_range=INITIAL_STD,
        eos_token_id=None,
        bos_token_id=None,
    )
    model: Any = Qwen2ForCausalLM(config)
    gain_H = torch.zeros(HIDDEN)
    gain_H[:WIDE_COORDINATES] = logit_gain(model.get_input_embeddings().weight[:, :WIDE_COORDINATES])
    model.model.norm.weight.data.copy_(gain_H)
    model.generation_config = GenerationConfig()
    model.to(torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(folder)


@torch.no_grad()
def logit_gain(weight_VW: Tensor) -> float:
    """Gain at which sets of p = MEAN_SIZE_P have MEAN_SIZE tokens on average, for normal hidden states."""
    hidden_SW = torch.randn(256, weight_VW.shape[1], generator=torch.Generator().manual_seed(1))
    logits_SV = hidden_SW @ weight_VW.T
    low, high = 1 / INITIAL_STD, 100 / INITIAL_STD
    for _ in range(12):
        gain = (low * high) ** 0.5
        sizes_S = top_p_candidates(gain * logits_SV, top_p=MEAN_SIZE_P).sizes_S
        low, high = (gain, high) if float(sizes_S.float().mean()) > MEAN_SIZE else (low, gain)
    return gain


def hooks_of(worker: Any) -> list[tuple[Any, str, Any]]:
    """What the recorder replaces in a step of a worker: object, attribute and its value."""
    runner = worker.model_runner
    if worker.use_v2_model_runner:
        places = [(runner, "sampler"), (runner.prompt_logprobs_worker, "compute_prompt_logprobs")]
    else:
        places = [(runner, "sampler"), (runner, "_get_prompt_logprobs_dict")]
    return [(place, name, getattr(place, name)) for place, name in places]


class Engine:
    """A teacher whose hooks come and go."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from openrlhf_bd.engines.actor import GenerationEngine
        from openrlhf_bd.teacher.engine import TeacherEngine

        class LateTeacher(TeacherEngine):
            def _build(self) -> Any:
                return GenerationEngine._build(self)

        self.teacher = LateTeacher(arguments)
        found: list[Any] = []
        self.teacher.llm.collective_rpc(found.append)
        self.worker = found[0]
        self.plain_hooks = hooks_of(self.worker)
        self.teacher._rpc("start_recording", arguments["record"])
        self.recording_hooks = hooks_of(self.worker)

    def record(self, options: RecordOptions | None) -> None:
        """Record this from now on; None: vLLM as it was."""
        for place, name, value in self.plain_hooks if options is None else self.recording_hooks:
            setattr(place, name, value)
        if options is not None:
            self.worker.state_recorder.options = options


def sides_of(engine: Engine, requests: list[RolloutRequest], sizes: dict[float, np.ndarray]) -> list[Side]:
    """Plain generation, recordings and vLLM's log-probabilities. `sizes` gets the sizes of recorded sets by p."""
    prompts = [request.prompt_ids for request in requests]

    def plain(num_logprobs: int | None) -> list[Sequence[int]]:
        params = [
            engine.teacher._sampling_params(
                temperature=1.0,
                # As many as the recording side, which samples once more for the set behind a cut response.
                max_tokens=request.max_new_tokens + 1,
                seed=request.seed,
                logprobs=num_logprobs,
                flat_logprobs=num_logprobs is not None,
            )
            for request in requests
        ]
        engine.record(None)
        sampled = engine.teacher._run(prompts, params)
        return [row.output.outputs[0].token_ids[:-1] for row in sampled]

    def recorded(top_p: float, *, logprobs: bool) -> list[Sequence[int]]:
        engine.record(RecordOptions(top_p, (), logprobs=logprobs))
        rows: list[Rollout] = engine.teacher.generate_rollouts(requests, temperature=1.0, top_p=1.0)
        sizes[top_p] = np.concatenate([row.sets.sizes_S for row in rows if row.sets is not None])
        return [row.response_ids.tolist() for row in rows]

    return [
        Side("plain", lambda: plain(None)),
        Side("recorded, p = 0.8, ids", lambda: recorded(0.8, logprobs=False)),
        Side("recorded, p = 0.95, log-probabilities", lambda: recorded(0.95, logprobs=True)),
        *(Side(f"logprobs={k}", lambda k=k: plain(k)) for k in TOP_KS),
    ]


def measure(sides: list[Side], repeats: int, *, seeded: bool) -> None:
    """Time the sides in turn; a first round warms up, and tells where seeded rows get other tokens."""
    expected: list[list[int]] = []
    for repeat in range(repeats + 1):
        for side in sides:
            start, cpu_start = time.perf_counter(), time.process_time()
            tokens = [list(row) for row in side.run()]
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            expected = expected or tokens
            if repeat:
                side.seconds.append(seconds)
                side.cpu_seconds.append(cpu_seconds)
            elif seeded and tokens != expected:
                same = sum(row == other for row, other in zip(tokens, expected, strict=True))
                print(f"{side.name}: {same} of {len(tokens)} rows have the tokens of plain generation")


def print_table(sides: list[Side], num_tokens: int) -> None:
    """Medians, and medians of the ratios to plain generation of the same round."""
    plain = sides[0]
    print(f"{'':38} {'tokens/s':>9} {'cost':>8} {'of processor time':>18}")
    for side in sides:
        cost, cpu_cost = (
            median(own / other for own, other in zip(own_s, plain_s, strict=True)) - 1
            for own_s, plain_s in ((side.seconds, plain.seconds), (side.cpu_seconds, plain.cpu_seconds))
        )
        print(f"{side.name:38} {num_tokens / median(side.seconds):9,.1f} {cost:8.1%} {cpu_cost:18.1%}", flush=True)


def print_sizes(sizes: dict[float, np.ndarray]) -> None:
    """How large the sets were, and how many of them a fixed K cuts."""
    for top_p, sizes_S in sorted(sizes.items()):
        cut = ", ".join(f"{np.mean(sizes_S > k):.1%} beyond {k}" for k in TOP_KS)
        print(f"p = {top_p}: mean {sizes_S.mean():.2f}, largest {sizes_S.max():,}; {cut}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="of the teacher; fewer make plain generation cheaper")
    parser.add_argument("--rows", type=int, default=32, help="rows, all decoded at once")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens of a row")
    parser.add_argument("--tokens", type=int, default=24, help="response tokens of a row")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--unseeded", action="store_true", help="no seed of its own for each row, as jobs have")
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    options, device = parse_arguments(), default_device()
    torch.set_num_threads(options.threads)
    random = np.random.default_rng(0)
    requests = [
        RolloutRequest(
            f"{number}:0",
            random.integers(0, VOCABULARY, options.prompt).astype(np.int32),
            None if options.unseeded else number,
            options.tokens,
        )
        for number in range(options.rows)
    ]
    with tempfile.TemporaryDirectory(prefix="recording_") as folder:
        # An outer setting would let vLLM's own threads differ from ours.
        os.environ |= engine_environment(folder, num_threads=options.threads)
        save_teacher(Path(folder), num_layers=options.layers, device=device)
        arguments = engine_arguments(
            folder,
            max_model_len=options.prompt + options.tokens,
            max_num_seqs=options.rows,
            seed=0,
            enable_prefix_caching=False,
            record=RecordOptions(0.8, ()),
        )
        arguments["llm"]["max_logprobs"] = max(TOP_KS)
        engine = Engine(arguments)
        sizes: dict[float, np.ndarray] = {}
        sides = sides_of(engine, requests, sizes)
        measure(sides, options.repeats, seeded=not options.unseeded)
        print(f"{options.rows} rows of {options.tokens} tokens, {options.layers} layers, {options.threads} threads")
        print_table(sides, options.rows * options.tokens)
        print_sizes(sizes)
        engine.teacher.shutdown()


if __name__ == "__main__":
    main()
