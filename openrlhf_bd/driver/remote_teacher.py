"""A teacher behind an OpenAI-compatible server: what is asked of it before the first actor starts, and its options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from openrlhf_bd.config import Config
from openrlhf_bd.data.limits import teacher_length
from openrlhf_bd.driver.models import stop_tokens
from openrlhf_bd.endpoint import ApiOptions, check_url, key_from_environment
from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.errors import ClusterError, ConfigError, DataError
from openrlhf_bd.teacher.api import ApiCompletion, ServedModel, TeacherApi
from openrlhf_bd.teacher.remote import RemoteOptions

# Before the job a server is there or not: no long patience.
_CHECK_TIMEOUT_S = 60.0
_CHECK_RETRIES = 2
_PROBE_TOKENS = 2000
# A nucleus of one token: it changes processed log-probabilities beyond any rounding, and raw ones not at all.
_PROBE_TOP_P = 1e-3
_PROBE_TOLERANCE = 0.1


def is_remote(config: Config) -> bool:
    """Whether a server hosts the teacher."""
    return config.teacher.api_base is not None


def check_remote_options(config: Config) -> None:
    """Refuse options that do not go with a teacher behind a server.

    Raises:
        ConfigError: the message names them.
    """
    teacher = config.teacher
    if teacher.api_base is None:
        return
    check_url(teacher.api_base, "--teacher.api_base")
    for name, value in (("model_name_or_path", teacher.model_name_or_path), ("routes", teacher.routes)):
        if value is not None:
            raise ConfigError(
                f"--teacher.{name} {value} is given beside --teacher.api_base {teacher.api_base}; expected one; "
                "leave one of them out"
            )
    if config.actor.model_name_or_path is None:
        raise ConfigError(
            "--actor.model_name_or_path is not given; a teacher behind a server needs it for its tokenizer, which is "
            "the student's, and for the tokens that end a response"
        )
    longest_s = teacher.api_timeout_s * (teacher.api_max_retries + 1)
    if longest_s > config.cluster.generate_timeout_s:
        raise ConfigError(
            f"--teacher.api_timeout_s {teacher.api_timeout_s:g} for each of 1 + --teacher.api_max_retries "
            f"{teacher.api_max_retries} tries is longer than --cluster.generate_timeout_s "
            f"{config.cluster.generate_timeout_s:g}, after which a client counts as hung; lower them, or raise it"
        )


def served_model(config: Config) -> str:
    """Name of the teacher on its server: --teacher.api_model, or what the server lists.

    Raises:
        ClusterError, ConfigError, DataError: see `TeacherApi.models`, and `_choose`.
    """
    if config.teacher.api_model is not None:
        return config.teacher.api_model
    return _choose(TeacherApi(api_options(config)).models(), config).id


def api_options(config: Config) -> ApiOptions:
    """Where the teacher's server is. The key comes from the environment of this process alone."""
    return ApiOptions(
        base_url=str(config.teacher.api_base),
        # The client wants one; a server without keys takes any.
        key=key_from_environment() or "none",
        timeout_s=config.teacher.api_timeout_s,
        max_retries=config.teacher.api_max_retries,
    )


def remote_options(config: Config, record: RecordOptions) -> RemoteOptions:
    """What a client of the server needs to know.

    Raises:
        ClusterError, ConfigError, DataError: see `TeacherApi.models`, and `_choose`.
    """
    api = api_options(config)
    model = _choose(TeacherApi(api).models(), config)
    return RemoteOptions(
        api=api,
        model=model.id,
        # A server that does not say is trusted to take one token more than the job's longest sequence.
        max_model_len=model.max_model_len or teacher_length(config) + 1,
        top_logprobs=config.teacher.api_top_logprobs,
        concurrency=config.teacher.api_concurrency,
        stop_token_ids=stop_tokens(str(config.actor.model_name_or_path), config),
        record=record,
    )


def check_server(config: Config, tokenizer: PreTrainedTokenizerBase, *, scores: bool) -> str:
    """Ask the server for everything that the job will ask for, once.

    Args:
        config: the job, with `teacher.api_base`.
        tokenizer: of the student, which must be the teacher's.
        scores: whether given responses are scored too.

    Returns:
        A line for the plan.

    Raises:
        ConfigError: the server is not there, does not have the model or refuses the key or K.
        DataError: its tokenizer is another, its model is too short, or it cannot answer with ids and log-probabilities
            at temperature 1.
    """
    timeout_s = min(_CHECK_TIMEOUT_S, config.teacher.api_timeout_s)
    api = TeacherApi(replace(api_options(config), timeout_s=timeout_s, max_retries=_CHECK_RETRIES))
    try:
        model = _choose(api.models(), config)
        _check_length(model, config, scores=scores)
        prompt = _check_tokenizer(api, model.id, config, tokenizer)
        _check_logprobs(api, model.id, prompt, config, scores=scores)
    except ClusterError as error:
        raise ConfigError(f"--teacher.api_base {config.teacher.api_base}: {error}") from None
    return (
        f"teacher: {model.id} at {config.teacher.api_base}, {config.teacher.num_engines} x "
        f"{config.teacher.api_concurrency} requests at once, candidate sets of at most "
        f"{config.teacher.api_top_logprobs} tokens"
    )


def _choose(models: Sequence[ServedModel], config: Config) -> ServedModel:
    """The teacher among the models that the server lists.

    Raises:
        ConfigError: it is not there, or there are several to choose from.
    """
    wanted, names = config.teacher.api_model, ", ".join(model.id for model in models) or "none"
    found = [model for model in models if wanted in (None, model.id)]
    if len(found) == 1:
        return found[0]
    asked = "--teacher.api_model is not given" if wanted is None else f"--teacher.api_model is {wanted!r}"
    raise ConfigError(f"{asked}, and {config.teacher.api_base} serves {names}; name one of its models")


def _check_length(model: ServedModel, config: Config, *, scores: bool) -> None:
    wanted, limit = teacher_length(config) + scores, model.max_model_len
    if limit is not None and wanted > limit:
        raise DataError(
            f"{model.id} at {config.teacher.api_base}: takes {limit} tokens, expected at least {wanted} "
            f"(--teacher.max_len or --data.max_len{', and one more to score responses' if scores else ''}); start the "
            "server with a larger --max-model-len, or lower them"
        )


def _check_tokenizer(api: TeacherApi, model: str, config: Config, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Compare how server and student turn a text with tokens from all over the vocabulary into ids.

    Returns:
        The first of these ids, as a prompt for further questions.
    """
    num_tokens = len(tokenizer)
    spread = range(0, num_tokens, max(1, num_tokens // _PROBE_TOKENS))
    text = " ".join(["The answer is 42.", *(str(tokenizer.decode([token])) for token in spread)])
    expected = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    found = api.tokenize(text, model=model)
    if found != expected:
        place = _first_difference(found, expected)
        raise DataError(
            f"the tokenizers of teacher {model} at {config.teacher.api_base} and student "
            f"{config.actor.model_name_or_path} differ: at token {place} of a text, {found[place : place + 3]} and "
            f"{expected[place : place + 3]}. Expected the same tokenizer; choose models of one family"
        )
    return expected[:8]


def _check_logprobs(api: TeacherApi, model: str, prompt: Sequence[int], config: Config, *, scores: bool) -> None:
    """Sample a token with K log-probabilities, once plainly and once from a nucleus that must not change them."""

    def ask(top_p: float, prompt_logprobs: int | None = None) -> ApiCompletion:
        return api.complete(
            prompt,
            model=model,
            what=f"--teacher.api_top_logprobs {config.teacher.api_top_logprobs}",
            max_tokens=1,
            temperature=1.0,
            top_p=top_p,
            top_logprobs=config.teacher.api_top_logprobs,
            stop_token_ids=stop_tokens(str(config.actor.model_name_or_path), config),
            seed=0,
            prompt_logprobs=prompt_logprobs,
        )

    try:
        plain, narrow = ask(1.0, 0 if scores else None), ask(_PROBE_TOP_P)
    except DataError as error:
        raise ConfigError(str(error)) from None
    num_found = len(plain.top_T[0])
    if num_found < config.teacher.api_top_logprobs:
        raise ConfigError(
            f"--teacher.api_top_logprobs {config.teacher.api_top_logprobs}: {config.teacher.api_base} answers with "
            f"{num_found} log-probabilities; lower it to that"
        )
    shared = plain.top_T[0].keys() & narrow.top_T[0].keys()
    difference = max((abs(plain.top_T[0][token] - narrow.top_T[0][token]) for token in shared), default=math.inf)
    if difference > _PROBE_TOLERANCE:
        raise DataError(
            f"{model} at {config.teacher.api_base}: log-probabilities change by {difference:.3g} nats with the "
            "sampler's nucleus, expected those of the raw logits at temperature 1; start the server with "
            "--logprobs-mode raw_logprobs"
        )


def _first_difference(first: Sequence[int], second: Sequence[int]) -> int:
    """Place of the first id that differs; the length of the shorter where it begins the longer."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))
