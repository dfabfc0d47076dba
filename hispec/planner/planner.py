"""The planner: the fastest setting of the decoder for this model, this machine and this text.

Parts of a decode are timed once. Every setting is then replayed on the same prompts, which gives
its counts and its seconds. The best few are really decoded, beside plain decoding and what decodes
without a plan, and the fastest of these is the plan; plain decoding is an answer too.

With several rows, prompts are decoded that many at a time, as one call with that many prompts does:
a row whose text has ended stays idle until the last one has.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch

from hispec.config import DecodeConfig, check_depths
from hispec.decoding.decoder import Decode
from hispec.decoding.ladder import Ladder, similar
from hispec.decoding.stats import DecodeStats
from hispec.models.exit_model import ExitModel
from hispec.planner import search_space
from hispec.planner.answers import Answers
from hispec.planner.forest import PASS
from hispec.planner.latency import Costs, measure_latency, now
from hispec.planner.plan_file import Machine, Plan, Setting, Tried
from hispec.planner.replay import Replay, can_replay
from hispec.planner.search_space import LONGEST_DRAFT, to_confirm, two_of_each
from hispec.utils.console import Progress
from hispec.utils.settings import check

WORTH_IT = 1.02
"""Against plain decoding; what gains less is within the noise of the measurement."""
_SCREENED = 2  # prompts that all settings are tried on
_KEPT = 24  # settings that are tried on the other prompts too
_ROOM = 2048  # nodes of all rows whose KV is kept, see `Answers`
MOST_ROWS = 16
Batch = list[list[int]]
"""Prompts that are decoded together."""
Prefill = Callable[[Batch], dict[int, float]]
"""Seconds that reading some prompts takes: of all layers, by the full model's depth, and of each
exit's head, by its depth."""


@dataclass
class _Totals:
    """A setting over all prompts."""

    seconds: float = 0.0
    tokens: int = 0
    row_passes: int = 0
    """Passes of the full model times their rows."""
    prompts: int = 0

    def add(self, seconds: float, stats: DecodeStats) -> None:
        self.seconds += seconds
        self.tokens += stats.new_tokens
        self.row_passes += stats.rungs[-1].passes * stats.rows
        self.prompts += stats.rows

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


@dataclass
class _Measured:
    """A setting as it was really decoded."""

    rates: list[float] = field(default_factory=list)
    """Tokens per second of every repeat over all prompts."""
    same_text: int = 0
    per_pass: float = 0.0
    """Tokens per pass of the full model in the last repeat."""


class Planner:
    """Plans one model for some prompts.

    Args:
        prompts: token ids of each.
        exits: depths to try; default: the model's own exits.
        new_tokens: decoded of each prompt.
        eos: token ids that end a text.
        rows: prompts that are decoded together. If they are no multiple of it, some occur twice.

    Raises:
        ValueError: no prompts, too many rows, or depths that the model does not have.
    """

    def __init__(
        self,
        model: ExitModel,
        prompts: Sequence[Sequence[int]],
        *,
        exits: Sequence[int] | None = None,
        new_tokens: int = 32,
        eos: Sequence[int] = (),
        rows: int = 1,
    ) -> None:
        check(len(prompts) > 0, "prompts", prompts, "give at least one prompt")
        check(1 <= rows <= MOST_ROWS, "rows", rows, f"1 to {MOST_ROWS}")
        check(new_tokens >= 2, "new_tokens", new_tokens, "2 or more")
        self.model = model
        self.exits = list(model.exits.depths if exits is None else exits)
        check_depths("exits", self.exits, self.model.num_layers, at_least=0, lowest=0)
        self.rows = rows
        count = -(-len(prompts) // rows)
        every = [list(prompt) for prompt in islice(cycle(prompts), count * rows)]
        self.batches = [every[number::count] for number in range(count)]  # of several tasks each
        self.new_tokens = new_tokens
        self.eos = tuple(eos)
        settings = search_space.settings(self.exits, self.model.num_layers)
        replayed = [setting for setting in settings if can_replay(model, setting["ladder"])]
        # what cannot be replayed is really decoded, with fewer settings
        others = [setting for setting in settings if not can_replay(model, setting["ladder"])]
        decoded = two_of_each(others)
        self.decoded = len(decoded)
        """Settings that are really decoded."""
        self.settings = [*replayed, *decoded]

    def run(
        self,
        text: dict[str, Any],
        *,
        confirm: int = 4,
        repeats: int = 2,
        progress: Progress = lambda things, _: things,
    ) -> Plan:
        """Measure, replay, confirm, choose.

        Args:
            text: says what the prompts are, for the plan.
            confirm: settings to decode really, besides plain decoding.
            repeats: of which the median counts.
            progress: sees the rounds of each stage go by, for a progress bar.
        """
        check(confirm >= 1, "confirm", confirm, "1 or more")
        check(repeats >= 1, "repeats", repeats, "1 or more")
        began = time.perf_counter()
        lengths = self.lengths
        latency = measure_latency(
            self.model,
            [*self.exits, self.model.num_layers],
            sorted({lengths[0], lengths[-1] + self.new_tokens}),
            rows=self.rows,
            progress=progress,
        )
        tried = self.predict(latency, self._prefill, progress)
        plain = tried[0]
        chosen = [plain, *to_confirm(tried[1:], confirm)]
        if (default := self._default(plain)) is not None:
            chosen.append(default)
        measured = self._decode(chosen, repeats, progress)
        for entry, found in zip(chosen, measured, strict=True):
            entry.measured = statistics.median(found.rates)
            entry.spread = min(found.rates), max(found.rates)
            entry.same_text = found.same_text
        assert plain.measured is not None
        # A machine is not as fast in every minute: predictions are stated in the minutes of the
        # confirmation, by one factor for all of them.
        scale = statistics.median(
            (entry.measured or 0.0) / entry.predicted for entry in chosen if entry is not default
        )
        for entry in tried:
            entry.predicted *= scale
        if default is not None:
            default.predicted = default.measured or 0.0
            default.tokens_per_target_pass = measured[-1].per_pass
            tried.append(default)
        best = max(chosen, key=lambda entry: entry.measured or 0.0)
        if (best.measured or 0.0) < WORTH_IT * plain.measured:
            best = plain
        return Plan(
            setting=best.setting,
            tokens_per_second=best.measured or 0.0,
            plain_tokens_per_second=plain.measured,
            machine=Machine.of(self.model),
            text=self.text(text),
            exits=self.exits,
            num_layers=self.model.num_layers,
            confirmed=sorted(chosen, key=lambda entry: -(entry.measured or 0.0)),
            settings=sorted(tried, key=lambda entry: -entry.predicted),
            latency={**asdict(latency), "scale": scale},
            seconds=time.perf_counter() - began,
            rows=self.rows,
        )

    def _default(self, plain: Tried) -> Tried | None:
        """What decodes without a plan, if it follows the clock: then no replay predicts it, and it
        is decoded whatever the other settings promise."""
        setting = search_space.default_setting(self.model)
        if not setting.get("adaptive") or setting["ladder"][0] not in self.exits:
            return None
        return Tried(setting, plain.predicted, 1.0, prompts=plain.prompts)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt, increasing."""
        return sorted(len(prompt) for batch in self.batches for prompt in batch)

    def text(self, text: dict[str, Any]) -> dict[str, Any]:
        """What the prompts are, with their numbers, see `plan_file.Text`."""
        lengths = self.lengths
        numbers = {"prompts": len(lengths), "prompt_tokens": [lengths[0], lengths[-1]]}
        return {**text, **numbers, "new_tokens": self.new_tokens}

    def predict(self, costs: Costs, prefill: Prefill, progress: Progress) -> list[Tried]:
        """Tokens per second of every setting, plain decoding first: all are tried on a few prompts,
        those that do well there on the others too."""
        pairs = [(setting, _Totals()) for setting in self.settings]
        screened_on = max(1, _SCREENED // self.rows)
        apart = max(1, len(self.batches) // screened_on)
        first = range(0, len(self.batches), apart)[:screened_on]
        words = f"trying {len(self.settings)} settings"
        for number in progress(first, words):
            self._try(self.batches[number], costs, prefill, pairs)
        plain, *others = pairs
        screened = plain[1].rate
        best = sorted(others, key=lambda pair: -pair[1].rate)[:_KEPT]
        rest = [number for number in range(len(self.batches)) if number not in first]
        for number in progress(rest, f"trying the best {_KEPT} further"):
            self._try(self.batches[number], costs, prefill, [plain, *best])
        return [
            Tried(
                setting,
                # where plain decoding was slower or faster on the other prompts, so would this be
                total.rate
                * (1 if total.prompts > len(first) * self.rows else plain[1].rate / screened),
                total.tokens / total.row_passes,
                prompts=total.prompts,
            )
            for setting, total in pairs
        ]

    def config(self, setting: Setting) -> DecodeConfig:
        """A decode with some setting."""
        return DecodeConfig(**setting, max_new_tokens=self.new_tokens, eos=self.eos)

    def known(self, batch: Batch) -> list[Answers]:
        """The answers of some prompts, those along their texts and of drafts there computed."""
        texts = Decode(self.model, batch, self.config(self.settings[0])).finish()
        depths = [*self.exits, self.model.num_layers]
        room = max(_ROOM // len(batch), 2 * PASS + 2 * self.new_tokens)
        found: dict[tuple[int, ...], Answers] = {}
        for prompt, text in zip(batch, texts, strict=True):
            if tuple(prompt) in found:
                continue
            answers = found[tuple(prompt)] = Answers(self.model, prompt, depths, room)
            nodes = answers.follow(text)
            for depth in depths:
                if not self.model.reads_before(depth):
                    answers.answers((depth, False), nodes)
                if depth < self.model.num_layers:
                    answers.draft(depth, nodes, LONGEST_DRAFT)
        return [found[tuple(prompt)] for prompt in batch]

    def _try(
        self,
        batch: Batch,
        costs: Costs,
        prefill: Prefill,
        pairs: Sequence[tuple[Setting, _Totals]],
    ) -> None:
        """Add the predicted seconds and the counts of one batch to the totals of some settings."""
        reading = prefill(batch)
        answers = self.known(batch)
        for setting, total in pairs:
            config = self.config(setting)
            if can_replay(self.model, config.ladder):
                seconds = sum(reading[depth] for depth in config.ladder)
                replay = Replay(answers, config, costs, seconds)
                replay.finish()
                total.add(replay.seconds, replay.stats)
            else:
                run = Decode(self.model, batch, config)
                run.finish()
                total.add(run.stats.seconds, run.stats)

    @torch.inference_mode()
    def _prefill(self, batch: Batch) -> dict[int, float]:
        """Measured seconds, see `Prefill`. Prompts of like lengths are read together."""
        full = self.model.num_layers
        groups = [[batch[row] for row in group] for group in similar([len(p) for p in batch])]

        def once(depths: Sequence[int]) -> float:
            taken = 0.0
            for group in groups:
                length_B = np.array([len(prompt) for prompt in group])
                tokens_BN = np.zeros((len(group), int(length_B.max())), dtype=np.int64)
                for row, prompt in enumerate(group):
                    tokens_BN[row, : len(prompt)] = prompt
                ladder = Ladder(self.model, depths, len(group), tokens_BN.shape[1])
                began = now(self.model.device)
                ladder.prefill(tokens_BN, length_B)
                taken += now(self.model.device) - began
            return taken

        def seconds(depths: Sequence[int]) -> float:
            return min(once(depths) for _ in range(2))

        found = {full: seconds([full])}
        blocks = {depth: len(self.model.head(depth).blocks) for depth in self.exits}
        heads = max(0.0, seconds([*self.exits, full]) - found[full]) if self.exits else 0.0
        every = sum(blocks.values())
        return found | {depth: heads * n / every if every else 0.0 for depth, n in blocks.items()}

    def _decode(self, chosen: Sequence[Tried], repeats: int, progress: Progress) -> list[_Measured]:
        """Really decode some settings, batch by batch side by side; plain decoding is first."""
        found = [_Measured() for _ in chosen]
        totals = [[_Totals() for _ in range(repeats)] for _ in chosen]
        rounds = [(r, batch) for r in range(repeats) for batch in self.batches]
        for repeat, batch in progress(rounds, f"decoding the best {len(chosen) - 1}"):
            plain: list[list[int]] = []
            for i, entry in enumerate(chosen):
                run = Decode(self.model, batch, self.config(entry.setting))
                texts = run.finish()
                plain = texts if i == 0 else plain
                totals[i][repeat].add(run.stats.seconds, run.stats)
                if repeat == 0:
                    found[i].same_text += sum(a == b for a, b in zip(texts, plain, strict=True))
        for measured, of_repeats in zip(found, totals, strict=True):
            measured.rates = [total.rate for total in of_repeats]
            measured.per_pass = of_repeats[-1].tokens / of_repeats[-1].row_passes
        return found
