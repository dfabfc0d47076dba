"""Text made by the target itself: `python train/synthesize.py base=NAME output=FILE.jsonl`.

Exits that learn from what the target says learn on the contexts that they will draft in. The
user's turns come from a file (`prompts=`), or the target invents them too: given its chat template
up to where the user's words begin, a tuned model writes a user's turn (Magpie, 2406.08464). A base
without a template writes text from its BOS on. Sample i depends on the settings, the seed and i
alone, so a run that was killed goes on where it was. Ends with one JSON line. Keys and defaults:
`Settings`. To train on the file: `data=FILE.jsonl text_column=messages` (`text` for raw texts).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import MISSING
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hispec.config import DRAFTERS
from hispec.utils.command_line import parse_device, parse_dtype, run_cleanly
from hispec.utils.console import Output, quiet_transformers
from hispec.utils.settings import check, resolve

NO_DRAFTER = "none"


@dataclass
class Settings:
    """Who speaks, on what, by which law, and what is kept. Lengths are in tokens."""

    base: str = MISSING
    """A name that `hispec fetch` knows, a Hub id, a folder, or an EE checkpoint; its full model
    speaks."""
    output: str = MISSING
    """JSONL file; `OUTPUT.meta.json` beside it says what it was made with and how far it is."""
    samples: int | None = None
    """Samples to make, from number 0 on; those that are dropped count. Default: one for each prompt
    of the file, or 1000. A finished run goes on if it is raised."""
    shard: int = 0
    """This process makes the samples whose number modulo `shards` is this, into a file of its own
    (a folder of such files can be trained on); duplicates are sought in that file alone."""
    shards: int = 1

    prompts: str | None = None
    """JSONL of prompts (`turns`, `question`, `messages`, or `prompt`, which is continued as it is),
    taken in order, again and again; default: the model invents them."""

    temperature: float = 0.8
    """Of answers and texts; 0 is greedy."""
    prompt_temperature: float = 1.0
    """Of the invented turns."""
    top_p: float | None = 0.95
    top_k: int | None = None
    seed: int = 0
    max_new_tokens: int = 512
    """Longest answer, or text."""
    max_prompt_tokens: int = 256
    """Longest user's turn; longer ones are dropped."""

    keep_truncated: bool = True
    """Keep answers that `max_new_tokens` cut off. What they say is the target's own; only the end
    of the turn, which the template writes after them, is not."""
    max_repetition: float = 0.5
    """Drop what has a larger share of 4-grams that occurred earlier in it (seq-rep-4)."""
    near_duplicate: float = 0.7
    """Drop an invented turn, an answer or a text that shares this much of its word 3-grams with an
    earlier one (Jaccard)."""

    drafter: str = NO_DRAFTER
    """`none`, or one of `DecodeConfig`, those with `exit` for an EE checkpoint. They change
    the speed; the law is the target's (`match`)."""
    batch_size: int = 8
    """Samples decoded together. In float32 it does not change them; in half precision passes of
    another shape round otherwise, texts part at near-ties, and a run goes on only with the batch
    and the drafter that it had."""
    dtype: str = "auto"
    device: str | None = None
    threads: int | None = None
    """Threads on a CPU."""

    def validate(self) -> None:
        """Raises ValueError naming the key, the value and what is allowed."""
        for key in ("samples", "shards", "top_k", "max_new_tokens", "max_prompt_tokens",
                    "batch_size", "threads"):  # fmt: skip
            value = getattr(self, key)
            check(value is None or value >= 1, key, value, "1 or more")
        check(0 <= self.shard < self.shards, "shard", self.shard, f"0 to {self.shards - 1}")
        for key in ("temperature", "prompt_temperature"):
            value = getattr(self, key)
            check(value == 0 or value >= 1e-3, key, value, "0 (greedy), or 0.001 and more")
        check(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1")
        for key in ("max_repetition", "near_duplicate"):
            check(0 < getattr(self, key) <= 1, key, getattr(self, key), "above 0, up to 1")
        drafters = (NO_DRAFTER, *DRAFTERS)
        check(self.drafter in drafters, "drafter", self.drafter, f"one of {', '.join(drafters)}")
        check(self.output.endswith(".jsonl"), "output", self.output, "a name that ends in .jsonl")


def main(words: Sequence[str]) -> int:
    settings = resolve(Settings, overrides=words)
    settings.validate()
    device, dtype = parse_device(settings.device), parse_dtype(settings.dtype)
    import torch  # after the settings are known to be good: slow to import

    from hispec.lm import load
    from train.sample_file import SampleFile
    from train.speaker import Speaker, find_target, made_by, plan

    if settings.threads:
        torch.set_num_threads(settings.threads)
    quiet_transformers()
    out = Output()
    lm = load(settings.base, dtype=dtype, device=device)
    prompts, indices = plan(settings, lm)
    target = find_target(settings.base)
    file = SampleFile(Path(settings.output), made_by(settings, lm, target))
    speaker = Speaker(lm, settings, prompts, file, target)
    left = [index for index in indices if index >= file.progress.next]
    if file.progress.next:
        out.say(
            f"{settings.output}: going on at sample {left[0]}" if left else
            f"{settings.output} is finished"
        )  # fmt: skip
    if file.cut:
        out.say(f"a stopped run had left {file.cut} bytes of an unfinished group: cut off")
    began, tokens_before = time.perf_counter(), file.progress.tokens
    columns = (
        *(TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
        TextColumn("{task.fields[speed]}"),
    )
    with Progress(*columns, console=Output(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(indices), completed=len(indices) - len(left), speed="")
        for start in range(0, len(left), settings.batch_size):
            group = left[start : start + settings.batch_size]
            speaker.make(group)
            done = file.progress
            speed = (done.tokens - tokens_before) / (time.perf_counter() - began)
            shown = f"{done.rows} kept, {speed:.1f} tokens/s"
            bar.update(task, advance=len(group), speed=shown)
    done = file.progress
    speed = done.tokens / done.seconds if done.seconds else 0.0
    dropped = ", ".join(f"{n} {why}" for why, n in sorted(done.dropped.items())) or "nothing"
    out.say(
        f"{done.rows} samples in {settings.output}; dropped: {dropped}; {done.tokens} tokens "
        f"decoded, {speed:.1f} tokens/s"
    )
    print(
        json.dumps(
            {
                "settings": asdict(settings),
                "samples": done.rows,
                "dropped": done.dropped,
                "tokens": done.tokens,
                "tokens_per_second": speed,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_cleanly(lambda: main(sys.argv[1:])))
