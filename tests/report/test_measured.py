"""`agreement.json` and `speed.json` that are wrong: one ValueError with file, key and remedy."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from report_files import write_agreement, write_speed

from hispec.report import measured, page

CONFIG = {"model": {"num_hidden_layers": 6}, "figures": {}}


def content(write, folder: Path) -> dict:
    write(folder)
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def agreement_file(tmp_path_factory) -> dict:
    return content(write_agreement, tmp_path_factory.mktemp("agreement"))


@pytest.fixture(scope="module")
def speed_file(tmp_path_factory) -> dict:
    return content(write_speed, tmp_path_factory.mktemp("speed"))


def changed(value: dict, path: tuple, new: object) -> dict:
    """A copy in which the value at a path of keys is another one; `...` removes it."""
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if new is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return value


def read(folder: Path, name: str) -> dict | None:
    return measured.agreement(folder, CONFIG) if "agree" in name else measured.speed(folder)


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        (("agreement",), [], r"agreement=\[\] is not possible: at least 1 values"),
        (("agreement",), ..., "agreement is missing"),
        (("agreement",), {}, "agreement={} is not possible: a list"),
        (("agreement", 0), 5, r"agreement\[0\]=5 is not possible: an object"),
        (("agreement", 0, "top1"), "x", r"agreement\[0\].top1='x' is not possible: a number"),
        (("agreement", 0, "top1"), 1.5, r"agreement\[0\].top1=1.5 is not possible: at most 1"),
        (("agreement", 0, "top1"), float("nan"), r"top1=nan is not possible: a finite number"),
        (("agreement", 0, "shallow"), 2.0, "shallow=2.0 is not possible: a whole number"),
        (("agreement", 0, "shallow"), 6, r"agreement\[0\]=.* is not possible: a depth `shallow`"),
        (("agreement", 0, "deep"), 9, "deep=9 is not possible: the model has 6 layers"),
        (("agreement", 0, "tokens"), 0, "tokens=0 is not possible: 1 or more"),
        (("agreement", 0, "tokens"), True, "tokens=True is not possible: a whole number"),
        (("agreement", 0, "more"), 1, r"unknown key 'agreement\[0\].more'"),
        (("untrained",), None, "untrained=None is not possible: a list"),
        (("extra",), 1, "unknown key 'extra'"),
    ],
)
def test_an_agreement_file_that_is_wrong(agreement_file, tmp_path, path, new, message):
    file = tmp_path / "agreement.json"
    file.write_text(json.dumps(changed(agreement_file, path, new)))
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, file.name)
    assert str(error.value).startswith(str(file))
    assert str(error.value).endswith("; `eval/agreement.py` writes it anew")


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        (("results",), [], r"results=\[\] is not possible: at least 2 values"),
        (("results",), None, "results=None is not possible: a list"),
        (("results", 1), ..., "transformers' generate first, then own plain decoding"),
        (("results", 1, "outside"), True, "transformers' generate first, then own plain"),
        (("results", 1, "outside"), 0, r"results\[1\].outside=0 is not possible: true or false"),
        (("results", 0, "tasks"), {}, r"results\[0\].tasks={} is not possible: at least 1"),
        (("results", 1, "tasks", "chat"), ..., "results=.* rows that all have the same tasks"),
        (("results", 0, "tokens_per_second"), 20, "tokens_per_second=20 is not possible: an obj"),
        (("results", 0, "tokens_per_second", "median"), None, "median=None is not possible"),
        (("results", 0, "tokens_per_second", "median"), 99.0, "lowest <= median <= highest"),
        (("results", 0, "tokens_per_second", "lowest"), -1, "lowest=-1 is not possible: 0 or m"),
        (("results", 2, "acceptance", "free"), "all", "acceptance.free='all' is not possible"),
        (("results", 2, "differences"), [], "differences=.* is not possible: an object"),
        (("results", 2, "setting"), 7, r"results\[2\].setting=7 is not possible: a text"),
        (("prompts",), {}, "prompts={} is not possible: at least 1 values"),
        (("prompts", "chat"), 0, "prompts.chat=0 is not possible: 1 or more"),
        (("prompts", "chat"), "2", "prompts.chat='2' is not possible: a whole number"),
        (("settings", "repeats"), ..., "settings.repeats is missing"),
        (("settings", "max_new_tokens"), 1.5, "max_new_tokens=1.5 is not possible: a whole"),
        (("machine", "threads"), "two", "machine.threads='two' is not possible: a whole number"),
        (("machine", "torch"), ..., "machine.torch is missing"),
        (("extra",), 1, "unknown key 'extra'"),
    ],
)
def test_a_speed_file_that_is_wrong(speed_file, tmp_path, path, new, message):
    file = tmp_path / "speed.json"
    if path == ("results", 1) and new is ...:  # only transformers and other packages are left
        speed_file = changed(speed_file, ("results",), speed_file["results"][::4])
    else:
        speed_file = changed(speed_file, path, new)
    file.write_text(json.dumps(speed_file))
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, file.name)
    assert str(error.value).startswith(str(file))
    assert str(error.value).endswith("; `eval/speed.py` writes it anew")


@pytest.mark.parametrize("name", ["agreement.json", "speed.json"])
@pytest.mark.parametrize(
    "text",
    [
        *(b"\xff\xfe", b"", b"null", b"[]", b"[" * 50_000, b'{"a": ' * 50_000),
        *(b'{"agreement": ' + b"9" * 5000 + b"}", b'{"exits": ["\\ud800"]}'),
    ],
    ids=["utf-16", "empty", "null", "list", "lists", "objects", "integer", "surrogate"],
)
def test_files_that_are_no_object(tmp_path, name, text):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match="anew") as error:
        read(tmp_path, name)
    assert str(error.value).startswith(str(tmp_path / name))
    assert len(str(error.value)) < 500


def paths(value: object, so_far: tuple = ()) -> list[tuple]:
    """Paths to all values inside another one."""
    if isinstance(value, dict):
        members = list(value.items())
    else:
        members = list(enumerate(value)) if isinstance(value, list) else []
    found = [so_far] if so_far else []
    return found + [path for key, inner in members for path in paths(inner, (*so_far, key))]


values = st.one_of(
    *(st.none(), st.booleans(), st.integers(-3, 10), st.integers(), st.floats(), st.text()),
    *(st.just([]), st.just({}), st.just(...), st.just([[1]])),
)


@fuzz("agreement.json and speed.json", 200)
@given(data=st.data(), name=st.sampled_from(["agreement.json", "speed.json"]))
def test_a_file_with_any_value_changed_is_shown_or_refused(
    agreement_file, speed_file, tmp_path, data, name
):
    """Nothing but ValueError, and what is taken can be drawn: the page's template runs on it."""
    whole = agreement_file if "agree" in name else speed_file
    path = data.draw(st.sampled_from(paths(whole)))
    (tmp_path / name).write_text(json.dumps(changed(whole, path, data.draw(values))))
    try:
        found = read(tmp_path, name)
    except ValueError as error:
        assert str(tmp_path / name) in str(error)  # noqa: PT017
        return
    finally:
        (tmp_path / name).unlink()
    sections = {"agreement": None, "speed": None, "plan": None, "texts": None}
    html = page.render(
        {
            **{"name": "x", "made": "x", "version": "x", "lead": "x", "facts": {}, "settings": []},
            **{**sections, name.partition(".")[0]: found, "missing": {}},
        }
    )
    assert "nan" not in html.replace("nanny", "").lower().split()


def test_an_agreement_of_a_training_is_checked_too():
    """Rows of `exit_config.json` may have keys of a later version, but not other types."""
    row = {"shallow": 2, "deep": 6, "top1": 0.5, "acceptance": 0.4, "tokens": 9, "later": 1}
    config = {**CONFIG, "figures": {"agreement": [row], "untrained": [row]}}
    found = measured.agreement(Path("nowhere"), config)
    assert found["of_training"]
    assert found["exits"][0]["untrained"] == 0.5
    for wrong in ("abc", [5], [{**row, "top1": "x"}]):
        config["figures"]["untrained"] = wrong
        with pytest.raises(ValueError, match=r"exit_config.json, figures: untrained"):
            measured.agreement(Path("nowhere"), config)
