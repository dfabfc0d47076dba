"""Shows a decode in the terminal: the text as it comes, colours, statistics, a comparison."""

from __future__ import annotations

from dataclasses import replace

from rich.table import Table
from rich.text import Text

from hispec.decoding.decoder import Decode
from hispec.decoding.state import FREE
from hispec.decoding.stats import DecodeStats
from hispec.lm import EarlyExitLM
from hispec.metrics.equivalence import first_difference, hf_generate
from hispec.utils.console import Output

_COLOURS = ("yellow", "cyan", "magenta", "blue")
_FINAL, _FREE = "green", "bright_black"


def colour(depth: int, ladder: tuple[int, ...]) -> str:
    """Style of tokens from the rung at `depth`. The full model has its own, and so have free drafts
    (depth -1)."""
    if depth == FREE:
        return _FREE
    if depth == ladder[-1]:
        return f"bold {_FINAL}"
    return _COLOURS[ladder.index(depth) % len(_COLOURS)]


def stream(out: Output, lm: EarlyExitLM, run: Decode, show_rungs: bool) -> list[int]:
    """Print the text as it is committed; returns the new token ids."""
    tokens, ladder = [], run.ladder.depths
    if show_rungs:
        legend = Text("tokens by rung: ")
        if run.config.drafter != "exit":
            legend.append("free draft", style=colour(FREE, ladder)).append("  ")
        for depth in ladder:
            legend.append(f"depth {depth}", style=colour(depth, ladder)).append("  ")
        out.print(legend)
    for piece in lm.stream(run):
        tokens.append(piece.token)
        if show_rungs:
            style = colour(piece.depth, ladder)
            out.print(Text(piece.text, style=style), end="", soft_wrap=True)
        else:  # rich would leave out control characters, and this is the model's text
            out.file.write(piece.text)
            out.file.flush()
    out.print()
    return tokens


def stats_table(out: Output, stats: DecodeStats) -> None:
    """Print one line per rung, and the totals."""
    table = Table()
    for title in ("rung", "layers", "passes", "tokens run", "proposed", "accepted", "seconds"):
        table.add_column(title, justify="right")
    if stats.free.proposed:
        share = f"{stats.free.accepted} ({stats.free.acceptance:.0%})"
        table.add_row("free draft", "0", "", "", str(stats.free.proposed), share, "")
    for rung in stats.rungs:
        rate = "" if rung.acceptance is None else f" ({rung.acceptance:.0%})"
        head = f" + {rung.head_layers}" if rung.head_layers else ""
        proposes = rung is not stats.rungs[-1]
        table.add_row(
            f"depth {rung.depth}",
            f"{rung.layers}{head}",
            str(rung.passes),
            str(rung.tokens_run),
            str(rung.proposed) if proposes else "",
            f"{rung.accepted}{rate}" if proposes else "",
            f"{rung.seconds:.2f}",
        )
    out.print(table)
    extra = stats.extra_layer_token_runs / stats.plain_layer_token_runs
    out.say(f"passes run by {stats.backend}, with {stats.weights} weights")
    out.say(
        f"{stats.new_tokens} tokens in {stats.seconds:.2f} s, prefill included: "
        f"{stats.tokens_per_second:.1f} tokens/s; {stats.tokens_per_target_pass:.2f} tokens per "
        f"target pass; {extra:.0%} more layer runs than plain decoding"
    )


def comparison(out: Output, lm: EarlyExitLM, run: Decode, tokens: list[int]) -> None:
    """Decode plainly too and say whether the text is the same.

    Greedy text is compared with transformers' `generate`. Sampled text is compared with our own
    plain decoding at the same seed, because `generate` draws from other noise.
    """
    config = run.config
    if config.verification == "rejection" and config.temperature > 0:
        out.say("verification 'rejection' keeps the distribution, not the text: nothing to compare")
        return
    prompt = run.state.tokens_BN[0, : run.state.prompt_B[0]].tolist()
    if config.temperature == 0:
        other = "transformers' generate"
        plain = hf_generate(
            lm.model.hf,
            prompt,
            config.max_new_tokens,
            config.eos,
            stopping_criteria=run.stopping,
            repetition_penalty=config.repetition_penalty,
            no_repeat_ngram_size=config.no_repeat_ngram_size,
        )
    else:
        other = "own plain decoding with the same seed"
        alone = replace(config, ladder=[lm.model.num_layers], drafter="exit", max_time=None)
        (plain,) = Decode(lm.model, [prompt], alone, stopping_criteria=run.stopping).finish()
    if config.max_time is not None:
        plain = plain[: len(tokens)]
    difference = first_difference(lm.model.hf, prompt, tokens, plain, config)
    if difference is None:
        out.say(f"identical to {other}: all {len(tokens)} tokens")
        return

    def name(token: int | None) -> str:
        return "the end of the text" if token is None else repr(lm.tokenizer.decode([token]))

    out.say(
        f"differs from {other} at new token {difference.position}: {name(difference.ours)} here, "
        f"{name(difference.theirs)} there; gap between the two top scores: {difference.gap:.4f} "
        f"({difference.kind})"
    )
