"""`lookup` and `lookup+exit` on scripted models: the exact text and the exact work, by hand.

The tests count positions from 0, prompt included. The prefill's pass of the full model gives the
first new token without a draft, so a prompt of 6 tokens begins its first round with 7 agreed to.
"""

from __future__ import annotations

import pytest
from scripted import Counts, follows, play

PERIODIC = "abc" * 12
BROKEN = "abcabcabdabca"  # the lookup after position 6 is right at 7 and wrong at 8
ALPHABET = "abcdefghijklmnopqrstuvwxyz"  # nothing to look up
LOOKUP = dict(drafter="lookup", lookup_length=4, lookup_shortest=2)
EITHER = dict(drafter="lookup+exit", lookup_length=4, lookup_shortest=2)


@pytest.mark.parametrize(
    ("ladder", "text", "new_tokens", "wrong", "expected"),
    [
        # 7 agreed; 4 looked up and 1 added: 12; once more: 17.
        ((3,), PERIODIC, 11, {}, Counts([3], (8, 8), [], [16])),
        # Verified to 12, which is 5 pending: validated to 13. Room for 3 more, verified to 17.
        ((2, 3), PERIODIC, 11, {}, Counts([2, 3], (7, 7), [(9, 9)], [16, 16])),
        # 4 looked up: 12, 13, 14. Room for 2 more; the second rung adds the last: 17.
        ((1, 2, 3), PERIODIC, 11, {},
         Counts([2, 2, 3], (6, 6), [(8, 8), (9, 9)], [16, 16, 16])),
        # Right, but for 8: b accepted, then d, a, b without a match; d looked up for the c at 11.
        ((3,), BROKEN, 7, {}, Counts([6], (5, 1), [], [16])),
        # The verifier refuses the same and collects b d a b; the full model adds c, it adds a.
        ((2, 3), BROKEN, 7, {}, Counts([4, 3], (4, 1), [(5, 5)], [15, 12])),
        # The verifier says # and ! at 7 and 8, both refused, then # at 8, refused.
        ((2, 3), PERIODIC, 3, {2: range(99)}, Counts([3, 3], (1, 0), [(3, 0)], [10, 9])),
        # b c of 4 accepted, then # at 9 and ! at 10; validated to b c, and a. From 10: 4 of 4
        # and one more, all validated, and one more: 16. The verifier adds the last.
        ((2, 3), PERIODIC, 11, {2: [9]}, Counts([4, 4], (8, 6), [(10, 8)], [20, 18])),
    ],
)  # fmt: skip
def test_lookups_are_verified_and_validated(ladder, text, new_tokens, wrong, expected):
    says = [follows(text, wrong=wrong.get(depth, ())) for depth in (1, 2, 3)]
    done = play("abcabc", says, ladder, max_new_tokens=new_tokens, **LOOKUP)
    assert done == (text[6 : 6 + new_tokens], expected)


def test_a_lookup_that_was_accepted_whole_is_followed_by_a_longer_one():
    # 7; 2 of 2 and one more: 10. Then 6 are proposed: b c accepted, x added: 13. Nothing matches
    # until the b at 15. c x proposed, 2 again: c accepted, a added: 18. One more: 19.
    text = "abcabcabcabcxyabcabc"
    settings = {**LOOKUP, "lookup_length": 2, "max_lookup_length": 6}
    done = play("abcabc", [follows("")] * 2 + [follows(text)], (3,), max_new_tokens=13, **settings)
    assert done == (text[6:19], Counts([8], (10, 5), [], [23]))


@pytest.mark.parametrize(
    ("ladder", "verifier", "text", "limit", "expected"),
    [
        # "d." is looked up; nothing after it is proposed, and nothing is asked after it.
        ((3,), "abcd.abcd.zz", "abcd.abcd.zz", 9, Counts([2], (2, 2), [], [9])),
        ((2, 3), "abcd.abcd.zz", "abcd.abcd.zz", 9, Counts([1, 2], (2, 2), [(2, 2)], [9, 9])),
        # The full model wants x in its place and goes on.
        ((3,), "", "abcd.abcdxy", 4, Counts([3], (2, 1), [], [10])),
        # The verifier ends the text, which makes the full model due; it wants x. ! for y follows.
        ((2, 3), "abcd.abcd.zz", "abcd.abcdxy", 4, Counts([2, 3], (2, 2), [(3, 1)], [10, 10])),
    ],
)
def test_an_end_of_text_inside_a_lookup(ladder, verifier, text, limit, expected):
    says = [follows(""), follows(verifier), follows(text)]
    done = play("abcd.ab", says, ladder, eos=".", max_new_tokens=limit, **LOOKUP)
    assert done == ("cd." if text.endswith("zz") else "cdxy", expected)


@pytest.mark.parametrize(
    ("limit", "passes", "looked_up"),
    [(1, 1, 0), (2, 2, 0), (3, 2, 1), (4, 2, 2), (5, 2, 3), (6, 2, 4), (7, 3, 4), (8, 3, 5)],
)
def test_the_limit_inside_a_lookup(limit, passes, looked_up):
    """No more is looked up than the limit leaves beside the full model's own token."""
    says = [follows(PERIODIC)] * 3
    done = play("abcabc", says, (3,), max_new_tokens=limit, **LOOKUP)
    assert done == (
        PERIODIC[6 : 6 + limit],
        Counts([passes], (looked_up, looked_up), [], [5 + limit]),
    )


@pytest.mark.parametrize(
    ("limit", "passes", "looked_up", "pending"),
    [
        (1, [0, 1], 0, 0),
        (2, [1, 2], 0, 1),  # no room for a lookup: the verifier makes the last token
        (6, [1, 2], 4, 5),  # 4 + 1 to the limit
        (7, [2, 2], 4, 6),  # 5 buffered, one more without a lookup
        (9, [2, 2], 6, 8),  # 5 + 2 + 1
        (11, [2, 2], 8, 10),  # 5 + 5 to the limit
        (12, [2, 2], 8, 10),  # 5 + 5 are enough, and the full model adds the last
        (13, [3, 3], 8, 11),  # and one more round for one token
    ],
)
def test_the_limit_inside_a_buffer(limit, passes, looked_up, pending):
    says = [follows(PERIODIC)] * 3
    done = play("abcabc", says, (2, 3), buffer=9, max_new_tokens=limit, **LOOKUP)
    counts = Counts(passes, (looked_up, looked_up), [(pending, pending)], [5 + limit] * 2)
    assert done == (PERIODIC[6 : 6 + limit], counts)


@pytest.mark.parametrize(
    ("ladder", "text", "stop", "kept", "expected"),
    [
        # a is the prefill's, b the first of 5 committed together; the other 4 are cut off.
        ((3,), PERIODIC, "ab", "ab", Counts([2], (4, 4), [], [11])),
        # The prompt's last token counts.
        ((3,), PERIODIC, "ca", "a", Counts([1], (0, 0), [], [6])),
        # a; b d; a; b; after a refused lookup of d a b, e; and x.
        ((3,), "abcabcabdabexyyyy", "ex", "abdabex", Counts([6], (7, 1), [], [18])),
        # b d a b validated with e behind; x y y verified one by one, and validated at the limit.
        ((2, 3), "abcabcabdabexyyyy", "ex", "abdabex",
         Counts([6, 3], (4, 1), [(7, 7)], [17, 14])),
    ],
)  # fmt: skip
def test_a_stop_string_over_two_rounds(ladder, text, stop, kept, expected):
    says = [follows(text)] * 3
    done = play("abcabc", says, ladder, max_new_tokens=9, stop=stop, **LOOKUP)
    assert done == (kept, expected)


@pytest.mark.parametrize(
    ("prompt", "text", "length", "wrong", "expected"),
    [
        # Drafts of 1, 3 and 4, as 5 would be above the maximum; no room for a fourth.
        ("ab", ALPHABET[:15], 1, [], Counts([8, 5], (0, 0), [(8, 8)], [14, 14])),
        # Drafts of 1, 3 (1 right), 2, 4 (1 right), 3.
        ("ab", ALPHABET[:16], 1, [6, 11], Counts([13, 6], (0, 0), [(13, 8)], [20, 20])),
        # d and e are looked up and right: the exit's length is still 1, twice.
        ("abcdefab", "abcdefabcdeghijk", 1, [], Counts([2, 4], (2, 2), [(2, 2)], [15, 15])),
        # They are wrong: the exit's length is still 2.
        ("abcdefab", "abcdefabcxghi", 2, [], Counts([2, 3], (2, 0), [(2, 2)], [14, 14])),
    ],
)
def test_the_draft_length_follows_the_exits_own_acceptance(prompt, text, length, wrong, expected):
    says = [follows(text, wrong=wrong), follows(text), follows(text)]
    settings = dict(draft_length=length, max_draft_length=4, drafter="lookup+exit", lookup_length=2)
    done = play(prompt, says, (1, 3), max_new_tokens=len(text) - len(prompt), **settings)
    assert done == (text[len(prompt) :], expected)


def test_an_unsure_drafter_ends_its_draft():
    """Of drafts of 4: 3 and 4, 6 and 7, and 9 to 11, where the limit ends the third."""
    says = [follows(ALPHABET, unsure=[4, 7]), follows(ALPHABET), follows(ALPHABET)]
    settings = dict(draft_length=4, draft_threshold=0.5, max_new_tokens=11, **EITHER)
    expected = Counts([7, 4], (0, 0), [(7, 7)], [12, 12])
    assert play("ab", says, (1, 3), **settings) == (ALPHABET[2:13], expected)


@pytest.mark.parametrize(
    ("limit", "wrong", "unsure", "expected"),
    [
        # 12, 17: the full model is due for the doubt at 12, agrees and adds 17; one more each.
        (13, [], [12], Counts([3, 3], (8, 8), [(11, 11)], [18, 18])),
        # The same without a doubt: 12, 17, 19.
        (13, [], [], Counts([3, 2], (9, 9), [(12, 12)], [18, 18])),
        # What it would say at 9 after a refused c counts for nothing: # at 8 and ! at 9 follow.
        (4, [8], [9], Counts([3, 3], (2, 1), [(4, 2)], [11, 10])),
    ],
)
def test_an_unsure_verifier_makes_the_full_model_due(limit, wrong, unsure, expected):
    verifier = follows(PERIODIC, wrong=wrong, unsure=unsure)
    says = [follows(""), verifier, follows(PERIODIC)]
    settings = dict(buffer=16, buffer_threshold=0.5, max_new_tokens=limit, **LOOKUP)
    assert play("abcabc", says, (2, 3), **settings) == (PERIODIC[6 : 6 + limit], expected)


@pytest.mark.parametrize(
    ("ladder", "text", "wrong", "expected"),
    [
        # Row 0 looks 4 up and is done; row 1 drafts 2, then 1.
        ((1, 3), PERIODIC, {}, Counts([3, 3], (4, 4), [(3, 3)], [20, 20])),
        # The verifier ends row 0, so the full model is due for both rows, with 5 and 3 pending.
        ((1, 2, 3), PERIODIC, {}, Counts([2, 2, 3], (4, 4), [(2, 2), (9, 9)], [20, 20, 20])),
        # Of 4 looked up and 2 drafted, 1 and 1 are right; then both rows draft 2, all right.
        ((1, 3), BROKEN, {1: [6]}, Counts([4, 3], (4, 1), [(6, 5)], [24, 24])),
        # The verifier's # at 9 refuses the drafted a in row 0 and ends row 1; the full model
        # refuses both. Row 0 drafts one token more, and is verified and validated.
        ((1, 2, 3), BROKEN, {1: [6], 2: [9]},
         Counts([5, 3, 3], (4, 1), [(7, 4), (10, 8)], [27, 27, 21])),
    ],
)  # fmt: skip
def test_a_row_without_a_lookup_has_the_exit(ladder, text, wrong, expected):
    texts = [text, "stuvwxyzABCDEF"]
    says = [follows(*texts, wrong=wrong.get(depth, ())) for depth in (1, 2, 3)]
    done = play(["abcabc", "stuv"], says, ladder, max_new_tokens=6, **EITHER)
    assert done == ([text[6:12], "wxyzAB"], expected)
