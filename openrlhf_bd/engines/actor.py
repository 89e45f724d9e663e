"""A vLLM engine that samples responses, as a plain class: an actor hosts it, or any process.

Shapes: T response tokens, R requests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.engines.arguments import arguments_for_model, engine_environment, stop_token_ids
from openrlhf_bd.engines.loop import Progress, Request, Sampled, StepLoop
from openrlhf_bd.errors import DataError
from openrlhf_bd.records import Activity, FinishReason, Span

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

TokenIds = Sequence[int] | NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled response.

    Attributes:
        token_ids: response tokens, the stop token included where it was produced.
        finish_reason: "stop" if the last token is a stop token, "length" if the response was cut.
        logprobs_T: log-probability of each token under the distribution that it was sampled from (temperature and
            nucleus of the sampler included), nats; None where the engine does not record it.
        first_version: policy version under which sampling began; None where the weights have no version.
        last_version: newest policy version that any of its tokens came from.
    """

    token_ids: NDArray[np.int32]
    finish_reason: FinishReason
    logprobs_T: NDArray[np.float32] | None = None
    first_version: int | None = None
    last_version: int | None = None


class GenerationEngine:
    """One engine with one model at a time.

    Args:
        arguments: of `engine_arguments`.

    Raises:
        OSError: the model cannot be read.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        # In an actor these are set already, by its runtime environment.
        for name, value in engine_environment(arguments["llm"]["model"]).items():
            os.environ.setdefault(name, value)
        self.arguments = dict(arguments)
        self._loop = StepLoop()
        self._start()

    def ready(self) -> dict[str, Any]:
        """What runs here: model, versions, start time, memory and cache (seconds, bytes). Answers once it can work.

        "kv_cache_bytes" is None on a GPU, where vLLM sizes the cache by itself.
        """
        import psutil
        import torch
        import transformers
        import vllm

        return {
            "model": self.arguments["llm"]["model"],
            "max_model_len": self.arguments["llm"]["max_model_len"],
            "stop_token_ids": list(self.stop_token_ids),
            "versions": {
                "vllm": vllm.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "start_s": self.start_s,
            "rss_bytes": psutil.Process().memory_info().rss,
            "kv_cache_bytes": self.arguments["llm"].get("kv_cache_memory_bytes"),
        }

    def progress(self) -> Progress:
        """A sign of life, at once, also while the engine generates."""
        return self._loop.progress()

    def take_spans(self, *, everything: bool = False) -> tuple[float, list[Span]]:
        """What the engine did since the last call, and its clock; see `SpanLog.take`."""
        return self._loop.spans.take(everything=everything)

    def load(self, model_path: str) -> None:
        """Switch to another model of any architecture that vLLM runs.

        The engine is built anew in this process. Imports and compiled code stay, so it costs little more than
        reading the weights; loading weights into the running model would leave a tied output embedding stale on CPU.

        Raises:
            OSError: the model's configuration cannot be read; the engine keeps its model.
        """
        arguments = arguments_for_model(self.arguments, model_path)
        self.shutdown()
        self.arguments = arguments
        self._start()

    def generate(
        self,
        prompts: Sequence[TokenIds],
        *,
        max_new_tokens: Sequence[int],
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
    ) -> list[Completion]:
        """Sample one response to each prompt.

        Args:
            prompts: R prompts, token ids.
            max_new_tokens: longest response of each.
            temperature: of the sampler; 0 is greedy.
            top_p: nucleus of the sampler.
            seeds: seed of each request's sampler.

        Returns:
            R completions, in the order of the prompts.

        Raises:
            DataError: a prompt is empty, or leaves less room than its max_new_tokens.
        """
        params = [
            self._sampling_params(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
            for max_tokens, seed in zip(max_new_tokens, seeds, strict=True)
        ]
        return [self._completion(sampled.output.outputs[0].token_ids) for sampled in self._run(prompts, params)]

    def shutdown(self) -> None:
        """Give back the engine's memory. `load` starts it again."""
        del self.llm
        self._loop.stop(_close)

    def _start(self) -> None:
        started = time.monotonic()
        llm_arguments = self.arguments["llm"]
        self.stop_token_ids = stop_token_ids(
            llm_arguments["model"], trust_remote_code=llm_arguments["trust_remote_code"]
        )
        self.llm: LLM = self._loop.start(self._build)
        self.start_s = time.monotonic() - started

    def _build(self) -> LLM:
        """vLLM itself; on its own thread."""
        from vllm import LLM

        return LLM(**self.arguments["llm"])

    def _rpc(self, method: str, *arguments: Any) -> list[Any]:
        """What a method of the workers answers, between two steps."""
        with self._naming_lost_workers():
            return self._loop.call(lambda: self.llm.collective_rpc(method, args=arguments))

    def _sampling_params(self, **options: Any) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=1,
            detokenize=False,
            stop_token_ids=list(self.stop_token_ids),
            output_kind=RequestOutputKind.FINAL_ONLY,
            **options,
        )

    def _run(
        self, prompts: Sequence[TokenIds], params: Sequence[SamplingParams], activity: Activity = "generate"
    ) -> list[Sampled]:
        limit = self.arguments["llm"]["max_model_len"]
        for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
            num_prompt, num_new = len(prompt), param.max_tokens or 0
            if not num_prompt or not num_new or num_prompt + num_new > limit:
                raise DataError(
                    f"request {index}: found {num_prompt} prompt tokens and {num_new} to sample, expected at least one "
                    f"of each and at most {limit} in all (max_model_len of the engine)"
                )
        requests = [
            Request([int(token) for token in prompt], param) for prompt, param in zip(prompts, params, strict=True)
        ]
        with self._naming_lost_workers():
            return self._loop.run(requests, activity)

    @contextmanager
    def _naming_lost_workers(self) -> Iterator[None]:
        """Say so where a process of a parallel engine died; of what it worked on vLLM only says "cancelled"."""
        try:
            yield
        except RuntimeError as error:
            is_parallel = self.arguments["llm"]["tensor_parallel_size"] > 1
            # After a shutdown there is none.
            llm: Any = vars(self).get("llm")
            if is_parallel and llm is not None and llm.llm_engine.engine_core.engine_core.model_executor.is_failed:
                raise RuntimeError("a worker process of the engine died") from error
            raise

    def _completion(self, token_ids: Sequence[int]) -> Completion:
        stopped = token_ids[-1] in self.stop_token_ids
        return Completion(np.asarray(token_ids, dtype=np.int32), "stop" if stopped else "length")


def _close(llm: LLM) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
