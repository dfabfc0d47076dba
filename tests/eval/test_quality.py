"""eval/quality.py: the tasks, what is compared with what, and the figures of text."""

from __future__ import annotations

import json
import math
import re
import sys

import pytest
from conftest import run
from lm_eval.tasks import TaskManager

import eval.harness_tasks
import eval.quality
from eval.harness import GenerationSettings, HarnessModel, LogLikelihoods
from eval.harness_tasks import Metric, difference, load_tasks, run_tasks
from hispec.base_models.local import find_base, load_base
from hispec.checkpoint import io as checkpoint
from hispec.config import DecodeConfig, ExitConfig
from hispec.data.documents import local_rows
from hispec.models.exit_model import ExitModel

QUICK = ("sequences=2", "seq_len=32", "limit=6", "max_new_tokens=8")


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """An EE checkpoint whose trunk has moved a little."""
    base = find_base(str(tiny_base))
    model = ExitModel(load_base(base.folder), ExitConfig.of([2, 4], "block", blocks=1))
    trunk = {name: tensor * 1.01 for name, tensor in model.hf.state_dict().items()}
    folder = tmp_path_factory.mktemp("trained") / "ee"
    checkpoint.save_checkpoint(folder, model, base, trunk=trunk)
    return folder


def line_of(capsys, *words) -> dict:
    eval.quality.main([*words, *QUICK])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_frozen_trunk_is_the_base_bit_for_bit(ee, tmp_path, capsys):
    tasks = "tasks=[local/common,local/word_problems]"
    found = line_of(capsys, f"checkpoint={ee}", f"output={tmp_path}", tasks)
    assert found["verdict"] == "frozen trunk: the target is the base bit for bit"
    assert [c["name"] for c in found["columns"]] == ["full model = base", "exit 4", "exit 2"]
    full, *exits = (column["text"] for column in found["columns"])
    assert full["kl"] == 0
    assert all(column["kl"] > 0.01 for column in exits)
    assert full["perplexity"] == pytest.approx(math.exp(full["loss"]))
    metrics = [(f["task"], f["metric"]) for f in found["columns"][2]["figures"]]
    assert ("local/common", "acc") in metrics
    assert ("local/word_problems", "exact_match, strict-match") in metrics
    written = json.loads((tmp_path / "quality.json").read_text())
    assert [len(f["each"]) for f in written["columns"][0]["figures"]] == [6] * 4


def test_a_trained_trunk_has_gone_from_its_base(trained, tmp_path, capsys):
    found = line_of(capsys, f"checkpoint={trained}", f"output={tmp_path}")
    assert found["verdict"].startswith("trained trunk: the target is no longer the base")
    assert [c["name"] for c in found["columns"]] == ["base", "full model", "exit 4", "exit 2"]
    base, full = (column["text"] for column in found["columns"][:2])
    assert base["kl"] == 0 < full["kl"]
    assert base["loss"] != full["loss"]
    assert [(d["task"], d["metric"]) for d in found["differences"]] == [
        ("local/common", "acc"),
        ("local/common", "acc_norm"),
    ]
    assert all(d["stderr"] is not None for d in found["differences"])


def test_what_a_config_says_of_the_trunk_is_not_believed(trained, tiny_base, tmp_path, capsys):
    """Weights are compared: a trained trunk that calls itself frozen is found out."""
    lying = tmp_path / "lying"
    checkpoint.copy_checkpoint(trained, lying)
    config = json.loads((lying / "exit_config.json").read_text())
    config["base"]["trained"] = False
    (lying / "exit_config.json").write_text(json.dumps(config))
    assert line_of(capsys, f"checkpoint={lying}", "tasks=[]")["same_as_base"] is False
    plain = line_of(
        capsys, f"checkpoint={tiny_base}", f"base={trained}", "tasks=[]", f"output={tmp_path}"
    )
    assert plain["same_as_base"] is False


def test_a_base_that_is_not_here(ee, tmp_path, capsys):
    """A frozen trunk is measured without it, and that is said; a trained one needs it."""
    model, _ = checkpoint.load_checkpoint(ee)
    base = checkpoint.own_base(ee, checkpoint.read_config(ee))
    full = tmp_path / "full"
    checkpoint.save_checkpoint(full, model, base, full=True)
    config = checkpoint.read_config(full)
    config["base"]["id"] = "nobody/base"
    (full / "exit_config.json").write_text(json.dumps(config))
    found = line_of(capsys, f"checkpoint={full}", "tasks=[]")
    assert found["verdict"].startswith("not compared with the base: 'nobody/base' is no local")
    assert found["same_as_base"] is None
    config["base"]["trained"] = True
    (full / "exit_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="nobody/base"):
        eval.quality.main([f"checkpoint={full}", "tasks=[]", *QUICK])


def test_tasks_without_the_harness(ee, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval.quality, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="tasks need lm-evaluation-harness"):
        eval.quality.main([f"checkpoint={ee}", *QUICK])
    assert line_of(capsys, f"checkpoint={ee}", f"output={tmp_path}", "tasks=[]")["same_as_base"]


UNPLANNED = {"lookup_length": 3}


def test_text_is_generated_as_planned_or_as_said(lm, monkeypatch):
    plan = {"ladder": [6], "drafter": "lookup", "lookup_length": 5}
    for planned, said, expected in (
        (None, {}, DecodeConfig([6], drafter="lookup", **UNPLANNED)),
        (plan, {}, DecodeConfig(**plan)),
        (plan, {"ladder": "4,6"}, DecodeConfig([4, 6])),
        (plan, {"drafter": "recycle"}, DecodeConfig([6], drafter="recycle", **UNPLANNED)),
        (None, {"drafter": "exit"}, DecodeConfig([2, 4, 6])),
        (plan, {"ladder": "plain"}, DecodeConfig([6])),
    ):
        monkeypatch.setattr(type(lm), "planned", lambda self, rows, planned=planned: (planned, ""))
        settings = eval.quality.Settings(checkpoint="x", **said)
        assert eval.quality._decoding(settings, lm) == expected


def test_a_plain_model_is_read_at_any_depth(tiny_base, tmp_path, capsys):
    words = f"checkpoint={tiny_base}", f"output={tmp_path}", "depths=[1,5]", "tasks=[]"
    found = line_of(capsys, *words)
    assert [c["depth"] for c in found["columns"]] == [6, 5, 1]
    assert found["verdict"].startswith("a plain model and no base=")


def test_an_exit_that_cannot_write_alone_is_only_scored(tiny_base, tmp_path, capsys):
    base = find_base(str(tiny_base))
    model = ExitModel(load_base(base.folder), ExitConfig.of([2], "adapter"))
    checkpoint.save_checkpoint(tmp_path / "ee", model, base)
    tasks = "tasks=[local/common,local/word_problems]"
    eval.quality.main([f"checkpoint={tmp_path / 'ee'}", tasks, *QUICK])
    out = capsys.readouterr().out
    assert "exit 2 generates no text alone: head='adapter'" in out
    full, alone = json.loads(out.splitlines()[-1])["columns"]
    assert {f["task"] for f in full["figures"]} == {"local/common", "local/word_problems"}
    assert {f["task"] for f in alone["figures"]} == {"local/common"}


def test_the_difference_is_paired():
    ours, base = (
        Metric("t", "acc", sum(each) / 4, 0.25, 4, True, each)
        for each in ([1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0])
    )
    gap, stderr = difference(ours, base)
    assert gap == 0.25
    assert stderr == pytest.approx(0.5 / 2)  # gaps 0, 1, 0, 0: deviation 0.5
    ours.each = []
    assert difference(ours, base) == (0.25, None)


class Knowing(HarnessModel):
    """Answers from the answers: what is scored right must be right."""

    def __init__(self, lm, answers):
        super().__init__(
            lm, 6, LogLikelihoods(lm.model, [6], 4, 512), GenerationSettings(DecodeConfig([6]))
        )
        self.answers = answers
        self.prompts: list[str] = []

    def generate_until(self, requests, disable_tqdm=True):
        self.prompts += [request.args[0] for request in requests]
        asked = [p.rsplit("Question: ", 1)[1].removesuffix("\nAnswer:") for p in self.prompts]
        return [self.answers[question] for question in asked]


def test_gsm8k_of_a_file_is_scored(lm, tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1\n#### {n + 1}"} for n in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = {row["question"]: f" So\n{row['answer']}" for row in rows}
    answers["What is 3 + 1?"] = " It is 4."  # not in the form asked for
    answers["What is 2 + 1?"] = " #### 1,000"
    model = Knowing(lm, answers)
    strict, flexible = run_tasks(model, load_tasks(["gsm8k"], str(file)))
    assert (strict.metric, strict.value) == ("exact_match, strict-match", 0.5)
    assert (flexible.metric, flexible.value) == ("exact_match, flexible-extract", 0.75)
    assert strict.each == [1, 1, 0, 0]
    assert strict.stderr == pytest.approx(0.5 / math.sqrt(3))
    assert all(prompt.count("#### ") == 5 for prompt in model.prompts)


def test_our_own_items_are_sound():
    items = [row for _, row in local_rows(eval.harness_tasks.LOCAL / "common.jsonl")]
    assert len(items) == 64
    assert len({item["question"] for item in items}) == 64
    for item in items:
        assert len(set(item["choices"])) == 4
        assert item["answer"] in range(4)
        if sum_of := re.fullmatch(r"(\d+) ([-+x/]) (\d+) =", item["question"]):
            left, sign, right = sum_of.groups()
            result = eval_sum(left, sign.replace("x", "*"), right)
            assert item["choices"][item["answer"]] == str(result)
    problems = [row for _, row in local_rows(eval.harness_tasks.LOCAL / "word_problems.jsonl")]
    assert len(problems) == 20
    for problem in problems:
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem["answer"])
        assert all(eval_sum(*step[:3]) == int(step[3]) for step in steps)
        assert problem["answer"].rpartition("#### ")[2] == steps[-1][3]


def eval_sum(left: str, sign: str, right: str) -> float:
    a, b = int(left), int(right)
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else None}[sign]


@pytest.mark.parametrize(
    ("names", "file", "message"),
    [
        (
            ["local/comon"],
            None,
            "tasks=.'local/comon'. is not possible: the local ones are local/c",
        ),
        (["local/common"] * 2, None, "each of them once"),
        (["local/common"], "x.jsonl", "gsm8k_file='x.jsonl' is not possible: it is the data of"),
        (["gsm8k"], "/nowhere/x.jsonl", "/nowhere/x.jsonl does not exist"),
    ],
)
def test_tasks_that_cannot_be_are_refused(names, file, message):
    with pytest.raises(ValueError, match=message):
        load_tasks(names, file)


def test_a_gsm8k_file_of_another_shape_is_refused(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"question": "why?", "reply": "so"}\n')
    with pytest.raises(ValueError, match="line 1: answer is missing"):
        load_tasks(["gsm8k"], str(file))
    file.write_text('{"question": "why?", "answer": 3}\n')
    with pytest.raises(ValueError, match="line 1: answer=3 is not possible: a text"):
        load_tasks(["gsm8k"], str(file))
    file.write_text('{"question": null, "answer": "so"}\n')
    with pytest.raises(ValueError, match="line 1: question=None is not possible: a text"):
        load_tasks(["gsm8k"], str(file))
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no questions"):
        load_tasks(["gsm8k"], str(file))


def test_names_of_the_harness(tmp_path, monkeypatch):
    """Without network a task of the Hub is named, and so is one that there is not."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "quiz.yaml").write_text(
        "task: quiz\ndataset_path: nobody/nothing-of-this-name\noutput_type: multiple_choice\n"
        "test_split: test\ndoc_to_text: q\ndoc_to_target: a\ndoc_to_choice: c\n"
    )
    few = TaskManager(include_defaults=False, include_path=tasks)
    monkeypatch.setattr(eval.harness_tasks, "TaskManager", lambda: few)
    with pytest.raises(ValueError, match=r"no task 'quizz'; did you mean quiz\?"):
        load_tasks(["quizz"])
    with pytest.raises(
        ValueError, match=r"the data of 'quiz' cannot be loaded: .*; without network"
    ):
        load_tasks(["quiz"])


def test_a_task_file_of_the_user(lm, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"q": "a b", "c": [" c", " d"], "a": 0}\n' * 3)
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "task: mine\ndataset_path: json\ntest_split: train\noutput_type: multiple_choice\n"
        f"dataset_kwargs:\n  data_files: {tmp_path / 'rows.jsonl'}\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\ndoc_to_choice: '{{c}}'\n"
    )
    few = TaskManager(include_defaults=False)
    monkeypatch.setattr(eval.harness_tasks, "TaskManager", lambda **_: few)
    model = HarnessModel(
        lm, 6, LogLikelihoods(lm.model, [6], 4, 512), GenerationSettings(DecodeConfig([6]))
    )
    found = run_tasks(model, load_tasks([str(mine)]))
    assert {(f.task, f.documents) for f in found} == {("mine", 3)}


def test_a_group_of_the_harness(lm, tmp_path, monkeypatch):
    """All of its tasks, and what the group makes of them."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tmp_path / "rows.jsonl").write_text('{"q": "a b", "c": [" c", " d"], "a": 0}\n' * 3)
    for name in ("one", "two"):
        (tasks / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: train\noutput_type: multiple_choice\n"
            f"dataset_kwargs:\n  data_files: {tmp_path / 'rows.jsonl'}\n"
            "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\ndoc_to_choice: '{{c}}'\n"
        )
    (tasks / "both.yaml").write_text(
        "group: both\ntask: [one, two]\naggregate_metric_list: [{metric: acc}]\n"
    )
    few = TaskManager(include_defaults=False, include_path=tasks)
    monkeypatch.setattr(eval.harness_tasks, "TaskManager", lambda **_: few)
    (group,) = found = load_tasks(["both"])
    assert not eval.harness_tasks.generates_text(group)
    model = HarnessModel(
        lm, 6, LogLikelihoods(lm.model, [6], 4, 512), GenerationSettings(DecodeConfig([6]))
    )
    counts = {f.task: f.documents for f in run_tasks(model, found) if f.metric == "acc"}
    assert counts == {"one": 3, "two": 3, "both": 6}


@pytest.mark.slow
def test_the_command_is_clean_without_network(ee, tmp_path):
    words = (sys.executable, "eval/quality.py", f"checkpoint={ee}", f"output={tmp_path}", *QUICK)
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert "frozen trunk: the target is the base bit for bit" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["columns"][0]["text"]["kl"] == 0
    absent = run(*words, "tasks=[arc_easy]")
    assert absent.returncode == 2
    assert "tasks: the data of 'arc_easy' cannot be loaded" in absent.stderr
    wrong = run(*words, "depths=[3]")
    assert wrong.returncode == 2
    assert "depths=[3] is not possible: the exits are 2, 4" in wrong.stderr
    assert "Traceback" not in absent.stderr + wrong.stderr
