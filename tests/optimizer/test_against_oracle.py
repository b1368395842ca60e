"""Every option, alone and combined at random, against the float64 oracle: both back ends, all dtypes.

Two kinds of check. `StepCheck` bounds each stored number of each step from the state before it, by interval arithmetic:
as tight as rounding allows. The free-running oracle then makes sure that nothing outside the state matters.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    LIVELY,
    VARIANTS,
    WALK,
    StepCheck,
    as_array,
    assert_follows_oracle,
    oracle_for,
    oracle_step,
    parameters,
    set_gradients,
    snapshot,
    train,
    why_not_core,
)
from hypothesis import given
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# float32: about 20 operations an element and step, 30 steps, 6e-8 each, partly random. float64 parameters follow to the
# same accuracy because their scale is a float32. bf16/fp16 parameters: an update that falls next to a tie may round to
# the other side, one unit in the last place (2^-8, 2^-11); a handful of those in 30 steps.
FREE_RUNNING_TOLERANCE = {torch.float32: 2e-5, torch.float64: 2e-6, torch.bfloat16: 2.5e-2, torch.float16: 4e-3}


def skip_unless_served(fused: bool, *dtypes: torch.dtype) -> None:
    for dtype in dtypes:
        if fused and (reason := why_not_core("cpu", dtype)):
            pytest.skip(f"the compiled core cannot serve {dtype}: {reason}")


# ---------------------------------------------------------------------------------------------------------------------
# Random configurations

sizes = st.sampled_from([(), (1,), (0,), (7,), (3, 5), (2, 0, 3), (64,), (129,), (2, 3, 4, 5)])


@st.composite
def adam_options(draw: st.DrawFn) -> dict[str, Any]:
    """Options that may differ between groups under every variant."""
    return {
        "lr": draw(st.sampled_from([0.0, 1e-4, 1e-2, 0.3])),
        "betas": draw(st.sampled_from([(0.9, 0.999), (0.0, 0.99), (0.95, 0.9), (0.5, 0.0), (0.99, 0.9999)])),
        "eps": draw(st.sampled_from([1e-8, 1e-3, 0.1])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1, 0.01])),
        "amsgrad": draw(st.booleans()),
        "maximize": draw(st.booleans()),
        "decoupled_weight_decay": draw(st.booleans()),
        "path_fraction": draw(st.sampled_from([1 / 16, 1.0])),
        "lr_smoothing": draw(st.sampled_from([0.9, 0.5, 0.0])),
    }


@st.composite
def adapt_options(draw: st.DrawFn) -> dict[str, Any]:
    """Options that must agree in all groups under Global."""
    return {
        "smoothing": draw(st.sampled_from([0.05, 0.2, 0.9, 1.0, 0.001])),
        "damping": draw(st.sampled_from([2.5, 0.5, 0.1])),
        "reference": draw(st.sampled_from(["random_walk", "random_walk", "random_walk", 1.0, 0.3])),
        "clip": draw(st.sampled_from([(0.5, 1.05), (0.5, 2.0), None, (0.9, 0.95), (1.0, 1.0)])),
        "initial_scale": draw(st.sampled_from(["cautious", 1.0, 1e-3, 2.5])),
        "scale_bounds": draw(st.sampled_from([(1e-8, 1e8), (1e-3, 3.0)])),
        "adapt_lr": draw(st.sampled_from([True, True, True, False])),
    }


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    variant = draw(st.sampled_from(list(VARIANTS)))
    shared = draw(adapt_options())
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        adapt = shared if variant == "Global" else draw(adapt_options())
        options = {**draw(adam_options()), **adapt}
        if variant != "Smoothed":
            del options["lr_smoothing"]
        members = draw(st.lists(st.tuples(sizes, st.sampled_from(DTYPES)), min_size=1, max_size=3))
        groups.append((options, members))
    steps = draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "present": st.lists(st.booleans(), min_size=9, max_size=9),
                    "size": st.sampled_from([1e-3, 1.0, 30.0]),
                    "drift": st.sampled_from([0.0, 1.0]),
                    "amp": st.sampled_from([None, None, (8.0, 0.0), (8.0, 1.0), (None, 0.0)]),
                }
            ),
            min_size=1,
            max_size=6,
        )
    )
    return {
        "variant": variant,
        "groups": groups,
        "steps": steps,
        "seed": draw(st.integers(0, 99)),
        "change": draw(st.booleans()),
    }


@given(run=runs())
def test_any_configuration_follows_the_formulas(fused: bool, run: dict[str, Any]) -> None:
    """Random groups, dtypes, sizes, options, missing gradients, AMP scales, and options changed during the run."""
    generator = torch.Generator().manual_seed(run["seed"])
    served = [d for d in DTYPES if not (fused and why_not_core("cpu", d))]
    groups = []
    for options, members in run["groups"]:
        params = [
            torch.nn.Parameter(torch.randn(size, generator=generator).to(d if d in served else torch.float32))
            for size, d in members
        ]
        groups.append({"params": params, **options})
    optimizer = VARIANTS[run["variant"]](groups, fused=fused)
    check = StepCheck(run["variant"], optimizer)

    for number, step in enumerate(run["steps"]):
        if run["change"] and number == 2:
            for group in optimizer.param_groups:
                beta2 = group["betas"][1]
                group.update(betas=(0.7, beta2), lr=group["lr"] * 0.5, eps=1e-6, weight_decay=0.05, smoothing=0.1)
        scale, overflow = step["amp"] or (None, 0.0)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for param, present in zip(params, step["present"], strict=False):
            noise = torch.randn(param.shape, generator=generator) + step["drift"]
            param.grad = (step["size"] * noise * (scale or 1.0)).to(param.dtype) if present else None
        if step["amp"] is not None:
            optimizer.grad_scale = None if scale is None else torch.tensor(scale)
            optimizer.found_inf = torch.tensor(overflow)
        if overflow:
            before = snapshot(optimizer)
            optimizer.step()
            assert_unchanged_by_overflow(before, snapshot(optimizer))
        else:
            check.step(grad_scale=scale)
        if step["amp"] is not None:
            del optimizer.grad_scale, optimizer.found_inf


def assert_unchanged_by_overflow(before: Any, after: Any) -> None:
    """A skipped first step may create state, which then holds what fresh state holds."""
    assert {**before, "state": None} == {**after, "state": None}
    for old, new in zip(before["state"], after["state"], strict=True):
        if old is not None or new is None:
            assert new == old
        else:
            for key in ("step", "exp_avg", "exp_avg_sq", "path", *WALK):
                assert not any(new[key][2]), key


# ---------------------------------------------------------------------------------------------------------------------
# One option at a time, so that a failure names it

SINGLE_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "lr 0": {"lr": 0.0},
    "betas": {"betas": (0.6, 0.97)},
    "no momentum": {"betas": (0.0, 0.999)},
    "beta2 0": {"betas": (0.9, 0.0), "eps": 0.01},  # else some steps are larger than a float16
    "eps": {"eps": 0.05},
    "weight decay": {"weight_decay": 0.3},
    "decoupled weight decay": {"weight_decay": 0.3, "decoupled_weight_decay": True},
    "amsgrad": {"amsgrad": True, "betas": (0.9, 0.5)},
    "maximize": {"maximize": True, "weight_decay": 0.3},
    "smoothing": {"smoothing": 0.4},
    "smoothing 1": {"smoothing": 1.0},
    "damping": {"damping": 0.2},
    "reference 1": {"reference": 1.0, "damping": 0.2},
    "reference 0.3": {"reference": 0.3},
    "no clip": {"clip": None, "damping": 0.2},
    "clip": {"clip": (0.8, 1.01)},
    "clip above 1": {"clip": (1.02, 1.5)},
    "cautious": {"initial_scale": "cautious"},
    "path of all elements": {"path_fraction": 1.0},
    "initial scale": {"initial_scale": 1e-3},
    "scale bounds": {"scale_bounds": (0.9, 1.02), "damping": 0.05, "clip": None},
    "not adapted": {"adapt_lr": False},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", SINGLE_OPTIONS)
def test_each_option_follows_the_formulas(variant: str, option: str, dtype: torch.dtype, fused: bool) -> None:
    skip_unless_served(fused, dtype)
    options = {**LIVELY[variant], **SINGLE_OPTIONS[option]}
    params = parameters([(40, 9), (130,), ()], dtype)
    optimizer = VARIANTS[variant](params, fused=fused, **options)
    check = StepCheck(variant, optimizer)
    for step in range(5):
        set_gradients(params, step)
        check.step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("initial_scale", ["cautious", 1.0])
def test_a_run_follows_the_oracle(variant: str, dtype: torch.dtype, initial_scale: str | float, fused: bool) -> None:
    """Thirty steps, the oracle left to itself: all that matters is in the state."""
    skip_unless_served(fused, dtype)
    params = parameters([(9, 6), (11,)], dtype)
    options = {"lr": 0.02, "smoothing": 0.1, "weight_decay": 0.01, "initial_scale": initial_scale}
    optimizer = VARIANTS[variant](params, fused=fused, **options)
    oracle = oracle_for(variant, optimizer)
    for step in range(30):
        set_gradients(params, step)
        oracle_step(oracle, optimizer)
        optimizer.step()
    narrow = FREE_RUNNING_TOLERANCE[dtype]
    # With 16-bit parameters the moments follow the parameter through weight decay: a unit there is 1e-2 of it here.
    assert_follows_oracle(optimizer, oracle, max(narrow * 0.01, 2e-6) if narrow > 1e-3 else narrow, narrow)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12])
def test_extreme_gradients_follow_the_formulas(variant: str, size: float, fused: bool) -> None:
    """v underflows, eps dominates, or g² is near the end of float32: as Adam's, never NaN."""
    params = parameters()
    optimizer = VARIANTS[variant](params, fused=fused)
    check = StepCheck(variant, optimizer)
    for step in range(4):
        set_gradients(params, step, size=size)
        check.step()
    assert all(p.isfinite().all() for p in params)


def test_alternating_gradients_follow_the_formulas(variant: str, fused: bool) -> None:
    """At the defaults, until the scale has fallen: where the momentum leaves nothing, another branch decides."""
    (param,) = params = parameters([(200,)])
    optimizer = VARIANTS[variant](params, fused=fused, initial_scale=1.0)
    check = StepCheck(variant, optimizer)
    gradient = torch.randn(200, generator=torch.Generator().manual_seed(0))
    for step in range(40):
        param.grad = gradient if step % 2 else -gradient
        check.step()
    assert float(optimizer.state[param]["lr_scale"]) < 0.1


def test_a_walk_expected_below_what_came_follows_the_formulas(variant: str, fused: bool) -> None:
    """One element whose v forgets at once: of the sum that estimates V not much is left, or less than nothing."""
    (param,) = params = parameters([()])
    optimizer = VARIANTS[variant](params, betas=(0.5, 0.0), fused=fused)
    check = StepCheck(variant, optimizer)
    for step in range(60):
        set_gradients(params, step)
        check.step()
    assert float(optimizer.state[param]["walk_moment_sq"]) > 0.0


def test_a_step_of_length_zero(variant: str, fused: bool) -> None:
    """Over it nothing can be expected. The walk goes on with the next, and momentum that cancelled counts as such."""
    param = torch.nn.Parameter(torch.ones(256))
    optimizer = VARIANTS[variant]([param], betas=(0.5, 0.999), initial_scale=1.0, fused=fused)
    for step in range(40):
        param.grad = torch.rand(256, generator=torch.Generator().manual_seed(step)) * (-1) ** step
        optimizer.step()
    state, before = optimizer.state[param], optimizer.lr_scales()[0].item()
    param.grad = -state["exp_avg"]  # half of it and half of its opposite
    optimizer.step()
    assert not state["exp_avg"].any()
    assert state["walk_moment_sq"] == 0.0 and state["walk_path_sq"] > 0.0
    assert optimizer.lr_scales()[0].item() < before
    param.grad = torch.ones(256)
    optimizer.step()
    assert state["walk_moment_sq"].item() == pytest.approx(1.0)  # the momentum holds nothing but what came


@pytest.mark.slow
def test_sums_over_large_tensors_are_exact(variant: str, fused: bool) -> None:
    """A float32 sum of 3 million squares, done naively, loses four digits; walk and scale show them with clip None."""
    params = parameters([(3_000_017,)])  # no power of two divides it, so that all elements have a path
    optimizer = VARIANTS[variant](params, clip=None, damping=0.05, fused=fused)
    check = StepCheck(variant, optimizer)
    for step in range(2):
        set_gradients(params, step)
        check.step()


# ---------------------------------------------------------------------------------------------------------------------
# Samples

SAMPLED_SHAPES: dict[str, tuple[int, ...]] = {
    "rows of one run": (64, 1024),
    "rows of several runs": (20, 4096),
    "short runs": (1024, 64),
    "odd runs": (70, 960),  # 64 divides a row, 128 does not
    "one dimension": (131_072,),
    "filters": (128, 64, 3, 3),
    "one row": (1, 65_536),
    "one column": (65_536, 1),
    "just too short": (1040, 63),
    "just too small": (63, 1024),
}


@pytest.mark.parametrize("fraction", [1 / 16, 0.02, 0.7, 1 / 1024, 1.0])
@pytest.mark.parametrize("shape", SAMPLED_SHAPES)
def test_samples_follow_the_formulas(shape: str, fraction: float, fused: bool) -> None:
    """Large tensors keep the path of some elements, which stand for all."""
    params = parameters([SAMPLED_SHAPES[shape], (3,)])
    optimizer = VARIANTS["Local"](params, fused=fused, path_fraction=fraction, **LIVELY["Local"])
    check = StepCheck("Local", optimizer)
    for step in range(2):
        set_gradients(params, step)
        check.step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_every_type_follow_the_formulas(variant: str, dtype: torch.dtype, fused: bool) -> None:
    skip_unless_served(fused, dtype)
    params = parameters([(64, 1024), (5,), (90_000,)], dtype)
    optimizer = VARIANTS[variant](params, fused=fused, amsgrad=True, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    for step in range(3):
        set_gradients(params, step)
        check.step()
    assert [optimizer.state[p]["path"].numel() for p in params] == [64 * 64, 5, 90_000]


def test_which_elements_have_a_path(variant: str, fused: bool) -> None:
    """By hand: of every run of 1024 elements the first 64."""
    param = torch.nn.Parameter(torch.zeros(33, 2048))
    optimizer = VARIANTS[variant]([param], fused=fused)
    param.grad = torch.arange(1.0, 33 * 2048 + 1).reshape(33, 2048) / 1000  # Adam's first step is its sign
    param.grad[:, 1::2] = 0
    optimizer.step()
    path = optimizer.state[param]["path"]
    assert path.shape == (33, 128)
    torch.testing.assert_close(path[:, ::2], torch.full((33, 64), (0.05 * 1.95) ** 0.5), rtol=1e-4, atol=0)
    assert not path[:, 1::2].any()


def test_channels_last_filters_are_sampled_in_storage_order(variant: str, fused: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(128, 64, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    param = torch.nn.Parameter(values)
    optimizer = VARIANTS[variant]([param], fused=fused, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    for _ in range(2):
        param.grad = torch.randn(128, 64, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
        check.step()
    assert optimizer.state[param]["path"].shape == (128, 576 // 16)


def test_another_memory_format_begins_the_sample_anew(variant: str, fused: bool) -> None:
    """Its path is of the same shape, but of other elements."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(128, 64, 3, 3, generator=generator))
    optimizer = VARIANTS[variant]([param], fused=fused)
    for layout in (torch.contiguous_format, torch.channels_last):
        param.data = param.data.contiguous(memory_format=layout)
        param.grad = torch.randn(128, 64, 3, 3, generator=generator).contiguous(memory_format=layout)
        optimizer.step()
    # One step's length, as a first one's, and the moments go on.
    path = optimizer.state[param]["path"]
    steps = (
        optimizer.state[param]["exp_avg"]
        / (1 - 0.9**2)
        / (optimizer.state[param]["exp_avg_sq"] / (1 - 0.999**2)).sqrt()
    )
    expected = (0.05 * 1.95) ** 0.5 * steps.permute(0, 2, 3, 1).reshape(128, -1, 64)[:, :, :4].reshape(path.shape)
    torch.testing.assert_close(path, expected, rtol=1e-3, atol=1e-5)


def test_the_whole_path_of_what_has_other_rows_outermost(variant: str, fused: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(512, 256, generator=generator).t())
    optimizer = VARIANTS[variant]([param], fused=fused, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    for _ in range(2):
        param.grad = torch.randn(512, 256, generator=generator).t()
        check.step()
    assert optimizer.state[param]["path"].shape == param.shape


def test_a_fraction_changed_in_mid_run_is_for_states_to_come(variant: str, fused: bool) -> None:
    params = parameters([(64, 1024), (64, 1024)])
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    for step in range(3):
        set_gradients(params, step)
        if step == 0:
            params[1].grad = None
        check.step()
        optimizer.param_groups[0]["path_fraction"] = 1.0
    assert [optimizer.state[p]["path"].numel() for p in params] == [64 * 64, 64 * 1024]


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite, what is zero


def test_non_finite_gradients_leave_the_scale_alone(variant: str, fused: bool) -> None:
    """A sum is not finite: the path is tracked, the scale stays; other tensors of Local and Smoothed go on."""
    params = parameters([(4,), (4,)])
    # A fixed reference: beside a walk the scales of so few elements rest.
    optimizer = VARIANTS[variant](params, **LIVELY[variant], reference=0.5, fused=fused)
    train(optimizer, 3)
    scales = [optimizer.state[p]["lr_scale"].item() for p in params]
    set_gradients(params, 3)
    params[0].grad[1] = float("nan")
    optimizer.step()
    after = [optimizer.state[p]["lr_scale"].item() for p in params]
    assert all(optimizer.state[p][key].isfinite() for p in params for key in WALK)
    assert after[0] == scales[0]
    assert (after[1] == scales[1]) == (variant == "Global")
    assert params[0].isnan().sum() == 1 and optimizer.state[params[0]]["path"].isnan().sum() == 1
    assert params[1].isfinite().all()


def test_infinite_path_norm_leaves_the_scale_alone(variant: str, fused: bool) -> None:
    """r = inf is not finite either: exp(inf) clipped would be the upper clip."""
    params = parameters([(4,)])
    optimizer = VARIANTS[variant](params, **LIVELY[variant], fused=fused)
    train(optimizer, 2)
    scale = optimizer.state[params[0]]["lr_scale"].item()
    optimizer.state[params[0]]["path"].fill_(float("inf"))
    set_gradients(params, 2)
    optimizer.step()
    assert optimizer.state[params[0]]["lr_scale"].item() == scale


def test_zero_path_leaves_the_scale_alone(variant: str, fused: bool) -> None:
    """Nothing has moved yet."""
    params = parameters()
    optimizer = VARIANTS[variant](params, fused=fused)
    before = [as_array(p) for p in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    for _ in range(3):
        optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert optimizer.state[param]["lr_scale"].item() == 1.0
        assert optimizer.state[param]["step"].item() == 3
        assert (as_array(param) == old).all()


def test_what_does_not_move_has_no_vote(variant: str, fused: bool) -> None:
    """A group that a warm-up holds at lr = 0: its path grew, and under Global it drove the one scale to 10,000."""
    still, moving = parameters([(40,), (30,)])
    optimizer = VARIANTS[variant](
        [{"params": [still], "lr": 0.0}, {"params": [moving]}], fused=fused, **LIVELY[variant]
    )
    alone = VARIANTS[variant]([twin := torch.nn.Parameter(moving.detach().clone())], fused=fused, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    for step in range(6):
        set_gradients([still, moving], step, drift=5.0)
        twin.grad = moving.grad.clone()
        check.step()
        alone.step()
    assert not optimizer.state[still]["path"].any()
    torch.testing.assert_close(optimizer.state[moving]["lr_scale"], alone.state[twin]["lr_scale"], rtol=1e-6, atol=0)
    optimizer.param_groups[0]["lr"] = 0.05  # the warm-up ends
    for step in range(6, 10):
        set_gradients([still, moving], step)
        check.step()


def test_a_tensor_lr_of_zero_is_seen_on_the_device(variant: str, fused: bool) -> None:
    lr = torch.tensor(0.05)
    params = parameters()
    optimizer = VARIANTS[variant](params, fused=fused, **{**LIVELY[variant], "lr": lr})
    check = StepCheck(variant, optimizer)
    for step in range(8):
        set_gradients(params, step)
        lr.fill_(0.0 if step in (0, 1, 4, 5) else 0.05)
        check.step()


def test_walk_begins_with_the_moments_it_finds(variant: str, fused: bool) -> None:
    """Of a torch.optim.Adam: its first step is that of ten ones before it, and the path a fresh one."""
    params = parameters()
    adam = torch.optim.Adam(params, lr=0.05)
    train(adam, 10)
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    optimizer.load_state_dict(adam.state_dict())
    check = StepCheck(variant, optimizer)
    for step in range(4):
        set_gradients(params, step)
        check.step()


def test_parameters_count_their_own_steps(variant: str, fused: bool) -> None:
    """DeepSpeed kept the step count in a leaked loop variable: a parameter that misses a gradient must keep its own."""
    params = parameters()
    optimizer = VARIANTS[variant](params, **LIVELY[variant], fused=fused)
    check = StepCheck(variant, optimizer)
    for step in range(7):
        set_gradients(params, step)
        if step % 2:
            params[0].grad = None
        if step < 3:
            params[1].grad = None
        check.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [4, 4, 7]


def test_scale_of_one_tensor_does_not_leak_into_the_next(fused: bool) -> None:
    """The original AdamClara code did that: a tensor's result must not depend on its neighbours (Local, Smoothed)."""
    for variant in ("Local", "Smoothed"):
        together, alone = parameters(), parameters()
        joint = VARIANTS[variant](together, **LIVELY[variant], fused=fused)
        train(joint, 5)
        for index, param in enumerate(alone):
            single = VARIANTS[variant]([param], **LIVELY[variant], fused=fused)
            for step in range(5):
                set_gradients(alone, step)
                single.step()
            assert torch.equal(param, together[index])


def test_lr_tensor_is_a_number_like_any_other(variant: str, fused: bool) -> None:
    for lr in (torch.tensor(0.05), torch.tensor([0.05]), torch.tensor(0.05, dtype=torch.float64)):
        params = parameters()
        options = {**LIVELY[variant], "lr": lr}
        optimizer = VARIANTS[variant](params, **options, fused=fused)
        check = StepCheck(variant, optimizer)
        for step in range(4):
            set_gradients(params, step)
            if step == 2:
                lr.fill_(0.01)
            check.step()
        assert optimizer.param_groups[0]["lr"] is lr


def test_amsgrad_may_be_switched_on_during_a_run(variant: str, fused: bool) -> None:
    """Options are read afresh at every step; a maximum that is missing starts at zero."""
    params = parameters()
    optimizer = VARIANTS[variant](params, **LIVELY[variant], fused=fused)
    check = StepCheck(variant, optimizer)
    for step in range(6):
        set_gradients(params, step)
        optimizer.param_groups[0]["amsgrad"] = step >= 3
        check.step()


def test_float32_gradient_of_a_bfloat16_parameter(variant: str, fused: bool) -> None:
    """Master gradients (p.grad_dtype): used in full, not rounded to the parameter's type first."""
    params = parameters(dtype=torch.bfloat16)
    if not hasattr(params[0], "grad_dtype"):
        pytest.skip("this torch has no grad_dtype (new in 2.10)")
    skip_unless_served(fused, torch.bfloat16)
    optimizer = VARIANTS[variant](params, **LIVELY[variant], fused=fused)
    check = StepCheck(variant, optimizer)
    for param in params:
        param.grad_dtype = torch.float32
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        check.step()


def test_bfloat16_gradient_of_a_float32_parameter(variant: str) -> None:
    """TransformerEngine's FusedAdam refuses it; autograd can produce it, so it is served (fused=None)."""
    params = parameters()
    if not hasattr(params[0], "grad_dtype"):
        pytest.skip("this torch has no grad_dtype (new in 2.10)")
    optimizer = VARIANTS[variant](params, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    for param in params:
        param.grad_dtype = torch.bfloat16
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).bfloat16()
        check.step()
