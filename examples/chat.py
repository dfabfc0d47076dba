"""A chat in the terminal: `python examples/chat.py [CHECKPOINT]`; an empty line ends it.

The whole conversation goes through the model's chat template, and the answer is printed as it is
committed, several tokens at a time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hispec
from hispec.decoding.decoder import Decode

RELEASED = Path(__file__).resolve().parents[1] / "checkpoints" / "smollm2-135m-ee"


def main(checkpoint: str | Path = RELEASED) -> None:
    lm = hispec.load(checkpoint)
    # the plan's ladder and drafter if there is a plan for this machine, else the default
    settings, why = lm.choose(None, {"max_new_tokens": 256})
    print(why)
    messages: list[dict[str, str]] = []
    while question := ask():
        messages.append({"role": "user", "content": question})
        prompt = lm.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        run = Decode(lm.model, [prompt["input_ids"]], hispec.DecodeConfig(**settings, eos=lm.eos()))
        answer = ""
        for piece in lm.stream(run):
            print(piece.text, end="", flush=True)
            answer += piece.text
        print(f"\n[{run.stats.tokens_per_target_pass:.2f} tokens per pass of the full model]")
        messages.append({"role": "assistant", "content": answer})


def ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
