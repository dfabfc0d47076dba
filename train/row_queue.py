"""Decodes a queue of prompts in a fixed number of rows: as a text ends, the next prompt begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Generic, TypeVar

from transformers import StoppingCriteriaList

from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.models.exit_model import ExitModel

T = TypeVar("T")


@dataclass
class Job(Generic[T]):
    """A prompt that waits for a row."""

    of: T
    """What it is for."""
    prompt: list[int]
    seed: int


def decode_queue(
    model: ExitModel,
    jobs: Iterator[Job[T]],
    config: DecodeConfig,
    rows: int,
    *,
    max_prompt: int = 0,
    stopping: StoppingCriteriaList | None = None,
) -> Iterator[tuple[T, list[int]]]:
    """What every job is for and its new tokens, in the order in which the texts end.

    A job is taken when a row is free for it, so `jobs` may be a queue that decodes, too.

    Args:
        rows: texts decoded together, at most.
        max_prompt: tokens that a prompt is expected to have at most. Before a longer one the rows
            are left to end, as the cache has to be larger.

    Raises:
        ValueError: a prompt or a config that this model cannot decode.
    """
    if model.longest_text is not None:
        max_prompt = min(max_prompt, model.longest_text - config.max_new_tokens)
    while first := list(islice(jobs, rows)):
        prompts = [job.prompt for job in first]
        run = Decode(
            model,
            prompts,
            config,
            seeds=[job.seed for job in first],
            stopping_criteria=stopping,
            max_prompt=max(max_prompt, *map(len, prompts)),
        )
        running = dict(enumerate(first))
        refilled = True
        while running:
            run.step()
            free = [row for row in run.ended_rows() if row in running]
            for row in free:
                yield running.pop(row).of, run.output(row)[0]
            for row in free if refilled else []:
                if (job := next(jobs, None)) is None:
                    break
                if not (refilled := len(job.prompt) <= run.max_prompt):
                    jobs = chain([job], jobs)
                    break
                run.admit(row, job.prompt, seed=job.seed)
                running[row] = job
