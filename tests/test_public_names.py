"""Names and commands of the README of version 0.1: all of them still work.

The lists are written out, so that a changed README cannot change what is held to.
"""

from __future__ import annotations

import inspect
import shlex
from dataclasses import fields
from importlib import import_module

import pytest
import typer
from conftest import ROOT

import hispec
from hispec.cli import app
from hispec.decoding.stats import DecodeStats, DraftStats, RungStats
from hispec.utils.settings import resolve
from train.recipe import Recipe, load_recipe

COMMANDS = """
hispec fetch smollm2-135m
hispec fetch ORG/NAME --root checkpoints/base
hispec generate checkpoints/demo "def read_config(path):" --raw --max-new-tokens 64 --show-rungs
hispec generate checkpoints/demo "Why?" --stats --compare
hispec generate checkpoints/demo "Why?" --ladder 6,30 --draft-length 3 --stats
hispec generate checkpoints/demo "Once upon a time" --raw --temperature 0.8 --seed 7 --compare
hispec generate checkpoints/demo "Why?" --ladder plain --base checkpoints/base/smollm2-135m
hispec generate checkpoints/demo - --ladder auto --drafter recycle+exit --tree-tokens 15
hispec generate checkpoints/demo "Why?" --draft-threshold 0.5 --max-draft-length 6
hispec generate checkpoints/demo "Why?" --drafter lookup --lookup-length 8
hispec generate checkpoints/demo "Why?" --buffer 4 --buffer-threshold 0.5 --law match
hispec generate checkpoints/demo "Why?" --law rejection --top-k 9 --top-p 0.9 --min-p 0.1
hispec generate checkpoints/demo "Why?" --stop x --stop y --max-time 9 --repetition-penalty 1.1
hispec generate checkpoints/demo "Why?" --no-repeat-ngram-size 3 --dtype bfloat16 --device cpu
hispec generate smollm2-135m "Why is the sky blue?" --exits 20 --ladder 20,30 --stats
hispec generate ORG/NAME "Why is the sky blue?"
hispec plan checkpoints/demo --prompts 2 --max-new-tokens 24 --repeats 1
hispec plan checkpoints/demo --data mine.jsonl --exits 4,8 --output plans --base b --device cpu
hispec plan checkpoints/demo --confirm 20 --json --dtype float32
hispec report checkpoints/demo --prompts 3 --max-new-tokens 32
hispec report checkpoints/demo --data mine.jsonl --prompts 12 --output report.html
hispec report checkpoints/demo --no-decode --base b --dtype auto --device cpu
hispec export checkpoints/demo checkpoints/demo-full --full --base b
hispec export checkpoints/demo draft --as draft-model --exit 6
hispec export checkpoints/demo full.gguf --as gguf
hispec export smollm2-135m checkpoints/ls --exits 6,12
hispec export checkpoints/demo head --as eagle3
hispec export checkpoints/demo head --as speculators --exit 0
hispec import-drafter ORG/NAME smollm2-135m checkpoints/eagle
hispec import-drafter folder b checkpoints/eagle --aux-depths 2,15,27
hispec inspect checkpoints/demo --base b
hispec inspect smollm2-135m --json
hispec push checkpoints/demo ORG/NAME --dry-run
hispec push checkpoints/demo ORG/NAME --revision v2 --private
hispec push checkpoints/demo ORG/NAME --public
hispec pull ORG/NAME
hispec pull ORG/NAME@v2 folder --revision v2
""".strip().splitlines()

SCRIPTS = """
eval/agreement.py checkpoint=c output=o seq_len=32 sequences=2 dtype=float32 device=cpu
eval/agreement.py checkpoint=c data=stdlib data_split=train text_column=text held_out=0.1
eval/speed.py checkpoint=c prompts_from=builtin prompts=6 repeats=1 rivals=[hf-lookup]
eval/speed.py checkpoint=c 'ladders=["4,30","4,10,30"]' 'drafters=["exit","lookup+exit"]'
eval/speed.py checkpoint=c output=o draft_length=2 lookup_length=8 buffer=4 rival_exits=[6]
eval/speed.py checkpoint=c max_new_tokens=9 stop_at_eos=false chat=true rivals=[] device=cpu
eval/lossless.py checkpoint=c against=plain temperature=0.8 seed=3
eval/lossless.py checkpoint=c 'drafters=["lookup","recycle+exit"]' rows=6 allow_ties=true
eval/lossless.py checkpoint=c prompts=24 max_new_tokens=96 prompts_from=spec-bench draft_length=3
eval/lossless.py checkpoint=c repetition_penalty=1.2 no_repeat_ngram_size=3 buffer=5 chat=false
eval/quality.py checkpoint=c 'tasks=[gsm8k]' gsm8k_file=FILE.jsonl limit=100
eval/quality.py checkpoint=c 'tasks=[arc_easy,hellaswag]' depths=[12] base=b output=o
eval/quality.py checkpoint=c tasks=[] ladder=6,30 drafter=exit chat=true batch_size=4 rows=2
train/synthesize.py base=smollm2-135m output=data/smollm2.jsonl samples=1000
train/synthesize.py base=b output=o.jsonl prompts=FILE.jsonl batch_size=8 drafter=lookup
train/synthesize.py base=b output=o.jsonl shard=0 shards=4 seed=1 threads=2
""".strip().splitlines()

RECIPE_WORDS = """
recipe=smollm2-135m output=checkpoints/demo steps=150 max_minutes=4
recipe=smollm2-135m exits=[4,10] head_blocks=1 output=checkpoints/small
recipe=smollm2-135m data=my.jsonl text_column=body output=checkpoints/mine streaming=true
recipe=smollm2-135m trunk=full head=shared layer_dropout=0.1 base_kl=0.5 lr=1e-4 output=o
recipe=smollm2-135m states=runs/states max_rows=1600 output=checkpoints/epochs states_top_k=32
recipe=smollm2-135m data=data/smollm2.jsonl text_column=messages output=checkpoints/own
recipe=smollm2-135m head_previous=true draft_vocab=8192 log_with=tensorboard eval_every=10
recipe=llama3-8b
recipe=llama3.2-1b
recipe=llama2-7b
recipe=llama2-13b
recipe=llama2-70b
recipe=codellama-7b
recipe=codellama-34b
recipe=qwen3-0.6b
recipe=qwen3-8b
recipe=gemma3-270m
recipe=qwen2.5-coder-1.5b
recipe=smoke
""".strip().splitlines()

RECIPE_KEYS = shlex.split("""
base output exits head head_blocks head_rank draft_vocab head_previous unroll unroll_decay trunk
lora_rank lora_alpha layer_dropout dropout_schedule dropout_warmup base_kl max_drift data data_split
text_column held_out streaming seq_len max_rows states states_top_k steps max_minutes batch_size
accumulate lr lr_schedule gradient_checkpointing warmup min_lr weight_decay clip distill_weight
divergence neighbour_share ce_weight exit_weights e_scale curriculum loss_chunk fused_loss precision
threads seed eval_every eval_sequences log_with save_every export_full
""")

DECODE_SETTINGS = shlex.split("""
ladder drafter draft_length max_draft_length adaptive draft_threshold draft_vocab join_drafts
lookup_length lookup_ngram lookup_shortest max_lookup_length tree_tokens buffer buffer_threshold
max_new_tokens max_time temperature top_k top_p min_p repetition_penalty no_repeat_ngram_size
seed eos
""")


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_and_options(line):
    _, name, *words = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    context = command.make_context(name, words)  # parses, and refuses an unknown option
    assert context.params


@pytest.mark.parametrize("line", SCRIPTS)
def test_keys_of_the_scripts(line):
    script, *words = shlex.split(line)
    assert (ROOT / script).is_file()
    module = import_module(script.removesuffix(".py").replace("/", "."))
    words = getattr(module, "current_names", list)(words)  # what became of renamed keys
    found = resolve(module.Settings, overrides=words)
    for word in words:
        assert hasattr(found, word.partition("=")[0])


@pytest.mark.parametrize("line", RECIPE_WORDS)
def test_recipes(line):
    load_recipe(shlex.split(line))


def test_recipe_keys():
    assert set(RECIPE_KEYS) <= {field.name for field in fields(Recipe)}


def test_the_training_command_and_its_configs():
    assert (ROOT / "train" / "ee_finetune.py").is_file()
    configs = {path.stem for path in (ROOT / "recipes" / "accelerate").glob("*.yaml")}
    assert {"single", "zero2"} <= configs


def test_names_of_the_package():
    for name in ("DecodeConfig", "DecodeResult", "EarlyExitLM", "ExitConfig", "ExitModel", "load"):
        assert getattr(hispec, name).__name__ == name
    assert import_module("hispec.generation").generate  # full checkpoints call it
    names = {field.name for field in fields(hispec.DecodeConfig)}
    assert set(DECODE_SETTINGS) <= names
    # exits that are alike were `ExitConfig(depths, head, ...)`, they are `ExitConfig.of` now
    alike = hispec.ExitConfig.of([2, 4], "block", blocks=1, rank=3, draft_vocab=9)
    assert alike.depths == [2, 4]
    assert [(exit.head, exit.blocks, exit.rank) for exit in alike.exits] == [("block", 1, 3)] * 2


@pytest.mark.parametrize(
    ("function", "names"),
    [
        ("load", "path dtype device exits base"),
        ("EarlyExitLM", "model tokenizer plan"),
        ("EarlyExitLM.from_transformers", "hf tokenizer exits"),
        ("EarlyExitLM.encode", "self prompt chat"),
        ("EarlyExitLM.ladder", "self ladder"),
        (
            "EarlyExitLM.decode",
            "self prompts ladder chat stop_strings seeds logits_processor stopping_criteria",
        ),
        ("EarlyExitLM.generate", "self prompts streamer"),
        ("EarlyExitLM.stream", "self prompt"),
    ],
)
def test_arguments(function, names):
    found = hispec
    for part in function.split("."):
        found = getattr(found, part)
    parameters = list(inspect.signature(found).parameters)
    assert [name for name in names.split() if name not in (*parameters, "self")] == []


def test_the_python_of_the_readme(lm):
    """With the tiny model, whose depths are 2, 4 and 6."""
    result = lm.generate(["Why is the sky blue?", "Name."], ladder=(2, 4, 6), max_new_tokens=4)
    assert len(result.text) == len(result.tokens) == len(result.depths) == 2
    assert result.stats.tokens_per_second > 0
    pieces = list(lm.stream("Why?", temperature=0.8, seed=7, max_new_tokens=4))
    assert all(isinstance(piece.text, str) for piece in pieces)
    assert {"token", "depth", "text"} <= vars(pieces[0]).keys()
    three = lm.generate(["Name."] * 3, temperature=1.5, seeds=[1, 2, 3], max_new_tokens=8)
    assert len(set(three.text)) == 3
    lm.generate("Name.", drafter="recycle", ladder=(6,), stop_strings=["\n\n"], max_new_tokens=4)
    wrapped = hispec.EarlyExitLM.from_transformers(lm.model.hf, lm.tokenizer, exits=(3, 5))
    assert wrapped.ladder() == [3, 5, 6]
    assert wrapped.planned()[0] is None


def test_figures_that_a_decode_counts():
    """Programs read them from `stats`, and from the JSON of `as_dict`."""
    stats = {
        *("rungs", "free", "rows", "prompt_tokens", "new_tokens", "seconds", "as_dict"),
        *("tokens_per_second", "tokens_per_target_pass", "layer_token_runs"),
        *("plain_layer_token_runs", "extra_layer_token_runs"),
    }
    rung = {"depth", "layers", "head_layers", "passes", "tokens_run", "head_tokens_run", "seconds"}
    for kind, names in (
        (DecodeStats, stats),
        (RungStats, rung | {"proposed", "accepted", "acceptance"}),
        (DraftStats, {"proposed", "accepted", "acceptance"}),
    ):
        assert names <= {*dir(kind), *(field.name for field in fields(kind))}
