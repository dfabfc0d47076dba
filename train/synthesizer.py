"""Generates training text with the target model and drops what is not worth learning."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import StoppingCriteriaList, StopStringCriteria

from hispec.base_models.local import find_base
from hispec.checkpoint.format import is_checkpoint, read_config
from hispec.config import DecodeConfig
from hispec.data.chat import Message, user_turn
from hispec.data.prompts import Prompt, read_prompts
from hispec.lm import EarlyExitLM
from hispec.utils.files import sha256
from hispec.utils.settings import check
from train.dedup import SeenTexts, seq_rep
from train.row_queue import Job, decode_queue
from train.sample import Sample, Turn
from train.sample_file import SampleFile
from train.synthesis_settings import NO_DRAFTER, Settings

_INVENTED = 1000  # samples, if no number and no prompts are given
_TEMPLATE = 64  # tokens that a chat template is expected to add to the user's words, at most
_NOT_OF_THE_TEXT = {  # settings that do not change the text of a sample
    *("base", "output", "samples", "prompts", "drafter", "batch_size", "backend", "dtype"),
    *("device", "threads", "server"),
}


def plan(settings: Settings, lm: EarlyExitLM) -> tuple[list[Prompt], list[int]]:
    """(prompts of the file, if one is given; numbers of the samples of this process).

    Raises:
        ValueError: prompts that do not fit this base, or a file with no prompts or with both kinds.
    """
    if settings.prompts is None:
        raw = not lm.tokenizer.chat_template
        key = "temperature" if raw else "prompt_temperature"
        value = getattr(settings, key)
        check(value > 0, key, value, "above 0 without prompts=FILE: all samples would be the same")
    prompts = [] if settings.prompts is None else list(read_prompts(Path(settings.prompts)))
    check(settings.prompts is None or bool(prompts), "prompts", settings.prompts, "it holds none")
    for prompt in prompts:
        if prompt.raw(lm.tokenizer) != prompts[0].raw(lm.tokenizer):
            raise ValueError(
                f"{settings.prompts}: line {prompt.line} and line {prompts[0].line} are not both "
                "texts to continue nor both turns to answer; give each kind a file of its own"
            )
    samples = settings.samples or len(prompts) or _INVENTED
    return prompts, list(range(settings.shard, samples, settings.shards))


def find_target(name: str) -> dict[str, Any]:
    """Id, revision and SHA-256 of the weights of the target model.

    Raises:
        ValueError: there is no model of that name.
    """
    folder = Path(name)
    if is_checkpoint(folder):
        base = read_config(folder)["base"]
        return {key: base[key] for key in ("id", "revision", "weights")}
    found = find_base(name)
    return {"id": found.id, "revision": found.revision, "weights": found.weights()}


def made_by(settings: Settings, lm: EarlyExitLM, target: dict[str, Any]) -> dict[str, Any]:
    """Everything that the samples depend on, by name."""
    keys = {k: v for k, v in asdict(settings).items() if k not in _NOT_OF_THE_TEXT}
    template = str(lm.tokenizer.chat_template or "")
    dtype = str(lm.model.hf.dtype).removeprefix("torch.")
    if dtype != "float32":  # the shape of a pass may decide a near-tie
        keys.update({key: getattr(settings, key) for key in ("batch_size", "drafter", "backend")})
    if settings.server is not None:
        keys["backend"] = "server"
    return {
        **keys,
        "prompts": sha256(Path(settings.prompts)) if settings.prompts else None,
        "weights": target["weights"],
        "dtype": dtype,
        "chat_template": hashlib.sha256(template.encode()).hexdigest(),
    }


class Synthesizer:
    """Generates samples and appends those that are worth learning to a file.

    Raises:
        ValueError: a base that the settings do not fit.
    """

    def __init__(
        self,
        lm: EarlyExitLM,
        settings: Settings,
        prompts: Sequence[Prompt],
        file: SampleFile,
        target: dict[str, Any],
    ) -> None:
        self.lm, self.settings, self.prompts, self.file = lm, settings, prompts, file
        self.target = target
        self.server = None
        if settings.server is not None:
            from train.server_queue import Server  # openai comes with an extra

            self.server = Server(settings.server, lm)
        self.raw = prompts[0].raw(lm.tokenizer) if prompts else not lm.tokenizer.chat_template
        self.invents = not prompts and not self.raw
        drafter = settings.drafter if settings.drafter != NO_DRAFTER else "exit"
        full = lm.model.num_layers
        self.config = DecodeConfig(
            ladder=lm.ladder() if "exit" in settings.drafter else [full],
            drafter=drafter,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            eos=lm.eos(),
        )
        self.config.validate(full)
        check(
            "exit" not in settings.drafter or len(self.config.ladder) > 1,
            "drafter",
            settings.drafter,
            "it needs an EE checkpoint, this base has no exits",
        )
        self.special = set(lm.tokenizer.all_special_ids)
        self.seen_questions = SeenTexts(settings.near_duplicate)
        self.seen_answers = SeenTexts(settings.near_duplicate)
        self.made_by = hashlib.sha256(json.dumps(file.made_by).encode()).hexdigest()[:16]
        if self.invents:
            self.opening, self.stop, self.closers = self._turn()
        for row in file.rows():
            self._remember(*self._texts(row))

    def make(self, indices: Sequence[int]) -> Iterator[int]:
        """Generate some samples and write those that are kept, in the order of their numbers.

        Yields:
            How many samples were written or dropped since the last time.
        """
        self.began = time.perf_counter()
        waiting = iter(indices)
        following = next(waiting, None)
        finished: dict[int, Sample] = {}
        ready: list[Sample] = []
        enough = max(1, self.settings.batch_size // 8)  # less is lost by a kill than is in the rows
        for sample in self._answered(self._asked(indices)):
            finished[sample.index] = sample
            while following in finished:
                ready.append(finished.pop(following))
                following = next(waiting, None)
            if len(ready) >= enough:
                self._write(ready)
                yield len(ready)
                ready = []
        assert not finished, "all samples end"
        if ready:
            self._write(ready)
            yield len(ready)

    def _write(self, samples: Sequence[Sample]) -> None:
        """Write the next samples, which are in order, so the file does not depend on which of them
        ended first."""
        rows, dropped = [], Counter(self.file.progress.dropped)
        for sample in samples:
            if (fault := self._fault(sample)) is not None:
                dropped[fault] += 1
                continue
            rows.append(self._row(sample))
            self._remember(*self._texts(rows[-1]))
        before, began = self.file.progress, self.began
        self.began = time.perf_counter()
        progress = replace(
            before,
            next=samples[-1].index + 1,
            tokens=before.tokens + sum(sample.decoded for sample in samples),
            seconds=before.seconds + self.began - began,
            dropped=dict(dropped),
        )
        self.file.append(rows, progress)

    def _prompt(self, index: int) -> Prompt | None:
        return self.prompts[index % len(self.prompts)] if self.prompts else None

    def _turn(self) -> tuple[list[int], str, tuple[int, ...]]:
        """(ids before the user's words, string that ends them, token ids that end them)."""
        tokenizer = self.lm.tokenizer
        opening, closing = user_turn(tokenizer)
        check(
            bool(opening), "base", self.settings.base, "its template begins with the user's words"
        )
        stop = closing.strip(" ")
        first = tokenizer(stop, add_special_tokens=False)["input_ids"][:1]
        closers = tuple(t for t in first if t in tokenizer.added_tokens_decoder)
        return tokenizer(opening, add_special_tokens=False)["input_ids"], stop, closers

    def _asked(self, indices: Sequence[int]) -> Iterator[Sample]:
        """Samples with their user's turn and the context of their answer, in any order."""
        samples = (Sample(index, self._prompt(index)) for index in indices)
        if not self.invents:
            for sample in samples:
                self._read(sample)
                yield sample
            return
        config = replace(
            self.config,
            max_new_tokens=self.settings.max_prompt_tokens,
            temperature=self.settings.prompt_temperature,
            eos=(*self.config.eos, *self.closers),
        )
        stop = "" if self.closers else self.stop
        jobs = (self._job(sample, self.opening, "question") for sample in samples)
        for sample, tokens in self._decode(jobs, config, stop):
            sample.question = question = self._decoded(tokens, self.opening, config.eos, stop)
            sample.decoded += len(tokens)
            if not question.ended:
                question.fault = question.fault or "truncated"
            if question.fault is None:
                message = {"role": "user", "content": question.text}
                sample.context = Prompt(0, "", (message,)).encode(self.lm.tokenizer)
            yield sample

    def _read(self, sample: Sample) -> None:
        """Give a sample the user's turn and the context that its prompt holds."""
        tokenizer, prompt = self.lm.tokenizer, sample.prompt
        if prompt is None:
            first = tokenizer.bos_token_id
            sample.context = [tokenizer.eos_token_id if first is None else first]
            return
        text = "".join(m["content"] for m in prompt.messages) or prompt.text
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        sample.question = Turn(text, ids)
        if len(ids) > self.settings.max_prompt_tokens:
            sample.question.fault = "too long"
        else:
            sample.context = prompt.encode(tokenizer)

    def _answered(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        """The samples with their answers, in any order; those without a question have none."""
        unanswered: list[Sample] = []

        def jobs() -> Iterator[Job[Sample]]:
            for sample in samples:
                # A question that repeats an earlier one is dropped in the end: it needs no answer.
                if sample.context is None or self._is_old(sample):
                    unanswered.append(sample)
                else:
                    yield self._job(sample, sample.context, "answer")

        longest = self.settings.max_prompt_tokens + _TEMPLATE
        for sample, tokens in self._decode(jobs(), self.config, max_prompt=longest):
            assert sample.context is not None
            sample.answer = self._decoded(tokens, sample.context, self.config.eos)
            sample.decoded += len(tokens)
            yield sample
            while unanswered:
                yield unanswered.pop()
        yield from unanswered

    def _job(self, sample: Sample, context: list[int], part: str) -> Job[Sample]:
        """A part of a sample to be decoded, with the noise of that sample and part."""
        return Job(sample, context, _seed(self.settings.seed, sample.index, part))

    def _decode(
        self,
        jobs: Iterator[Job[Sample]],
        config: DecodeConfig,
        stop: str = "",
        max_prompt: int = 0,
    ) -> Iterator[tuple[Sample, list[int]]]:
        """The target's continuation of each context."""
        if self.server is not None:
            return self.server.decode_queue(jobs, config, self.settings.batch_size, stop=stop)
        criteria = [StopStringCriteria(self.lm.tokenizer, [stop])] if stop else []
        return decode_queue(
            self.lm.model,
            jobs,
            config,
            self.settings.batch_size,
            max_prompt=max_prompt,
            stopping=StoppingCriteriaList(criteria),
        )

    def _decoded(
        self, tokens: list[int], context: list[int], eos: Sequence[int], stop: str = ""
    ) -> Turn:
        """The text of generated tokens, and the reason to drop it if there is one."""
        decode = self.lm.tokenizer.decode
        ended = bool(tokens) and tokens[-1] in eos
        ids = tokens[:-1] if ended else tokens
        text = decode(ids)
        if self.raw:  # some tokenizers leave out the space before the first word that they decode
            given = decode(context, skip_special_tokens=True)
            text = decode([*context, *ids], skip_special_tokens=True)[len(given) :]
        if stop and stop in text:
            text, ended = text[: text.index(stop)], True
        if not ended:
            text = text.rstrip("\ufffd")  # the limit may have cut a character
        turn = Turn(text if self.raw else text.strip(), tokens, ended)
        if not text.strip():
            turn.fault = "empty"
        elif self.special & set(ids):  # the template could not write it again
            turn.fault = "special token"
        elif "\ufffd" in text:
            turn.fault = "broken character"
        elif seq_rep(ids) > self.settings.max_repetition:
            turn.fault = "repetitive"
        return turn

    def _is_old(self, sample: Sample) -> bool:
        """Whether the target has invented this user's turn before."""
        return (
            self.invents
            and sample.question is not None
            and sample.question.text in self.seen_questions
        )

    def _fault(self, sample: Sample) -> str | None:
        """Why a sample is dropped; None if it is kept."""
        if sample.question is not None and sample.question.fault:
            return f"question: {sample.question.fault}"
        if self._is_old(sample):
            return "question: duplicate"
        assert sample.answer is not None, "all others were answered"
        if sample.answer.fault:
            return f"answer: {sample.answer.fault}"
        if not (sample.answer.ended or self.settings.keep_truncated):
            return "answer: truncated"
        return "answer: duplicate" if sample.answer.text in self.seen_answers else None

    def _row(self, sample: Sample) -> dict[str, Any]:
        """The sample as a row of the file."""
        assert sample.answer is not None
        assert sample.context is not None
        provenance = {
            "index": sample.index,
            "seed": self.settings.seed,
            "base": self.target["id"],
            "revision": self.target["revision"],
            "weights": self.target["weights"],
            "settings": self.made_by,
            "source": self._source(sample),
            "tokens": {"context": len(sample.context), "answer": len(sample.answer.tokens)},
            "ended": sample.answer.ended,
            "hispec": version("hispec"),
        }
        question = sample.question.text if sample.question else ""
        if self.raw:
            return {
                "text": question + sample.answer.text,
                "provenance": {**provenance, "given_characters": len(question)},
            }
        messages: list[Message] = (
            list(sample.prompt.messages)
            if sample.prompt
            else [{"role": "user", "content": question}]
        )
        messages.append({"role": "assistant", "content": sample.answer.text})
        return {"messages": messages, "provenance": provenance}

    def _source(self, sample: Sample) -> dict[str, Any] | str:
        if sample.prompt is None:
            return "invented"
        return {"file": Path(self.settings.prompts or "").name, "line": sample.prompt.line}

    def _texts(self, row: dict[str, Any]) -> tuple[str, str]:
        """(user's turn, answer) of a row of the file."""
        if self.raw:
            return "", row["text"][row["provenance"]["given_characters"] :]
        return row["messages"][-2]["content"], row["messages"][-1]["content"]

    def _remember(self, question: str, answer: str) -> None:
        if self.invents:
            self.seen_questions.add(question)
        self.seen_answers.add(answer)


def _seed(seed: int, index: int, part: str) -> int:
    """Seed of the noise of one part of one sample, unrelated to all others, below 2^63."""
    digest = hashlib.sha256(f"{seed} {index} {part}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
