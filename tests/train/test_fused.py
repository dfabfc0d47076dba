"""Liger's kernels, in Triton's interpreter on a CPU: the losses and gradients of the plain way."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import TRAIN, history, run
from test_losses import H, N, V, problem, students_of
from test_trainer import settings

from train.losses import exit_loss
from train.recipe import load_recipe


def soft_capped(head):
    return lambda normed: 3 * torch.tanh(head(normed) / 3)


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize(
    ("kind", "distill", "ce", "neighbour"),
    [
        *(("forward_kl", 1.0, 0.0, 0.0), ("forward_kl", 0.0, 1.0, 0.0)),
        *(("forward_kl", 0.7, 0.4, 0.25), ("tv", 1.0, 0.0, 0.0), ("tv", 1.0, 0.3, 0.5)),
    ],
)
def test_kernels_give_the_plain_loss(train_head, capped, kind, distill, ce, neighbour):
    head, exits, final, labels = problem(torch.float32)
    read = soft_capped(head) if capped else head
    found = []
    for kernels in (False, True):
        students = students_of(exits, final, kind, distill, ce, neighbour)
        result = exit_loss(
            read, students, final, labels, chunk=8, train_head=train_head, kernels=kernels
        )
        inputs = [*exits, head.weight] if train_head else exits
        found.append((result, torch.autograd.grad(result.loss * 3, inputs)))
    (plain, wanted), (fused, got) = found
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fused.loss_P, plain.loss_P, rtol=1e-6, atol=1e-6)
    assert fused.agreement_P.tolist() == plain.agreement_P.tolist()
    for gradient, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)
    assert wanted[0].abs().max() > 1e-3


def test_kernels_read_bf16_logits():
    """A vocabulary of several blocks, and rows that teach nothing."""
    generator = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(H, 40_000, bias=False, dtype=torch.bfloat16)
    exits = [torch.randn(N, H, generator=generator).bfloat16().requires_grad_()]
    final = torch.randn(N, H, generator=generator).bfloat16()
    labels = torch.randint(0, 40_000, (N,), generator=generator)
    labels[3] = -100
    found = []
    for kernels in (False, True):
        students = students_of(exits, final, "forward_kl", 1.0, 0.1)
        result = exit_loss(head, students, final, labels, chunk=8, kernels=kernels)
        found.append((result.loss, *torch.autograd.grad(result.loss, exits)))
    (plain, exact), (fused, gradient) = found
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, exact, rtol=0.02, atol=1e-5)
    assert gradient[3].abs().max() == 0 < exact.abs().max()
    assert V < 100  # the other tests have one block


@pytest.mark.slow
@pytest.mark.parametrize("words", [{}, {"trunk": "full", "base_kl": 0.5, "divergence": "tv"}])
def test_a_run_with_kernels_has_the_losses_of_one_without(tiny_base, texts, tmp_path, words):
    found = []
    for fused in ("false", "true"):
        output = tmp_path / fused / "ee"
        changes = {"steps": 4, "eval_every": 4, "fused_loss": fused, **words}
        done = run(*TRAIN, *settings(tiny_base, texts, output, **changes))
        assert done.returncode == 0, done.stderr
        found.append([m["acceptance"] for m in history(output)[-1]["agreement"]])
    assert found[1] == pytest.approx(found[0], abs=1e-3)


def test_where_there_is_no_kernel_it_is_said(tiny_base, texts, tmp_path):
    words = settings(tiny_base, texts, tmp_path / "ee", fused_loss="true")
    done = run(sys.executable, "train/ee_finetune.py", *words, TRITON_INTERPRET="0")
    assert done.returncode == 2
    assert "there are kernels for GPUs, not for a CPU" in done.stderr
    for named in ("divergence=reverse_kl", "states=somewhere"):
        with pytest.raises(ValueError, match=r"^fused_loss=True"):
            load_recipe([*words, named])
