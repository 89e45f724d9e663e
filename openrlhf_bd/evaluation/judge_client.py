"""The judge behind its server: one question, one answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import httpx
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, NotFoundError
from pydantic import BaseModel, Field

from openrlhf_bd.config import JudgeOptions
from openrlhf_bd.endpoint import KEY_VARIABLE, Advice, ApiOptions, check_url, explained, key_from_environment
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.evaluation.judge_prompt import VERDICTS

# Room for "Tie" in any tokenizer and some decoration, and none for a sentence.
_ANSWER_TOKENS = 8
_ADVICE = Advice(
    url_flag="--api_base",
    concurrency_flag="--concurrency",
    limits="the judge must take the whole question and this request's options (a longer context; no --constrained)",
    kept="verdicts are kept and not asked for again",
)


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message


class _Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a judge said.

    Attributes:
        text: as it came.
        usage: prompt and answer tokens; None where the server does not count them.
    """

    text: str
    usage: tuple[int, int] | None


class JudgeClient:
    """One judge. Use it as an asynchronous context, which closes its connections.

    Args:
        options: which judge.
        api: where it is.
    """

    def __init__(self, options: JudgeOptions, api: ApiOptions) -> None:
        self._api = api
        self._model, self._constrained = options.model, options.constrained
        self._client = AsyncOpenAI(
            base_url=self._api.base_url,
            api_key=self._api.key,
            timeout=self._api.timeout_s,
            max_retries=self._api.max_retries,
            http_client=DefaultAsyncHttpxClient(trust_env=not api.direct),
        )

    async def __aenter__(self) -> JudgeClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(self, messages: Sequence[dict[str, str]], *, what: str) -> Answer:
        """The judge's answer to a conversation, at temperature 0.

        Args:
            messages: role and content of each.
            what: name of the question in messages.

        Raises:
            ClusterError, ConfigError, DataError: see `endpoint.explained`; ConfigError too for a model or path that
                the server does not have.
        """
        body: dict[str, Any] = {
            "model": self._model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": _ANSWER_TOKENS,
        }
        if self._constrained:
            body["structured_outputs"] = {"choice": list(VERDICTS)}
        with explained(what, self._api, _ADVICE):
            try:
                answer = await self._client.post("/chat/completions", cast_to=httpx.Response, body=body)
            except NotFoundError as error:
                raise ConfigError(
                    f"{self._api.base_url} answered with status 404 ({error.message}); expected a model "
                    f"{self._model!r} there. Name one that it serves in --model, and its API in --api_base, usually http://HOST:PORT/v1"
                ) from None
            found = _Completion.model_validate_json(answer.content)
        usage = (found.usage.prompt_tokens, found.usage.completion_tokens) if found.usage else None
        return Answer(found.choices[0].message.content or "", usage)


def api_options(options: JudgeOptions) -> ApiOptions:
    """Where the judge's server is. The key comes from the environment of this process alone.

    Raises:
        ConfigError: the URL is none, or OpenAI's own server is to be asked without a key.
    """
    check_url(options.api_base, "--api_base")
    key = key_from_environment()
    if key is None and httpx.URL(options.api_base).host.endswith("openai.com"):
        raise ConfigError(
            f"{options.api_base} wants a key, and the environment variable {KEY_VARIABLE} is not set; put one there, "
            "or name another server in --api_base"
        )
    # The client wants one; a server without keys takes any.
    return ApiOptions(options.api_base, key or "none", options.timeout_s, options.max_retries)
