"""Settings with two and with three rungs, replayed side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval import assumed as of_assumed
from hispec.decoding.decoder import Decode
from hispec.decoding.stats import DecodeStats
from hispec.models.exit_model import ExitModel
from hispec.planner.answers import Answers
from hispec.planner.device_model import DeviceModel, SimulatedCosts
from hispec.planner.latency import Costs, head, measure_latency, reading, segment
from hispec.planner.plan_file import Setting, is_plain
from hispec.planner.planner import Batch, Planner
from hispec.planner.replay import Replay, can_replay
from hispec.utils.console import Progress
from hispec.utils.settings import check

FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""What the layers above the deepest exit are made to cost, against what they do."""
_CHECKED = 3  # tokens of the full model's pass in the ratio of costs: two drafts and one before
PAPER_BUFFER = {"draft_length": 2, "buffer": 4}
"""N_d and N_i of HiSpec (2510.01336)."""


class SplitCosts:
    """Costs that also add up the seconds of the layers above a depth."""

    def __init__(self, costs: Costs, above: int, full: int) -> None:
        self.costs, self.above, self.full = costs, above, full
        self.seconds = 0.0

    @property
    def simulated(self) -> bool:
        return self.costs.simulated

    def of(self, part: str, tokens: int, length: int) -> float:
        found = self.costs.of(part, tokens, length)
        words = part.replace(",", "").split()
        if words[0] == "layers" and int(words[3]) == self.full:
            low = int(words[1])
            self.seconds += found * (self.full - max(low, self.above)) / (self.full - low)
        return found


@dataclass
class Entry:
    """A setting over all prompts."""

    setting: Setting
    kind: str
    """What drafts."""
    tokens: int = 0
    seconds: float = 0.0
    above: float = 0.0
    """Seconds of the layers above the deepest exit, among those."""
    row_passes: int = 0
    """Passes of the full model times rows."""
    layer_token_runs: int = 0
    drafted: int = 0
    """Draft tokens that the first verifying rung has seen."""
    rejected: int = 0
    decoded: float | None = None
    """Tokens per second as really decoded."""

    @property
    def rungs(self) -> int:
        """Rungs that verify, and one that drafts, by a model or without one."""
        ladder, drafter = self.setting["ladder"], self.setting.get("drafter", "exit")
        return 1 if is_plain(self.setting) else len(ladder) + ("exit" not in drafter)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.scaled(1.0)

    def scaled(self, factor: float) -> float:
        """Tokens per second if the layers above the deepest exit cost so many times as much."""
        return self.tokens / (self.seconds + (factor - 1) * self.above)

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / self.row_passes

    @property
    def layer_runs(self) -> float:
        """Layers run per new token, heads and rejected drafts included."""
        return self.layer_token_runs / self.tokens

    @property
    def thrown_out(self) -> float | None:
        """Share of the drafts that the middle rung rejects; None without one."""
        return self.rejected / self.drafted if self.rungs > 2 and self.drafted else None

    def add(self, stats: DecodeStats, prefilled: int, seconds: float, above: float) -> None:
        """Add a replay.

        Args:
            prefilled: tokens of the prompts, whose layers are not counted.
        """
        first = stats.rungs[0]
        self.tokens += stats.new_tokens - stats.rows  # reading the prompts gives the first ones
        self.seconds += seconds
        self.above += above
        self.row_passes += (stats.rungs[-1].passes - 1) * stats.rows
        heads = sum(rung.head_layers for rung in stats.rungs)
        self.layer_token_runs += stats.layer_token_runs
        self.layer_token_runs -= prefilled * (stats.rungs[-1].depth + heads)
        self.drafted += first.proposed + stats.free.proposed
        self.rejected += first.proposed - first.accepted
        self.rejected += stats.free.proposed - stats.free.accepted

    def as_dict(self) -> dict[str, Any]:
        return {
            "setting": self.setting,
            "drafter": self.kind,
            "rungs": self.rungs,
            "tokens_per_second": self.rate,
            "decoded_tokens_per_second": self.decoded,
            "tokens_per_target_pass": self.tokens_per_pass,
            "layer_runs_per_token": self.layer_runs,
            "thrown_out_by_the_middle_rung": self.thrown_out,
        }


@dataclass
class Found:
    """All settings at some number of rows."""

    rows: int
    entries: list[Entry]
    paper: list[Entry]
    """The paper's comparison: without a middle rung, and with one; empty without such exits."""
    costs: dict[str, float] = field(default_factory=dict)
    """Seconds of a draft step, a full pass, and its layers above the deepest exit."""

    @property
    def plain(self) -> Entry:
        return self.entries[0]

    def best(self, rungs: int, kind: str | None = None, factor: float = 1.0) -> Entry | None:
        """The fastest setting with so many rungs."""
        fits = [e for e in self.entries if e.rungs == rungs and kind in (None, e.kind)]
        return max(fits, key=lambda entry: entry.scaled(factor), default=None)

    def listed(self) -> list[Entry]:
        """Plain decoding, the best of each drafter with two and with three rungs, the paper's."""
        kinds = dict.fromkeys(entry.kind for entry in self.entries[1:])
        best = [self.best(rungs, kind) for kind in kinds for rungs in (2, 3)]
        return [self.plain, *(entry for entry in best if entry is not None), *self.paper]

    def ratio(self, factor: float = 1.0) -> float | None:
        """The best three rungs over the best two."""
        two, three = self.best(2, factor=factor), self.best(3, factor=factor)
        if two is None or three is None:
            return None
        return three.scaled(factor) / two.scaled(factor)

    def ratios(self) -> dict[str, float | None]:
        """What the comparisons come to, in words."""
        two, three = self.best(2), self.best(3)
        decoded = None
        if two is not None and three is not None:
            pairs = [[e for e in self.entries if e.rungs == n and e.decoded] for n in (2, 3)]
            if all(pairs):
                fastest = [max(e.decoded or 0.0 for e in of) for of in pairs]
                decoded = fastest[1] / fastest[0]
        paper = self.paper[1].rate / self.paper[0].rate if self.paper else None
        tuned = three.rate / self.paper[0].rate if self.paper and three is not None else None
        return {
            "best three rungs over best two": self.ratio(),
            "the same, really decoded": decoded,
            "the paper's three rungs over its two": paper,
            "best three rungs over the paper's two": tuned,
        }

    def line(self) -> list[dict[str, float | None]]:
        """The ratio of the best three rungs to the best two over the ratio of costs: that of a full
        pass of three tokens to a draft step."""
        step, full, above = (self.costs[key] for key in ("draft_step", "full_pass", "above"))
        return [
            {
                "factor": factor,
                "ratio_of_costs": (full + (factor - 1) * above) / step,
                "three_over_two": self.ratio(factor),
            }
            for factor in FACTORS
        ]

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "best": [entry.as_dict() for entry in self.listed()],
            "ratios": self.ratios(),
            "costs": self.costs,
            "line": self.line() if self.costs else [],
        }


def kind_of(setting: Setting) -> str:
    """What drafts, in words."""
    drafter = setting.get("drafter", "exit")
    if is_plain(setting):
        return "none"
    tree = setting.get("draft_width", 1) > 1
    if drafter != "exit":
        joined = " in one tree" if setting.get("join_drafts", True) else " tree"
        return drafter + (joined if tree and "exit" in drafter else "")
    what = "tree" if tree else "chain"
    return f"{what} from depth 0" if not setting["ladder"][0] else f"exit {what}"


class Bench:
    """Replays settings of one model on some prompts.

    Args:
        exits: depths to try; default: the model's own.
        device: a device model; None to measure the costs here.
    """

    def __init__(
        self,
        model: ExitModel,
        prompts: Sequence[Sequence[int]],
        *,
        exits: Sequence[int] | None,
        new_tokens: int,
        eos: Sequence[int],
        device: DeviceModel | None,
    ) -> None:
        self.model, self.device = model, device
        self.prompts = [list(prompt) for prompt in prompts]
        check(new_tokens >= 2, "max_new_tokens", new_tokens, "2 or more")
        self._planner = lambda rows: Planner(
            model, self.prompts, exits=exits, new_tokens=new_tokens, eos=eos, rows=rows
        )
        planner = self._planner(1)
        self.exits, self.depths = planner.exits, [*planner.exits, model.num_layers]
        self._known: dict[tuple[int, ...], Answers] = {}

    @property
    def count(self) -> int:
        return len(self.prompts)

    def settings(self, planner: Planner) -> list[Setting]:
        """What is tried: all of the planner's that can be replayed."""
        return [s for s in planner.settings if can_replay(self.model, s["ladder"])]

    def run(self, rows: int, paper_length: int, progress: Progress) -> Found:
        """Replay all settings with so many rows."""
        planner = self._planner(rows)
        costs = self._costs(planner, progress)
        entries = [Entry(setting, kind_of(setting)) for setting in self.settings(planner)]
        paper = [Entry(s, "the paper's: exit chain") for s in self._paper(paper_length)]
        for batch in progress(planner.batches, f"rows {rows}: replaying {len(entries)} settings"):
            answers = self._answers(planner, batch)
            for entry in [*entries, *paper]:
                split = SplitCosts(costs, max(self.exits), self.model.num_layers)
                replay = Replay(answers, planner.config(entry.setting), split)
                replay.step()
                before, above = replay.seconds, split.seconds
                replay.finish()
                tokens = sum(map(len, batch))
                entry.add(replay.stats, tokens, replay.seconds - before, split.seconds - above)
        return Found(rows, entries, paper, self._ratio(costs, planner.lengths[-1]))

    def decode(self, found: Found, count: int, progress: Progress) -> None:
        """Really decode plain decoding and the best settings with two and with three rungs."""
        planner = self._planner(found.rows)
        chosen = [found.plain, *found.paper]
        for rungs in (2, 3):
            fits = [entry for entry in found.entries if entry.rungs == rungs]
            chosen += sorted(fits, key=lambda entry: -entry.rate)[:count]
        totals = [[0.0, 0.0] for _ in chosen]
        for batch in progress(planner.batches, f"rows {found.rows}: decoding {len(chosen)}"):
            for entry, total in zip(chosen, totals, strict=True):
                run = Decode(self.model, batch, planner.config(entry.setting))
                run.step()  # reads the prompts
                before = run.stats.seconds
                run.finish()
                total[0] += run.stats.new_tokens - run.stats.rows
                total[1] += run.stats.seconds - before
        for entry, (tokens, seconds) in zip(chosen, totals, strict=True):
            entry.decoded = tokens / seconds

    def _answers(self, planner: Planner, batch: Batch) -> list[Answers]:
        new = [prompt for prompt in batch if tuple(prompt) not in self._known]
        for answers in planner.known(new) if new else []:
            self._known[tuple(answers.prompt)] = answers
        return [self._known[tuple(prompt)] for prompt in batch]

    def _costs(self, planner: Planner, progress: Progress) -> Costs:
        if self.device is not None:
            return SimulatedCosts(self.device, self.model, self.depths, planner.rows)
        lengths = sorted({planner.lengths[0], planner.lengths[-1] + planner.new_tokens})
        return measure_latency(
            self.model, self.depths, lengths, rows=planner.rows, progress=progress
        )

    def _paper(self, length: int) -> list[Setting]:
        """The paper's comparison: a chain from the exit nearest to L / 8, verified by the full
        model, and the same under the exit nearest to L / 4."""
        full = self.model.num_layers
        exits = [depth for depth in self.exits if depth]
        draft = min(exits, key=lambda depth: abs(depth - full / 8), default=0)
        deeper = [depth for depth in exits if depth > draft]
        middle = min(deeper, key=lambda depth: abs(depth - full / 4), default=0)
        found = [
            {"ladder": [draft, full], "drafter": "exit", "draft_length": length},
            {"ladder": [draft, middle, full], "drafter": "exit", **PAPER_BUFFER},
        ]
        possible = middle and all(can_replay(self.model, s["ladder"]) for s in found)
        return found if possible else []

    def _ratio(self, costs: Costs, length: int) -> dict[str, float]:
        """See `Found.costs`."""
        full, draft = self.model.num_layers, min(self.exits)
        step = costs.of(segment(0, draft), 1, length) if draft else 0.0
        if self.model.head(draft).blocks:
            step += costs.of(head(draft), 1, length)
        reduced = self.model.draft_tokens is not None
        step += costs.of(reading(draft, reduced), 1, length)
        layers = costs.of(segment(0, full), _CHECKED, length)
        above = layers * (full - max(self.exits)) / full
        whole = layers + costs.of(reading(full, False), _CHECKED, length)
        return {"draft_step": step, "full_pass": whole, "above": above}


class _AssumedBench(Bench):
    def __init__(self, shares: Mapping[int, float], same_mistakes: float, **keys: Any) -> None:
        super().__init__(**keys)
        self._known = {
            tuple(prompt): of_assumed.AssumedAnswers(self.model, prompt, shares, same_mistakes)
            for prompt in self.prompts
        }

    def settings(self, planner: Planner) -> list[Setting]:
        """Chains alone: second choices and their probabilities are not assumed."""
        found = super().settings(planner)
        keys = {"ladder", "drafter", "draft_length", "buffer"}
        return [s for s in found if s.keys() <= keys and s.get("drafter", "exit") == "exit"]


def assumed(
    device: DeviceModel,
    shares: Mapping[int, float],
    same_mistakes: float,
    *,
    count: int,
    new_tokens: int,
) -> Bench:
    """A bench of exits that are right as often as is assumed, see `eval.assumed`.

    Raises:
        ValueError: depths that the device model does not have.
    """
    layers, depths = device.model.layers, sorted(shares)
    inside = all(0 < depth < layers for depth in depths)
    check(inside, "assumed", dict(shares), f"depths from 1 to {layers - 1}")
    return _AssumedBench(
        {depth: shares[depth] for depth in depths},
        same_mistakes,
        model=of_assumed.stand_in(layers, depths),
        prompts=of_assumed.prompts(count),
        exits=depths,
        new_tokens=new_tokens,
        eos=(),
        device=device,
    )
