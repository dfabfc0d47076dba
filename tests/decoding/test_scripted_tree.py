"""`recycle` and `recycle+exit` on scripted models: the exact text and the exact work, by hand.

A tree of 3 has the best candidate, the best after that one, and the second best: columns 1, 2 and
3. Candidates are those of the last time that some level was asked after a token, the accepted path
of a pass counting as later than what lies beside it, or else what followed it in the prompt. Tokens
that nothing is known after have no children, and after such a token there is no tree.
"""

from __future__ import annotations

import pytest
from scripted import Counts, follows, play

from hispec.decoding.drafters.recycle import tree_template

PERIODIC = "abc" * 12
NOVEL = "abacadaea"  # what followed a is never right again
TURNS = "abacabacabac"  # what follows a is its second candidate every time
EITHER_OR = dict(second={"b": "c", "c": "b"}, lost={"a": "bc", "b": "a", "c": "a"})
RECYCLE = dict(drafter="recycle", tree_tokens=3)
BOTH = dict(drafter="recycle+exit", tree_tokens=3)


def test_the_trees_of_these_tests():
    assert tree_template(3, 8) == [(0, 0), (1, 0), (0, 1)]
    assert tree_template(7, 8) == [(0, 0), (1, 0), (2, 0), (1, 1), (0, 1), (5, 0), (0, 2)]


@pytest.mark.parametrize(
    ("ladder", "text", "new_tokens", "wrong", "expected"),
    [
        # From a: b c of the prompt, and a added; then b c and a filler, 2 right.
        ((3,), PERIODIC, 7, {}, Counts([3], (5, 4), [], [13])),
        ((2, 3), PERIODIC, 7, {}, Counts([2, 2], (5, 4), [(6, 6)], [13, 12])),
        ((1, 2, 3), PERIODIC, 7, {}, Counts([2, 1, 2], (5, 4), [(6, 6), (6, 6)], [13, 12, 12])),
        # From c and d there is no tree, from a one of c a ~ for d, and one of d ~ for e.
        ((3,), NOVEL, 6, {}, Counts([6], (5, 0), [], [13])),
        # The verifier refuses c for #, after which nothing is known: ! and ! are collected, and
        # b is validated, c added. From c: a b right, c and a are the verifier's.
        ((2, 3), PERIODIC, 7, {2: [8]}, Counts([5, 3], (5, 3), [(8, 5)], [17, 15])),
    ],
)
def test_trees_are_verified_and_validated(ladder, text, new_tokens, wrong, expected):
    says = [follows(text, wrong=wrong.get(depth, ())) for depth in (1, 2, 3)]
    prompt = "aba" if text == NOVEL else "abcabc"
    done = play(prompt, says, ladder, max_new_tokens=new_tokens, **RECYCLE)
    assert done == (text[len(prompt) :][:new_tokens], expected)


@pytest.mark.parametrize(
    ("ladder", "tree_tokens", "new_tokens", "expected"),
    [
        # c has no tree. From the a at 4, 6 and 8: c a b, b a c, c a b; column 3 each time. What the
        # a in column 2 said is not kept: the a on the path says the opposite.
        ((3,), 3, 9, Counts([6], (9, 3), [], [17])),
        # a, b a and c a are 5 pending, validated, and b added. From b: a and a filler, a right.
        ((2, 3), 3, 9, Counts([4, 3], (8, 3), [(7, 7)], [16, 11])),
        # From a: c a c ~, b a, ~; columns 5 6. From c: a c, b, ~ !, }; columns 1 3, as the limit
        # leaves out what is 3 deep.
        ((3,), 7, 8, Counts([4], (13, 4), [], [19])),
    ],
)
def test_a_branch_beside_is_kept(ladder, tree_tokens, new_tokens, expected):
    """What was run in the slots of other columns moves to where the text has it."""
    says = [follows(TURNS, **EITHER_OR)] * 3
    settings = dict(drafter="recycle", tree_tokens=tree_tokens, max_new_tokens=new_tokens)
    assert play("aba", says, ladder, **settings) == (TURNS[3 : 3 + new_tokens], expected)


@pytest.mark.parametrize(
    ("ladder", "prompt", "text", "expected"),
    [
        # The tree is b and the end, without a child.
        ((3,), "ab.c", "ab.cab.xx", Counts([2], (2, 2), [], [7])),
        ((2, 3), "ab.c", "ab.cab.xx", Counts([1, 2], (2, 2), [(2, 2)], [7, 6])),
        # The prompt's end after a is refused, the tree had nothing else; then a and a filler.
        ((3,), "a.bb", "a.bbabbb", Counts([4], (3, 0), [], [10])),
    ],
)
def test_an_end_of_text_on_the_first_path(ladder, prompt, text, expected):
    done = play(prompt, [follows(text)] * 3, ladder, eos=".", max_new_tokens=4, **RECYCLE)
    assert done == ("ab." if "xx" in text else "abbb", expected)


def test_an_end_of_text_beside_the_accepted_branch():
    """From the a at 4: c a b, b right. The a in column 2, whose prefix is of no text, then said
    that the end is likelier than b. From the a at 6: the end, without a child, and b, right."""
    words = dict(second=EITHER_OR["second"], lost={"a": ".b", "b": "a", "c": "a"})
    says = [follows("abacababa", **words)] * 3
    done = play("aba", says, (3,), eos=".", max_new_tokens=6, **RECYCLE)
    assert done == ("cababa", Counts([4], (5, 2), [], [11]))


@pytest.mark.parametrize(
    ("limit", "passes", "free", "ran"),
    [
        (1, 1, (0, 0), 6),
        (2, 2, (0, 0), 7),
        (3, 2, (1, 1), 8),  # b alone: c would be the last token, which the full model adds
        (4, 2, (2, 2), 9),
        (5, 3, (2, 2), 10),
        (6, 3, (4, 3), 12),  # then b and, beside it, a filler
        (7, 3, (5, 4), 13),
    ],
)
def test_the_limit_inside_a_tree(limit, passes, free, ran):
    done = play("abcabc", [follows(PERIODIC)] * 3, (3,), max_new_tokens=limit, **RECYCLE)
    assert done == (PERIODIC[6 : 6 + limit], Counts([passes], free, [], [ran]))


def test_a_stop_string_over_two_trees():
    """b a are of the first tree's round, c a of the second's: the last a is cut off."""
    says = [follows(TURNS, **EITHER_OR)] * 3
    done = play("aba", says, (3,), stop="cabac", max_new_tokens=9, **RECYCLE)
    assert done == ("cabac", Counts([4], (6, 2), [], [12]))


@pytest.mark.parametrize(
    ("unsure", "expected"),
    [
        # Of the a after a branch in column 3: validated at 3 pending, c added. Then a right and b
        # added, a right and c added.
        ([6], Counts([4, 3], (8, 3), [(7, 7)], [16, 11])),
        # Nothing is validated before the limit, at 8 pending: trees at 5, 7 and 9, and the a at 10.
        ([], Counts([5, 2], (9, 3), [(8, 8)], [17, 11])),
    ],
)
def test_an_unsure_verifier_of_a_branch(unsure, expected):
    verifier = follows(TURNS, unsure=unsure, **EITHER_OR)
    says = [follows(""), verifier, follows(TURNS, **EITHER_OR)]
    settings = dict(buffer=9, buffer_threshold=0.5, max_new_tokens=9, **RECYCLE)
    assert play("aba", says, (2, 3), **settings) == (TURNS[3:12], expected)


@pytest.mark.parametrize(
    ("ladder", "text", "limit", "wrong", "expected"),
    [
        # Row 0: b c, then b ~. Row 1 drafts 2, then 1.
        ((1, 3), PERIODIC, 6, {}, Counts([3, 3], (4, 3), [(3, 3)], [21, 21])),
        # Row 0 drafts a b as nothing is known after c; then b a c, column 3 right, and b c, the
        # first right. Row 1 drafts 2 and 2, and the full model adds its last token.
        ((1, 3), TURNS, 8, {}, Counts([4, 4], (5, 2), [(6, 6)], [24, 24])),
        # The drafter is wrong at 6, in row 1; the verifier at 9, in both. Row 0: b c, # added; !
        # of the ! that it said itself beside row 1's refused #, ! added; a for #; then b ~.
        ((1, 2, 3), PERIODIC, 6, {1: [6], 2: [9]},
         Counts([4, 3, 3], (6, 4), [(4, 3), (12, 8)], [25, 25, 22])),
    ],
)  # fmt: skip
def test_a_row_without_a_tree_has_the_exit(ladder, text, limit, wrong, expected):
    prompt, alphabet = text[: 3 if text == TURNS else 6], "stuvwxyzABCDEF"
    words = EITHER_OR if text == TURNS else {}
    says = [follows(text, alphabet, wrong=wrong.get(d, ()), **words) for d in (1, 2, 3)]
    done = play([prompt, "stuv"], says, ladder, max_new_tokens=limit, **BOTH)
    assert done == ([text[len(prompt) :][:limit], alphabet[4:][:limit]], expected)


def test_a_row_that_has_ended_runs_nothing_beside_a_tree():
    """The work of row 0 alone, 13 tokens, and the prompt of row 1."""
    says = [follows(PERIODIC, "st.")] * 3
    done = play(["abcabc", "st"], says, (3,), eos=".", max_new_tokens=7, **RECYCLE)
    assert done == (["abcabca", "."], Counts([3], (5, 4), [], [13 + 2]))
