"""The student's engine: samples rollouts under weights that change while it runs, and knows which.

An engine whose weights are neither the old ones nor all new never generates: from the start of an update until its end
it stands still, and after an update that failed it refuses until a whole one has come.

Shapes: T response tokens, R requests.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.engines.actor import Completion, GenerationEngine, TokenIds
from openrlhf_bd.engines.arguments import UpdateOptions
from openrlhf_bd.engines.loop import InFlight, Sampled
from openrlhf_bd.errors import ClusterError

SLEEP_TIMEOUT_S = 60.0


class RolloutEngine(GenerationEngine):
    """One engine of a student in training.

    Several calls may be under way at once; those about weights are the driver's and the ranks' alone, one at a time.

    Args:
        arguments: of `engine_arguments`, with `update`.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._version: int | None = None  # that is on its way
        self._has_started = False  # and some of its weights may be in the model
        self._stood_s = 0.0  # since when the engine stands still for it, unix time
        self._refusal: str | None = None  # why it does not generate
        self._is_broken = False  # as it came out of a failed update
        self._num_adapters = 0
        self._asleep: set[str] = set()
        super().__init__(arguments)

    def generate(
        self,
        prompts: Sequence[TokenIds],
        *,
        max_new_tokens: Sequence[int],
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
    ) -> list[Completion]:
        """Sample one response to each prompt; see `GenerationEngine.generate`.

        Returns:
            R completions with log-probabilities and versions.

        Raises:
            DataError: a prompt is empty, or leaves less room than its max_new_tokens.
            ClusterError: an update of the weights failed, before or meanwhile.
        """
        if self._refusal is not None:
            raise ClusterError(self._refusal)
        params = [
            self._sampling_params(
                max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, logprobs=0, flat_logprobs=True
            )
            for max_tokens, seed in zip(max_new_tokens, seeds, strict=True)
        ]
        return [self._versioned(sampled) for sampled in self._run(prompts, params)]

    def score_tokens(
        self, prompts: Sequence[TokenIds], responses: Sequence[NDArray[np.int32]]
    ) -> list[NDArray[np.float32]]:
        """Log-probability at temperature 1 of each token of given responses, [T] each, nats.

        Raises:
            DataError: a prompt is empty, or prompt and response fill the engine.
            ClusterError: an update of the weights failed, before or meanwhile.
        """
        if self._refusal is not None:
            raise ClusterError(self._refusal)
        # The last token's own state is of no use: nothing follows it.
        texts = [np.concatenate([prompt, response]) for prompt, response in zip(prompts, responses, strict=True)]
        params = self._sampling_params(max_tokens=1, temperature=0.0, prompt_logprobs=0, skip_reading_prefix_cache=True)
        scored = self._run(texts, [params] * len(texts), "score")
        found = []
        for sampled, text, response in zip(scored, texts, responses, strict=True):
            places: Any = sampled.output.prompt_logprobs
            tokens = enumerate(text[-len(response) :].tolist(), start=len(text) - len(response))
            found.append(np.array([places[place][token].logprob for place, token in tokens], np.float32))
        return found

    def _versioned(self, sampled: Sampled) -> Completion:
        output: Any = sampled.output.outputs[0]
        completion = self._completion(output.token_ids)
        return Completion(
            completion.token_ids,
            completion.finish_reason,
            logprobs_T=np.asarray(output.logprobs.logprobs, dtype=np.float32),
            first_version=sampled.first_version,
            last_version=sampled.last_version,
        )

    def load(self, model_path: str) -> None:
        """Switch to another model, from disk; see `GenerationEngine.load`. The engine leaves its group of ranks.

        Raises:
            OSError: the model's configuration cannot be read; the engine keeps its model.
        """
        super().load(model_path)
        self._version, self._refusal, self._is_broken = None, None, False

    # Weights. join_weight_group once; then for each version begin_update, receive_weights, finish_update.

    def weight_target(self) -> dict[str, Any]:
        """What weights must be: "dtype" of the engine's, and "config" of its model."""
        model = self.llm.llm_engine.vllm_config.model_config
        return {"dtype": str(model.dtype).removeprefix("torch."), "config": model.hf_config.to_dict()}

    def join_weight_group(self, init_info: Mapping[str, Any]) -> None:
        """Join the group in which weights come. An engine that a failed update left behind is built anew first.

        Args:
            init_info: of the backend of vLLM's weight transfer.

        Raises:
            ClusterError: the group did not come together.
        """
        self.abandon_update("another group of ranks came before it was finished")
        if self._is_broken:
            self.shutdown()
            self._start()
            self._is_broken = False
        try:
            self._rpc("init_weight_transfer_engine", dict(init_info))
        except RuntimeError as error:
            raise ClusterError(f"the engine could not join the ranks' group for weights ({error})") from error

    def begin_update(self, version: int, *, in_flight: InFlight, timeout_s: float) -> dict[str, float]:
        """Stop generating, for weights of another version.

        Args:
            version: optimizer steps behind the weights that come.
            in_flight: what becomes of requests that have tokens: wait: they finish first; keep: they stand still and
                go on under the new weights; abort: they start again under them. Others wait for the new weights.
            timeout_s: longest wait for requests in flight.

        Returns:
            "kept" and "restarted": requests; "pause_s".

        Raises:
            ClusterError: requests in flight did not finish in time, and go on; or the engine's weights are those of a
                failed update, and it has joined no new group since.
        """
        if self._is_broken:
            raise ClusterError(str(self._refusal))
        started = time.monotonic()
        try:
            paused = self._loop.pause(in_flight, timeout_s=timeout_s)
        except TimeoutError:
            num_running = self.progress().num_running
            self._go_on()
            raise ClusterError(
                f"{num_running} requests in flight did not finish within {timeout_s:.0f} s; new weights waited for "
                "them. Raise --cluster.sync_timeout_s, or use --algo.distill.in_flight keep or abort"
            ) from None
        self._version, self._has_started, self._stood_s = version, False, time.time()
        return {"kept": paused.num_kept, "restarted": paused.num_restarted, "pause_s": time.monotonic() - started}

    def receive_weights(self, update_info: Mapping[str, Any]) -> float:
        """Take what the sender transfers now; may be called several times in an update.

        Returns:
            Seconds that it took, the sender's share included.

        Raises:
            ClusterError: it did not come, or is not what the model has. The engine refuses to generate from then on.
        """
        started = time.monotonic()
        with self._whole_or_refused("transfer"):
            if not self._has_started:
                self._has_started = True
                self.wake_up("weights")
                self._rpc("start_weight_update")
            self._rpc("update_weights", dict(update_info))
        return time.monotonic() - started

    def finish_update(self, version: int) -> dict[str, float]:
        """Go on generating under the weights that came, with an empty prefix cache.

        Args:
            version: as given to `begin_update`.

        Returns:
            "load_s": loading what was left; "reset_s": reset of the cache.

        Raises:
            ClusterError: the update is not whole. The engine refuses to generate from then on.
        """
        started = time.monotonic()
        with self._whole_or_refused("load"):
            if self._version != version or not self._has_started:
                raise RuntimeError(f"an update to version {self._version} was under way, expected one to {version}")
            self._rpc("finish_weight_update")
        loaded = time.monotonic()
        with self._whole_or_refused("cache reset"):
            self.wake_up("kv_cache")
            self._loop.resume(version, stood_s=self._stood_s)
        self._version = self._refusal = None
        return {"load_s": loaded - started, "reset_s": time.monotonic() - loaded}

    def abandon_update(self, reason: str) -> None:
        """Give up an update that will not be finished, if one is under way.

        The engine goes on with its old weights if nothing of the new ones has come; otherwise it refuses to generate
        until a whole update has come.
        """
        if self._version is None:
            return
        if self._has_started:
            self._refuse(reason)
        else:
            self._version = None
            self._go_on()

    def _go_on(self) -> None:
        """Generate with the weights that are there, unless the engine sleeps."""
        if not self._asleep:
            self._loop.resume(self._loop.version)

    def _refuse(self, reason: str) -> None:
        if self._is_broken:
            return  # What is still under way fails too; the first reason says why.
        self._refusal = (
            f"the weights of version {self._version} did not arrive whole: {reason}. This engine generates again after "
            "a whole update, in a new group"
        )
        self._version, self._is_broken = None, True
        self._loop.call(self._loop.fail, ClusterError(self._refusal))

    @contextmanager
    def _whole_or_refused(self, phase: str) -> Iterator[None]:
        if self._is_broken:
            raise ClusterError(str(self._refusal))
        try:
            yield
        except BaseException as error:  # Whatever it was: the weights are neither old nor new.
            self._refuse(f"{phase} failed with {type(error).__name__}: {error}")
            raise ClusterError(str(self._refusal)) from error

    # Adapters travel as files, and requests name theirs, so nothing has to stand still for them.

    def load_adapter(self, name: str, path: str, version: int, *, in_flight: InFlight) -> dict[str, Any]:
        """Let new requests use another adapter.

        Args:
            name: with the version, as student-v12; another adapter needs another name.
            path: folder as peft writes it; it must stay as long as a request needs it.
            version: optimizer steps behind it.
            in_flight: abort: requests in flight start again with it; otherwise they finish with their own.

        Returns:
            "load_s"; "restarted": requests whose tokens were thrown away; "needed": names of the adapters that are
            needed still, this one and those of requests in flight. Others are not loaded any more.

        Raises:
            ValueError: the adapter does not fit the model.
        """
        from vllm.lora.request import LoRARequest

        started = time.monotonic()
        self._num_adapters += 1
        adapter = LoRARequest(lora_name=name, lora_int_id=self._num_adapters, lora_path=path)
        restarted, needed = self._loop.use_adapter(adapter, version, restart=in_flight == "abort")
        return {"load_s": time.monotonic() - started, "restarted": restarted, "needed": needed}

    def num_adapters(self) -> int:
        """Adapters that are loaded."""
        return len(self._loop.call(self.llm.llm_engine.list_loras))

    # Sleep: on GPUs that a training step shares.

    def sleep(self) -> None:
        """Give the GPU's memory back: weights go to host memory, the cache is dropped. New requests wait.

        Raises:
            ClusterError: requests are in flight, or the engine was started without sleep mode.
        """
        update: UpdateOptions = self.arguments["update"]
        if not update.sleep:
            raise ClusterError(f"this engine cannot sleep: found {update}, expected sleep=True, which needs GPUs")
        num_running = self.progress().num_running
        if num_running:
            raise ClusterError(
                f"an engine was told to sleep with {num_running} requests in flight; wait for them first"
            )
        self._loop.pause("wait", timeout_s=SLEEP_TIMEOUT_S)
        self._loop.call(self.llm.sleep, 1)
        self._asleep = {"weights", "kv_cache"}

    def wake_up(self, part: Literal["weights", "kv_cache"] | None = None) -> None:
        """Take memory again; nothing happens where it is taken already.

        Args:
            part: "weights" before an update, "kv_cache" after it, which needs less memory at once; None: both.
        """
        parts = self._asleep if part is None else self._asleep & {part}
        if not parts:
            return
        self._loop.call(self.llm.wake_up, sorted(parts))
        self._asleep -= parts
        if self._version is None:
            self._go_on()
