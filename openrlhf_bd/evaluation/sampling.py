"""Responses to many prompts from several engines: requests in batches, and on each engine the next one waiting."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from openrlhf_bd.errors import ClusterError, DataError
from openrlhf_bd.records import Prompt, Rollout
from openrlhf_bd.rollout.calls import wait_for

if TYPE_CHECKING:
    from openrlhf_bd.engines.actor import Completion

# Large enough to fill an engine, small enough that engines finish at about the same time and progress is seen.
BATCH_SIZE = 256
# Batches of responses that an engine has at once: it takes from the next where responses of the first have ended, so
# that it decodes as many as it can until few are left at all.
BATCHES_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class Request:
    """One response to sample.

    Attributes:
        prompt_ids: prompt tokens.
        max_new_tokens: longest response.
        seed: of this request's sampler.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    seed: int


def request_seed(seed: int, prompt_id: str) -> int:
    """Sampler seed of one request, in [0, 2^31): the same for a prompt whatever batch, order or engine it comes in."""
    digest = hashlib.blake2b(f"{seed}:{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 33


def make_requests(prompts: Sequence[Prompt], *, seed: int, max_new_tokens: int | None, max_len: int) -> list[Request]:
    """One request a prompt; a response may be as long as both limits allow.

    Args:
        prompts: P prompts.
        seed: sampling seed of the set.
        max_new_tokens: longest response, tokens; None: what max_len leaves.
        max_len: longest prompt and response together, tokens.

    Raises:
        DataError: a prompt leaves no room for a response.
    """
    requests = []
    for prompt in prompts:
        room = max_len - len(prompt.token_ids)
        if room < 1:
            raise DataError(
                f"prompt {prompt.prompt_id}: found {len(prompt.token_ids)} tokens, expected fewer than --data.max_len "
                f"{max_len}, which holds prompt and response; raise it, or lower --data.max_prompt_len"
            )
        limit = room if max_new_tokens is None else min(room, max_new_tokens)
        requests.append(Request(prompt.token_ids.tolist(), limit, request_seed(seed, prompt.prompt_id)))
    return requests


def sample_responses(
    engines: Sequence[Any],
    requests: Sequence[Request],
    *,
    temperature: float,
    top_p: float,
    timeout_s: float,
    on_progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Responses to all requests, in their order.

    Args:
        engines: actor handles of `GenerationEngine`.
        requests: R requests.
        temperature: of the sampler; 0 is greedy.
        top_p: nucleus of the sampler.
        timeout_s: longest wait for one batch, seconds.
        on_progress: called with the number of responses that have just arrived.

    Returns:
        R completions.

    Raises:
        ClusterError: an engine died, or no batch was ready in time.
        BDError: what an engine raised, if it is one of ours.
    """

    def submit(engine: Any, batch: Sequence[Request]) -> Any:
        return engine.generate.remote(
            [request.prompt_ids for request in batch],
            max_new_tokens=[request.max_new_tokens for request in batch],
            temperature=temperature,
            top_p=top_p,
            seeds=[request.seed for request in batch],
        )

    return run_batches(
        engines,
        requests,
        submit,
        timeout_s=timeout_s,
        what="a batch of responses",
        on_progress=on_progress,
        at_once=BATCHES_AT_ONCE,
    )


def score_by_teacher(
    teacher: Any,
    rollouts: Sequence[Rollout],
    prompts: Sequence[Prompt],
    *,
    timeout_s: float,
    on_progress: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """The same rollouts with the teacher's log-probability of every response token.

    Args:
        teacher: actor handle of `TeacherEngine`.
        rollouts: R responses of the student.
        prompts: R prompts; the teacher sees its own where there is one.
        timeout_s: longest wait for one batch, seconds.
        on_progress: called with the number of rollouts that have just been scored.

    Raises:
        ClusterError: the teacher died, or no batch was ready in time.
        BDError: what the teacher raised, if it is one of ours.
    """

    def submit(engine: Any, batch: Sequence[tuple[Rollout, Prompt]]) -> Any:
        return engine.score.remote([rollout for rollout, _ in batch], [prompt.teacher_ids for _, prompt in batch])

    items = list(zip(rollouts, prompts, strict=True))
    return run_batches(
        [teacher], items, submit, timeout_s=timeout_s, what="the teacher's scores", on_progress=on_progress
    )


def run_batches(
    actors: Sequence[Any],
    items: Sequence[Any],
    submit: Callable[[Any, Sequence[Any]], Any],
    *,
    timeout_s: float,
    what: str,
    on_progress: Callable[[int], None] | None = None,
    batch_size: int = BATCH_SIZE,
    at_once: int = 1,
) -> list[Any]:
    """One result for each item, in order; an actor gets its next batch when one is done.

    Args:
        actors: actor handles, at least one.
        items: what to work on.
        submit: starts a batch on an actor; returns the reference of a list with one result an item.
        timeout_s: longest wait for the next batch, seconds.
        what: name of a batch in messages.
        on_progress: called with the number of items just finished.
        batch_size: items of one batch.
        at_once: batches that an actor has at a time.

    Raises:
        ClusterError: an actor died, or no batch was ready in time.
        BDError: what an actor raised, if it is one of ours.
    """
    results: list[Any] = [None] * len(items)
    waiting = deque(_spans(len(items), batch_size, num_places=len(actors) * at_once))
    idle = deque([*actors] * at_once)
    running: dict[Any, tuple[Any, range]] = {}
    try:
        while waiting or running:
            while waiting and idle:
                actor, span = idle.popleft(), waiting.popleft()
                running[submit(actor, items[span.start : span.stop])] = (actor, span)
            ref = _wait_for_one(running, timeout_s=timeout_s, what=what)
            actor, span = running.pop(ref)
            for index, result in zip(span, wait_for(ref, timeout_s=timeout_s, what=what), strict=True):
                results[index] = result
            idle.append(actor)
            if on_progress is not None:
                on_progress(len(span))
    finally:
        # After an error the other batches' results are of no use: let the queued ones go.
        for ref in running:
            ray.cancel(ref)
    return results


def _spans(num_items: int, batch_size: int, *, num_places: int) -> Iterator[range]:
    """Consecutive ranges over the items: at most batch_size each, and no fewer than there are places if it can be."""
    size = max(1, min(batch_size, -(-num_items // num_places)))
    bounds = [*range(0, num_items, size), num_items]
    return (range(start, stop) for start, stop in itertools.pairwise(bounds))


def _wait_for_one(running: dict[Any, tuple[Any, range]], *, timeout_s: float, what: str) -> Any:
    started = time.monotonic()
    ready, _ = ray.wait(list(running), num_returns=1, timeout=timeout_s)
    if not ready:
        raise ClusterError(
            f"no answer within {time.monotonic() - started:.0f} s while waiting for {what}: {len(running)} batches are "
            "out. Raise --cluster.generate_timeout_s, or look for a stuck engine in Ray's logs; run the same command "
            "again to resume"
        )
    return ready[0]
