"""Device models: what a pass costs by the roofline, and what files may say."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import yaml
from conftest import ROOT, tiny_hf, tiny_model

from hispec.config import Exit, ExitConfig
from hispec.models.exit_model import ExitModel
from hispec.planner.device_model import (
    DeviceModel,
    Hardware,
    Measured,
    Shape,
    SimulatedCosts,
    read_device_model,
)
from hispec.planner.latency import (
    CONFIDENCE,
    KEEPING,
    RANKING,
    chain,
    head,
    measure_latency,
    reading,
    segment,
)

SHIPPED = sorted((ROOT / "recipes" / "devices").glob("*.yaml"))
SHAPE = Shape(layers=12, hidden_size=8, intermediate_size=20, heads=4, kv_heads=2, vocab_size=100)
LAYER = 8 * 2 * (8 + 4) + 3 * 8 * 20
"""Weights of one of its layers: Q and O of 8 x 8, K and V of 8 x 4, three matrices of the MLP."""
SLOW_MEMORY = Hardware(bandwidth_gbs=1e-9, tflops=1e9)  # a byte per second, arithmetic for nothing
SLOW_COMPUTE = Hardware(bandwidth_gbs=1e9, tflops=1e-12)  # an operation per second


def costs(hardware, rows=1, shape=SHAPE, depths=(2, 4, 6), model=None, latency=None):
    device = DeviceModel("a test", shape, hardware, latency)
    return SimulatedCosts(device, model or tiny_model("llama", exits=(2, 4)), depths, rows)


def test_memory_bound_passes_read_weights_once_and_the_kv_of_each_row():
    kv = 2 * 4 * 2  # bytes per token and layer: keys and values of 4 numbers, 2 bytes each
    one, three = costs(SLOW_MEMORY), costs(SLOW_MEMORY, rows=3)
    # depths 2 to 4 of 6 stand for 4 layers of 12
    assert one.of(segment(2, 4), 1, 10) == pytest.approx(4 * (2 * LAYER + 11 * kv))
    assert one.of(segment(2, 4), 5, 10) == pytest.approx(4 * (2 * LAYER + 15 * kv))
    assert three.of(segment(2, 4), 5, 10) == pytest.approx(4 * (2 * LAYER + 3 * 15 * kv))
    assert one.of(segment(0, 6, tree=True), 1, 10) == 3 * one.of(segment(2, 4), 1, 10)


def test_compute_bound_passes_grow_with_tokens_and_rows():
    one, three = costs(SLOW_COMPUTE), costs(SLOW_COMPUTE, rows=3)
    # two operations per weight; scores and sums over 11 keys, 8 numbers of the queries
    assert one.of(segment(0, 6), 1, 10) == pytest.approx(12 * (2 * LAYER + 4 * 11 * 8))
    # four tokens see 11, 12, 13 and 14 keys
    assert one.of(segment(0, 6), 4, 10) == pytest.approx(12 * (8 * LAYER + 4 * 50 * 8))
    assert three.of(segment(0, 6), 4, 10) == pytest.approx(3 * one.of(segment(0, 6), 4, 10))


def test_the_dearer_of_the_two_counts_and_overheads_come_on_top():
    both = Hardware(bandwidth_gbs=1e-9, tflops=1e-12, bandwidth_share=0.5, compute_share=0.25)
    few, many = (costs(both).of(segment(0, 6), n, 0) for n in (1, 100))
    assert few == pytest.approx(max(24 * LAYER / 0.5 + 12 * 16 / 0.5, 12 * (2 * LAYER + 32) / 0.25))
    assert many == pytest.approx(12 * (200 * LAYER + 4 * 5050 * 8) / 0.25)
    launched = replace(SLOW_MEMORY, bandwidth_gbs=1e9, launch_us=3, layer_kernels=7, pass_us=50)
    assert costs(launched).of(segment(0, 6), 1, 0) == pytest.approx(12 * 7 * 3e-6)
    assert costs(launched).of(reading(6, False), 1, 0) == pytest.approx(3 * 3e-6 + 50e-6)


def test_devices_share_layers_and_add_up_what_they_have():
    alone = costs(SLOW_MEMORY).of(segment(0, 6), 2, 0)
    shared = replace(SLOW_MEMORY, devices=4, all_reduce_us=5, link_gbs=1e9)
    assert costs(shared).of(segment(0, 6), 2, 0) == pytest.approx(alone / 4 + 24 * 5e-6)
    narrow = replace(shared, link_gbs=1e-9)
    # a ring sends 2 * 3 / 4 of the states of 2 tokens
    sent = 24 * 1.5 * 2 * 8 * 2
    assert costs(narrow).of(segment(0, 6), 2, 0) == pytest.approx(alone / 4 + sent)


def test_the_lm_head_and_the_draft_vocabulary():
    logits = 2 * 4  # bytes: written in float32, and read again
    assert costs(SLOW_MEMORY).of(reading(6, False), 3, 0) == 100 * 8 * 2 + 3 * 100 * logits
    few = ExitConfig.of([2, 4], "block", blocks=1, draft_vocab=9)
    model = ExitModel(tiny_hf(), few).eval()
    drafts = costs(SLOW_MEMORY, model=model)
    assert drafts.of(reading(2, True), 1, 0) == 9 * 8 * 2 + 9 * logits
    assert drafts.of(reading(2, False), 1, 0) == 100 * 8 * 2 + 100 * logits
    named = costs(SLOW_MEMORY, model=model, shape=replace(SHAPE, draft_vocab=20))
    assert named.of(reading(2, True), 1, 0) == 20 * 8 * 2 + 20 * logits


def test_heads_are_those_of_the_checkpoint_at_the_other_width():
    two = ExitModel(tiny_hf(), ExitConfig.of([2], "block", blocks=2)).eval()
    layers = costs(SLOW_MEMORY, depths=(2, 6), model=two)
    assert layers.of(head(2), 1, 0) == layers.layers(2, 1, 0)
    eagle = ExitModel(tiny_hf(), ExitConfig([Exit(0, "eagle3")])).eval()
    found = costs(SLOW_MEMORY, depths=(0, 6), model=eagle)
    wider = 8 * (8 + 4 + 4) + 3 * 8 * 8  # QKV of twice the width; three states fused
    assert found.of(head(0), 1, 0) == found.layers(1, 1, 0) + 2 * wider
    step = found.of(head(0), 1, 5) + found.of(reading(0, True), 1, 5)
    assert found.of(chain(0), 3, 5) == pytest.approx(3 * step)


def test_latencies_that_were_measured():
    latency = Measured(
        tokens=[1, 4],
        layer_ms=[1.0, 2.5],
        lm_head_ms=[2.0, 2.0],
        draft_head_ms=[0.5, 0.5],
        pass_us=100,
    )
    one = costs(None, latency=latency)
    assert one.of(segment(0, 6), 1, 99) == pytest.approx(12e-3)
    assert one.of(segment(2, 4), 2, 99) == pytest.approx(4 * 1.5e-3)
    assert one.of(segment(0, 6), 8, 99) == pytest.approx(12 * 5e-3)  # in proportion past the last
    assert costs(None, rows=2, latency=latency).of(segment(0, 6), 2, 9) == pytest.approx(30e-3)
    assert one.of(reading(2, True), 1, 0) == pytest.approx(0.6e-3)
    assert one.of(reading(2, False), 1, 0) == pytest.approx(2.1e-3)
    assert one.of(CONFIDENCE, 1, 0) == one.of(KEEPING, 1, 0) == 0


def test_every_part_that_is_measured_has_a_simulated_cost():
    exits = ExitConfig([Exit(0, "eagle3"), Exit(4, blocks=1)], draft_vocab=9)
    model = ExitModel(tiny_hf(), exits).eval()
    measured = measure_latency(model, [0, 4, 6], [5], rows=2, repeats=1)
    h100 = read_device_model(SHIPPED[0])
    simulated = SimulatedCosts(h100, model, [0, 4, 6], 2)
    for part in [*measured.seconds, chain(0), CONFIDENCE, RANKING, KEEPING]:
        empty = part in (segment(0, 0), segment(0, 0, tree=True))
        assert (simulated.of(part, 3, 50) > 0) is not empty, part


def test_prompts_of_like_lengths_are_read_together():
    found = costs(SLOW_COMPUTE, rows=3)
    model = tiny_model("llama", exits=(2, 4))
    alone = SimulatedCosts(found.device, model, (2, 4, 6), 1)
    prompts = [[5] * 400, [5] * 10, [5] * 9]
    reading_all = found.prefill(prompts)
    two = SimulatedCosts(found.device, model, (2, 4, 6), 2)
    expected = alone.layers(12, 400, 0) + two.layers(12, 10, 0)
    assert reading_all[6] == pytest.approx(expected)
    blocks = len(model.head(2).blocks)
    assert reading_all[2] == pytest.approx(alone.layers(blocks, 400, 0) + two.layers(blocks, 10, 0))
    assert found.rows == 3


def test_depths_that_fall_together_are_refused():
    thin = replace(SHAPE, layers=3)
    assert costs(SLOW_MEMORY, shape=thin).depth_of == {0: 0, 2: 1, 4: 2, 6: 3}
    with pytest.raises(ValueError, match=r"exits=\(3, 4, 6\) .*different ones .*3 for 2, 4 for 2"):
        costs(SLOW_MEMORY, shape=thin, depths=(3, 4, 6))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_device_models(path):
    found = read_device_model(path)
    assert found.sources
    shape = found.model
    weights = shape.layers * shape.layer_weights + 2 * shape.vocab_size * shape.hidden_size
    billions = {"llama3-8b": 8.03, "llama3-70b": 70.55}["-".join(path.stem.split("-")[:2])]
    assert weights / 1e9 == pytest.approx(billions, rel=0.002)
    header = path.read_text().splitlines()[0]
    assert header == f"# hispec plan CHECKPOINT --device-model recipes/devices/{path.name}"


def test_a_pass_of_llama3_8b_takes_what_its_weights_do():
    """16 GB less the embeddings at 2.68 TB/s, some overhead: 6 to 7 ms."""
    found = read_device_model(ROOT / "recipes/devices/llama3-8b-h100.yaml")
    model = tiny_model("llama", exits=(2, 4))
    by_rows = [SimulatedCosts(found, model, (2, 4, 6), rows) for rows in (1, 16, 256)]
    once = [c.of(segment(0, 6), 1, 500) + c.of(reading(6, False), 1, 500) for c in by_rows]
    assert 0.006 < once[0] < 0.007
    assert once[0] < once[1] < 1.2 * once[0]
    # 256 rows of 8 tokens are bound by compute: twice as many take twice as long
    many = [by_rows[2].of(segment(0, 6), n, 500) for n in (8, 16)]
    assert 1.8 < many[1] / many[0] < 2.2


CONTENT = yaml.safe_load(SHIPPED[0].read_text())


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("hardwear",), {}, "unknown key 'hardwear'"),
        (("hardware", "bandwith_gbs"), 3, "unknown key 'bandwith_gbs'; known keys: all_reduce_us"),
        (("hardware", "tflops"), "many", "hardware.tflops='many' is not possible: a number"),
        (("hardware", "devices"), 0, "hardware.devices=0 is not possible: 1 or more"),
        (("hardware", "bandwidth_share"), 1.5, "hardware.bandwidth_share=1.5 .*: at most 1"),
        (("model", "layers"), 2.5, "model.layers=2.5 is not possible: a whole number"),
        (("model", "hidden_size"), 2**40, "model.hidden_size=.*: at most"),
        (("model", "heads"), 33, "model.head_size=None is not possible: needed"),
        (("model", "vocab_size"), None, "model.vocab_size=None is not possible: a whole number"),
        (("model",), 5, "model=5 is not possible"),
        (("name",), "", "name='' is not possible"),
        (("hardware",), None, "given=.* is not possible: either hardware or latency"),
        (
            ("latency",),
            {"tokens": [1, 2], "layer_ms": [1.0, 1.0], "lm_head_ms": [1.0, 1.0]},
            r"given=\['hardware', 'latency'\] is not possible: either hardware or latency",
        ),
    ],
)
def test_wrong_files_are_named(tmp_path, place, value, message):
    content = copy.deepcopy(CONTENT)
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message) as caught:
        read_device_model(path)
    assert "mine.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("latency", "message"),
    [
        ({"tokens": [2, 1]}, r"latency.tokens=\[2, 1\] is not possible: increasing"),
        ({"layer_ms": [1.0]}, "latency.layer_ms=.* is not possible: one for each of tokens, 2"),
        ({"layer_ms": [1.0, 0.0]}, r"latency.layer_ms\[1\]=0.0 is not possible: more than 0"),
    ],
)
def test_wrong_latencies_are_named(tmp_path, latency, message):
    right = {"tokens": [1, 2], "layer_ms": [1.0, 1.0], "lm_head_ms": [1.0, 1.0]}
    content = {"name": "x", "model": CONTENT["model"], "latency": {**right, **latency}}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        read_device_model(path)


def test_no_file():
    with pytest.raises(ValueError, match=r"device_model='nowhere\.yaml' is not possible"):
        read_device_model(ROOT.__class__("nowhere.yaml"))
