"""lm-evaluation-harness through the API: the texts and scores of `eval/quality.py`."""

from __future__ import annotations

from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from serve_process import MODEL, served

from eval.harness import GenerationSettings, HarnessModel, LogLikelihoods, longest_text
from eval.harness_tasks import load_tasks
from hispec.config import DecodeConfig

LIMIT = 4


def texts_and_scores(model):
    """What the model answered to each problem, and all metrics."""
    found = simple_evaluate(
        model,
        tasks=load_tasks(["local/word_problems"]),
        task_manager=TaskManager(include_defaults=False),
        limit=LIMIT,
        bootstrap_iters=0,
    )
    samples = found["samples"]["local/word_problems"]
    return [sample["resps"] for sample in samples], found["results"]


def test_a_task_through_the_api_is_the_task_of_the_evaluation(ee, lm, tmp_path):
    full = lm.model.num_layers
    longest = longest_text(lm.model)
    scores = LogLikelihoods(lm.model, [full], 4, longest)
    settings = GenerationSettings(DecodeConfig([full]), rows=2, max_new_tokens=40)
    lm.tokenizer.save_pretrained(tmp_path)
    with served(ee, "--max-prompt", str(longest), "--max-new-tokens", "40") as server:
        api = LocalCompletionsAPI(
            base_url=f"{server.url}v1/completions",
            model=MODEL,
            tokenizer=str(tmp_path),
            tokenizer_backend="huggingface",
            num_concurrent=2,
            max_gen_toks=40,
            max_length=longest + 1,  # it takes one off
            truncate=True,
        )
        through_api = texts_and_scores(api)
    assert through_api == texts_and_scores(HarnessModel(lm, full, scores, settings))
    assert len(through_api[0]) == 2 * LIMIT  # two filters read each text
    assert any(text for ((text,),) in through_api[0])
