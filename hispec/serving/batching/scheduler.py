"""Continuous batching: one thread owns the model, and texts join and leave between two rounds."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from hispec.config import DecodeConfig
from hispec.models.exit_model import ExitModel
from hispec.serving.batching.group import Group
from hispec.serving.batching.jobs import Failure, Job
from hispec.serving.errors import ApiError
from hispec.serving.metrics import Metrics

_log = logging.getLogger("hispec.serving")


class Scheduler:
    """Decodes the texts of all requests.

    Texts with equal settings share the passes of one decode; decodes with other settings take turns
    with it, a round each.

    Args:
        max_rows: texts decoded at a time, over all settings.
        max_queue: texts that may wait for a row.
        max_prompt: tokens of the longest prompt.
    """

    def __init__(
        self, model: ExitModel, max_rows: int, max_queue: int, max_prompt: int, metrics: Metrics
    ) -> None:
        self.model, self.metrics = model, metrics
        self.max_rows, self.max_queue, self.max_prompt = max_rows, max_queue, max_prompt
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._groups: deque[Group] = deque()
        self._rows = 0
        self._when_idle: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)

    def start(self) -> None:
        """Begin to decode."""
        self._thread.start()

    @property
    def draining(self) -> bool:
        """Whether requests are refused because the server ends."""
        return self._when_idle is not None

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put texts into the queue, all or none.

        Raises:
            ApiError: 503 while draining, 429 if the queue has no room for all of them.
        """
        with self._changed:
            if self.draining:
                raise ApiError(503, "The server is shutting down.", code="shutting_down")
            if self._rows + len(self._waiting) + len(jobs) > self.max_rows + self.max_queue:
                words = f"The queue is full: {len(self._waiting)} texts wait. Try again later."
                raise ApiError(429, words, code="queue_full")
            self._waiting.extend(jobs)
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these texts any more: their rows are free from the next round on. Texts
        that have ended may be among them."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
                if job in self._waiting:
                    self._waiting.remove(job)
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def drain(self, when_idle: Callable[[], None]) -> None:
        """Refuse new texts, decode those that are here, then call `when_idle`, in the decoding
        thread. May be called from a signal handler."""
        self._when_idle = when_idle
        threading.Thread(target=self._wake, daemon=True).start()  # a handler must not wait

    def give_up(self) -> None:
        """End all texts where they are. May be called from a signal handler."""
        threading.Thread(target=self._give_up, daemon=True).start()

    def _give_up(self) -> None:
        with self._changed:
            jobs = [*self._waiting, *(job for group in self._groups for job in group.jobs)]
        for job in jobs:
            job.tell(Failure("The server was stopped."))
        self.cancel(jobs)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _work(self) -> None:
        """Round after round, until the server drains."""
        while self._assign():
            group = self._groups[0]
            self._groups.rotate(-1)
            try:
                group.step()
            except Exception:  # the others go on
                _log.exception("decoding failed")
                self._fail(group)
        assert self._when_idle is not None
        self._when_idle()

    def _fail(self, group: Group) -> None:
        with self._changed:
            self._groups.remove(group)
        for job in group.jobs:
            self.metrics.texts.labels("failed").inc()
            job.tell(Failure("The server could not decode this text."))

    def _assign(self) -> bool:
        """Give free rows to those that wait longest; waits while there is nothing to do. False once
        all is done and no more will come."""
        with self._changed:
            while True:
                for group in self._groups:
                    group.drop_cancelled()
                self._groups = deque(group for group in self._groups if group.rows)
                self._rows = sum(group.rows for group in self._groups)
                while self._waiting and self._rows < self.max_rows:
                    job = self._waiting.popleft()
                    self._group(job.config).joining.append(job)
                    self._rows += 1
                self.metrics.running.set(self._rows)
                self.metrics.waiting.set(len(self._waiting))
                if self._groups:
                    return True
                if self.draining:
                    return False
                self._changed.wait()

    def _group(self, config: DecodeConfig) -> Group:
        """The group of these settings; a new one if there is none."""
        for group in self._groups:
            if group.config == config:
                return group
        group = Group(self.model, config, self.max_prompt, self.metrics)
        self._groups.append(group)
        return group
