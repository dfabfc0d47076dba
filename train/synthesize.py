"""Generate training text with the target itself:
`python train/synthesize.py base=NAME output=FILE.jsonl`.

Exits that are trained on the target's own text see the contexts that they will draft in. The user's
turns come from a file (`prompts=`), or the target invents them too: given its chat template up to
where the user's words begin, a tuned model writes a user's turn (Magpie, 2406.08464). A base
without a template writes text from its BOS token on. Sample i depends on the settings, the seed and
i alone, so a run that was killed continues where it stopped. The last line of the output is JSON.
Keys and defaults: `train/synthesis_settings.py`. To train on the file: `data=FILE.jsonl
text_column=messages` (`text` for raw texts).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hispec.utils.command_line import parse_device, parse_dtype, run_cleanly
from hispec.utils.console import Output, quiet_transformers
from hispec.utils.files import output_path
from hispec.utils.settings import resolve
from train.synthesis_settings import Settings


def main(words: Sequence[str]) -> int:
    settings = resolve(Settings, overrides=words)
    settings.validate()
    output_path(Path(settings.output))
    needed = {"datasketch": "finds duplicates"}
    if settings.server is not None:
        needed["openai"] = "asks a server"
    for package, use in needed.items():
        if find_spec(package) is None:
            raise ValueError(f"{package} {use}: pip install -e '.[synthesis]'")
    device, dtype = parse_device(settings.device), parse_dtype(settings.dtype)
    import torch  # after the settings are known to be good: slow to import

    from hispec.lm import load
    from train.sample_file import SampleFile
    from train.synthesizer import Synthesizer, find_target, made_by, plan

    if settings.threads:
        torch.set_num_threads(settings.threads)
    quiet_transformers()
    out = Output()
    if settings.server is None:
        lm = load(settings.base, dtype=dtype, device=device, backend=settings.backend)
    else:
        from train.server_queue import without_weights

        lm = without_weights(settings.base)
    prompts, indices = plan(settings, lm)
    target = find_target(settings.base)
    file = SampleFile(Path(settings.output), made_by(settings, lm, target))
    synthesizer = Synthesizer(lm, settings, prompts, file, target)
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
        for made in synthesizer.make(left):
            done = file.progress
            speed = (done.tokens - tokens_before) / (time.perf_counter() - began)
            shown = f"{done.rows} kept, {speed:.1f} tokens/s"
            bar.update(task, advance=made, speed=shown)
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
