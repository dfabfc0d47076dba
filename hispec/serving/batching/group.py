"""Texts with equal settings, decoded together."""

from __future__ import annotations

import time
from itertools import zip_longest

from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.decoding.rows import Reading, resized
from hispec.decoding.stats import TargetPass
from hispec.models.exit_model import ExitModel
from hispec.serving.batching.jobs import Job, Update, Usage
from hispec.serving.metrics import Metrics

_ROWS = 4
"""Decodes of several texts have a multiple of so many rows: on a CPU they take as long for four as
for two, and each width that is new to an engine takes a tenth of a second."""


class Group:
    """One decode, whose rows join and leave between two rounds.

    Args:
        config: settings of all its texts.
        max_prompt: tokens of the longest prompt.
    """

    def __init__(
        self, model: ExitModel, config: DecodeConfig, max_prompt: int, metrics: Metrics
    ) -> None:
        self.model, self.config, self.max_prompt = model, config, max_prompt
        self.metrics = metrics
        self.joining: list[Job] = []
        self.running: dict[int, Job] = {}
        """By row."""
        self._run: Decode | None = None
        self._reading: tuple[Job, Reading] | None = None

    @property
    def rows(self) -> int:
        """Texts that decode, or will from the next round on."""
        return len(self.running) + len(self.joining) + (self._reading is not None)

    @property
    def jobs(self) -> list[Job]:
        """These texts."""
        reading = [] if self._reading is None else [self._reading[0]]
        return [*self.running.values(), *reading, *self.joining]

    def drop_cancelled(self) -> None:
        """Free the rows of texts that nobody waits for."""
        self.joining = [job for job in self.joining if not job.cancelled]
        if self._reading is not None and self._reading[0].cancelled:
            self._reading = None
        for row, job in list(self.running.items()):
            if job.cancelled:
                self._end(row, "cancelled")

    def step(self) -> None:
        """Run one pass over the prompt of a text that waits, and one round of those that run."""
        self._read()
        run = self._run
        if run is None or not self.running:
            return
        committed = run.step()
        ended = set(run.ended_rows())
        for part in committed:
            passes = run.by_row.latest[part.row]
            self._tell(part.row, part.tokens, part.depths, passes, part.row in ended)

    def _read(self) -> None:
        """Run one pass over the prompt of the next text; it joins once that was the last."""
        if self._reading is None:
            if not self.joining:
                return
            job = self.joining.pop(0)
            job.started = time.perf_counter()
            self.metrics.queued_for.observe(job.started - job.submitted)
            self._reading = job, Reading(self._fitting(), job.prompt, seed=job.seed)
        job, reading = self._reading
        if not reading.step():
            return
        run = self._fitting()
        row = next(row for row in run.ended_rows() if row not in self.running)
        part = reading.join(run, row, max_new_tokens=job.max_new_tokens)
        self._reading = None
        self.running[row] = job
        passes = run.by_row.latest.pop(row)
        self._tell(row, part.tokens, part.depths, passes, row in run.ended_rows())

    def _fitting(self) -> Decode:
        """The decode with rows for all texts, and not with more than twice as many."""
        needed, run = max(self.rows, len(self.running) + 1), self._run
        width = 1 if needed == 1 else -(-needed // _ROWS) * _ROWS
        if run is None:
            run = Decode(self.model, [[0]] * width, self.config, max_prompt=self.max_prompt)
            for row in range(width):
                run.stop(row)
        elif needed > run.state.rows or 2 * needed < run.state.rows:
            kept = sorted(self.running)
            run = resized(run, kept, width)
            self.running = {new: self.running[old] for new, old in enumerate(kept)}
        self._run = run
        return run

    def _tell(
        self, row: int, tokens: list[int], depths: list[int], passes: list[TargetPass], ended: bool
    ) -> None:
        """Hand on what the passes of one step committed in a row."""
        job = self.running[row]
        job.first = job.first or time.perf_counter()
        at = 0
        for passed, following in zip_longest(passes, passes[1:]):
            stop = at + passed.accepted + 1 if following else len(tokens)
            last = ended and following is None
            pieces = job.text.add(tokens[at:stop], depths[at:stop], last)
            at = stop
            if not (last or job.text.stopped):
                job.tell(Update(pieces, passed))
                continue
            by_eos = job.text.stopped or tokens[-1] in self.config.eos
            finish = "stop" if by_eos else "length"
            job.tell(Update(pieces, passed, finish, self._end(row, finish)))
            return

    def _end(self, row: int, reason: str) -> Usage:
        """Free a row; returns the counts of its text."""
        job, run, now = self.running.pop(row), self._run, time.perf_counter()
        assert run is not None
        if row not in run.ended_rows():
            run.stop(row)
        usage = Usage(
            len(job.prompt),
            job.text.tokens,
            int(run.by_row.passes_B[row]),
            run.by_row.drafted(row),
            run.by_row.accepted(row),
            now - job.started,
        )
        self.metrics.ended(reason, usage)
        if job.first:
            self.metrics.first_token.observe(job.first - job.submitted)
        if usage.new_tokens > 1:
            self.metrics.per_token.observe((now - job.first) / (usage.new_tokens - 1))
        self.metrics.whole.observe(now - job.submitted)
        return usage
