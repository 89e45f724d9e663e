"""An OpenAI-compatible server: where it is, its key, and what it refuses as our errors.

The official client does the talking: it tries again, with growing pauses that vary at random, where the server does not
answer, is overloaded (408, 409, 429) or fails (5xx), and waits as long as a Retry-After of up to two minutes says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError
from pydantic import ValidationError

from openrlhf_bd.errors import BDError, ClusterError, ConfigError, DataError

KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True, slots=True)
class ApiOptions:
    """Where the server is, and how long to try.

    Attributes:
        base_url: with the path of the API, http://HOST:PORT/v1.
        key: sent as bearer token; in no message and no representation.
        timeout_s: longest wait for one answer.
        max_retries: further tries of one request.
        direct: past any proxy that the environment names.
    """

    base_url: str
    key: str = field(repr=False)
    timeout_s: float
    max_retries: int
    direct: bool = False


@dataclass(frozen=True, slots=True)
class Advice:
    """What messages tell the user of a server.

    Attributes:
        url_flag: option that names the server.
        concurrency_flag: option that says how many requests are on the way at once.
        limits: what to do about a request that the server refuses.
        kept: what an interruption leaves as it is.
    """

    url_flag: str
    concurrency_flag: str
    limits: str
    kept: str


def check_url(url: str, flag: str) -> None:
    """Refuse what is no plain URL of a server.

    Raises:
        ConfigError: the message names the option, and repeats nothing that may be a password.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
        raise ConfigError(
            f"{flag}: found no URL of the form http://HOST:PORT/v1; expected one without user, password or "
            f"query. A key belongs into the environment variable {KEY_VARIABLE}"
        )


def key_from_environment() -> str | None:
    """The server's key; None where the variable is not set, or empty."""
    return os.environ.get(KEY_VARIABLE) or None


@contextmanager
def explained(what: str, options: ApiOptions, advice: Advice) -> Iterator[None]:
    """The client's errors, in the block, as ours.

    Args:
        what: name of the request in messages.
        options: the server.
        advice: what messages tell.

    Raises:
        ClusterError: the server does not answer, whatever was tried.
        ConfigError: it refuses the key.
        DataError: it refuses the request, or answers otherwise than an OpenAI-compatible server.
    """
    try:
        yield
    except APIConnectionError as error:
        # The cause says more: refused, reset, name not known, too late.
        cause = str(error.__cause__ or error) or type(error.__cause__ or error).__name__
        raise ClusterError(
            f"{what}: no answer from {options.base_url} in {options.max_retries + 1} tries ({cause}). Start the "
            f"server, or name it in {advice.url_flag}, then run the same command again; {advice.kept}"
        ) from None
    except APIStatusError as error:
        raise _refusal(what, error.status_code, str(error.message), options, advice) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "its body"
        raise DataError(
            f"{what}: {options.base_url} answered otherwise than an OpenAI-compatible server: {place}: "
            f"{first['msg']}. Name the server's API in {advice.url_flag}, usually http://HOST:PORT/v1"
        ) from None


def _refusal(what: str, status: int, message: str, options: ApiOptions, advice: Advice) -> BDError:
    found = f"{what}: {options.base_url} answered with status {status} ({message})"
    if status in (401, 403):
        return ConfigError(f"{found}; put the server's key into the environment variable {KEY_VARIABLE}")
    if status in (408, 409, 429) or status >= 500:
        return ClusterError(
            f"{found} in {options.max_retries + 1} tries. See the server's log, lower {advice.concurrency_flag} if it "
            f"is overloaded, then run the same command again; {advice.kept}"
        )
    return DataError(f"{found}; {advice.limits}")
