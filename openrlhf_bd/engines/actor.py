"""A vLLM engine that samples responses, as a plain class: an actor hosts it, or any process."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.engines.arguments import arguments_for_model, engine_environment, stop_token_ids
from openrlhf_bd.errors import DataError
from openrlhf_bd.records import FinishReason

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

TokenIds = Sequence[int] | NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled response.

    Attributes:
        token_ids: response tokens, the stop token included where it was produced.
        finish_reason: "stop" if the last token is a stop token, "length" if the response was cut.
    """

    token_ids: NDArray[np.int32]
    finish_reason: FinishReason


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
        self._start()

    def ready(self) -> dict[str, Any]:
        """What runs here: model, versions, start time (seconds), resident memory (bytes). Answers once it can work."""
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
        }

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
        outputs = self._run(prompts, params)
        return [self._completion(output.outputs[0].token_ids) for output in outputs]

    def shutdown(self) -> None:
        """Give back the engine's memory. `load` starts it again."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()

    def _start(self) -> None:
        started = time.monotonic()
        from vllm import LLM

        llm_arguments = self.arguments["llm"]
        self.stop_token_ids = stop_token_ids(
            llm_arguments["model"], trust_remote_code=llm_arguments["trust_remote_code"]
        )
        self.llm: LLM = LLM(**llm_arguments)
        self.start_s = time.monotonic() - started

    def _sampling_params(self, **options: Any) -> SamplingParams:
        from vllm import SamplingParams

        return SamplingParams(n=1, detokenize=False, stop_token_ids=list(self.stop_token_ids), **options)

    def _run(self, prompts: Sequence[TokenIds], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        from vllm import TokensPrompt

        limit = self.arguments["llm"]["max_model_len"]
        for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
            num_prompt, num_new = len(prompt), param.max_tokens or 0
            if not num_prompt or not num_new or num_prompt + num_new > limit:
                raise DataError(
                    f"request {index}: found {num_prompt} prompt tokens and {num_new} to sample, expected at least one "
                    f"of each and at most {limit} in all (max_model_len of the engine)"
                )
        requests = [TokensPrompt(prompt_token_ids=[int(token) for token in prompt]) for prompt in prompts]
        return self.llm.generate(requests, list(params), use_tqdm=False)

    def _completion(self, token_ids: Sequence[int]) -> Completion:
        stopped = token_ids[-1] in self.stop_token_ids
        return Completion(np.asarray(token_ids, dtype=np.int32), "stop" if stopped else "length")
