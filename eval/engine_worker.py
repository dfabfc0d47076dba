"""Another engine, in a process and a Python environment of its own: see `eval/engines.py`.

Needs nothing but the engine's package. Reads one JSON line for each prompt, {"tokens",
"max_new_tokens", "eos"}, and answers with one, {"tokens"}: the new ids, greedy. The first line it
writes is {"version"}, once the model is loaded.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[int], int, list[int]], list[int]]
"""(prompt, most new tokens, ids that end a text) -> new ids."""


def openvino_genai(model: str, threads: int, lookup: int) -> tuple[str, Generate]:
    """OpenVINO GenAI on a folder that `optimum-cli export openvino` wrote."""
    import numpy
    import openvino
    import openvino_genai as genai

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    if lookup:
        settings["prompt_lookup"] = True
    pipeline = genai.LLMPipeline(model, "CPU", **settings)

    def generate(prompt: list[int], most: int, eos: list[int]) -> list[int]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample = most, False
        config.apply_chat_template = False
        config.ignore_eos = not eos
        if eos:
            config.eos_token_id, config.stop_token_ids = eos[0], set(eos)
        if lookup:
            config.num_assistant_tokens, config.max_ngram_size = lookup, 3
        ids = openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
        mask = openvino.Tensor(numpy.ones((1, len(prompt)), dtype=numpy.int64))
        return list(pipeline.generate(genai.TokenizedInputs(ids, mask), config).tokens[0])

    return openvino.__version__.partition("-")[0], generate


def llama_cpp(model: str, threads: int, lookup: int) -> tuple[str, Generate]:
    """llama.cpp on a GGUF file, through the package xllamacpp."""
    from importlib.metadata import version

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.cache_prompt = 4096, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = 0
    if lookup:
        kind = xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE
        params.speculative.types = [kind]
        params.speculative.ngram_simple.size_m = lookup
    server = xllamacpp.Server(params)

    def generate(prompt: list[int], most: int, eos: list[int]) -> list[int]:
        asked = {"prompt": prompt, "n_predict": most, "temperature": 0, "cache_prompt": False}
        body = json.dumps({**asked, "return_tokens": True, "ignore_eos": not eos}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/completion", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            tokens = list(json.load(answer)["tokens"])
        ended = next((n for n, token in enumerate(tokens) if token in eos), len(tokens))
        return tokens[: ended + 1]

    return version("xllamacpp"), generate


ENGINES = {"openvino-genai": openvino_genai, "llama.cpp": llama_cpp}


def main(kind: str, model: str, threads: str, lookup: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints is not an answer
    version, generate = ENGINES[kind](model, int(threads), int(lookup))
    print(json.dumps({"version": version}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        tokens = generate(asked["tokens"], asked["max_new_tokens"], asked["eos"])
        print(json.dumps({"tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
