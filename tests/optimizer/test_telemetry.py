"""effective_lrs() and lr_scales()."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import LIVELY, VARIANTS, all_params, frozen, parameters, set_gradients, snapshot, train

from clara_fused.integrations.telemetry import current_lrs, find_optimizer, scale_figures


def test_order_dtype_and_shape(variant: str, fused: bool) -> None:
    """One float32 tensor per group, its parameters in order, whatever their own types."""
    first, second = parameters([(5,), (2, 3), ()]), parameters([(4,)], torch.bfloat16)
    optimizer = VARIANTS[variant](
        [{"params": first, "lr": 0.5}, {"params": second, "lr": 0.25}], fused=fused, **LIVELY[variant]
    )
    train(optimizer, 4)
    scales, rates = optimizer.lr_scales(), optimizer.effective_lrs()
    assert [(r.shape, r.dtype) for r in rates] == [((3,), torch.float32), ((1,), torch.float32)]
    assert [(s.shape, s.dtype) for s in scales] == [((3,), torch.float32), ((1,), torch.float32)]
    for params, lr, scale, rate in zip((first, second), (0.5, 0.25), scales, rates, strict=True):
        assert scale.tolist() == [optimizer.state[p]["lr_scale"].item() for p in params]
        torch.testing.assert_close(rate, lr * scale, rtol=2e-7, atol=0)


def test_never_stepped(variant: str) -> None:
    optimizer = VARIANTS[variant](parameters(), lr=0.5, initial_scale=0.25)
    assert [s.tolist() for s in optimizer.lr_scales()] == [[0.25] * 3]
    assert [r.tolist() for r in optimizer.effective_lrs()] == [[0.125] * 3]
    assert not optimizer.state


def test_never_stepped_shows_the_cautious_scale(variant: str, fused: bool) -> None:
    """What the first step will start from, without making state for it."""
    params = [torch.nn.Parameter(torch.full((4,), value)) for value in (3.0, 1.0)]
    optimizer = VARIANTS[variant](params, lr=10.0, fused=fused)
    expected = 0.01 * 5**0.5 / 10
    assert optimizer.lr_scales()[0].tolist() == pytest.approx([expected] * 2, rel=1e-6)
    assert optimizer.effective_lrs()[0].tolist() == pytest.approx([10 * expected] * 2, rel=1e-6)
    assert not optimizer.state


def test_some_never_stepped(variant: str, fused: bool) -> None:
    """Local and Smoothed: initial_scale for those; Global: the one scale."""
    params = parameters()
    # A rule without a rest: every step moves the scale.
    options = {**LIVELY[variant], "initial_scale": 0.25, "reference": 0.3}
    optimizer = VARIANTS[variant](params, fused=fused, **options)
    for step in range(3):
        set_gradients(params, step)
        params[1].grad = None
        optimizer.step()
    scales = optimizer.lr_scales()[0].tolist()
    moved = optimizer.state[params[0]]["lr_scale"].item()
    assert moved != 0.25
    assert scales[1] == (moved if variant == "Global" else 0.25)
    assert params[1] not in optimizer.state


def test_what_was_handed_out_stays(variant: str, fused: bool) -> None:
    """A logger may read it later, from another thread."""
    optimizer = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    train(optimizer, 2)
    taken = [*optimizer.lr_scales(), *optimizer.effective_lrs()]
    before = frozen(taken)
    train(optimizer, 3, first=2)
    assert frozen(taken) == before
    assert frozen([*optimizer.lr_scales(), *optimizer.effective_lrs()]) != before


def test_writing_into_it_changes_nothing(variant: str, fused: bool) -> None:
    optimizer = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    train(optimizer, 2)
    before = snapshot(optimizer)
    for taken in (*optimizer.lr_scales(), *optimizer.effective_lrs()):
        taken.fill_(7.0)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(
    "lr", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.float64)], ids=str
)
def test_tensor_lr(lr: torch.Tensor, variant: str, fused: bool) -> None:
    optimizer = VARIANTS[variant](parameters(), **{**LIVELY[variant], "lr": lr.clone()}, fused=fused)
    train(optimizer, 2)
    (rate,), (scale,) = optimizer.effective_lrs(), optimizer.lr_scales()
    assert rate.dtype == torch.float32 and rate.shape == (3,)
    torch.testing.assert_close(rate, 0.5 * scale, rtol=2e-7, atol=0)


def test_follows_the_scheduler(variant: str) -> None:
    optimizer = VARIANTS[variant](parameters(), lr=0.5, initial_scale=1.0)
    optimizer.param_groups[0]["lr"] = 0.125
    assert optimizer.effective_lrs()[0].tolist() == [0.125] * 3


def test_group_without_parameters(variant: str) -> None:
    optimizer = VARIANTS[variant]([{"params": parameters()}, {"params": []}])
    train(optimizer, 1)
    assert [r.shape for r in optimizer.effective_lrs()] == [(3,), (0,)]
    assert [s.shape for s in optimizer.lr_scales()] == [(3,), (0,)]


def test_no_graph(variant: str) -> None:
    optimizer = VARIANTS[variant](parameters())
    train(optimizer, 1)
    assert not any(t.requires_grad for t in (*optimizer.lr_scales(), *optimizer.effective_lrs()))
    assert all(p.grad is not None for p in all_params(optimizer))


def test_the_optimizer_is_found_inside_wrappers() -> None:
    """What the logging callbacks ask first: they must leave runs with other optimizers alone."""
    optimizer = VARIANTS["Local"](parameters())
    accelerated = SimpleNamespace(optimizer=optimizer)
    zero = SimpleNamespace(optim=SimpleNamespace(optimizer=optimizer))
    loop = SimpleNamespace()
    loop.optimizer = loop
    assert all(find_optimizer(wrapped) is optimizer for wrapped in (optimizer, accelerated, zero))
    assert all(find_optimizer(other) is None for other in (None, torch.optim.Adam(parameters()), loop))


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_figures_for_a_log(tensor_lr: bool) -> None:
    params = parameters([(3,), (4,), (5,)])
    lr = torch.tensor(0.5, dtype=torch.float64) if tensor_lr else 0.5
    optimizer = VARIANTS["Local"]([{"params": params}, {"params": []}], lr=lr, initial_scale=1.0)
    train(optimizer, 1)
    for param, scale in zip(params, (4.0, 1.0, 2.0), strict=True):
        optimizer.state[param]["lr_scale"].fill_(scale)
    assert scale_figures(optimizer, current_lrs(optimizer), "log") == {
        "log/group0/effective_lr/min": 0.5,
        "log/group0/effective_lr/median": 1.0,
        "log/group0/effective_lr/max": 2.0,
        "log/group0/lr_scale/min": 1.0,
        "log/group0/lr_scale/median": 2.0,
        "log/group0/lr_scale/max": 4.0,
    }
