"""lm-evaluation-harness' view of a depth: log-likelihoods and text, against transformers."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB, tiny_model
from lm_eval.api.instance import Instance

from eval.harness import GenerationSettings, HarnessModel, LogLikelihoods, longest_text
from hispec.config import DecodeConfig, ExitConfig
from hispec.export.draft_model import draft_model
from hispec.lm import EarlyExitLM
from hispec.metrics.equivalence import hf_generate
from hispec.models.exit_model import ExitModel

TEXTS = [("def f(x):", " return x"), ("import", " os"), ("x =", " 3\n" * 6), ("class A:\n", " ")]


def request(kind: str, *arguments) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def harness_model(lm, depth: int, longest: int = 512, **generation) -> HarnessModel:
    scores = LogLikelihoods(lm.model, [*lm.model.exits.depths, lm.model.num_layers], 3, longest)
    return HarnessModel(
        lm,
        depth,
        scores,
        GenerationSettings(DecodeConfig([2, 4, 6]), **{"max_new_tokens": 24, **generation}),
    )


@torch.inference_mode()
def log_probs_of(lm, depth: int, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [T, V] of a LayerSkip depth, by transformers alone."""
    hf = lm.model.hf
    out = hf(torch.tensor([tokens]), output_hidden_states=True)
    if depth == lm.model.num_layers:
        return out.logits[0].log_softmax(-1)
    return hf.lm_head(hf.model.norm(out.hidden_states[depth][0])).log_softmax(-1)


@pytest.mark.parametrize("depth", [2, 4, 6])
def test_log_likelihoods_are_those_of_transformers(lm, depth):
    """Texts of different lengths in one pass."""
    model = harness_model(lm, depth)
    found = model.loglikelihood([request("loglikelihood", *pair) for pair in TEXTS])
    for (before, after), (total, is_greedy) in zip(TEXTS, found, strict=True):
        whole = lm.tokenizer(before + after)["input_ids"]
        start = len(lm.tokenizer(before.rstrip())["input_ids"])
        log_probs = log_probs_of(lm, depth, whole)[start - 1 : -1]
        ending = torch.tensor(whole[start:])
        expected = log_probs.gather(-1, ending[:, None]).sum().item()
        assert total == pytest.approx(expected, abs=1e-4)
        assert not is_greedy
    ids = tuple(lm.tokenizer("while True:")["input_ids"])
    best = log_probs_of(lm, depth, list(ids))[-1].argsort(descending=True)[:2].tolist()
    first, second = model.scores.of([(ids, (token,)) for token in best], depth)
    assert (first[1], second[1]) == (True, False)


def test_log_likelihoods_of_every_family_and_head(family):
    """Padded in a batch as alone: exits with blocks, sliding windows, heads that read what was
    before."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (4, 19, 11)]
    pairs = [(tuple(text[:2]), tuple(text[2:])) for text in texts]
    exits = ExitConfig.of([2, 4], "block", blocks=1, previous=True)
    model = ExitModel(tiny_model(family).hf, exits).eval()
    for head in model.heads.values():
        torch.nn.init.normal_(head.mix.weight, std=0.3)
    scores = LogLikelihoods(model, [2, 4, 6], 3, 512)
    for depth in (2, 4, 6):
        for text, (total, _) in zip(texts, scores.of(pairs, depth), strict=True):
            tokens = torch.tensor([text[:-1]])
            with torch.inference_mode():
                final = model.final(tokens)
                before = torch.cat([torch.zeros_like(final[:, :1]), final[:, :-1]], 1)
                state = model.run(model.embed(tokens), 0, depth)
                log_probs = model.logits(depth, state, None, before)[0, 1:].log_softmax(-1)
            expected = log_probs.gather(-1, torch.tensor(text[2:])[:, None]).sum().item()
            assert total == pytest.approx(expected, abs=1e-3)


def test_one_pass_serves_all_depths(lm, monkeypatch):
    model = harness_model(lm, 6)
    passes = []
    states = ExitModel.states
    monkeypatch.setattr(
        ExitModel, "states", lambda self, *args: passes.append(1) or states(self, *args)
    )
    requests = [request("loglikelihood", *pair) for pair in [*TEXTS, *TEXTS]]
    for depth in (6, 2, 4):
        model.depth = depth
        assert len(set(model.loglikelihood(requests))) == len(TEXTS)
    assert len(passes) == 2  # four texts, three rows at a time


def test_of_a_long_text_the_beginning_is_left_out(lm):
    (found,) = harness_model(lm, 6, longest=8).loglikelihood(
        [request("loglikelihood", "import os\n" * 9, "import os\n" * 2)]
    )
    whole = lm.tokenizer("import os\n" * 11)["input_ids"]
    count = min(len(whole) - len(lm.tokenizer(("import os\n" * 9).rstrip())["input_ids"]), 8)
    log_probs = log_probs_of(lm, 6, whole[-9:-1])[-count:]
    expected = log_probs.gather(-1, torch.tensor(whole[-count:])[:, None]).sum().item()
    assert found[0] == pytest.approx(expected, abs=1e-4)


def test_a_text_from_its_first_token_on(lm):
    """Rolling: every token once, after BOS; an empty context is the same for one window."""
    text = "import os\nimport sys\n"
    ids = lm.tokenizer(text)["input_ids"]
    log_probs = log_probs_of(lm, 4, [lm.tokenizer.bos_token_id, *ids[:-1]])
    expected = log_probs.gather(-1, torch.tensor(ids)[:, None]).sum().item()
    model = harness_model(lm, 4)
    (rolled,) = model.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    ((total, _),) = model.loglikelihood([request("loglikelihood", "", text)])
    assert rolled == pytest.approx(expected, abs=1e-4)
    assert total == pytest.approx(expected, abs=1e-4)
    short = harness_model(lm, 4, longest=5)
    (windowed,) = short.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    assert windowed != pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("depth", [2, 6])
def test_text_ends_before_the_first_stop_string(lm, depth):
    """The text is transformers' own, of the full model or of the exit as a model of its own."""
    hf = lm.model.hf if depth == 6 else draft_model(lm.model, depth)
    prompts = ["def f(x):", "import os", "x"]

    def whole(prompt: str) -> str:
        ids = hf_generate(hf, lm.tokenizer(prompt)["input_ids"], 24, lm.eos())
        return lm.tokenizer.decode(ids, skip_special_tokens=True)

    wanted = [whole(prompt) for prompt in prompts]
    model = harness_model(lm, depth, rows=2)
    free = [request("generate_until", p, {"until": [], "do_sample": False}) for p in prompts]
    assert model.generate_until(free) == wanted
    stop = next(c for c in wanted[0][4:] if c not in wanted[0][:4] and c != "\ufffd")
    stopped = [request("generate_until", p, {"until": [stop, "@@@"]}) for p in prompts]
    cut = model.generate_until(stopped)
    assert cut == [text.split(stop)[0] for text in wanted]
    assert 4 <= len(cut[0]) < len(wanted[0])
    short = request("generate_until", prompts[0], {"until": stop, "max_gen_toks": 2})
    assert wanted[0].startswith(model.generate_until([short])[0])


def test_a_stop_string_ends_the_decoding(lm, monkeypatch):
    """Not only the text: nothing is decoded past it."""
    import eval.harness

    decoded = []

    class Counting(eval.harness.Decode):
        def finish(self):
            decoded.extend(tokens := super().finish())
            return tokens

    monkeypatch.setattr(eval.harness, "Decode", Counting)
    model = harness_model(lm, 6)
    (text,) = model.generate_until([request("generate_until", "def f(x):", {"until": []})])
    model.generate_until([request("generate_until", "def f(x):", {"until": [text[3]]})])
    assert len(decoded[1]) < len(decoded[0])


def test_what_cannot_be_generated_is_refused(lm, tiny_base):
    model = harness_model(lm, 6)
    wrong = request("generate_until", "x", {"until": [], "num_beams": 4})
    with pytest.raises(ValueError, match=r"generation_kwargs=.'num_beams': 4.* is not possible"):
        model.generate_until([wrong])
    long = request("generate_until", "x", {"max_gen_toks": 512})
    with pytest.raises(ValueError, match="max_gen_toks=512 is not possible: the model's texts"):
        model.generate_until([long])
    adapted = EarlyExitLM(
        ExitModel(lm.model.hf, ExitConfig.of([2], "adapter")).eval(), lm.tokenizer
    )
    with pytest.raises(ValueError, match="head='adapter' is not possible"):
        harness_model(adapted, 2).generate_until([request("generate_until", "x", {})])


def test_sampling_of_a_task_is_that_of_its_settings(lm):
    drawn = {"until": [], "do_sample": True, "temperature": 0.9, "top_k": 20}
    greedy = {"until": [], "do_sample": False, "temperature": 0.9}
    model = harness_model(lm, 6)
    texts = model.generate_until([request("generate_until", "x = ", a) for a in (drawn, greedy)])
    assert (
        texts[0]
        == lm.generate(
            "x = ", chat=False, ladder="plain", max_new_tokens=24, temperature=0.9, top_k=20
        ).text[0]
    )
    assert texts[1] == lm.generate("x = ", chat=False, max_new_tokens=24).text[0]


def test_a_chat_template_writes_the_prompt(lm):
    model = harness_model(lm, 6)
    chat = [{"role": "user", "content": "hello"}]
    assert model.apply_chat_template(chat) == "user: hello\nassistant: "
    assert longest_text(lm.model) == 512
