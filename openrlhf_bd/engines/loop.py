"""vLLM step by step on one thread: requests of several callers at once, and control between two steps.

All of vLLM runs on that thread: it is not made for several, and the current device, inference mode and OpenMP's team
belong to a thread. Callers only wait.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from openrlhf_bd.engines.spans import SpanLog
from openrlhf_bd.records import Activity

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest

Result = TypeVar("Result")
InFlight = Literal["wait", "keep", "abort"]


@dataclass(frozen=True, slots=True)
class Request:
    """One response to sample.

    Attributes:
        prompt_ids: prompt tokens.
        params: of vLLM, with output_kind FINAL_ONLY.
    """

    prompt_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Sampled:
    """A finished request.

    Attributes:
        output: of vLLM.
        first_version: policy version under which its first token was sampled; None: weights without a version.
        last_version: and its last.
    """

    output: RequestOutput
    first_version: int | None
    last_version: int | None


@dataclass(frozen=True, slots=True)
class Progress:
    """A sign of life. An engine that hangs has requests and the same counts as before.

    Attributes:
        num_steps: steps of vLLM since the process started.
        num_tokens: tokens sampled since then, those of requests under way included, those thrown away not.
        num_running: requests that vLLM works on.
        num_waiting: requests held back while weights change.
        since_step_s: time since the last step ended; since the start where there was none.
        version: policy version of the weights; None where they have none.
        is_paused: whether weights are changing.
    """

    num_steps: int
    num_tokens: int
    num_running: int
    num_waiting: int
    since_step_s: float
    version: int | None
    is_paused: bool


@dataclass(frozen=True, slots=True)
class Paused:
    """What became of the requests in flight when generation stopped.

    Attributes:
        num_kept: go on after the pause.
        num_restarted: had tokens, which were thrown away.
    """

    num_kept: int
    num_restarted: int


@dataclass(eq=False, slots=True)
class _Call:
    """The requests of one caller, who waits for all of them at once."""

    sampled: dict[int, Sampled]
    num_requests: int
    done: Future[list[Sampled]]
    activity: Activity

    def take(self, place: int, sampled: Sampled) -> None:
        self.sampled[place] = sampled
        if len(self.sampled) == self.num_requests and not self.done.done():
            self.done.set_result([self.sampled[place] for place in range(self.num_requests)])

    def fail(self, error: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(eq=False, slots=True)
class _Flight:
    """A request on its way. `begun` holds the version of its first token, as soon as the weights may become others."""

    request: Request
    call: _Call
    place: int
    adapter: LoRARequest | None = None
    begun: tuple[int | None] | None = None


class StepLoop:
    """Runs an engine while it has requests.

    Attributes:
        version: policy version of the weights, or of the adapter that new requests get.
        spans: what the engine did: started, sampled or scored, took weights.
    """

    def __init__(self) -> None:
        self.spans = SpanLog()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vllm")
        self._llm: LLM | None = None
        self._asking: deque[None] = deque()  # one entry for each call that waits for the steps to stop
        self._names = itertools.count()
        self._flying: dict[str, _Flight] = {}
        self._held: deque[_Flight] = deque()
        self._adapter: LoRARequest | None = None
        self._pausing: Future[Paused] | None = None
        self._admits, self._is_stepping, self._stands = True, False, False
        self._num_steps = self._num_finished_tokens = 0
        self._stepped = time.monotonic()
        self.version: int | None = None

    def call(self, action: Callable[..., Result], *arguments: Any) -> Result:
        """Run something on the engine's thread, between two steps.

        Raises:
            BaseException: what the action raised.
        """

        def answer() -> Result:
            self._asking.pop()
            return action(*arguments)

        self._asking.append(None)
        return self._thread.submit(answer).result()

    def start(self, build: Callable[[], LLM]) -> LLM:
        """Build an engine on its thread."""

        def begin() -> LLM:
            with self.spans.span("start"):
                self._llm = llm = build()
            self._pausing, self._admits, self._stands = None, True, False
            self._adapter, self.version = None, None
            self._stepped = time.monotonic()
            return llm

        return self.call(begin)

    def stop(self, close: Callable[[LLM], None]) -> None:
        """End the engine; requests on their way are cancelled."""

        def end() -> None:
            if self._llm is not None:
                self.fail(RuntimeError("the engine was shut down"))
                llm, self._llm = self._llm, None
                close(llm)

        self.call(end)

    def run(self, requests: Iterable[Request], activity: Activity = "generate") -> list[Sampled]:
        """Sample a response to each request, together with whatever else is on its way.

        Args:
            requests: of one caller.
            activity: what they are for, in the engine's spans.

        Raises:
            ValueError: vLLM refuses a request.
            BaseException: what ended the engine, or what `fail` was given.
        """
        call = self.call(self._submit, list(requests), activity)
        try:
            return call.done.result()
        finally:
            if len(call.sampled) < call.num_requests:
                self.call(self._abandon, call)

    def progress(self) -> Progress:
        """How far the engine is. Answers at once, from any thread."""
        llm = self._llm
        states: list[Any] = [] if llm is None else list(llm.llm_engine.output_processor.request_states.values())
        return Progress(
            num_steps=self._num_steps,
            num_tokens=self._num_finished_tokens + sum(len(state.detokenizer.output_token_ids) for state in states),
            num_running=len(self._flying),
            num_waiting=len(self._held),
            since_step_s=time.monotonic() - self._stepped,
            version=self.version,
            is_paused=not self._admits,
        )

    def pause(self, in_flight: InFlight, *, timeout_s: float) -> Paused:
        """Stop between two steps, with no work left on the device. New requests wait until `resume`.

        Args:
            in_flight: wait: requests that have tokens finish first; keep: they stand still and go on afterwards; abort:
                they start again afterwards. Those without tokens start afterwards in any case.
            timeout_s: longest wait for them.

        Raises:
            TimeoutError: they took longer; the engine stays on its way to the pause.
        """
        return self.call(self._begin_pause, in_flight).result(timeout_s)

    def resume(self, version: int | None, *, stood_s: float | None = None) -> None:
        """Go on after a pause, under weights of another version.

        Args:
            version: of the weights.
            stood_s: since when the engine stood still for them, unix time; None: not for weights.

        Raises:
            RuntimeError: vLLM did not reset its prefix cache.
        """
        self.call(self._resume, version, stood_s)

    def use_adapter(self, adapter: LoRARequest, version: int, *, restart: bool) -> tuple[int, list[str]]:
        """Let new requests use another adapter; those on their way keep theirs, or start again with it.

        Returns:
            Requests whose tokens were thrown away; the adapters that are needed still, by name.

        Raises:
            ValueError: the adapter does not fit the model.
        """

        def switch() -> tuple[int, list[str]]:
            started = time.time()
            self._engine.add_lora(adapter)
            self.spans.add("sync", started, time.time())
            self._adapter, self.version = adapter, version
            num_restarted = len([name for name in self._flying if self._num_tokens(name)]) if restart else 0
            if restart:
                self._held.extendleft(reversed(self._take_back(list(self._flying))))
                self._admit_held()
            return num_restarted, self._unload_adapters()

        return self.call(switch)

    def fail(self, error: BaseException) -> None:
        """End every request with an error. Only on the engine's thread."""
        names, flights = list(self._flying), [*self._flying.values(), *self._held]
        self._flying.clear()
        self._held.clear()
        # First of all: an engine that failed may fail in what follows too.
        for flight in flights:
            flight.call.fail(error)
        if names:
            self._engine.abort_request(names)

    # What follows runs on the engine's thread.

    @property
    def _engine(self) -> Any:
        if self._llm is None:
            raise RuntimeError("the engine was shut down; `load` starts it again")
        return self._llm.llm_engine

    def _submit(self, requests: Sequence[Request], activity: Activity) -> _Call:
        call = _Call({}, len(requests), Future(), activity)
        if not requests:
            call.done.set_result([])
        self._held.extend(_Flight(request, call, place) for place, request in enumerate(requests))
        self._admit_held()
        return call

    def _abandon(self, call: _Call) -> None:
        self._take_back([name for name, flight in self._flying.items() if flight.call is call])
        self._held = deque(flight for flight in self._held if flight.call is not call)

    def _admit_held(self) -> None:
        while self._admits and self._held:
            self._admit(self._held.popleft())
        self._keep_stepping()

    def _admit(self, flight: _Flight) -> None:
        from vllm import TokensPrompt

        name = str(next(self._names))
        prompt = TokensPrompt(prompt_token_ids=flight.request.prompt_ids)
        try:
            self._engine.add_request(name, prompt, flight.request.params, lora_request=self._adapter)
        except ValueError as error:
            flight.call.fail(error)
            return
        flight.adapter, flight.begun = self._adapter, None
        if self._adapter is not None:
            flight.begun = (self.version,)
        self._flying[name] = flight

    def _keep_stepping(self) -> None:
        if self._flying and not self._is_stepping and not self._stands:
            self._is_stepping = True
            self._thread.submit(self._steps).add_done_callback(self._after_steps)

    def _steps(self) -> None:
        while self._flying and not self._asking:
            self._step()

    def _step(self) -> None:
        started = time.time()
        # Of callers that share a step the oldest counts: it is only for the record.
        oldest = next(iter(self._flying.values()), None)
        activity: Activity = "generate" if oldest is None else oldest.call.activity
        for output in self._engine.step():
            self._finish(output)
        self.spans.extend(activity, started, time.time())
        self._num_steps += 1
        self._stepped = time.monotonic()

    def _after_steps(self, steps: Future[None]) -> None:
        self._is_stepping = False
        error = steps.exception()
        if error is not None:
            self.fail(error)
        if self._pausing is not None and not self._stands and not self._flying:
            self._stand_still(Paused(num_kept=0, num_restarted=0))
        self._keep_stepping()

    def _finish(self, output: RequestOutput) -> None:
        flight = self._flying.pop(output.request_id)
        self._num_finished_tokens += len(output.outputs[0].token_ids)
        first = self.version if flight.begun is None else flight.begun[0]
        last = self.version if flight.adapter is None else first
        flight.call.take(flight.place, Sampled(output, first, last))
        if flight.adapter is not self._adapter:
            self._unload_adapters()

    def _num_tokens(self, name: str) -> int:
        """Tokens that a request on its way has."""
        processor = self._engine.output_processor
        return sum(
            len(processor.request_states[internal].detokenizer.output_token_ids)
            for internal in processor.external_req_ids.get(name, ())
        )

    def _take_back(self, names: Sequence[str]) -> list[_Flight]:
        """Take requests out of vLLM; what they have is thrown away."""
        if names:
            self._engine.abort_request(list(names))
        return [self._flying.pop(name) for name in names]

    def _begin_pause(self, in_flight: InFlight) -> Future[Paused]:
        if self._pausing is not None:
            return self._pausing
        pausing: Future[Paused] = Future()
        self._pausing, self._admits = pausing, False
        begun = [name for name in self._flying if self._num_tokens(name)]
        back = list(self._flying) if in_flight == "abort" else [name for name in self._flying if name not in set(begun)]
        # They are older than whatever waits already.
        self._held.extendleft(reversed(self._take_back(back)))
        if in_flight != "wait" or not self._flying:
            self._stand_still(Paused(len(self._flying), len(begun) if in_flight == "abort" else 0))
        return pausing

    def _stand_still(self, paused: Paused) -> None:
        """No further step, and none on the device: vLLM may have one there whose tokens it has not given yet."""
        core = self._engine.engine_core.engine_core
        core.pause_scheduler(mode="keep", clear_cache=False)
        while core.batch_queue:
            self._step()
        for flight in self._flying.values():
            flight.begun = flight.begun or (self.version,)
        self._stands = True
        assert self._pausing is not None
        self._pausing.set_result(paused)

    def _resume(self, version: int | None, stood_s: float | None) -> None:
        # Requests that were kept compute their cache anew, so that each further token is the new policy's own.
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM did not reset its prefix cache, which holds keys and values of the old weights")
        self._engine.engine_core.engine_core.resume_scheduler()
        if stood_s is not None:
            self.spans.add("sync", stood_s, time.time())
        self.version, self._pausing, self._stands, self._admits = version, None, False, True
        self._admit_held()

    def _unload_adapters(self) -> list[str]:
        """Drop the adapters that neither new requests nor those on their way name. Returns the names of the others."""
        adapters = [self._adapter, *(flight.adapter for flight in self._flying.values())]
        needed = {adapter.lora_int_id: adapter.lora_name for adapter in adapters if adapter is not None}
        for adapter_id in self._engine.list_loras() - needed.keys():
            self._engine.remove_lora(adapter_id)
        return sorted(needed.values())
