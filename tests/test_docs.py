"""The documentation says what is there: links, commands, options, keys, files and drawings."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from conftest import ROOT

import hispec
from hispec import generation
from hispec.cli import app
from hispec.config import DecodeConfig
from hispec.lm import EarlyExitLM
from hispec.utils.settings import resolve
from train.recipe import Recipe, load_recipe

DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
SCRIPTS = {
    "train/synthesize.py": "train.synthesize",
    "train/task_prompts.py": "train.task_prompts",
    "eval/agreement.py": "eval.agreement",
    "eval/speed.py": "eval.speed",
    "eval/passes.py": "eval.passes",
    "eval/rounds.py": "eval.rounds",
    "eval/lossless.py": "eval.lossless",
    "eval/quality.py": "eval.quality",
    "eval/hierarchy.py": "eval.hierarchy",
    "eval/serve_load.py": "eval.serve_load",
}
COMMANDS = typer.main.get_command(app).commands
OTHER_OPTIONS = {"--plan", "--strict"}
"""Options in the text that belong to `train/ee_finetune.py` and to zensical."""
OLD = (ROOT / "tests/old_commands.txt").read_text(encoding="utf-8").splitlines()[1:]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

sys.path.insert(0, str(DOCS / "drawings"))
import import_graph  # noqa: E402
import speed_bars  # noqa: E402


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return [text for kind, text in FENCE.findall(path.read_text("utf-8")) if kind == language]


def prose(path: Path) -> str:
    """A page without its fenced code blocks."""
    return FENCE.sub("", path.read_text("utf-8"))


def spans(path: Path) -> list[str]:
    """The inline code of a page."""
    return re.findall(r"`([^`\n]+)`", prose(path))


def anchors(path: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub and Python-Markdown make them."""
    titles = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles]
    return {re.sub(r"[\s-]+", "-", title) for title in words}


def shell_commands() -> list[tuple[str, str]]:
    """(page, command) of every line of the bash blocks."""
    return [
        (name_of(page), line)
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.splitlines()
        if shlex.split(line, comments=True)
    ]


def check_command(line: str) -> None:
    """Parse a command with the parser of the program that it calls.

    Raises:
        Exception: the program would refuse it, or is not known here.
    """
    program, *words = shlex.split(line, comments=True)
    if program == "hispec":
        command, *words = words
        COMMANDS[command].make_context(command, words)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text("utf-8")
        for target in words:
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"
    elif program in ("accelerate", "python"):
        check_python(words)
    else:
        raise AssertionError(f"{program} is not a program of this project")


def check_python(words: list[str]) -> None:
    """Parse what follows `python` or `accelerate launch`."""
    if words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).is_file() for word in words[2:])
        return
    for word in words:
        if word.startswith("recipes/"):
            assert (ROOT / word).is_file(), word
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, settings = words[at], words[at + 1 :]
    if script == "train/ee_finetune.py":
        load_recipe([word for word in settings if word != "--plan"])
    else:
        module = importlib.import_module(SCRIPTS[script])
        words_now = getattr(module, "current_names", list)(settings)
        resolve(module.Settings, overrides=words_now)


@pytest.mark.parametrize(("path", "most"), [(README, 160), (DOCS / "decisions.md", 200)])
def test_pages_that_must_stay_short(path, most):
    assert len(path.read_text("utf-8").splitlines()) <= most


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(there), f"{target}: no such heading"


@pytest.mark.parametrize(("page", "line"), shell_commands())
def test_commands_can_be_parsed(page, line):
    check_command(line)


@pytest.mark.parametrize("line", OLD)
def test_commands_of_the_first_readme_still_can_be_parsed(line):
    check_command(line)


def test_a_command_that_does_not_exist_is_found():
    for line in (
        "hispec generate DIR x --no-such-option",
        "python eval/speed.py checkpoint=DIR no_such_key=1",
        "accelerate launch train/ee_finetune.py recipe=no-such-recipe",
        "make no-such-target",
    ):
        with pytest.raises(Exception, match=r"no.such"):
            check_command(line)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_inline_options_exist(page):
    options = {name: {o for p in c.params for o in p.opts + p.secondary_opts}
               for name, c in COMMANDS.items()}  # fmt: skip
    for span in spans(page):
        words = span.split()
        if words[0] == "hispec" and words[1:2] not in ([], ["--help"]):
            assert words[1] in COMMANDS, span
            found, known = words[2:], options[words[1]]
        elif words[0].startswith("--"):
            found, known = words, set().union(*options.values()) | OTHER_OPTIONS
        else:
            continue
        for word in found:
            assert not word.startswith("--") or word.split("=")[0] in known, span


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_inline_settings_exist(page):
    modules = [importlib.import_module(module) for module in SCRIPTS.values()]
    known = {f.name for kind in (Recipe, DecodeConfig) for f in fields(kind)} | {"recipe"}
    known |= {f.name for module in modules for f in fields(module.Settings)}
    for method in (EarlyExitLM.decode, EarlyExitLM.generate, hispec.load, generation.generate):
        known |= set(inspect.signature(method).parameters)
    known |= {"custom_generate", "trust_remote_code", "assistant_early_exit"}  # of transformers
    known.add("key")  # stands for any
    for span in spans(page):
        words = span.strip("'").split()
        if all(re.match(r"[a-z_]+=", word) for word in words):
            for word in words:
                assert word.split("=")[0] in known, span


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page):
    for span in [*spans(page), *re.findall(r"[\w/.-]+", "\n".join(blocks(page, "text")))]:
        if re.fullmatch(r"(hispec|train|eval|tests|docs|recipes)/[\w/.-]*\w\.(py|md|yaml)", span):
            assert (ROOT / span).is_file(), span


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_extras_that_are_named_exist(page):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for extra in re.findall(r"(?:hispec|\.)\[(\w+)\]", page.read_text("utf-8")):
        assert extra in project["optional-dependencies"], extra


def python_blocks() -> list[tuple[str, str]]:
    return [(name_of(page), block) for page in PAGES for block in blocks(page, "python")]


@pytest.mark.parametrize(("page", "block"), python_blocks(), ids=lambda text: text[:24])
def test_python_in_the_pages_uses_names_that_exist(page, block):
    known = {f.name for f in fields(DecodeConfig)} | {"prompt", "prompts"}
    for method in (EarlyExitLM.decode, EarlyExitLM.generate):
        known |= set(inspect.signature(method).parameters)
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "hispec":
            assert hasattr(hispec, node.attr), node.attr
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "lm":
            assert hasattr(EarlyExitLM, node.attr) or node.attr == "tokenizer", node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("lm.generate", "lm.stream"):
            assert {word.arg for word in node.keywords} <= known, ast.unparse(node)


def test_every_table_of_figures_has_date_commit_machine_and_command():
    text = (DOCS / "benchmarks.md").read_text("utf-8")
    sections = re.split(r"^##+ ", text, flags=re.MULTILINE)[1:]
    tables = 0
    for section in sections:
        title, *lines = section.splitlines()
        for i, line in enumerate(lines):
            if not line.startswith("|---"):
                continue
            tables += 1
            before = "\n".join(lines[:i])
            stamp = r"^\*2\d{3}-\d\d-\d\d.* · commits? [0-9a-f]{7}.* · machine \w"
            assert re.search(stamp, before, re.MULTILINE), f"{title}: no date, commit and machine"
            assert "```bash\n" in before, f"{title}: no command"
    assert tables >= 10


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "benchmarks.md"], ids=name_of)
def test_tables_of_figures_stand_in_the_benchmarks_only(page):
    for line in prose(page).splitlines():
        if line.startswith("|"):
            assert not re.search(r"\d\.\d+x|\d (tokens/s|ms)\b", line), line


def test_the_decode_loop_is_read_in_seven_files():
    text = (DOCS / "architecture.md").read_text("utf-8")
    section = text.split("## The way of a prompt", 1)[1].split("\n## ", 1)[0]
    files = re.findall(r"^\d\. `([\w/.]+)`", section, re.MULTILINE)
    assert 3 <= len(files) <= 7
    assert all((ROOT / file).is_file() for file in files)
    assert files[0].startswith("hispec/cli/")


def test_the_map_names_every_package():
    text = (DOCS / "architecture.md").read_text("utf-8")
    table = text.split("| package |", 1)[1].split("\n\n", 1)[0]
    graph = import_graph.import_graph(ROOT / "hispec")
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == graph.keys()


def test_every_shape_letter_is_in_the_legend():
    text = (DOCS / "concepts.md").read_text("utf-8").split("## Shape letters", 1)[1]
    legend = re.findall(r"^\| ([A-Z]) \|", text, re.MULTILINE)
    assert len(legend) == len(set(legend))
    for folder in ("hispec", "train", "eval"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            words = set(re.findall(r"\b[a-z]\w*_([A-Z][A-Z0-9]*)\b", path.read_text("utf-8")))
            for suffix in words:
                letters = re.sub(r"\d", "", suffix)
                assert set(letters) <= set(legend), f"{name_of(path)}: _{suffix}"


def test_drawings_are_those_that_make_docs_draws():
    """They are tracked, so that the pages show them wherever they are read."""
    graph = import_graph.import_graph(ROOT / "hispec")
    bars = speed_bars.read_table(speed_bars.BENCHMARKS.read_text("utf-8"))
    for name, drawn in (
        ("import-graph.svg", import_graph.draw(graph)),
        ("speed.svg", speed_bars.draw(bars)),
    ):
        tracked = (DOCS / "images" / name).read_text("utf-8")
        assert tracked == drawn, f"{name} is not up to date: run `make docs`"


def test_the_import_graph_points_down_and_refuses_circles():
    graph = import_graph.import_graph(ROOT / "hispec")
    levels = import_graph.levels_of(graph)
    assert {"decoding", "cli"} <= graph.keys()
    assert all(levels[name] > levels[other] for name in graph for other in graph[name])
    with pytest.raises(ValueError, match="cycle"):
        import_graph.draw({"a": {"b"}, "b": {"a"}})


def test_every_page_is_in_the_navigation():
    config = tomllib.loads((ROOT / "zensical.toml").read_text("utf-8"))

    def pages(entries):
        for entry in entries:
            for target in entry.values():
                yield from [target] if isinstance(target, str) else pages(target)

    listed = sorted(pages(config["project"]["nav"]))
    assert listed == sorted(page.relative_to(DOCS).as_posix() for page in PAGES[1:])


@pytest.mark.parametrize("page", sorted((DOCS / "api").glob("*.md")), ids=name_of)
def test_documented_names_exist(page):
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text("utf-8"), re.MULTILINE):
        module, rest = name, []
        while module not in sys.modules:
            try:
                importlib.import_module(module)
            except ModuleNotFoundError:
                module, _, last = module.rpartition(".")
                rest.insert(0, last)
        found = sys.modules[module]
        for part in rest:
            found = getattr(found, part)
        assert found.__doc__, f"{name} has no docstring"


def test_public_names_are_documented():
    documented = "\n".join(page.read_text("utf-8") for page in (DOCS / "api").glob("*.md"))
    for name in hispec.__all__:
        assert f"`hispec.{name}`" in documented, name
