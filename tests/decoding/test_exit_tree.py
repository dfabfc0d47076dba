"""Trees that an exit drafts: the tokens are the most probable ones, each after its own path.

Lossless they are in `test_properties.py`; here the drafts themselves are compared, with chains that
a ladder of their own drafts path by path, and by hand on scripted models.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import disturbed, tiny_hf
from scripted import Counts, follows, play

from hispec.config import DecodeConfig, Exit, ExitConfig
from hispec.decoding.decoder import Decode
from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.ladder import Ladder
from hispec.models.exit_model import ExitModel

EXITS = {
    "shared at 2": Exit(2, "shared"),
    "blocks at 2": Exit(2, "block", blocks=1),
    "simple": Exit(0, "block", blocks=1, previous=True),
    "eagle3": Exit(0, "eagle3"),
}


def model_of(exit, family):
    return disturbed(ExitModel(tiny_hf(family), ExitConfig([exit])).eval())


def paths_of(tree: DraftTree, row: int) -> list[tuple[int, ...]]:
    """The tokens that lead to each draft token of a row, itself included."""
    paths = [()]
    for token, parent in zip(tree.tokens_BN[row], tree.parent_BN[row], strict=True):
        if parent >= 0:
            paths.append((*paths[parent], int(token)))
    return paths[1:]


def log_probs(model, text: list[int], path: tuple[int, ...]) -> torch.Tensor:
    """What the exit says after a chain of drafts, in a ladder of its own."""
    row = np.array([[*text, *path]])
    ladder = Ladder(model, (model.exits.depths[0], model.num_layers), 1, row.shape[1] + 1)
    ladder.prefill(row, np.array([len(text) - 1]))
    for at in range(len(text) - 1, row.shape[1]):
        logits_V = ladder.logits(0, row, np.array([at]), np.array([at + 1]), drafting=True)[0, 0]
    return logits_V.float().log_softmax(-1)


def expected_paths(model, text, width, steps, most, least=-np.inf):
    """Step by step, with everything computed anew for every path."""
    found, front = {}, {(): 0.0}
    for _ in range(steps):
        children = {}
        for path, so_far in front.items():
            top = log_probs(model, text, path).topk(width)
            for log_p, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                if so_far + log_p >= least:
                    children[(*path, token)] = so_far + log_p
        found |= children
        front = dict(sorted(children.items(), key=lambda item: -item[1])[:width])
    return {path for path, _ in sorted(found.items(), key=lambda item: -item[1])[:most]}


@pytest.mark.parametrize("exit", EXITS.values(), ids=EXITS)
@torch.inference_mode()
def test_the_draft_is_the_most_probable_tree(exit, family):
    model = model_of(exit, family)
    prompts = [[5, 9, 33, 7, 18], [40, 4, 11]]
    config = DecodeConfig(
        [exit.depth, 6], draft_width=3, draft_length=4, tree_tokens=9, max_new_tokens=20
    )
    run = Decode(model, prompts, config)
    for _ in range(3):
        run.step()
        text = run.state.view()
        tree = run._draft()
        for row in range(2):
            so_far = text.tokens_BN[row, : text.length_B[row]].tolist()
            expected = expected_paths(model, so_far, 3, min(4, int(text.room_B[row])), 9)
            assert set(paths_of(tree, row)) == expected
        run.ladder.truncate(text.length_B - 1)


@torch.inference_mode()
def test_improbable_tokens_are_left_out():
    model = model_of(EXITS["simple"], "llama")
    config = DecodeConfig(
        [0, 6], draft_width=4, draft_length=3, draft_threshold=0.03, max_new_tokens=20
    )
    run = Decode(model, [[5, 9, 33]], config)
    run.step()
    text = run.state.view().tokens_BN[0, :4].tolist()
    expected = expected_paths(model, text, 4, 3, 15, np.log(0.03))
    assert 0 < len(expected) < 15
    assert set(paths_of(run._draft(), 0)) == expected


ALPHABET = "abcdefghijklmnop"
TREE = dict(draft_width=2, draft_length=3, tree_tokens=5)


def beside(text, first):
    """Says another token first, and the right one second, at every position of `first`."""

    def says(prefix):
        right = follows(text)(prefix)
        return "#" + right if len(prefix) in first else right

    return says


def test_a_tree_by_hand():
    """From c: d e f, a filler beside d and beside e; 3 right, g added. From g two steps are left:
    h i, a filler beside each, and one more behind the filler; 2 right, j is the full model's.

    The exit reads the prompt, c, twice 2 tokens, and the tree once more with the full model; then
    g, 2 tokens, the tree."""
    done = play("ab", [follows(ALPHABET)] * 3, (1, 3), max_new_tokens=8, **TREE)
    assert done == (ALPHABET[2:10], Counts([5, 3], (0, 0), [(10, 5)], [2 + 10 + 8, 2 + 6 + 6]))


def test_a_second_candidate_is_accepted():
    """The exit prefers # to e. A chain ends there: c; d # ! for d, e added; f, g added. A tree has
    both behind d: c; d e f, g added."""
    says = [beside(ALPHABET, {4}), follows(ALPHABET), follows(ALPHABET)]
    for settings, judged, passes in (
        (dict(draft_length=3), (4, 2), [4, 3]),
        (dict(TREE, tree_tokens=8), (8, 3), [3, 2]),
    ):
        text, counts = play("ab", says, (1, 3), max_new_tokens=5, **settings)
        assert text == ALPHABET[2:7]
        assert (counts.judged[0], counts.passes) == (judged, passes)


def test_under_a_middle_rung():
    """The middle rung accepts d e f and adds g, the full model validates them and adds h."""
    settings = dict(max_new_tokens=6, buffer=4, **TREE)
    text, counts = play("ab", [follows(ALPHABET)] * 3, (1, 2, 3), **settings)
    assert text == ALPHABET[2:8]
    assert counts.judged == [(5, 3), (4, 4)]
    assert counts.passes == [3, 1, 2]


def test_one_tree_of_an_exit_and_a_lookup():
    """Of the lookup c a, of the exit c d and three fillers: c is the exit's, a free. The text goes
    on with either, and the full model adds the last token."""
    for text in ("abcabcab", "abcabcde"):
        settings = dict(drafter="lookup+exit", lookup_length=3, max_new_tokens=4, **TREE)
        says = [follows("abcabcde"), follows(text), follows(text)]
        new, counts = play("abca", says, (1, 3), **settings)
        assert new == text[4:]
        assert counts.passes[1] == 2
        by_lookup = 1 if text.endswith("ab") else 0
        assert counts.free == (1, by_lookup)
        assert counts.judged[0] == (5, 2 - by_lookup)


def test_a_tree_of_an_exit_or_a_lookup():
    """Behind a b the lookup has c a b alone; c is right, d is added. It has nothing behind d, so
    the exit drafts: its tree has e f and three fillers, and the full model adds g."""
    text = "abcabcdefgh"
    settings = dict(drafter="lookup+exit", join_drafts=False, lookup_length=3, **TREE)
    new, counts = play("abca", [follows(text)] * 3, (1, 3), max_new_tokens=6, **settings)
    assert new == text[4:10]
    assert counts.free == (3, 1)
    assert counts.judged[0] == (5, 2)


def test_an_end_of_text_has_no_continuation():
    says = [follows("abcd.efgh")] * 3
    new, counts = play("ab", says, (1, 3), eos=".", max_new_tokens=9, **TREE)
    assert new == "cd."
    assert counts.passes[1] == 2


def test_steps_follow_acceptance():
    """1 step, all right: 3 steps, all right: 5, as many as the limit leaves."""
    settings = dict(draft_width=2, draft_length=1, max_draft_length=8, tree_tokens=12)
    _, counts = play("a", [follows(ALPHABET)] * 3, (1, 3), max_new_tokens=13, **settings)
    assert counts.passes == [1 + 3 + 5, 4]


def test_rejection_takes_no_trees():
    config = DecodeConfig([2, 6], draft_width=3, verification="rejection")
    with pytest.raises(ValueError, match="draft_width=3 is not possible: 1, a chain"):
        config.validate(6)


def test_nodes_become_a_tree_depth_first():
    """Two branches in the order of their steps; a token that comes twice behind one parent is one,
    and free only if both are."""
    tokens = np.array([[7, 8, 9, 7, 5, 8]])
    parents = np.array([[0, 0, 1, 0, 4, 4]])
    free = np.array([[False, True, False, True, True, True]])
    tree = DraftTree.of_nodes(tokens, parents, free)
    assert paths_of(tree, 0) == [(7,), (7, 9), (7, 5), (7, 8), (8,)]
    assert tree.free_BN.tolist() == [[False, False, True, True, True]]
    assert not tree.chain
    assert DraftTree.of_nodes(tokens[:, :1], parents[:, :1]).chain
