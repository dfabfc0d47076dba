"""Train early exits: `accelerate launch train/ee_finetune.py recipe=NAME [key=value ...]`.

With `--plan` it prints the memory and time that the run would need. The recipe's keys, with their
defaults, limits and meanings, are in `train/recipe.py`.
"""

from __future__ import annotations

import sys

from train.recipe import load_recipe


def main(words: list[str]) -> int:
    """Train; returns 0, or 2 after an error that a user can mend, which is printed as one line."""
    try:
        recipe = load_recipe([word for word in words if word != "--plan"])
        if "--plan" in words:
            from train.plan import show_plan

            show_plan(recipe)
            return 0
        from train.trainer import Trainer  # after the settings are known to be good: slow to import

        Trainer(recipe).train()
    except (ValueError, OSError) as error:
        print(f"ee_finetune: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
