# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers to questions of many clients: computed and encoded once for all clients with the same question."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import field

from khod.dataclass import dataclass
from khod.server.load import Allowance

MAX_COST_SECONDS = 0.25
"""The maximum that one answer is charged to the allowance: a longer time is mostly waiting for the kernel."""

Produce = Callable[[], Awaitable[bytes]]
Deliver = Callable[[bytes], None]


@dataclass
class _Question:
    """One question. Clients that ask while an answer is being computed get the next one, because this one is older."""

    produce: Produce
    waiting: list[Deliver] = field(default_factory=list)
    is_asked: bool = False


class Answers:
    """Answers by question; each question has at most one computation, and one batch that waits for the next."""

    def __init__(self, allowance: Allowance | None = None) -> None:
        """Compute at once, or as the allowance permits."""
        self._allowance = allowance
        self._questions: dict[Hashable, _Question] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def queue_question(self, question: Hashable, produce: Produce, deliver: Deliver) -> None:
        """Call `deliver` with an answer that is not older than this call; `produce` must not raise."""
        waiting = self._questions.get(question)
        if waiting is None:
            waiting = self._questions[question] = _Question(produce)
        waiting.waiting.append(deliver)
        self._start_questions()

    def go_on(self) -> None:
        """Compute the waiting time again, because the share has changed."""
        if self._timer is not None:
            self._timer.cancel()
            self._try_again()

    def _start_questions(self) -> None:
        """Start the computation of every waiting question that has none."""
        if self._timer is not None:
            return
        wait_seconds = 0.0
        for name, question in self._questions.items():
            if question.is_asked:
                continue
            wait_seconds = self._allowance.wait_seconds() if self._allowance is not None else 0.0
            if wait_seconds:
                self._timer = asyncio.get_running_loop().call_later(wait_seconds, self._try_again)
                return
            question.is_asked = True
            task = asyncio.ensure_future(self._compute_answer(name, question))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _try_again(self) -> None:
        self._timer = None
        self._start_questions()

    async def _compute_answer(self, name: Hashable, question: _Question) -> None:
        batch, question.waiting = question.waiting, []
        began = time.monotonic()
        try:
            answer = await question.produce()
        finally:
            del self._questions[name]
            if question.waiting:
                question.is_asked = False
                self._questions[name] = question  # behind the others
            if self._allowance is not None:
                self._allowance.spend_time(min(time.monotonic() - began, MAX_COST_SECONDS))
            self._start_questions()
        for deliver in batch:
            deliver(answer)
