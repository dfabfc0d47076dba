"""The model card of an EE checkpoint: metadata for the Hub, measured figures, how to decode."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hispec.base_models.local import fetch_names
from hispec.checkpoint.format import exit_depths
from hispec.planner.plan_file import PICTURE, Plan, shown

FIGURE = "agreement.png"
# A card with this line is written anew by hispec; one without it is the user's own text.
WRITTEN = "<!-- Written by hispec, which writes it anew while this line stands. -->"
_KINDS = {
    "shared": "the final norm and the LM head",
    "adapter": "norms and low-rank adapters of their own and the shared LM head",
    "block": "own transformer blocks and the shared LM head",
    "eagle3": "an EAGLE-3 head",
}
# The settings of a recipe that the card shows; `exit_config.json` holds all of them.
_SETTINGS = (
    *("trunk", "exits", "head", "head_blocks", "head_rank", "head_previous", "draft_vocab"),
    *("unroll", "unroll_decay", "data"),
    *("seq_len", "steps", "batch_size", "lr", "divergence", "neighbour_share", "distill_weight"),
    *("ce_weight", "e_scale", "curriculum", "layer_dropout", "base_kl", "precision", "seed"),
)


def model_card(
    name: str,
    config: dict[str, Any],
    *,
    files: Collection[str] = (),
    plan: Plan | None = None,
) -> str:
    """The model card: Markdown with a YAML head, from the content of `exit_config.json`.

    Args:
        name: of the checkpoint: a folder's, or on the Hub `ORG/NAME`.
        files: names of the files beside the card; pictures of the agreement and the plan are shown
            if they are among them.
        plan: the content of `plan.json`, if there is one.
    """
    base = config["base"]
    metadata = ModelCardData(
        base_model=base["hub_id"],
        license=base["license"],
        library_name="hispec",
        pipeline_tag="text-generation",
        tags=["early-exit", "speculative-decoding", "hispec"],
        model_name=name.rpartition("/")[2],
        eval_results=_eval_results(config) or None,
    )
    depths = ", ".join(map(str, exit_depths(config)))
    trained = (
        " Its layers were trained together with the exits, so that text is no longer the base's."
        if base.get("trained")
        else ""
    )
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        WRITTEN,
        "",
        f"# {name}",
        "",
        f"Early exits at depth {depths} of {config['model']['num_hidden_layers']} for "
        f"`{_cell(base['id'])}`, read through {_readers(config)}. "
        "Decoded with HiSpec, a shallow exit drafts, a deeper one verifies and the full model "
        f"validates; the text is the full model's own.{trained}",
        "",
        *_usage(name, config),
        *_figures(config["figures"], FIGURE in files),
        *_training(config["recipe"]),
        *(_plan(plan, PICTURE in files) if plan else []),
    ]
    lines += _checked(config["figures"])
    included = "included in this folder" if base["included"] else "not included"
    lines += ["## Base", "", f"`{_cell(base['id'])}`, {included}. SHA-256 of its weights:", ""]
    lines += [f"- `{file}` `{digest}`" for file, digest in base["weights"].items()]
    return "\n".join(lines) + "\n"


def _readers(config: dict[str, Any]) -> str:
    """What reads the exits, in words."""
    kinds = dict.fromkeys(exit["head"] for exit in config["exits"])
    return " or ".join(_KINDS[kind] for kind in kinds)


def _eval_results(config: dict[str, Any]) -> list[EvalResult]:
    """The measured agreement in the Hub's model-index form."""
    figures, data = config["figures"], config["recipe"].get("data", "text")
    return [
        EvalResult(
            task_type="text-generation",
            task_name="early-exit drafting",
            dataset_type=_cell(data),
            dataset_name=figures["text"],
            metric_type=kind,
            metric_name=f"{title}, depth {row['shallow']} judged by depth {row['deep']}",
            metric_value=round(row[key], 4),
        )
        for row in figures.get("agreement", ())
        for kind, key, title in (
            ("agreement", "top1", "same top token"),
            ("acceptance", "acceptance", "sum of min(p, q)"),
        )
    ]


def _usage(name: str, config: dict[str, Any]) -> list[str]:
    base = config["base"]
    lines = ["## Decode", "", "```bash"]
    if not base["included"]:
        lines += [f"hispec fetch {fetched}" for fetched in fetch_names(base)[:1]]
    if "/" in name:
        lines.append(f"hispec pull {name}")
    lines += [f'hispec generate {name} "your prompt" --stats', "```", ""]
    lines += ["```python", "import hispec", "", f'lm = hispec.load("{name}")']
    lines += ['print(lm.generate("your prompt").text[0])', "```", ""]
    if base["included"]:
        lines += ["Plain transformers loads the full model from it: "
                  f'`AutoModelForCausalLM.from_pretrained("{name}")`.', ""]  # fmt: skip
    return lines


def _figures(figures: dict[str, Any], pictured: bool) -> list[str]:
    lines = []
    if rows := figures.get("agreement"):
        lines += [
            "## Agreement",
            "",
            f"On {figures['text']}, {rows[0]['tokens']:,} tokens, temperature 1:",
            "",
            "| depth | judged by | same top token | acceptance, sum of min(p, q) |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {r['shallow']} | {r['deep']} | {r['top1']:.3f} | {r['acceptance']:.3f} |"
            for r in rows
        ]
        trained = (
            f"Trained on {figures['training_tokens']:,} tokens in {figures['minutes']:.1f} minutes."
        )
        lines += ["", trained, ""]
    if pictured:
        lines += [f"![Agreement with the full model over depth]({FIGURE})", ""]
    if (drift := figures.get("drift")) is not None:
        lines += [f"KL of the full model to its base on the same text: {drift:.4f} nats.", ""]
    return lines


def training_settings(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, value) of the settings that decide how the exits were trained."""
    return [(key, public(recipe[key])) for key in _SETTINGS if key in recipe]


def _training(recipe: dict[str, Any]) -> list[str]:
    rows = [f"| `{key}` | {_cell(value)} |" for key, value in training_settings(recipe)]
    return ["## Training", "", "| setting | value |", "|---|---|", *rows, ""] if rows else []


def _plan(plan: Plan, pictured: bool) -> list[str]:
    """The chosen setting and those that were decoded beside it; the file has the others."""
    text, plain = plan.text, plan.plain_tokens_per_second
    lines = [
        "## Plan",
        "",
        f"The fastest setting on {plan.machine}, over {text['prompts']} prompts{plan.together}, "
        f"with {text['new_tokens']} new tokens of each: **{shown(plan.setting)}**, "
        f"{plan.tokens_per_second:.1f} tokens/s, {plan.speedup:.2f}x plain decoding. There it is "
        "what `auto` means; `hispec plan` finds the one for another machine.",
        "",
        "| setting | tokens/s | against plain | tokens per target pass |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {shown(t.setting)} | {t.measured:.1f} | {t.measured / plain:.2f}x "
        f"| {t.tokens_per_target_pass:.2f} |"
        for t in plan.confirmed
        if t.measured is not None
    ]
    picture = [f"![Predicted gain over what drafts and what verifies]({PICTURE})", ""]
    return [*lines, "", *(picture if pictured else [])]


def public(value: Any) -> str:
    """A setting as others may read it: of a path on the author's machine only the last part."""
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return str(value)


def _cell(value: Any) -> str:
    """A setting in a table of Markdown."""
    return public(value).replace("|", "\\|").replace("\n", " ")


def _checked(figures: dict[str, Any]) -> list[str]:
    """The figures of the check of the export."""
    if not (check := figures.get("check")):
        return []
    ties = f", but for {check['near_ties']} near-ties" if check["near_ties"] else ""
    return [
        "## Checked",
        "",
        f"Loaded by a new process before it was called an export, in {check['dtype']}: the logits "
        f"at every exit are those of its source, without any difference. {check['prompts']} "
        f"prompts ({check['text']}), {check['new_tokens']} new tokens, ladder "
        f"{', '.join(map(str, check['ladder']))}: the full model's own text{ties}; accepted of the "
        f"drafts: {accepted(check)}.",
        "",
    ]


def accepted(check: dict[str, Any]) -> str:
    """The share of each exit's drafts that was accepted in the check of an export, in words."""
    shares = [f"{s:.3f} at depth {d}" for d, s in check["acceptance"].items() if s is not None]
    return ", ".join(shares) or "none were made"
