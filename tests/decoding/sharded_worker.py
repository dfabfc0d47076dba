"""One process of several that share a model: `torchrun sharded_worker.py CASES.json OUT`.

Each case has a folder, its exits, prompts, settings of `generate`; the texts, or the message of a
refusal, are written to OUT/RANK.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from hispec.lm import EarlyExitLM


def main(cases: str, out: str) -> None:
    torch.set_num_threads(1)
    found, models = [], {}
    for case in json.loads(Path(cases).read_text()):
        key = case["model"], str(case["exits"])
        try:
            if key not in models:
                hf = AutoModelForCausalLM.from_pretrained(
                    case["model"],
                    dtype=torch.float32,
                    attn_implementation="sdpa",
                    distributed_config=DistributedConfig(tp_plan="auto"),
                ).eval()
                tokenizer = AutoTokenizer.from_pretrained(case["model"])
                models[key] = EarlyExitLM.from_transformers(hf, tokenizer, case["exits"])
            found.append(models[key].generate(case["prompts"], **case["settings"]).tokens)
        except ValueError as error:
            found.append(str(error))
    parts = {(type(p).__name__, dist.get_world_size()) for p in hf.model.layers[0].parameters()}
    written = {"texts": found, "sharded": ("DTensor", dist.get_world_size()) in parts}
    Path(out, f"{dist.get_rank()}.json").write_text(json.dumps(written))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
