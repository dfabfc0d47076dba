"""Prompts of the tasks that people give a chat model, made of text that every machine has:
`python train/task_prompts.py output=prompts.jsonl`.

`tasks=[completion]` makes functions to be continued as they stand, for models of code.
Passages are prose from the standard library's documentation and the descriptions of the packages
installed here or, with `text=[FILE]`, from the answers in files of `train/synthesize.py`; functions
are those of the standard library. `train/synthesize.py prompts=FILE` lets the target answer the
prompts. Prompt i depends on the seed, i and that text alone. The last line of the output is JSON.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated, Any

from omegaconf import MISSING
from pydantic import Field

from hispec.data.documents import local_documents, stdlib_documents
from hispec.utils.command_line import run_cleanly
from hispec.utils.console import Output
from hispec.utils.files import new_file, output_path
from hispec.utils.limits import Seed, at_most, ending_in, one_of
from hispec.utils.schema import STRICT, validate
from hispec.utils.settings import check, resolve

_PROSE = re.compile(r"[A-Z][\w\s,;:'\"()/.!?%-]+[.!?]", re.ASCII)
_WORDS = range(30, 160)
"""Words of a passage."""
_SENTENCE = re.compile(r"(?<=[.!?]) +(?=[A-Z])")
COMPLETION = "completion"
BACK_TRANSLATION = "back_translation"
_LANGUAGES = "German", "French", "Spanish", "Italian"
_TO = "Translate English to {}: "
_TRANSLATED = re.compile(_TO.format(f"({'|'.join(_LANGUAGES)})"))


@dataclass(frozen=True)
class Material:
    """What prompts are made of."""

    passages: Sequence[str]
    functions: Sequence[str]
    """The header of a function and its docstring, as it stands in the source."""
    translations: Sequence[tuple[str, str]] = ()
    """Languages, and texts in them."""
    most_passages: int = 2
    """Passages of a prompt about more than one of them."""


def _summarization(found: Material, rng: random.Random) -> str:
    start = rng.randrange(len(found.passages))
    text = "\n".join(found.passages[start : start + rng.randint(1, found.most_passages)])
    asked = "Summarize:", "Summarize this text in two sentences:", "Give the main points of this:"
    return f"{rng.choice(asked)} {text}"


def _retrieval(found: Material, rng: random.Random) -> str:
    passages = rng.sample(found.passages, rng.randint(2, found.most_passages))
    about = max(re.findall(r"[A-Za-z]{5,}", rng.choice(passages)) or ["it"], key=len)
    asked = f"What does the text say about {about}?", f"According to the text, what is {about}?"
    return "\n\n".join([*passages, f"Question: {rng.choice(asked)}"])


def _translation(found: Material, rng: random.Random) -> str:
    sentence = rng.choice(_SENTENCE.split(rng.choice(found.passages)))
    return f"{_TO.format(rng.choice(_LANGUAGES))}{sentence}"


def _back_translation(found: Material, rng: random.Random) -> str:
    language, text = rng.choice(found.translations)
    return f"Translate {language} to English: {text}"


def _rewriting(found: Material, rng: random.Random) -> str:
    asked = (
        "Rewrite this in simpler words:",
        "Turn this into a list of questions and answers:",
        "Write an email to a colleague that explains this:",
        "Explain this to a child:",
    )
    return f"{rng.choice(asked)} {rng.choice(found.passages)}"


def _article(found: Material, rng: random.Random) -> str:
    asked = "Write a news article about this:", "Write an encyclopedia entry about this:"
    sentence = rng.choice(_SENTENCE.split(rng.choice(found.passages)))
    return f"{rng.choice(asked)} {sentence}"


def _code(found: Material, rng: random.Random) -> str:
    asked = "Complete this Python function:", "Write this function and explain it:"
    return f"{rng.choice(asked)}\n\n```python\n{rng.choice(found.functions)}\n```"


def _completion(found: Material, rng: random.Random) -> str:
    return f"{rng.choice(found.functions)}\n"


TASKS: dict[str, Callable[[Material, random.Random], str]] = {
    "summarization": _summarization,
    "retrieval": _retrieval,
    "translation": _translation,
    "rewriting": _rewriting,
    "code": _code,
    "article": _article,
    BACK_TRANSLATION: _back_translation,
    COMPLETION: _completion,
}
_DEFAULT = "summarization", "retrieval", "translation", "rewriting", "code"


@dataclass
class Settings:
    """How many prompts, of which tasks."""

    __pydantic_config__ = STRICT

    output: Annotated[str, ending_in(".jsonl")] = MISSING
    prompts: Annotated[int, Field(ge=1), at_most(10**6, "each one is generated from")] = 1000
    """Prompts that differ; all tasks get as many, up to one."""
    tasks: Annotated[list[Annotated[str, one_of(*TASKS)]], Field(min_length=1)] = field(
        default_factory=lambda: list(_DEFAULT)
    )
    """Questions to a chat model, or `completion` alone: `synthesize.py` wants one kind a file.
    `back_translation` takes answers to `translation` that are in `text` into English."""
    text: Annotated[list[str], Field(min_length=1)] | None = None
    """Files of `synthesize.py`: passages are paragraphs of the answers in them."""
    most_passages: Annotated[int, Field(ge=2, le=16)] = 2
    """Passages that a prompt of `summarization` and `retrieval` has at most."""
    seed: Seed = 0


def material() -> Material:
    """Passages and functions from the standard library and the installed packages, in an order
    that depends on what is installed alone."""
    texts, functions = [], []
    for document in stdlib_documents():
        try:
            tree = ast.parse(document.text)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                doc = ast.get_docstring(node)
                texts.append(doc or "")
                if doc and isinstance(node, ast.FunctionDef) and len(doc) < 400:
                    functions.append(_header(node))
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        topics = {}
    texts += [topics[key] for key in sorted(topics)]
    described = {d.metadata["Name"]: d.metadata.get_payload() or "" for d in distributions()}
    texts += [str(described[name]) for name in sorted(described, key=str.lower)]
    passages = dict.fromkeys(part for text in texts for part in _passages(text))
    return Material(list(passages), list(dict.fromkeys(functions)))


def material_of(files: Sequence[str]) -> Material:
    """Passages and translations from the answers of chats, functions from the standard library.

    Raises:
        ValueError: a file cannot be read, or its rows have no `messages`.
    """
    passages: dict[str, None] = {}
    translations = []
    for document in (d for file in files for d in local_documents(Path(file), "messages")):
        *before, answer = (message["content"] for message in document.chat)
        if before and (asked := _TRANSLATED.match(before[-1])):
            translations.append((asked[1], " ".join(answer.split())))
        else:
            passages.update(dict.fromkeys(_passages(answer)))
    return replace(material(), passages=list(passages), translations=translations)


def task_prompts(
    found: Material, tasks: Sequence[str], count: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Rows with `task` and `question`, or `prompt` for completions, the tasks in turn; no prompt
    twice.

    Raises:
        ValueError: there is too little text for so many prompts.
    """
    rng, seen, misses = random.Random(seed), set(), 0
    while len(seen) < count:
        task = tasks[len(seen) % len(tasks)]
        question = TASKS[task](found, rng)
        if question in seen:
            misses += 1
            if misses > 1000:
                raise ValueError(
                    f"prompts={count} is not possible: the text installed here gives {len(seen)}"
                )
            continue
        seen.add(question)
        misses = 0
        yield {"task": task, "prompt" if task == COMPLETION else "question": question}


def _header(node: ast.FunctionDef) -> str:
    """A function without its body, its docstring kept."""
    doc = node.body[0]
    bare = ast.FunctionDef(
        name=node.name,
        args=node.args,
        body=[doc],
        decorator_list=[],
        returns=node.returns,
        type_comment=None,
        lineno=1,
        col_offset=0,
    )
    return ast.unparse(bare)


def _passages(text: str) -> Iterator[str]:
    """Paragraphs of a text that are prose, on one line each."""
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        if len(line.split()) in _WORDS and _PROSE.fullmatch(line):
            yield line


def _check_material(tasks: Sequence[str], found: Material) -> None:
    """Raise ValueError where there is nothing that a task can ask about."""
    for task in tasks:
        if task == BACK_TRANSLATION:
            wanted = "needs answers to `translation` in text=[FILE.jsonl]"
            check(bool(found.translations), "tasks", tasks, f"{task} {wanted}")
        elif task not in ("code", COMPLETION):
            enough = len(found.passages) >= found.most_passages
            check(enough, "tasks", tasks, f"there are too few paragraphs of prose for {task}")


def main(words: Sequence[str]) -> int:
    settings = resolve(Settings, overrides=words)
    validate(Settings, settings)
    apart = COMPLETION not in settings.tasks or set(settings.tasks) == {COMPLETION}
    check(apart, "tasks", settings.tasks, f"{COMPLETION} alone, or none of it")
    output = output_path(Path(settings.output))
    found = material() if settings.text is None else material_of(settings.text)
    found = replace(found, most_passages=settings.most_passages)
    _check_material(settings.tasks, found)
    rows = list(task_prompts(found, settings.tasks, settings.prompts, settings.seed))
    with new_file(output) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    by_task = Counter(row["task"] for row in rows)
    Output().say(f"{len(rows)} prompts in {output}")
    print(json.dumps({"output": str(output), "prompts": len(rows), "tasks": by_task}))
    return 0


if __name__ == "__main__":
    sys.exit(run_cleanly(lambda: main(sys.argv[1:])))
