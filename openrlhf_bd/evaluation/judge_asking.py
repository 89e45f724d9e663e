"""A judge's answers to many questions: several on the way at once, within a budget, each kept once it is there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from openrlhf_bd.config import JudgeOptions
from openrlhf_bd.errors import ClusterError, ConfigError, DataError
from openrlhf_bd.evaluation.judge_cache import Judgement, Judgements
from openrlhf_bd.evaluation.judge_client import Answer, JudgeClient
from openrlhf_bd.evaluation.judge_prompt import REMINDER, Verdict, parse_verdict
from openrlhf_bd.evaluation.judge_questions import Question
from openrlhf_bd.evaluation.win_rates import NO_ANSWER, REFUSED

# Called with the questions that are judged, and with all there are; first before anything is asked.
OnProgress = Callable[[int, int], None]

# So many questions one after the other without an answer: the server is not there any more.
_MAX_UNANSWERED = 3


@dataclass
class Asking:
    """One call's way through its questions.

    Attributes:
        failed: why questions have no judgement, by key.
        stopped: why no more is asked, or None.
        first_error: of the questions that failed, or None.
    """

    judgements: Judgements
    options: JudgeOptions
    on_progress: OnProgress | None
    failed: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None
    first_error: str | None = None
    num_requests: int = 0
    num_tokens: int = 0
    num_done: int = 0
    num_questions: int = 0
    unanswered: int = 0

    def open_questions(self, questions: Sequence[Question]) -> list[Question]:
        """Those that are not judged yet."""
        return [question for question in questions if not self._is_done(question)]

    async def run(self, client: JudgeClient, questions: Sequence[Question]) -> None:
        """Ask what is not judged yet, several questions at once."""
        open_questions = self.open_questions(questions)
        self.num_questions, self.num_done = len(questions), len(questions) - len(open_questions)
        self._report()
        async with client:
            if not self.num_done:
                # The shortest alone: what is wrong with server, key or options shows at the cost of one request.
                first = min(open_questions, key=lambda question: len(question.text))
                open_questions.remove(first)
                await self._judge(client, first)
            await self._share_out(client, iter(open_questions), min(self.options.concurrency, len(open_questions)))

    async def _share_out(self, client: JudgeClient, questions: Iterator[Question], num_workers: int) -> None:
        async def work() -> None:
            for question in questions:
                if self.stopped is not None:
                    return
                await self._judge_or_note(client, question)

        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(num_workers):
                    workers.create_task(work())
        except ExceptionGroup as group:
            # The first one ended the others.
            error = group.exceptions[0]
            if not isinstance(error, ClusterError):
                raise error from None
            self.stopped = str(error)

    async def _judge_or_note(self, client: JudgeClient, question: Question) -> None:
        """Judge a question; where the server does not answer it or refuses it, note that and go on.

        Raises:
            ClusterError: so many in a row had no answer that the server seems to be gone.
        """
        try:
            await self._judge(client, question)
        except (ClusterError, DataError) as error:
            is_unanswered = isinstance(error, ClusterError)
            self.failed[question.key] = NO_ANSWER if is_unanswered else REFUSED
            self.first_error = self.first_error or str(error)
            self.unanswered += is_unanswered
            if is_unanswered and self.unanswered >= _MAX_UNANSWERED:
                raise

    async def _judge(self, client: JudgeClient, question: Question) -> None:
        """Ask until an answer is a verdict or was asked for often enough, and keep what came of it."""
        messages = [{"role": "user", "content": question.text}]
        answers: list[Answer] = []
        verdict = None
        while verdict is None and len(answers) < self.options.max_asks:
            if not self._take_request():
                return
            answer = await client.ask(messages, what=f"prompt {question.answer_a.prompt_id}")
            self._count(answer)
            answers.append(answer)
            verdict = parse_verdict(answer.text)
            # Servers refuse an empty message.
            said = {"role": "assistant", "content": answer.text or "..."}
            messages += [said, {"role": "user", "content": REMINDER}]
        self.judgements.append(_judgement(question, answers, verdict, self.options))
        self.num_done += 1
        self._report()

    def _is_done(self, question: Question) -> bool:
        judgement = self.judgements.get(question.key)
        return judgement is not None and (
            judgement.verdict is not None or len(judgement.answers) >= self.options.max_asks
        )

    def _take_request(self) -> bool:
        """Whether the budget allows one more."""
        for name, used, limit in (
            ("max_requests", self.num_requests, self.options.max_requests),
            ("max_tokens", self.num_tokens, self.options.max_tokens),
        ):
            if limit is not None and used >= limit:
                self.stopped = f"the budget of --{name} {limit} is used up"
                return False
        self.num_requests += 1
        return True

    def _count(self, answer: Answer) -> None:
        self.unanswered = 0
        if answer.usage is not None:
            self.num_tokens += sum(answer.usage)
        elif self.options.max_tokens is not None:
            raise ConfigError(
                f"--max_tokens {self.options.max_tokens}: {self.options.api_base} does not say how many tokens an "
                "answer took; give --max_requests instead"
            )

    def _report(self) -> None:
        if self.on_progress is not None:
            self.on_progress(self.num_done, self.num_questions)


def _judgement(
    question: Question, answers: Sequence[Answer], verdict: Verdict | None, options: JudgeOptions
) -> Judgement:
    usages = [answer.usage for answer in answers if answer.usage is not None]
    counted = len(usages) == len(answers)
    return Judgement(
        key=question.key,
        model=options.model,
        test_set=question.answer_a.test_set,
        prompt_id=question.answer_a.prompt_id,
        shown_a=question.shown_a,
        shown_b=question.shown_b,
        verdict=verdict,
        answers=[answer.text for answer in answers],
        prompt_tokens=sum(prompt for prompt, _ in usages) if counted else None,
        completion_tokens=sum(completion for _, completion in usages) if counted else None,
    )
