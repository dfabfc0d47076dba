"""Train early exits: `accelerate launch train/ee_finetune.py recipe=NAME [key=value ...]`.

With `--plan` it prints the memory and time that the run would need. The recipe's keys, with their
defaults, limits and meanings, are in `train/recipe.py`.
"""

from __future__ import annotations

import sys

from hispec.utils.command_line import run_cleanly
from train.recipe import load_recipe


def main(words: list[str]) -> None:
    recipe = load_recipe([word for word in words if word != "--plan"])
    if "--plan" in words:
        from train.plan import show_plan

        show_plan(recipe)
        return
    from train.trainer import Trainer  # after the settings are known to be good: slow to import

    Trainer(recipe).train()


if __name__ == "__main__":
    sys.exit(run_cleanly(lambda: main(sys.argv[1:])))
