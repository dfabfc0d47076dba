"""What compiled graphs, and the making of them, leave in memory."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import ROOT

SETUP = """
import re, pathlib, sys, openvino as ov, torch
from conftest import tiny_model
from hispec.engine import openvino_graph

def used():  # bytes of this process that no file backs
    rollup = pathlib.Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.search(r"^Anonymous: +([0-9]+) kB", rollup, re.MULTILINE).group(1))

config = tiny_model("llama").hf.config
core = ov.Core()
"""

KERNELS = """
if sys.argv[1] == "unmarked":
    openvino_graph._marked = lambda model: model

torch.manual_seed(0)
linear = torch.nn.Linear(1024, 32768, bias=False)
linear.weight.data = linear.weight.detach().bfloat16().float()
states, out = torch.randn(1, 1024), torch.empty(1, 32768)
before = used()
graph = openvino_graph.Traced(core, linear, config, [states], threads=1).graph([[-1, 1024]])
graph.set_input(0, states)
graph.set_output(0, out)
graph.infer()
assert torch.allclose(out, linear(states), rtol=1e-4, atol=1e-4)
print((used() - before) / linear.weight.numel())
"""


TRACES = """
layers = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(4)))
layers.bfloat16().requires_grad_(False)
states, after = torch.randn(1, 2048), []
for trace in range(4):
    layers[0].weight.mul_(1.5)
    openvino_graph.Traced(core, layers, config, [states], threads=1)
    after.append(used())
print((after[-1] - after[0]) / 3 / sum(weight.numel() for weight in layers.parameters()))
"""


def bytes_per_weight(code, cache, *words):
    """What a process of its own prints that runs `code`."""
    more = {"HISPEC_CACHE": str(cache), "PYTHONPATH": f"{ROOT}/tests"}
    done = subprocess.run(
        [sys.executable, "-c", SETUP + code, *words],
        env={**os.environ, **more},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_what_was_traced_is_not_kept(tmp_path):
    """torch registers every traced module, its weights among it, for the life of the process."""
    assert bytes_per_weight(TRACES, tmp_path) < 5  # a trace; 14 where they are kept


def test_kernels_read_weights_as_they_are_kept(tmp_path):
    """In 16 bits: OpenVINO does so in language models alone, and else makes float32 of them."""
    kinds = "marked", "marked", "unmarked"  # compiled, loaded; and as a model of no kind
    each = [bytes_per_weight(KERNELS, tmp_path / kind, kind) for kind in kinds]
    compiled, loaded, unmarked = each
    assert max(compiled, loaded) < unmarked - 1.5  # bytes per weight: 2 instead of 4
