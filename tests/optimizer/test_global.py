"""AdamClaraGlobal: one scale for everything."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import (
    GLOBAL_OPTIONS,
    LIVELY,
    VARIANTS,
    StepCheck,
    clones,
    parameters,
    set_gradients,
    snapshot,
    train,
    unforced,
)

from clara_fused import state
from clara_fused.options import OPTIONS

OTHER_VALUES: dict[str, Any] = {
    "smoothing": 0.21,
    "damping": 1.5,
    "reference": 0.7,
    "clip": (0.4, 1.6),
    "initial_scale": 0.5,
    "scale_bounds": (1e-3, 10.0),
    "adapt_lr": False,
}


def two_groups(fused: bool = False, **options: Any) -> torch.optim.Optimizer:
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:], **options}]
    return VARIANTS["Global"](groups, fused=fused, **LIVELY["Global"])


def test_all_shared_options_are_tested() -> None:
    assert set(OTHER_VALUES) == set(GLOBAL_OPTIONS) == {name for name, option in OPTIONS.items() if option.one_for_all}


@pytest.mark.parametrize("option", GLOBAL_OPTIONS)
def test_options_that_must_agree(option: str, fused: bool) -> None:
    """An option that differs is named with its group; nothing has changed. Once it agrees, training goes on."""
    optimizer = two_groups(fused)
    train(optimizer, 2)
    group = optimizer.param_groups[1]
    good = group[option]
    group[option] = OTHER_VALUES[option]
    set_gradients([p for g in optimizer.param_groups for p in g["params"]], 2)
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"param group 1\b.*{option}"):
            optimizer.step()
        assert snapshot(optimizer) == before
    group[option] = good
    optimizer.step()


@pytest.mark.parametrize("option", GLOBAL_OPTIONS)
def test_options_that_differ_from_the_start(option: str) -> None:
    """Refused at the step, or before it; in neither case is anything trained."""
    with pytest.raises(ValueError, match=rf"param group 1\b.*{option}"):
        optimizer = two_groups(**{option: OTHER_VALUES[option]})
        train(optimizer, 1)


@pytest.mark.parametrize("variant", ["Local", "Smoothed"])
def test_the_others_need_not_agree(variant: str, fused: bool) -> None:
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:], **OTHER_VALUES}]
    optimizer = VARIANTS[variant](groups, fused=fused, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    for step in range(3):
        set_gradients(params, step)
        check.step()


def test_options_of_each_parameter_may_differ(fused: bool) -> None:
    """beta1 enters the walk tensor by tensor; lr, eps, decay, amsgrad, maximize, path_fraction are a tensor's own."""
    optimizer = two_groups(
        fused,
        betas=(0.5, 0.9),
        lr=0.3,
        eps=1e-3,
        weight_decay=0.0,
        amsgrad=True,
        maximize=True,
        path_fraction=1.0,
    )
    check = StepCheck("Global", optimizer)
    for step in range(5):
        set_gradients([p for g in optimizer.param_groups for p in g["params"]], step)
        check.step()


def test_lists_and_tuples_are_the_same_option(fused: bool) -> None:
    """A checkpoint that went through JSON or YAML has lists for tuples."""
    optimizer = two_groups(fused)
    optimizer.param_groups[1].update(clip=[0.5, 1.6], scale_bounds=[1e-8, 1e8], betas=[0.9, 0.999])
    train(optimizer, 2)


def test_every_state_has_the_one_scale(fused: bool) -> None:
    """After every step, also in parameters without a gradient then; who joins gets it; sums count only gradients."""
    params = parameters()
    # A rule without a rest: every step moves the scale.
    optimizer = VARIANTS["Global"](params, fused=fused, **LIVELY["Global"], reference=0.3)
    check = StepCheck("Global", optimizer)
    scales = []
    for step, missing in enumerate([(2,), (1, 2), (0, 2), (), (0,), (0, 1)]):
        set_gradients(params, step)
        for index in missing:
            params[index].grad = None
        check.step()
        held = {optimizer.state[p]["lr_scale"].item() for p in params if p in optimizer.state}
        assert len(held) == 1, f"step {step}"
        scales.append(held.pop())
    assert len(set(scales)) == len(scales)


@pytest.mark.parametrize("reference", ["random_walk", 0.3])
def test_scale_counts_elements_not_tensors(reference: str | float, fused: bool) -> None:
    """Splitting a tensor in two changes next to nothing, although the parts disagree: the later, the more to learn."""
    whole = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    drift = torch.linspace(0.0, 1.0, 4000)
    runs = []
    for parts in ([4000], [3000, 1000], [1, 3999]):
        params = clones(whole.split(parts))
        optimizer = VARIANTS["Global"](params, fused=fused, **{**LIVELY["Global"], "reference": reference})
        start = optimizer.lr_scales()[0][0].item()
        for step in range(4):
            grad = drift + torch.randn(4000, generator=torch.Generator().manual_seed(step))
            for param, part in zip(params, grad.split(parts), strict=True):
                param.grad = part.clone()
            optimizer.step()
        runs.append((torch.cat([p.detach() for p in params]), optimizer.lr_scales()[0][:1]))
    assert abs(runs[0][1].item() / start - 1.0) > 0.02
    for values, scale in runs[1:]:
        # Each part's walk is kept over its own lengths, whose weights change from step to step: nearly, not exactly.
        torch.testing.assert_close(scale, runs[0][1], rtol=1e-3, atol=0)
        torch.testing.assert_close(values, runs[0][0], rtol=1e-3, atol=1e-4)


def test_the_sum_over_many_tensors_loses_nothing(fused: bool) -> None:
    """A small damping magnifies whatever is lost on the way from the tensors' sums to the one scale."""
    params = parameters([(3,)] * 1100, dtype=torch.float64)
    options = {"damping": 0.005, "clip": None, "reference": 0.5, "scale_bounds": (1e-9, 1e9), "initial_scale": 1.0}
    optimizer = VARIANTS["Global"](params, fused=fused, **options)
    train(optimizer, 3)
    before = optimizer.lr_scales()[0][0].item()
    train(optimizer, 1, first=3)
    path_sq = math.fsum(optimizer.state[p]["path"].square().sum().item() for p in params)
    expected = before * math.exp(0.05 / (2 * 0.005) * (path_sq / (3 * 1100 * 0.5) - 1.0))
    assert 1e-8 < expected < 1e8
    assert optimizer.lr_scales()[0][0].item() == pytest.approx(expected, rel=2e-7, abs=0.0)


def test_scale_survives_the_loss_of_its_holders(fused: bool) -> None:
    """The scale is the optimizer's: groups that join when no other has a gradient take it from the others' state."""
    old, new = parameters(), parameters([(6,)], seed=5)
    optimizer = VARIANTS["Global"](old, fused=fused, **LIVELY["Global"])
    train(optimizer, 4)
    scale = optimizer.lr_scales()[0][0].item()
    optimizer.zero_grad()
    optimizer.add_param_group({"params": new})
    assert optimizer.lr_scales()[1].tolist() == [scale]
    optimizer.param_groups[0]["lr"] = 0.0
    check = StepCheck("Global", optimizer)
    set_gradients(new, 0)
    check.step()


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float32] * 2, [torch.float32, torch.bfloat16]], ids=str)
def test_a_scale_put_into_the_states_from_outside_is_followed(dtypes: list[torch.dtype], fused: bool) -> None:
    """As ZeroRedundancyOptimizer.load_state_dict does it, and users who set the scale by hand."""
    runs = []
    for in_place in (True, False):
        params = [parameters([(20,)], dtype)[0] for dtype in dtypes]
        optimizer = VARIANTS["Global"](params, fused=fused, **LIVELY["Global"], reference=0.3)
        train(optimizer, 3)
        scale = torch.tensor(2.0)
        for entry in optimizer.state.values():
            if in_place:
                entry["lr_scale"].copy_(scale)
            else:
                entry["lr_scale"] = scale
        train(optimizer, 4, first=3)
        runs.append(snapshot(optimizer))
        assert len({entry["lr_scale"].item() for entry in optimizer.state.values()} - {2.0}) == 1
    assert runs[0] == runs[1]


@pytest.mark.parametrize("at_step", [0, 2])
def test_a_parameter_put_into_a_group_again_is_named(at_step: int, fused: bool) -> None:
    """The step would count it twice, and take one step of two."""
    params = parameters()
    optimizer = VARIANTS["Global"](params, fused=unforced(fused), **LIVELY["Global"])
    train(optimizer, at_step)
    optimizer.param_groups[0]["params"].append(params[1])
    set_gradients(params, at_step)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"param group 0, parameter 3 .* is param group 0, parameter 1 as well"):
        optimizer.step()
    assert snapshot(optimizer) == before
    optimizer.param_groups[0]["params"].pop()
    optimizer.step()


def test_one_tensor_alone_is_local(fused: bool) -> None:
    runs = []
    for variant in ("Global", "Local"):
        (param,) = parameters([(300, 70)])
        optimizer = VARIANTS[variant]([param], fused=fused, **LIVELY[variant])
        train(optimizer, 5)
        runs.append((param.detach(), optimizer.lr_scales()[0]))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_betas_of_each_group_enter_the_one_total(fused: bool) -> None:
    params = parameters([(300,), (40,), (5,)])
    groups = [{"params": [p], "betas": (beta1, 0.99)} for p, beta1 in zip(params, (0.0, 0.5, 0.95), strict=True)]
    optimizer = VARIANTS["Global"](groups, fused=fused, **{**LIVELY["Global"], "clip": None})
    check = StepCheck("Global", optimizer)
    for step in range(6):
        set_gradients(params, step)
        check.step()


def test_dtypes_of_several_buckets_share_the_scale(fused: bool) -> None:
    params = parameters([(30,), (64, 1024)])
    params += [*parameters([(20,)], torch.float64), *parameters([(9,)], torch.bfloat16)]
    optimizer = VARIANTS["Global"](params, fused=fused, **LIVELY["Global"])
    check = StepCheck("Global", optimizer)
    for step in range(4):
        set_gradients(params, step)
        if step == 2:
            params[0].grad = None
        check.step()


def test_scales_of_local_become_one(fused: bool) -> None:
    """Whatever scale states bring, Global goes on with one of them for all."""
    local = VARIANTS["Local"](parameters(), fused=fused, **LIVELY["Local"])
    train(local, 4)
    held = local.lr_scales()[0].tolist()
    optimizer = VARIANTS["Global"](clones(local.param_groups[0]["params"]), fused=fused, **LIVELY["Global"])
    optimizer.load_state_dict(local.state_dict())
    optimizer.param_groups[0]["adapt_lr"] = False
    train(optimizer, 1)
    (scale,) = {s["lr_scale"].item() for s in optimizer.state.values()}
    assert min(held) <= scale <= max(held)


def test_state_is_made_without_going_through_all_that_is_there() -> None:
    """For each parameter once: with thousands of them the first step took seconds."""
    optimizer = VARIANTS["Global"](parameters([(2,)] * 50), fused=None)
    set_gradients(optimizer.param_groups[0]["params"], 0)
    with mock.patch("clara_fused.state.shared_scales", wraps=state.shared_scales) as searched:
        optimizer.step()
    assert searched.call_count < 10
