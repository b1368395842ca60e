"""GradScaler: overflow steps that change nothing, gradients unscaled once, with and without enable_fused_amp()."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import (
    LIVELY,
    VARIANTS,
    StepCheck,
    UnreadByTheHost,
    all_params,
    clones,
    parameters,
    results,
    set_gradients,
    snapshot,
    train,
)

SCALE = 1024.0


def scaled_backward(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, step: int, overflow: bool) -> None:
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(step)
    loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in all_params(optimizer))
    scaler.scale(loss).backward()
    if overflow:
        all_params(optimizer)[0].grad.view(-1)[0] = float("inf")


def new_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=2)


@pytest.mark.parametrize("unscale_first", [False, True], ids=["", "unscale_ before"])
@pytest.mark.parametrize("fused_amp", [False, True], ids=["watched", "fused amp"])
def test_grad_scaler(fused_amp: bool, unscale_first: bool, variant: str, fused: bool) -> None:
    """The run with a scaler equals the one on the plain gradients; overflow steps leave no trace. apex unscales twice
    after the user's own unscale_."""
    scaled = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    plain = VARIANTS[variant](clones(all_params(scaled)), fused=fused, **LIVELY[variant])
    scaled.enable_fused_amp(fused_amp)
    scaler, unit = new_scaler(), torch.amp.GradScaler("cpu", enabled=False)
    for step in range(8):
        overflow = step in (0, 4)
        scaled_backward(scaled, scaler, step, overflow)
        before = snapshot(scaled)
        if unscale_first:
            scaler.unscale_(scaled)
        scaler.step(scaled)
        if overflow:
            after = snapshot(scaled)
            assert after["params"] == before["params"]
            assert all(new == old for old, new in zip(before["state"], after["state"], strict=True) if old is not None)
            assert scaled.lr_scales()[0].tolist() == plain.lr_scales()[0].tolist()
        else:
            scaled_backward(plain, unit, step, False)
            plain.step()
        scaler.update()
        assert not hasattr(scaled, "grad_scale") and not hasattr(scaled, "found_inf")
    # The scales are powers of two: unscaling is exact, so the runs agree bit for bit.
    assert results(scaled) == results(plain)
    assert scaled.state[all_params(scaled)[0]]["step"].item() == 6


def test_fused_amp_is_the_users_choice(variant: str) -> None:
    """Off by default, so that frameworks that watch for skipped steps see them."""
    optimizer = VARIANTS[variant](parameters())
    assert not optimizer._step_supports_amp_scaling
    optimizer.enable_fused_amp()
    assert optimizer._step_supports_amp_scaling
    optimizer.enable_fused_amp(False)
    assert not optimizer._step_supports_amp_scaling
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


def test_frameworks_see_skipped_steps(variant: str) -> None:
    """Accelerate and Lightning patch step() and conclude from a missing call that the scaler skipped."""
    optimizer = VARIANTS[variant](parameters())
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    scaler = new_scaler()
    for step in range(4):
        scaled_backward(optimizer, scaler, step, overflow=step == 1)
        scaler.step(optimizer)
        scaler.update()
    assert len(calls) == 3


@pytest.mark.parametrize("decides", [nullcontext, UnreadByTheHost], ids=["host", "device"])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1 element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_found_inf_leaves_every_bit(
    dtype: torch.dtype, shape: tuple[int, ...], decides: Any, variant: str, fused: bool
) -> None:
    """Also where the gradients themselves are inf and nan, under amsgrad, and of tensors with a sample."""
    params = parameters([(5, 3), (7,), (2, 3, 4), (64, 1024)], dtype)
    optimizer = VARIANTS[variant](params, amsgrad=True, fused=fused, **LIVELY[variant])
    train(optimizer, 3)
    set_gradients(all_params(optimizer), 3)
    all_params(optimizer)[0].grad.view(-1)[1] = float("inf")
    all_params(optimizer)[2].grad.view(-1)[0] = float("nan")
    before = snapshot(optimizer)
    optimizer.grad_scale = torch.full(shape, 8.0)
    optimizer.found_inf = torch.full(shape, 1.0)
    for _ in range(2):
        with decides():
            optimizer.step()
    assert snapshot(optimizer) == before
    del optimizer.grad_scale, optimizer.found_inf
    check = StepCheck(variant, optimizer)
    set_gradients(all_params(optimizer), 4)
    check.step()


def test_found_inf_at_the_first_step(variant: str, fused: bool) -> None:
    """GradScaler's first scale usually overflows: the run must start afterwards as if nothing had been."""
    skipped = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    plain = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    for param in all_params(skipped):
        param.grad = torch.full_like(param, float("nan"))
    skipped.grad_scale, skipped.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    skipped.step()
    del skipped.grad_scale, skipped.found_inf
    for optimizer in (skipped, plain):
        train(optimizer, 3)
    assert results(skipped) == results(plain)


def test_found_inf_with_parameters_that_join(fused: bool) -> None:
    """Global: a parameter whose first step is skipped takes the scale in force, and counts from there."""
    params = parameters()
    optimizer = VARIANTS["Global"](params, fused=fused, **LIVELY["Global"])
    check = StepCheck("Global", optimizer)
    for step in range(3):
        set_gradients(params[:2], step)
        check.step()
    scale = optimizer.lr_scales()[0][0].item()
    set_gradients(params, 3)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert optimizer.lr_scales()[0].tolist() == [scale] * 3
    del optimizer.found_inf
    check.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [4, 4, 1]


@pytest.mark.parametrize(
    "attributes", [{"grad_scale": None, "found_inf": 0.0}, {"found_inf": 0.0}, {"grad_scale": 4.0}]
)
def test_either_attribute_may_be_absent_or_none(attributes: dict[str, Any], variant: str, fused: bool) -> None:
    """GradScaler sets grad_scale to None after unscale_."""
    optimizer = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    for name, value in attributes.items():
        setattr(optimizer, name, None if value is None else torch.tensor(value))
    check = StepCheck(variant, optimizer)
    for step in range(3):
        set_gradients(all_params(optimizer), step, size=4.0)
        check.step(grad_scale=attributes.get("grad_scale"))


def test_plain_numbers_serve_too(variant: str, fused: bool) -> None:
    """GradScaler sums found_inf over the devices that have gradients: where none has, it hands over the number 0."""
    optimizer = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    optimizer.grad_scale, optimizer.found_inf = 4.0, 0
    for step in range(2):
        set_gradients(all_params(optimizer), step, size=4.0)
        check.step(grad_scale=4.0)
    before = snapshot(optimizer)
    optimizer.found_inf = 1
    optimizer.step()
    assert snapshot(optimizer) == before


def test_unscaling_keeps_what_float16_cannot_hold(variant: str, fused: bool) -> None:
    """Gradients are divided in float32: small ones must not vanish in the gradient's own type."""
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = VARIANTS[variant]([param], fused=fused, **LIVELY[variant])
    param.grad = torch.tensor([1e-3, 2e-3, 1.0, 100.0])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(65536.0), torch.tensor(0.0)
    StepCheck(variant, optimizer).step(grad_scale=65536.0)
