"""Simulation by a device model: counts are the checkpoint's, and it never becomes its plan."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from conftest import HISPEC, ROOT, plan_of, run, tiny_hf, tiny_model

from hispec.cli import planning
from hispec.config import DecodeConfig, ExitConfig
from hispec.decoding.decoder import Decode
from hispec.models.exit_model import ExitModel
from hispec.planner.device_model import DeviceModel, Hardware, Shape, read_device_model
from hispec.planner.plan_file import is_plain, parse
from hispec.planner.planner import Planner
from hispec.planner.what_if import simulate

H100 = ROOT / "recipes" / "devices" / "llama3-8b-h100.yaml"
PROMPTS = [[5, 6, 7, 8, 5, 6], [9, 4, 3, 9, 4]]


def always_right(exits=(2, 4)):
    """A model whose layers behind the first exit do nothing."""
    model = tiny_model("llama", exits=exits, head="shared", vocab_size=320)
    for layer in model.hf.model.layers[exits[0] :]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    return model


def test_counts_are_measured_and_seconds_simulated():
    """Each layer takes a second and nothing else anything: seconds follow from the real decode's
    passes."""
    device = DeviceModel(
        "a second per layer",
        Shape(12, 4096, 14336, 32, 8, 128256),
        Hardware(bandwidth_gbs=1e9, tflops=1e9, launch_us=1e6, layer_kernels=1),
    )
    model = always_right()
    planner = Planner(model, PROMPTS, new_tokens=12)
    found = simulate(planner, device, {"source": "a test", "tasks": []})
    assert found.depths == {2: 4, 4: 8, 6: 12}
    assert {tuple(t.setting["ladder"]) for t in found.settings} == {
        *((12,), (4, 12), (8, 12), (4, 8, 12))
    }
    setting = {"ladder": [4, 12], "drafter": "exit", "draft_length": 3}
    entry = next(t for t in found.settings if t.setting == setting)
    tokens = seconds = passes = 0
    for prompt in PROMPTS:
        config = DecodeConfig([2, 6], draft_length=3, max_new_tokens=12)
        real = Decode(model, [prompt], config)
        tokens += len(real.finish()[0])
        shallow, full = real.stats.rungs
        passes += full.passes
        # Every draft runs 4 layers, every pass of the full model 8, or 12 where the exit has not
        # run the last draft. Three kernels read logits each time; reading the prompt runs 12.
        caught_up = full.passes - 1
        seconds += 4 * (shallow.passes + caught_up) + 8 * caught_up + 12
        seconds += 3 * (shallow.passes + full.passes)
    assert entry.tokens_per_target_pass == pytest.approx(tokens / passes)
    assert entry.predicted == pytest.approx(tokens / seconds, rel=0.02)
    assert entry.measured is None
    rates = [t.predicted for t in found.settings]
    assert rates == sorted(rates, reverse=True)


def test_drafts_pay_where_passes_are_bound_by_memory():
    model, gain = always_right(), {}
    for tflops in (1e6, 1e-2):
        device = read_device_model(H100)
        device = replace(device, hardware=replace(device.hardware, tflops=tflops))
        found = simulate(Planner(model, PROMPTS, new_tokens=12, rows=2), device, {})
        two, three = found.best_of(2), found.best_of(3)
        assert (len(two.setting["ladder"]), len(three.setting["ladder"])) == (2, 3)
        gain[tflops] = two.predicted / found.plain.predicted
    # bound by memory, right drafts save passes; bound by compute, nothing saves a layer's work
    assert gain[1e6] > 1.5
    assert gain[1e-2] < 1.2


def test_what_cannot_be_replayed_is_left_out_and_counted():
    config = ExitConfig.of([2, 4], "block", blocks=1, previous=True)
    model = ExitModel(tiny_hf(vocab_size=320), config).eval()
    found = simulate(Planner(model, PROMPTS, new_tokens=6), read_device_model(H100), {})
    assert found.left_out == 8
    assert found.best_of(3) is None
    assert is_plain(found.plain.setting)


@pytest.fixture(scope="module")
def simulation():
    planner = Planner(always_right(), PROMPTS, new_tokens=6)
    text = {"source": "a test", "tasks": [""]}
    return simulate(planner, read_device_model(H100), text)


def test_a_simulation_is_never_read_as_a_plan(simulation, tmp_path):
    path = simulation.save(tmp_path)
    assert path.name == "simulated.json"
    content = json.loads(path.read_text())
    assert content["simulated"] is True
    assert content["settings"][0]["over_plain"] > 1
    with pytest.raises(ValueError, match="format_version"):
        parse(content, "plan.json")
    with pytest.raises(ValueError, match=r"unknown key|missing"):
        parse({**content, "format_version": 1}, "plan.json")


def test_it_is_written_to_no_checkpoint(ee, tmp_path):
    planning.check_simulation_output(tmp_path)
    (tmp_path / "other").mkdir()
    plan_of({"ladder": [6]}).save(tmp_path / "other")
    for folder, words in (
        (ee, "a folder without a checkpoint or a plan"),
        (tmp_path / "other", "a folder without a checkpoint or a plan"),
        (tmp_path / "none", "an existing folder"),
    ):
        with pytest.raises(ValueError, match=f"output=.* is not possible: {words}"):
            planning.check_simulation_output(folder)


@pytest.mark.slow
def test_the_command(ee, tiny_base, tmp_path):
    checkpoint = shutil.copytree(ee, tmp_path / "ee")
    before = sorted(path.name for path in checkpoint.iterdir())
    call = (*HISPEC, "plan", checkpoint, "--base", tiny_base, "--device", "cpu")
    small = ("--prompts", 2, "--max-new-tokens", 6, "--device-model", H100)
    (tmp_path / "out").mkdir()
    done = run(*call, *small, "--rows", 2, "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["simulated"] is True
    assert said["rows"] == 2
    assert said["depths"] == {"2": 11, "4": 21, "6": 32}
    assert "simulated: Llama-3-8B" in done.stdout
    assert "a simulation, no plan" in done.stdout.replace("\n", " ")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["simulated.json"]
    assert sorted(path.name for path in checkpoint.iterdir()) == before
    for words, named in (
        (("--output", checkpoint), "output="),
        (("--device-model", tmp_path / "none.yaml"), "device_model="),
        (("--rows", 17), "rows=17"),
    ):
        refused = run(*call, *small, *words)
        assert refused.returncode == 2
        assert named in refused.stderr
        assert "Traceback" not in refused.stderr
