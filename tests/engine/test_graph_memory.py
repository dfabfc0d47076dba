"""What compiled graphs, and the making of them, leave in memory."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import ROOT

MEMORY = """
import re, pathlib, sys, openvino as ov, torch
from conftest import tiny_model
from hispec.engine import openvino_graph

if sys.argv[1] == "unmarked":
    openvino_graph._marked = lambda model: model

def used():  # bytes of this process that no file backs
    rollup = pathlib.Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.search(r"^Anonymous: +([0-9]+) kB", rollup, re.MULTILINE).group(1))

config = tiny_model("llama").hf.config
torch.manual_seed(0)
linear = torch.nn.Linear(1024, 32768, bias=False)
linear.weight.data = linear.weight.detach().bfloat16().float()
states, out, core = torch.randn(1, 1024), torch.empty(1, 32768), ov.Core()
before = used()
graph = openvino_graph.Traced(core, linear, config, [states], threads=1).graph([[-1, 1024]])
graph.set_input(0, states)
graph.set_output(0, out)
graph.infer()
assert torch.allclose(out, linear(states), rtol=1e-4, atol=1e-4)
print((used() - before) / linear.weight.numel())
"""


TRACES = """
import re, pathlib, openvino as ov, torch
from conftest import tiny_model
from hispec.engine.openvino_graph import Traced

def used():  # bytes of this process that no file backs
    rollup = pathlib.Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.search(r"^Anonymous: +([0-9]+) kB", rollup, re.MULTILINE).group(1))

config = tiny_model("llama").hf.config
layers = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(4)))
layers.bfloat16().requires_grad_(False)
states, core, after = torch.randn(1, 2048), ov.Core(), []
for trace in range(4):
    layers[0].weight.mul_(1.5)
    Traced(core, layers, config, [states], threads=1)
    after.append(used())
print((after[-1] - after[0]) / 3 / sum(weight.numel() for weight in layers.parameters()))
"""


def test_what_was_traced_is_not_kept(tmp_path):
    """torch registers every traced module, its weights among it, for the life of the process."""
    more = {"HISPEC_CACHE": str(tmp_path), "PYTHONPATH": f"{ROOT}/tests"}
    done = subprocess.run(
        [sys.executable, "-c", TRACES],
        env={**os.environ, **more},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 5  # bytes per weight and trace; 14 where they are kept


def test_kernels_read_weights_as_they_are_kept(tmp_path):
    """In 16 bits: OpenVINO does so in language models alone, and else makes float32 of them."""
    each = []
    for kind in ("marked", "marked", "unmarked"):  # compiled, loaded; and as a model of no kind
        more = {"HISPEC_CACHE": str(tmp_path / kind), "PYTHONPATH": f"{ROOT}/tests"}
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, kind],
            env={**os.environ, **more},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        each.append(float(done.stdout))
    compiled, loaded, unmarked = each
    assert max(compiled, loaded) < unmarked - 1.5  # bytes per weight: 2 instead of 4
