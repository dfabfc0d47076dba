"""Prompts to JSONL: `python examples/batch.py [CHECKPOINT [PROMPTS.txt]] > answers.jsonl`.

Eight prompts are decoded side by side. When one text has ended, the next prompt takes its row, so
that no row waits for the longest text. A line is written as soon as its text has ended.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hispec

RELEASED = Path(__file__).resolve().parents[1] / "checkpoints" / "smollm2-135m-ee"
ROWS, NEW_TOKENS = 8, 96
PROMPTS = [
    "Name three rivers in Europe.",
    "What is seven times eight?",
    "Translate to French: The weather is lovely today.",
    "Write a haiku about a lighthouse.",
    "Why is the sky blue?",
    "Write a Python function that reverses a list.",
    "What do bees eat?",
    "Give me two ideas for a rainy Sunday.",
    "What is the difference between a lake and a pond?",
    "Who wrote Hamlet?",
]


def main(checkpoint: str | Path = RELEASED, file: str | None = None) -> None:
    lines = PROMPTS if file is None else Path(file).read_text(encoding="utf-8").splitlines()
    prompts = [line for line in lines if line.strip()]
    lm = hispec.load(checkpoint)
    # the longest first: the cache has room for the longest of the prompts that it begins with
    order = sorted(range(len(prompts)), key=lambda i: len(lm.encode(prompts[i])), reverse=True)
    busy, waiting = dict(enumerate(order[:ROWS])), order[ROWS:]
    run = lm.decode([prompts[i] for i in busy.values()], max_new_tokens=NEW_TOKENS)
    while busy:
        run.step()
        for row in busy.keys() & set(run.ended_rows()):
            prompt = prompts[busy.pop(row)]
            tokens, _ = run.output(row)
            text = lm.tokenizer.decode(tokens, skip_special_tokens=True)
            print(json.dumps({"prompt": prompt, "text": text, "tokens": len(tokens)}), flush=True)
            if waiting:
                busy[row] = waiting.pop(0)
                run.admit(row, lm.encode(prompts[busy[row]]))
    print(f"{run.stats.tokens_per_second:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
