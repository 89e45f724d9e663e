"""Client of an OpenAI-compatible server: completions of token ids, with token ids and log-probabilities in the answer.

What an answer must have is checked here; how often it is asked for, and what becomes of refusals, is `endpoint`'s.
"""

# P prompt tokens, T sampled tokens, K tokens reported of a state

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from openai import OpenAI
from pydantic import BaseModel

from openrlhf_bd.endpoint import Advice, ApiOptions, explained
from openrlhf_bd.errors import DataError
from openrlhf_bd.teacher.top_logprobs import TopLogprobs

# How vLLM writes a token as its id (`return_tokens_as_token_ids`).
_ID_PREFIX = "token_id:"
# Options that a server would take from the model's generation_config.json where a request has none.
_PLAIN_SAMPLING = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
# What a sum of float32 probabilities may lie above 1.
_MASS_SLACK = 1e-3


_ADVICE = Advice(
    url_flag="--teacher.api_base",
    concurrency_flag="--teacher.api_concurrency",
    limits="the server's limits decide (vLLM: --max-logprobs, --max-model-len)",
    kept="committed rows are safe",
)


class ServedModel(BaseModel):
    """A model that a server lists. `max_model_len` is the longest prompt and response together, if it says so."""

    id: str
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True)
class ApiCompletion:
    """One sampled response.

    Attributes:
        token_ids: T sampled tokens, a stop token included.
        top_T: of each its state's K likeliest tokens, and itself: id -> log-probability, nats.
        prompt_top: of each prompt token but the first the same; empty where it was not asked for.
        stopped: the server ended the response by a stop token, not by its length.
    """

    token_ids: list[int]
    top_T: Sequence[TopLogprobs]
    prompt_top: Sequence[TopLogprobs]
    stopped: bool


class _Models(BaseModel):
    data: list[ServedModel]


class _Tokens(BaseModel):
    tokens: list[int]


class _PromptLogprob(BaseModel):
    logprob: float


class _Logprobs(BaseModel):
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class _Choice(BaseModel):
    finish_reason: str | None
    logprobs: _Logprobs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[int, _PromptLogprob] | None] | None = None


class _Usage(BaseModel):
    prompt_tokens: int


class _Completion(BaseModel):
    choices: list[_Choice]
    usage: _Usage


class TeacherApi:
    """One server. Its methods may be called from several threads at once.

    Args:
        options: where it is.
    """

    def __init__(self, options: ApiOptions) -> None:
        self._options = options
        self._client = OpenAI(
            base_url=options.base_url,
            api_key=options.key,
            timeout=options.timeout_s,
            max_retries=options.max_retries,
        )

    def models(self) -> list[ServedModel]:
        """The models that the server lists.

        Raises:
            ClusterError: it does not answer.
            ConfigError: it refuses the key.
            DataError: it answers otherwise than an OpenAI-compatible server.
        """
        with self._explained("its list of models"):
            return _Models.model_validate_json(self._client.get("/models", cast_to=httpx.Response).content).data

    def tokenize(self, text: str, *, model: str) -> list[int]:
        """Ids of a text by the server's tokenizer, without special tokens around it.

        Raises:
            ClusterError, ConfigError: see `models`.
            DataError: the server has no /tokenize beside /v1, as vLLM and others do.
        """
        # Beside the API, not in it.
        url = self._options.base_url.rstrip("/").removesuffix("/v1") + "/tokenize"
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        with self._explained("/tokenize"):
            return _Tokens.model_validate_json(self._client.post(url, cast_to=httpx.Response, body=body).content).tokens

    def complete(
        self,
        prompt_ids: Sequence[int] | NDArray[np.int32],
        *,
        model: str,
        what: str,
        max_tokens: int,
        temperature: float,
        top_p: float,
        top_logprobs: int,
        stop_token_ids: Sequence[int],
        seed: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> ApiCompletion:
        """Sample one response.

        Args:
            prompt_ids: P tokens.
            model: name of the served model.
            what: name of the request in messages.
            max_tokens: longest response.
            temperature: of the sampler.
            top_p: nucleus of the sampler.
            top_logprobs: K.
            stop_token_ids: ids that end a response.
            seed: of the sampler.
            prompt_logprobs: K for the prompt's own tokens; None: they are not asked for.

        Raises:
            ClusterError, ConfigError: see `models`.
            DataError: the server refuses the request, or its answer lacks ids or log-probabilities.
        """
        body: dict[str, Any] = {
            **_PLAIN_SAMPLING,
            "model": model,
            "prompt": [int(token) for token in prompt_ids],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "logprobs": top_logprobs,
            "stop_token_ids": list(stop_token_ids),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if seed is not None:
            body["seed"] = seed
        if prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs
        with self._explained(what):
            answer = self._client.post("/completions", cast_to=httpx.Response, body=body)
            found = _Completion.model_validate_json(answer.content)
        try:
            return _completion(found, body["prompt"], with_prompt=prompt_logprobs is not None)
        except ValueError as error:
            raise DataError(
                f"{what}: the server at {self._options.base_url} answered with {error}. Take a server that speaks "
                "token ids as vLLM's does (return_token_ids, return_tokens_as_token_ids, logprobs, prompt_logprobs)"
            ) from None

    def _explained(self, what: str) -> AbstractContextManager[None]:
        return explained(what, self._options, _ADVICE)


def _completion(found: _Completion, prompt: Sequence[int], *, with_prompt: bool) -> ApiCompletion:
    """The answer's only choice.

    Raises:
        ValueError: it lacks something, or contradicts itself; the message says what was found, and what is expected.
    """
    if len(found.choices) != 1:
        raise ValueError(f"{len(found.choices)} responses, expected 1")
    choice = found.choices[0]
    if found.usage.prompt_tokens != len(prompt) or choice.prompt_token_ids not in (None, list(prompt)):
        raise ValueError(
            f"another prompt, of {found.usage.prompt_tokens} tokens, than the {len(prompt)} that were sent"
        )
    if choice.finish_reason not in ("stop", "length"):
        raise ValueError(f"finish_reason {choice.finish_reason!r}, expected stop or length")
    if choice.logprobs is None or not choice.logprobs.tokens:
        raise ValueError("no log-probabilities of the sampled tokens")
    token_ids = [_token_id(token) for token in choice.logprobs.tokens]
    if choice.token_ids not in (None, token_ids):
        raise ValueError(f"{len(choice.token_ids or [])} token ids, and log-probabilities of {len(token_ids)} others")
    top_T = [
        {_token_id(token): logprob for token, logprob in (top or {}).items()} for top in choice.logprobs.top_logprobs
    ]
    _check_states(token_ids, top_T)
    prompt_top: Sequence[TopLogprobs] = ()
    if with_prompt:
        listed = choice.prompt_logprobs or []
        prompt_top = [{token: item.logprob for token, item in (top or {}).items()} for top in listed[1:]]
        _check_states(list(prompt[1:]), prompt_top)
    return ApiCompletion(token_ids, top_T, prompt_top, stopped=choice.finish_reason == "stop")


def _token_id(token: str) -> int:
    number = token.removeprefix(_ID_PREFIX)
    if number == token or not number.isdecimal():
        raise ValueError(f"the text {token!r} for a token, expected its id")
    return int(number)


def _check_states(taken: Sequence[int], tops: Sequence[Mapping[int, float]]) -> None:
    if len(taken) != len(tops):
        raise ValueError(f"log-probabilities at {len(tops)} of {len(taken)} tokens")
    for place, (token, top) in enumerate(zip(taken, tops, strict=True)):
        if token not in top:
            raise ValueError(f"no log-probability of token {place} itself")
        mass = float(np.exp(list(top.values())).sum())
        if not mass <= 1 + _MASS_SLACK:
            raise ValueError(
                f"probabilities of token {place} that sum to {mass:.4g}, expected at most 1: these are no "
                "log-probabilities (vLLM's --logprobs-mode must be raw_logprobs)"
            )
