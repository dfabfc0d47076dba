"""Losses by hand, their gradients, their chunks; weights, curricula, the schedule."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from train.layer_dropout import SCHEDULES, rates, skipped, warmed_up
from train.losses import StoredProbs, Student, Teacher, Teaching, exit_loss
from train.schedule import CURRICULA, EXIT_WEIGHTS, active_exits, exit_weights, learning_rate

N, H, V, E = 11, 6, 13, 3
WEIGHTS = [0.5, 0.3, 0.2]


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    head = torch.nn.Linear(H, V, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(rand(V, H))
    exits = [rand(N, H).requires_grad_() for _ in range(E)]
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[4] = labels[10] = -100
    return head, exits, rand(N, H), labels


def students_of(exits, final, kind, distill, ce, neighbour=0.0):
    shared = Teaching([Teacher(final)] if distill else [], distill, ce, kind, by_final=True)
    students = []
    for e, hidden in enumerate(exits):
        teaching = shared
        if distill and neighbour and e + 1 < len(exits):
            teachers = [
                Teacher(final, 1 - neighbour),
                Teacher(exits[e + 1].detach(), neighbour),
            ]
            teaching = Teaching(teachers, distill, ce, kind)
        students.append(Student(hidden, WEIGHTS[e], teaching))
    return students


def by_hand(head, exits, final, labels, kind, distill, ce, neighbour=0.0):
    """The weighted sum over exits of the mean over labelled tokens, unchunked, from definitions."""
    labelled = labels >= 0
    total = 0
    for e, hidden in enumerate(exits):
        p = head(final).softmax(-1).detach()
        if neighbour and e + 1 < len(exits):
            deeper = head(exits[e + 1]).softmax(-1).detach()
            p = (1 - neighbour) * p + neighbour * deeper
        log_q = head(hidden).log_softmax(-1)
        q = log_q.exp()
        distance = {
            "forward_kl": -(p * log_q).sum(-1),
            "reverse_kl": (q * (log_q - p.log())).sum(-1),
            "tv": 1 - torch.minimum(p, q).sum(-1),
        }[kind]
        soft = distance[labelled].sum()
        hard = F.nll_loss(log_q, labels, ignore_index=-100, reduction="sum")
        total = total + WEIGHTS[e] * (distill * soft + ce * hard) / labelled.sum()
    return total


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize(
    ("kind", "distill", "ce", "neighbour"),
    [
        *(("forward_kl", 1.0, 0.0, 0.0), ("forward_kl", 0.0, 1.0, 0.0)),
        *(("forward_kl", 0.7, 0.4, 0.25), ("reverse_kl", 0.7, 0.4, 0.0)),
        *(("tv", 1.0, 0.0, 0.0), ("tv", 1.0, 0.3, 0.5)),
    ],
)
def test_loss_and_gradients_equal_the_plain_computation(
    train_head, chunk, kind, distill, ce, neighbour
):
    head, exits, final, labels = problem()
    expected = by_hand(head, exits, final, labels, kind, distill, ce, neighbour)
    wanted = torch.autograd.grad(expected, [*exits, head.weight])
    students = students_of(exits, final, kind, distill, ce, neighbour)
    result = exit_loss(head, students, final, labels, chunk=chunk, train_head=train_head)
    # probabilities are float32 by design
    torch.testing.assert_close(result.loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    weighted = sum(w * loss for w, loss in zip(WEIGHTS, result.loss_P, strict=True))
    torch.testing.assert_close(weighted, result.loss.detach().to(weighted.dtype))
    inputs = [*exits, head.weight] if train_head else exits
    got = torch.autograd.grad(result.loss * 3, inputs)
    for gradient, exact in zip(got, wanted[: len(inputs)], strict=True):
        torch.testing.assert_close(gradient, 3 * exact, rtol=1e-4, atol=1e-6)


def stored_probs(head, final, k):
    log_probs = head(final).log_softmax(-1).detach()
    tokens = log_probs.topk(k).indices
    return StoredProbs(tokens, log_probs.gather(1, tokens))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "tv"])
@pytest.mark.parametrize("ce", [0.0, 0.4])
def test_stored_probs_of_every_token_teach_what_the_full_model_teaches(kind, ce):
    head, exits, final, labels = problem()
    probs = stored_probs(head, final, V)
    taught = [
        exit_loss(
            head,
            [Student(h, w, teaching) for h, w in zip(exits, WEIGHTS, strict=True)],
            measured_by,
            labels,
            chunk=4,
        )
        for teaching, measured_by in (
            (Teaching([Teacher(final)], 0.7, ce, kind), final),
            (Teaching(probs, 0.7, ce, kind), probs),
        )
    ]
    (dense, stored) = taught
    torch.testing.assert_close(stored.loss, dense.loss, rtol=1e-6, atol=1e-6)
    assert stored.agreement_P.tolist() == dense.agreement_P.tolist()
    expected, got = (torch.autograd.grad(result.loss, exits) for result in taught)
    for gradient, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "tv"])
def test_tokens_outside_the_stored_top_k_are_one_outcome(kind):
    """By hand: the probabilities of four tokens and of all others together."""
    head, (hidden, *_), final, labels = problem()
    probs, labelled = stored_probs(head, final, 4), labels >= 0
    p, q = head(final).softmax(-1).detach(), head(hidden).softmax(-1)
    outside = torch.ones(N, V, dtype=torch.bool).scatter(1, probs.tokens_NK, False)
    p, q = (
        torch.cat([x.gather(1, probs.tokens_NK), (x * outside).sum(1, keepdim=True)], 1)
        for x in (p, q)
    )
    distance = {
        "forward_kl": -(p * q.log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "tv": 1 - torch.minimum(p, q).sum(-1),
    }[kind]
    expected = distance[labelled].mean()
    result = exit_loss(
        head, [Student(hidden, 1.0, Teaching(probs, 1.0, 0.0, kind))], probs, labels, chunk=4
    )
    torch.testing.assert_close(result.loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    got, exact = (torch.autograd.grad(loss, hidden)[0] for loss in (result.loss, expected))
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-6)


def test_agreement_counts_equal_argmaxes_of_labelled_tokens():
    head, exits, final, labels = problem()
    exits[1] = final.clone().requires_grad_()
    top, labelled = head(final).argmax(-1), labels >= 0
    expected = [(head(h).argmax(-1) == top)[labelled].double().mean().item() for h in exits]
    for train_head in (False, True):
        students = students_of(exits, final, "forward_kl", 1.0, 0.0)
        result = exit_loss(head, students, final, labels, chunk=4, train_head=train_head)
        assert result.agreement_P.tolist() == pytest.approx(expected)
    assert expected[1] == 1


def test_a_teacher_with_a_head_of_its_own():
    """The base before training, as the teacher of the full model."""
    head, _, final, labels = problem()
    other = torch.nn.Linear(H, V, bias=False, dtype=torch.float64)
    own = final.clone().requires_grad_()
    student = Student(own, 1.0, Teaching([Teacher(final, read=other)], 0.5, 1.0))
    result = exit_loss(head, [student], final, labels, chunk=4)
    log_q, p = head(own).log_softmax(-1), other(final).softmax(-1)
    labelled = labels >= 0
    expected = 0.5 * -(p * log_q).sum(-1)[labelled].mean() + F.cross_entropy(head(own), labels)
    torch.testing.assert_close(result.loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)


def test_no_gradient_reaches_a_teacher():
    head, exits, final, labels = problem()
    for train_head in (False, True):
        students = students_of(exits[:1], exits[1], "forward_kl", 1.0, 1.0)
        exit_loss(head, students, final, labels, chunk=4, train_head=train_head).loss.backward()
        assert exits[0].grad is not None
        assert exits[1].grad is None


@pytest.mark.parametrize("train_head", [False, True])
def test_logits_of_all_tokens_and_exits_are_never_held_at_once(train_head):
    """The largest tensor that the head produces is one chunk, and the frozen path reads each
    teacher once."""
    head, exits, final, labels = problem()
    seen = []
    head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    students = students_of(exits, final, "forward_kl", 1.0, 0.0)
    exit_loss(head, students, final, labels, chunk=4, train_head=train_head).loss.backward()
    assert set(seen) == {(4, V), (3, V)}
    if not train_head:
        assert len(seen) == (E + 1) * 3


@pytest.mark.parametrize("kind", EXIT_WEIGHTS)
@pytest.mark.parametrize("final", [None, 32])
def test_exit_weights_sum_to_one_and_grow_with_the_depth(kind, final):
    weights = exit_weights(kind, [4, 8, 16], e_scale=0.2, final=final)
    assert sum(weights) == pytest.approx(1)
    assert len(weights) == 3 + (final is not None)
    assert all(a <= b for a, b in pairwise(weights))
    if kind != "uniform":
        assert weights[0] < weights[1]
    if final and kind == "sum":
        assert weights[2] / weights[3] == pytest.approx(0.2 * (16 * 17) / (32 * 33))


@pytest.mark.parametrize("curriculum", CURRICULA)
def test_curricula_train_every_exit(curriculum):
    seen = [active_exits(curriculum, 4, step, 40) for step in range(40)]
    assert {e for active in seen for e in active} == {0, 1, 2, 3}
    assert all(active == sorted(active) and active for active in seen)
    if curriculum == "rotational":
        assert seen[:5] == [[0], [1], [2], [3], [0]]
    if curriculum == "gradual":
        assert seen[0] == [3]
        assert all(len(a) <= len(b) for a, b in pairwise(seen))
        assert seen[14] == [1, 2, 3]
        assert seen[15] == [0, 1, 2, 3]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_layers_are_skipped_at_the_rate_of_the_schedule(schedule):
    wanted = rates(schedule, 8, 0.4)
    assert wanted[-1] == pytest.approx(0.4, rel=0.01)
    assert all(a <= b + 1e-12 for a, b in pairwise(wanted))
    for layer, rate in enumerate(wanted):
        found = [skipped(rate, 8, seed=1, step=step, layer=layer).mean() for step in range(500)]
        assert sum(found) / 500 == pytest.approx(rate, abs=0.03)


def test_what_is_skipped_depends_on_seed_step_and_layer_alone():
    where = dict(seed=3, step=5, layer=2)
    first = skipped(0.5, 64, **where)
    assert (first == skipped(0.5, 64, **where)).all()
    for key in where:
        assert (first != skipped(0.5, 64, **{**where, key: 9})).any(), key
    assert warmed_up(0, 9) == 0.1
    assert warmed_up(9, 9) == warmed_up(0, 0) == warmed_up(50, 9) == 1


def test_learning_rate_rises_then_falls_to_the_floor():
    rates = [learning_rate(s, 100, warmup=0.1, floor=0.2) for s in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == pytest.approx(1)
    assert max(rates) == rates[10]
    assert rates[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert learning_rate(0, 1, warmup=0, floor=0) == 1


def test_learning_rate_may_fall_in_a_line():
    rates = [learning_rate(s, 100, warmup=0, floor=0, curve="linear") for s in range(101)]
    assert rates[0] == 1
    assert rates[25] == pytest.approx(0.75)
    assert rates[100] == 0
