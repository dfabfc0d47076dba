"""The decode loop: what it emits equals plain decoding, and every layer runs once per token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import VOCAB, tiny_hf, tiny_model

from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.models.exit_model import ExitModel


def decode(model, prompts, ladder, **config) -> tuple[list[list[int]], Decode]:
    run = Decode(model, prompts, DecodeConfig(list(ladder), **config))
    rows: list[list[int]] = [[] for _ in prompts]
    for committed in run.run():
        for part in committed:
            rows[part.row] += part.tokens
    return rows, run


def generate(hf, prompt, max_new_tokens, eos=()) -> list[int]:
    """transformers' own greedy text."""
    out = hf.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos) or None,
        pad_token_id=0,
        use_cache=True,
    )
    return out[0, len(prompt) :].tolist()


LADDERS = [(6,), (2, 6), (2, 4, 6), (1, 2, 4, 6)]


@pytest.mark.parametrize("ladder", LADDERS)
def test_greedy_equals_generate(family, ladder, prompts):
    model = tiny_model(family, exits=(2, 4))
    for prompt in prompts:
        expected = generate(model.hf, prompt, 24)
        assert decode(model, [prompt], ladder, max_new_tokens=24)[0] == [expected]


@pytest.mark.parametrize("head", ["shared", "adapter", "block"])
@pytest.mark.parametrize("ladder", LADDERS[1:])
def test_sampled_text_does_not_depend_on_the_ladder(head, ladder, prompts):
    model = tiny_model(exits=(2, 4), head=head)
    for prompt in prompts:
        for law in ({"temperature": 0.8}, {"temperature": 1.3, "top_k": 9, "top_p": 0.9}):
            settings_ = dict(max_new_tokens=24, seed=7, **law)
            plain = decode(model, [prompt], (6,), **settings_)[0]
            assert decode(model, [prompt], ladder, **settings_)[0] == plain
            assert decode(model, [prompt], ladder, **{**settings_, "seed": 8})[0] != plain


@pytest.mark.parametrize("ladder", LADDERS)
def test_rows_get_what_they_get_alone(ladder, prompts):
    model = tiny_model(exits=(2, 4))
    for law in ({}, {"temperature": 0.9, "seed": 3}):
        config = dict(max_new_tokens=20, eos=(7, 11, 13), **law)
        alone = [decode(model, [prompt], ladder, **config)[0][0] for prompt in prompts]
        assert decode(model, prompts, ladder, **config)[0] == alone


@pytest.mark.parametrize("ladder", LADDERS)
def test_prompts_are_read_in_blocks(family, ladder, monkeypatch):
    """Rows end in the first, at the end of the second, and inside the third block."""
    monkeypatch.setattr("hispec.decoding.ladder._FIRST_PREFILL", 5)
    monkeypatch.setattr("hispec.decoding.ladder._PREFILL", 5)
    model = tiny_model(family, exits=(2, 4))
    prompts = [torch.arange(1, n + 1).mul(7).remainder(VOCAB).tolist() for n in (3, 10, 13)]
    expected = [generate(model.hf, prompt, 12) for prompt in prompts]
    widths: list[int] = []
    model.hf.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["position_ids"].shape[1]), with_kwargs=True
    )
    assert decode(model, prompts, ladder, max_new_tokens=12)[0] == expected
    assert widths[:3] == [5, 5, 3]


@pytest.mark.parametrize("rows", [1, 3])
def test_prompts_are_read_by_causal_attention_without_a_mask(family, rows, prompts):
    """A mask makes the kernel multiply with all keys, those ahead too."""
    model = tiny_model(family, exits=(2,))
    masks: list[torch.Tensor | None] = []
    lengths: list[list[int] | None] = []

    def note(_, args, kwargs):
        masks.append(kwargs["attention_mask"])
        lengths.append(kwargs["lengths"])

    model.hf.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    read = [prompt[:7] if row else prompt[:5] for row, prompt in enumerate(prompts[:rows])]
    decode(model, read, (2, 6), max_new_tokens=4)  # shorter than the windows of sliding attention
    assert masks[0] is None
    assert lengths[0] == [len(prompt) for prompt in read]
    assert all(mask is not None for mask in masks[1:])
    assert lengths[1:] == [None] * len(lengths[1:])


class LayerLog:
    """Watches the real layers: which (layer, position) runs, on which prefix, and what was kept.

    An entry is *live* from its run until some rung replaces a token of its prefix. Running a live
    entry again would be work done twice.
    """

    def __init__(self, model: ExitModel, decode: Decode) -> None:
        self.tokens_BN = decode.state.tokens_BN
        self.runs = self.repeated = self.head_runs = 0
        self.live: set[tuple[int, tuple[int, ...]]] = set()
        for index, layer in enumerate(model.hf.model.layers):
            layer.register_forward_pre_hook(self._hook(index), with_kwargs=True)
        for head in model.heads.values():
            for block in head.blocks:  # negative numbers tell blocks from layers of the trunk
                hook = self._hook(-block.self_attn.layer_idx)
                block.register_forward_pre_hook(hook, with_kwargs=True)
        decode._verify = self._watch(decode._verify, lambda *_: decode.state.tokens_BN)
        if (steps := getattr(decode.drafter, "steps", None)) is not None:
            steps.token = self._watch(steps.token, lambda tokens_BN, *_: tokens_BN)  # of a copy

    def _hook(self, index):
        def record(module, args, kwargs):
            for position in kwargs["position_ids"][0].tolist():
                entry = index, self.prefix(position)
                self.runs += 1
                self.head_runs += index < 0
                self.repeated += entry in self.live
                self.live.add(entry)

        return record

    def prefix(self, position: int) -> tuple[int, ...]:
        return tuple(self.tokens_BN[0, : position + 1].tolist())

    def _watch(self, step, text):
        def stepped(*args):
            self.tokens_BN = text(*args)
            result = step(*args)
            self.live = {e for e in self.live if e[1] == self.prefix(len(e[1]) - 1)}
            return result

        return stepped


@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("exits", [(), (2, 4)])
def test_every_layer_runs_once_per_committed_token(ladder, temperature, exits):
    """Only drafts that were thrown away are run besides, and the stats account for every run."""
    model = tiny_model(exits=exits)
    prompt = list(range(3, 14))
    config = DecodeConfig(list(ladder), max_new_tokens=40, temperature=temperature, seed=2)
    run = Decode(model, [prompt], config)
    log = LayerLog(model, run)
    text = prompt + [t for c in run.run() for part in c for t in part.tokens]
    stats = run.stats

    assert log.repeated == 0
    for layer in range(6):  # what is live at the end is the committed text, in every layer
        for position in range(len(text) - 1):
            assert (layer, tuple(text[: position + 1])) in log.live
    assert log.runs == stats.layer_token_runs
    on_path = 6 * (len(text) - 1)
    assert stats.plain_layer_token_runs == on_path
    assert stats.extra_layer_token_runs == log.runs - on_path
    kept_trunk = sum(layer >= 0 for layer, _ in log.live)
    assert kept_trunk == on_path
    if ladder == (6,):
        assert stats.extra_layer_token_runs == 0
    if not exits:
        assert log.head_runs == 0
    elif len(ladder) > 1 and 2 in ladder[:-1]:
        assert log.head_runs > 0


class Scripted(ExitModel):
    """A real tiny model whose exits are overruled: they say the target's text, or never do.

    The target's text is known beforehand; an exit reads its logits off the script, by position.
    """

    def script(self, text: list[int], right: dict[int, object]) -> None:
        self.text, self.right = text, right

    def read(self, depth, hidden):
        logits = super().read(depth, hidden)
        if depth == self.num_layers:
            return logits
        for column, position in enumerate(range(self.first, self.first + hidden.shape[1])):
            token = self.text[position + 1] if position + 1 < len(self.text) else 5
            if not self.right[depth](position + 1):
                token = (token + 1) % VOCAB
            logits[0, column] = torch.nn.functional.one_hot(torch.tensor(token), VOCAB) * 50.0
        return logits

    def follow(self, ladder):
        """Note from which position on the ladder reads."""
        logits = ladder.logits

        def noted(rung, tokens_BN, first_B, *args, **options):
            self.first = int(first_B[0])
            return logits(rung, tokens_BN, first_B, *args, **options)

        ladder.logits = noted


ALWAYS, NEVER = (lambda position: True), (lambda position: False)
EVERY_THIRD_WRONG = lambda position: position % 3 != 0  # noqa: E731


def scripted(draft, verify, **config):
    model = Scripted(tiny_hf()).eval()
    prompt = [3, 4, 5, 6]
    plain = decode(model, [prompt], (6,), max_new_tokens=config.get("max_new_tokens", 24))[0][0]
    model.script(prompt + plain, {2: draft, 4: verify})
    model.decode = Decode(
        model, [prompt], DecodeConfig([2, 4, 6], **{"max_new_tokens": 24, **config})
    )
    model.follow(model.decode.ladder)
    text = [t for c in model.decode.run() for part in c for t in part.tokens]
    return text, plain, model.decode


@pytest.mark.parametrize("draft", [ALWAYS, NEVER, EVERY_THIRD_WRONG])
@pytest.mark.parametrize("verify", [ALWAYS, NEVER, EVERY_THIRD_WRONG])
def test_scripted_exits_never_change_the_text(draft, verify):
    text, plain, run = scripted(draft, verify)
    assert text == plain
    first, second, _ = run.stats.rungs
    if draft is verify:  # both say the same tokens, right or wrong
        assert first.accepted == first.proposed
    if verify is NEVER:
        assert second.accepted == 0
        assert run.stats.tokens_per_target_pass == 1
    if verify is ALWAYS:
        assert second.accepted == second.proposed
    if draft is ALWAYS and verify is NEVER:
        assert first.accepted == 0


def test_perfect_exits_cost_the_expected_passes():
    """The prompt's pass gives 1 token. Draft 2, verify adds 1: 3 pending. Once more: 6 pending, 4
    or more; validate adds 1."""
    text, plain, run = scripted(ALWAYS, ALWAYS, max_new_tokens=22, draft_length=2, buffer=4)
    assert text == plain
    draft, verify, target = run.stats.rungs
    assert (draft.passes, verify.passes, target.passes) == (12, 6, 4)
    assert run.stats.tokens_per_target_pass == 22 / 4
    assert run.stats.extra_layer_token_runs == 0


@pytest.mark.parametrize("position", range(1, 12))
def test_eos_in_the_middle_of_a_draft_ends_the_text_there(position):
    """The first token of the plain text at `position` is made the end-of-text token."""
    text, plain, _ = scripted(ALWAYS, ALWAYS, draft_length=5, buffer=9)
    assert text == plain
    eos = plain[position]
    text, _, run = scripted(ALWAYS, ALWAYS, draft_length=5, buffer=9, eos=(eos,))
    assert text == plain[: plain.index(eos) + 1]
    assert run.stats.new_tokens == len(text)


@pytest.mark.parametrize("limit", range(1, 15))
def test_the_limit_may_fall_anywhere_in_a_round(limit):
    text, plain, run = scripted(
        EVERY_THIRD_WRONG, ALWAYS, max_new_tokens=limit, draft_length=4, buffer=6
    )
    assert text == plain
    assert len(text) == limit
    assert all(length[0] < limit + 4 for length in run.ladder.cache.lengths.values())


def test_every_token_knows_the_rung_that_made_it():
    _, _, run = scripted(EVERY_THIRD_WRONG, ALWAYS, max_new_tokens=12)
    for position in range(5, 15):
        depth = run.state.depth_BN[0, position]
        assert depth in (2, 4, 6)
        if position % 3 == 0:
            assert depth != 2  # the drafter is wrong there
    _, _, run = scripted(NEVER, NEVER)
    assert set(run.state.depth_BN[0, 4:28]) == {6}


def test_what_is_yielded_is_what_was_committed(prompts):
    model = tiny_model(exits=(2, 4))
    run = Decode(model, prompts, DecodeConfig([2, 4, 6], max_new_tokens=9))
    seen = [0, 0, 0]
    for committed in run.run():
        for part in committed:
            start = len(prompts[part.row]) + seen[part.row]
            stop = start + len(part.tokens)
            assert run.state.committed_B[part.row] == stop
            assert run.state.tokens_BN[part.row, start:stop].tolist() == part.tokens
            assert len(part.depths) == len(part.tokens)
            seen[part.row] += len(part.tokens)
    assert seen == [9, 9, 9]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(ladder=[2, 4]), "it must end at 6"),
        (dict(ladder=[]), "it must end at 6"),
        (dict(ladder=[4, 2, 6]), "increasing"),
        (dict(ladder=[6, 6]), "not an exit"),
        (dict(ladder=[6], draft_length=0), "draft_length=0"),
        (dict(ladder=[6], buffer=0), "buffer=0"),
        (dict(ladder=[6], max_new_tokens=0), "max_new_tokens=0"),
        (dict(ladder=[6], temperature=-1.0), "temperature=-1"),
        (dict(ladder=[6], top_p=0.0), "top_p=0"),
    ],
)
def test_wrong_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Decode(tiny_model(), [[3]], DecodeConfig(**config))


@pytest.mark.parametrize(
    ("ladder", "drafter"),
    [((6,), "exit"), ((2, 4, 6), "exit"), ((6,), "lookup"), ((6,), "recycle")],
)
def test_rows_with_seeds_of_their_own_get_the_texts_that_they_get_alone(prompts, ladder, drafter):
    model = tiny_model(exits=(2, 4))
    rows, seeds = [*prompts, prompts[1]], [7, 2**63 + 1, 7, 8]
    config = dict(drafter=drafter, max_new_tokens=20, temperature=0.9, eos=(2,))
    together = Decode(model, rows, DecodeConfig(list(ladder), **config), seeds=seeds).finish()
    for row, seed, tokens in zip(rows, seeds, together, strict=True):
        assert tokens == Decode(model, [row], DecodeConfig([6], seed=seed, **config)).finish()[0]
    assert together[1] != together[3]  # the same prompt


def test_seeds_that_do_not_fit_the_rows_are_refused():
    with pytest.raises(ValueError, match=r"seeds=\[1\] is not possible: one per prompt, 2"):
        Decode(tiny_model(), [[3], [4]], DecodeConfig([6]), seeds=[1])
    with pytest.raises(ValueError, match="needs verification 'match'"):
        Decode(tiny_model(), [[3]], DecodeConfig([6], verification="rejection"), seeds=[1])


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match=r"prompts\[1\]=\[\] is not possible"):
        Decode(tiny_model(), [[3], []], DecodeConfig([6]))
    with pytest.raises(ValueError, match="at least one prompt"):
        Decode(tiny_model(), [], DecodeConfig([6]))


def test_hooks_do_not_leak_state_between_decodes():
    """Two decodes on one model, interleaved step by step, do not disturb each other."""
    model = tiny_model(exits=(2, 4))
    config = DecodeConfig([2, 4, 6], max_new_tokens=12)
    texts = {}
    runs = {name: Decode(model, [[name, 9, 4]], config) for name in (5, 8)}
    streams = {name: run.run() for name, run in runs.items()}
    while streams:
        for name in list(streams):
            if (committed := next(streams[name], None)) is None:
                del streams[name]
            else:
                texts.setdefault(name, []).extend(committed[0].tokens)
    for name in runs:
        assert texts[name] == generate(model.hf, [name, 9, 4], 12)
    assert np.array_equal(runs[5].state.end_B, [15])
