"""Decodes a queue of prompts on a server that runs the target: vLLM, SGLang or `hispec serve`.

Servers with paged attention make text about twice as fast as a process here (docs/benchmarks.md),
and on machines of their own. They are asked through OpenAI's API, in token ids, so that the context
is the one that the exits are trained on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
from openai import APIConnectionError, APIStatusError, OpenAI
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from hispec.base_models.local import find_base
from hispec.base_models.model_folder import load_tokenizer
from hispec.checkpoint.format import is_checkpoint, read_config
from hispec.checkpoint.io import base_folder
from hispec.config import EAGER, DecodeConfig
from hispec.lm import EarlyExitLM
from hispec.utils.console import one_line
from train.row_queue import Job

T = TypeVar("T")
_RETRIES = 5


class Server:
    """A server of OpenAI's API that runs the target.

    Args:
        url: as clients of that API take it, `http://localhost:8000/v1`; the key is read from
            `OPENAI_API_KEY`.
        lm: tokenizer and end tokens of the target.

    Raises:
        ValueError: it cannot be reached, or serves several models or none.
    """

    def __init__(self, url: str, lm: EarlyExitLM) -> None:
        self.url, self._tokenizer, self._eos = url, lm.tokenizer, lm.eos()
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client = OpenAI(base_url=url, api_key=key, max_retries=_RETRIES)
        served = [model.id for model in self._asked(self._client.models.list).data]
        if len(served) != 1:
            raise ValueError(f"server={url!r} serves {served or 'no model'}; it has to serve one")
        self.model = served[0]

    def decode_queue(
        self, jobs: Iterator[Job[T]], config: DecodeConfig, at_once: int, *, stop: str = ""
    ) -> Iterator[tuple[T, list[int]]]:
        """What every job is for and its new tokens, in the order in which the texts end.

        Tokens are those of the text that the server sends, behind them an end token if it has
        ended. A job is taken when fewer than `at_once` are being answered.

        Args:
            stop: a string that ends a text.

        Raises:
            ValueError: the server is gone, or refuses a request.
        """
        pool = ThreadPoolExecutor(at_once)
        running: dict[Future[list[int]], Job[T]] = {}
        try:
            while True:
                while len(running) < at_once and (job := next(jobs, None)) is not None:
                    running[pool.submit(self._answer, job, config, stop)] = job
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future).of, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _answer(self, job: Job[Any], config: DecodeConfig, stop: str) -> list[int]:
        """The new tokens of a job."""
        fields: dict[str, Any] = {"max_tokens": config.max_new_tokens, "temperature": 0.0}
        more: dict[str, Any] = {}  # of vLLM and SGLang
        if config.temperature:
            fields |= {"temperature": config.temperature, "seed": job.seed}
            if config.top_p is not None:
                fields["top_p"] = config.top_p
            if config.top_k is not None:
                more["top_k"] = config.top_k
        if stop:
            fields["stop"] = [stop]
        if closers := sorted(set(config.eos) - set(self._eos)):
            more["stop_token_ids"] = closers
        found = self._asked(
            self._client.completions.create,
            model=self.model,
            prompt=job.prompt,
            extra_body=more,
            **fields,
        ).choices[0]
        ids: list[int] = self._tokenizer(found.text, add_special_tokens=False)["input_ids"]
        return [*ids, config.eos[0]] if found.finish_reason == "stop" else ids

    def _asked(self, request: Any, **fields: Any) -> Any:
        try:
            return request(**fields)
        except APIStatusError as error:
            raise ValueError(
                f"server={self.url!r} answers {error.status_code}: {one_line(error)[:200]}"
            ) from error
        except APIConnectionError as error:
            cause = one_line(error.__cause__ or error)[:200]
            raise ValueError(f"server={self.url!r} cannot be reached: {cause}") from error


def without_weights(name: str) -> EarlyExitLM:
    """A target that runs elsewhere: its tokenizer, config and end tokens.

    Args:
        name: as `hispec.load` takes it.

    Raises:
        ValueError: there is no model of that name, or its architecture is not supported.
    """
    folder = Path(name)
    checkpoint = is_checkpoint(folder)
    home = base_folder(folder, read_config(folder), None) if checkpoint else find_base(name).folder
    config = AutoConfig.from_pretrained(home, local_files_only=True)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    if (home / "generation_config.json").is_file():
        hf.generation_config = GenerationConfig.from_pretrained(home, local_files_only=True)
    return EarlyExitLM.from_transformers(hf, load_tokenizer(home), (), EAGER)
