"""Checks an export in a process of its own: `python -m hispec.export.verify REQUEST`.

It loads the written folder as any user would and compares it with its source: the logits at every
exit in float32, which must be equal, and the text of the whole ladder with that of the full model.
Then it measures how well the exits do. The result goes to standard output as JSON, so that a killed
process leaves no file behind.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from hispec.checkpoint.format import read_config
from hispec.config import DecodeConfig
from hispec.data.documents import STDLIB, Document, documents, held_out_stream, split
from hispec.data.packing import Tokens, encoded, packed
from hispec.decoding.decoder import Decode
from hispec.lm import EarlyExitLM, load
from hispec.metrics.agreement import agreement, ladder_pairs
from hispec.metrics.equivalence import first_difference
from hispec.utils.console import quiet_transformers
from hispec.utils.schema import parse_json

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 24, 24
ROWS, ROW_TOKENS = 4, 128
"""Text on which agreement is measured and logits are compared."""
_CHARACTERS = 4000
"""Read of one document."""
NEAR_TIE = 1e-3
"""Gap of the two top logits below which float32 may round either way; such texts are counted."""

_LINES = (
    "The city lies on both banks of the river, and its oldest bridge is made of stone.",
    "def read_config(path):\n    with open(path) as file:\n        return json.load(file)",
    "Question: Why is the sky blue?\nAnswer: Sunlight is scattered by the air, and blue light",
    "In the year 1848 the price of bread rose by 20 %, and the people went to the streets.",
    "1. Wash the rice. 2. Boil it for ten minutes. 3. Let it rest under a lid, off the heat.",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):",
    "She opened the letter, read it twice, and put it back where nobody would look for it.",
    "The integral of a sum is the sum of the integrals, as long as each of them exists.",
)


@dataclass
class Request:
    """The two folders to compare."""

    source: str
    """An EE checkpoint or a plain model."""
    written: str
    """The folder that is to become the export."""
    base: str | None = None
    exits: list[int] | None = None
    """For a plain source: the depths that were written as exits."""


def check_in_fresh_process(
    source: str, written: Path, *, base: str | None = None, exits: Sequence[int] | None = None
) -> dict[str, Any]:
    """Figures of a folder that was just written, found by a new Python process.

    Raises:
        ValueError: it cannot be loaded, or differs from `source`; the message says in what.
    """
    request = Request(source, str(written), base, None if exits is None else list(exits))
    done = subprocess.run(
        [sys.executable, "-m", "hispec.export.verify", json.dumps(asdict(request))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    found = parse_json(done.stdout, "the result of the check") if done.stdout else {}
    if done.returncode < 0:
        raise ValueError(
            f"the check of {written} was ended by signal {-done.returncode}; it needs memory for "
            "the model in float32"
        )
    if done.returncode or "figures" not in found:
        last = found.get("error") or done.stderr.strip()[-500:]
        raise ValueError(f"the export failed its check and was removed: {last}")
    figures: dict[str, Any] = found["figures"]
    return figures


def verify(request: Request) -> dict[str, Any]:
    """Figures of `request.written`.

    Raises:
        ValueError: it cannot be loaded, or differs from `request.source`.
    """
    before = load(
        request.source, dtype=torch.float32, device="cpu", base=request.base, exits=request.exits
    )
    name, parts = _text(Path(request.written), before.tokenizer)
    total = sum(len(ids) for ids, _ in parts)
    length = min(ROW_TOKENS, total)
    rows = packed(parts, length, min(ROWS, total // length))
    wanted = _logits(before, rows.tokens_RT[:1])
    del before
    gc.collect()  # two models in float32 need not be here at once
    lm = load(request.written, dtype=torch.float32, device="cpu", base=request.base)
    _compare(wanted, _logits(lm, rows.tokens_RT[:1]))
    del wanted
    depths, full = lm.model.exits.depths, lm.model.num_layers
    measured = agreement(lm.model, rows, ladder_pairs(depths, full))
    return {
        "dtype": "float32",
        "logits_difference": 0.0,
        "text": name,
        **_decode(lm, _prompts(parts)),
        "agreement": [
            {key: value for key, value in asdict(m).items() if key != "runs"} for m in measured
        ],
    }


@torch.inference_mode()
def _logits(lm: EarlyExitLM, tokens_1T: torch.Tensor) -> dict[int, torch.Tensor]:
    """Logits [T, V] at every exit and at full depth."""
    model = lm.model
    states = model.states(tokens_1T, [*model.exits.depths, model.num_layers])
    return {depth: model.logits(depth, hidden_1TH)[0] for depth, hidden_1TH in states.items()}


def _compare(wanted: dict[int, torch.Tensor], found: dict[int, torch.Tensor]) -> None:
    if wanted.keys() != found.keys():
        raise ValueError(f"it has exits at {list(found)}, its source at {list(wanted)}")
    for depth, logits_TV in wanted.items():
        if not torch.equal(logits_TV, found[depth]):
            gap = (logits_TV - found[depth]).abs().max().item()
            raise ValueError(
                f"the logits at depth {depth} differ by up to {gap:.3g} from the source's, in "
                "float32 on the same tokens"
            )


def _decode(lm: EarlyExitLM, prompts: list[list[int]]) -> dict[str, Any]:
    """Decode prompts with all exits.

    Raises:
        ValueError: the text differs from the full model's, and not at a near-tie.
    """
    full = lm.model.num_layers
    plain = DecodeConfig([full], max_new_tokens=NEW_TOKENS, eos=lm.eos())
    ladder = replace(plain, ladder=[*lm.model.exits.depths, full])
    wanted = Decode(lm.model, prompts, plain).finish()
    run = Decode(lm.model, prompts, ladder)
    near_ties = 0
    for number, (prompt, ours, theirs) in enumerate(
        zip(prompts, run.finish(), wanted, strict=True)
    ):
        found = first_difference(lm.model.hf, prompt, ours, theirs)
        if found is None:
            continue
        if found.gap > NEAR_TIE:
            raise ValueError(
                f"prompt {number}: the text of the ladder {tuple(ladder.ladder)} differs from that "
                f"of the full model at new token {found.position} ({found.ours} instead of "
                f"{found.theirs}), gap of the two top logits {found.gap:.5f}"
            )
        near_ties += 1
    stats = run.stats
    return {
        "prompts": len(prompts),
        "new_tokens": stats.new_tokens,
        "near_ties": near_ties,
        "ladder": list(ladder.ladder),
        "acceptance": {str(rung.depth): rung.acceptance for rung in stats.rungs[:-1]},
    }


def _text(folder: Path, tokenizer: Any) -> tuple[str, list[Tokens]]:
    """(name of the text, its documents as tokens): held-out text of the training, if it is here."""
    recipe = read_config(folder)["recipe"]
    data = recipe.get("data")
    lines = [Document(f"line {n}", line) for n, line in enumerate(_LINES)]
    if data is None or not (data == STDLIB or Path(data).exists()):
        return "eight short texts", encoded(lines, tokenizer)
    words = data, recipe.get("text_column", "text"), recipe.get("data_split", "train")
    share = recipe.get("held_out", 0.05)
    if recipe.get("streaming"):
        found = list(islice(held_out_stream(*words, share), PROMPTS * 2))
    else:
        found = split(documents(*words), share)[1][: PROMPTS * 2]
    found = [d if d.chat else replace(d, text=d.text[:_CHARACTERS]) for d in found]
    parts = encoded(found, tokenizer)
    if not _prompts(parts):
        return "eight short texts", encoded(lines, tokenizer)
    return f"held-out documents of {data}", parts


def _prompts(parts: Sequence[Tokens]) -> list[list[int]]:
    """Up to `PROMPTS` prompts: the beginnings of the documents, then the parts that follow."""
    longest = max((len(ids) for ids, _ in parts), default=0)
    pieces = (
        ids[start : start + PROMPT_TOKENS]
        for start in range(0, longest, PROMPT_TOKENS)
        for ids, _ in parts
        if len(ids) >= start + 8
    )
    return list(islice(pieces, PROMPTS))


def main(word: str) -> int:
    request = Request(**json.loads(word))
    result = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # other output must not mix with the result
    quiet_transformers()
    try:
        found: dict[str, Any] = {"figures": verify(request)}
    except (ValueError, OSError) as error:
        found = {"error": str(error)}
    with result:
        json.dump(found, result)
    return 0 if "figures" in found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
