"""Imports run one way, there are no circles, and heavy packages stay out of the decode path."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

ORDER = [
    *("utils", "config", "data", "base_models", "models", "engine", "decoding", "metrics"),
    *("planner", "checkpoint", "hub", "lm", "generation", "export", "report", "serving", "cli"),
]
"""The packages and top-level modules of `hispec`; each may import those before it."""
COPIED = "hispec.checkpoint.custom_generate"
"""Not imported but copied into full checkpoints, from where it imports `hispec.generation`."""
NEVER_IN_LIBRARY = {"accelerate", "peft", "deepspeed", "train", "eval", "trl"}
MOST_LINES, MOST_FILES = 400, 12
FILES = sorted((ROOT / "hispec").rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Modules that a file imports when it runs, at any depth, but not those for types alone."""
    found = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node):
            if getattr(node.test, "id", "") != "TYPE_CHECKING":
                self.generic_visit(node)

        def visit_Import(self, node):
            found.update(alias.name for alias in node.names)

        def visit_ImportFrom(self, node):
            assert not node.level, f"{path}: relative import; write the whole name"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)

    Visitor().visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def part(module: str) -> str:
    """The package or top-level module of `hispec` that a module belongs to."""
    return module.split(".")[1]


def test_the_order_names_every_package():
    found = {part(module) for module in MODULES if module != "hispec.__init__"}
    assert sorted(found) == sorted(ORDER)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_library_modules_import_downward(module):
    if module in ("hispec.__init__", COPIED):  # the one imports all, on first use
        return
    for name in imports(MODULES[module]):
        top = name.split(".")[0]
        assert top not in NEVER_IN_LIBRARY, f"{module} imports {name}"
        assert top != "datasets" or module == "hispec.data.rows", f"{module} imports {name}"
        if name.startswith("hispec."):
            assert ORDER.index(part(name)) <= ORDER.index(part(module)), f"{module} imports {name}"


@pytest.mark.parametrize("folder", ["hispec", "train", "eval"])
def test_no_files_import_in_a_circle(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    names = {
        name: path for name, path in names.items() if path.name != "__init__.py" and name != COPIED
    }
    graph = {name: names.keys() & imports(path) - {name} for name, path in names.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda p: p.name)
def test_packages_are_neither_lonely_nor_crowded(folder):
    files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert 2 <= len(files) <= MOST_FILES


@pytest.mark.parametrize("folder", ["hispec", "train", "eval"])
def test_files_can_be_read_in_one_sitting(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES, path


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


def test_no_two_test_files_have_one_name():
    """pytest imports them by their names alone, and would refuse to collect the second."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
