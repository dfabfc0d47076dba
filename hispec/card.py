"""The model card of an EE checkpoint: metadata for the Hub, measured figures, how to decode."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData


def model_card(name: str, config: dict[str, Any]) -> str:
    """Markdown with a YAML head, from the content of `exit_config.json`."""
    base, exits = config["base"], config["exits"]
    metadata = ModelCardData(
        base_model=base["hub_id"],
        license=base["license"],
        library_name="hispec",
        pipeline_tag="text-generation",
        tags=["early-exit", "speculative-decoding", "hispec"],
    )
    depths = ", ".join(map(str, exits["depths"]))
    kind = {
        "shared": "the final norm",
        "adapter": "norms and low-rank adapters of their own",
        "block": "own transformer blocks",
    }[exits["head"]]
    trained = (
        " Its layers were trained together with the exits, so that text is no longer the base's."
        if base.get("trained")
        else ""
    )
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        f"# {name}",
        "",
        f"Early exits at depth {depths} of {config['model']['num_hidden_layers']} for "
        f"`{base['id']}`, read through {kind} and the shared LM head. Decoded with HiSpec, a "
        "shallow exit drafts, a deeper one verifies and the full model validates; the text is the "
        f"full model's own.{trained}",
        "",
        "```bash",
        f'hispec generate {name} "your prompt" --stats',
        "```",
        "",
    ]
    lines += _figures(config["figures"])
    lines += _checked(config["figures"])
    included = "included in this folder" if base["included"] else "not included"
    if (drift := config["figures"].get("drift")) is not None:
        lines += [f"KL of the full model to its base on the same text: {drift:.4f} nats.", ""]
    lines += ["## Base", "", f"`{base['id']}`, {included}. SHA-256 of its weights:", ""]
    lines += [f"- `{file}` `{digest}`" for file, digest in base["weights"].items()]
    return "\n".join(lines) + "\n"


def _figures(figures: dict[str, Any]) -> list[str]:
    rows = figures.get("agreement")
    if not rows:
        return []
    lines = [
        "## Agreement",
        "",
        f"On {figures['text']}, {rows[0]['tokens']:,} tokens, temperature 1:",
        "",
        "| depth | judged by | same top token | acceptance, sum of min(p, q) |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r['shallow']} | {r['deep']} | {r['top1']:.3f} | {r['acceptance']:.3f} |" for r in rows
    ]
    trained = (
        f"Trained on {figures['training_tokens']:,} tokens in {figures['minutes']:.1f} minutes."
    )
    return [*lines, "", trained, ""]


def _checked(figures: dict[str, Any]) -> list[str]:
    """What the check of the export found."""
    if not (check := figures.get("check")):
        return []
    shares = [f"{s:.3f} at depth {d}" for d, s in check["acceptance"].items() if s is not None]
    ties = f", but for {check['near_ties']} near-ties" if check["near_ties"] else ""
    return [
        "## Checked",
        "",
        f"Loaded by a new process before it was called an export, in {check['dtype']}: the logits "
        f"at every exit are those of its source, without any difference. {check['prompts']} "
        f"prompts ({check['text']}), {check['new_tokens']} new tokens, ladder "
        f"{', '.join(map(str, check['ladder']))}: the full model's own text{ties}; accepted of the "
        f"drafts: {', '.join(shares) or 'none were made'}.",
        "",
    ]
