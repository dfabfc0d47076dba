"""Imports run downward only; heavy packages stay out of the decode path."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# Each module may import those in lines before its own.
LAYERS = [
    {"config", "files", "stats", "bases", "console", "proposal", "families", "attention", "chat"},
    {"sampling", "cache", "plan_file", "text", "convert", "gguf_tokenizer"},
    {"fetch", "prompts", "packing", "hub_errors"},
    {"heads", "card"},
    {"model"},
    {"ladder", "draft", "measure", "compare", "exits_file"},
    {"decode", "checkpoint", "contexts", "latency", "plan_picture"},
    {"replay"},
    {"parcel"},
    {"hub", "draft_model", "gguf_file"},
    {"lm", "inspection", "generation"},
    {"verify", "plan", "report_figures", "report_texts"},
    {"export", "planning", "report"},
    {"show"},
    {"cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
NEVER_IN_LIBRARY = {"accelerate", "peft", "deepspeed", "train", "eval", "trl"}


def imports(path) -> set[str]:
    """Modules that a file imports when it runs, at any depth, but not those for types alone."""
    found = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node):
            if getattr(node.test, "id", "") != "TYPE_CHECKING":
                self.generic_visit(node)

        def visit_Import(self, node):
            found.update(alias.name for alias in node.names)

        def visit_ImportFrom(self, node):
            prefix = "." * node.level
            if node.level and not node.module:
                found.update(prefix + alias.name for alias in node.names)
            else:
                found.add(prefix + (node.module or ""))

    Visitor().visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "hispec").glob("*.py")), ids=lambda p: p.stem)
def test_library_modules_import_downward(path):
    if path.stem == "__init__":
        return
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in NEVER_IN_LIBRARY, f"{path.stem} imports {name}"
        assert top != "datasets" or path.stem == "text", f"{path.stem} imports {name}"
        if name.startswith("."):
            module = name.lstrip(".").split(".")[0]
            assert RANK[module] < RANK[path.stem], f"{path.stem} imports {module}"


@pytest.mark.parametrize(("folder", "other"), [("train", "eval"), ("eval", "train")])
def test_train_and_eval_do_not_import_each_other(folder, other):
    for path in (ROOT / folder).glob("*.py"):
        assert other not in {name.split(".")[0] for name in imports(path)}, path


def test_no_file_of_train_hides_a_library():
    """`accelerate launch train/ee_finetune.py` puts train/ first on the path."""
    names = {path.stem for path in (ROOT / "train").glob("*.py")}
    assert not names & {"datasets", "logging", "types", "evaluate", "peft", "tokenizers", "queue"}


def test_the_command_starts_without_torch():
    code = "import sys, hispec, hispec.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
