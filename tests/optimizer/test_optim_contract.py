"""What a user of torch.optim expects to keep: closures, hooks, schedulers, pickles, param groups, zero_grad."""

from __future__ import annotations

import copy
import gc
import pickle
import types
import warnings
import weakref
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    GLOBAL_OPTIONS,
    LIVELY,
    SCALARS,
    VARIANTS,
    StepCheck,
    all_params,
    clones,
    frozen,
    parameters,
    results,
    set_gradients,
    snapshot,
    train,
    why_not_core,
)
from torch.optim import lr_scheduler

import clara_fused


@pytest.fixture
def optimizer(variant: str, fused: bool) -> torch.optim.Optimizer:
    return VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])


# ---------------------------------------------------------------------------------------------------------------------
# Construction and param groups


def test_classes(variant: str) -> None:
    assert issubclass(VARIANTS[variant], clara_fused.AdamClara)
    assert issubclass(clara_fused.AdamClara, torch.optim.Optimizer)
    assert VARIANTS[variant].step is not torch.optim.Optimizer.step


def test_constructs_from_generators_names_and_dicts(variant: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    cls = VARIANTS[variant]
    assert len(cls(model.parameters()).param_groups[0]["params"]) == 4
    assert cls(model.named_parameters()).param_groups[0]["param_names"][0] == "0.weight"
    assert len(cls([{"params": model[0].parameters()}, {"params": model[1].weight, "lr": 0.1}]).param_groups) == 2
    with pytest.raises(ValueError, match="empty parameter list"):
        cls([])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_constructs_before_lazy_modules_have_shapes(variant: str, fused: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LazyLinear(2))
    optimizer = VARIANTS[variant](model.parameters(), fused=fused, **LIVELY[variant])
    for _ in range(2):
        model[0](torch.ones(5, 3)).sum().backward()
        optimizer.step()
        assert len(optimizer.state) == 2
    loss = model(torch.ones(5, 3)).sum()  # gives the second layer its shapes
    check = StepCheck(variant, optimizer)
    loss.backward()
    check.step()
    assert len(optimizer.state) == 4


def test_no_state_before_the_first_step(optimizer: torch.optim.Optimizer) -> None:
    """Accelerate swaps parameters between __init__ and the first step: nothing may be created or cached before."""
    assert not optimizer.state
    assert not optimizer.state_dict()["state"]


def test_state_holds_what_is_documented(variant: str, fused: bool) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        if fused and why_not_core("cpu", dtype):
            continue
        for amsgrad in (False, True):
            small, large = parameters([(3, 2), (64, 1024)], dtype)
            optimizer = VARIANTS[variant]([small, large], amsgrad=amsgrad, fused=fused)
            train(optimizer, 1)
            kept = torch.float64 if dtype == torch.float64 else torch.float32
            moments = {"exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])}
            for param, path_shape in ((small, (3, 2)), (large, (64, 64))):
                state = optimizer.state[param]
                assert set(state) == {*moments, "path", *SCALARS}
                for key in moments:
                    assert (state[key].dtype, state[key].shape) == (kept, param.shape), key
                assert (state["path"].dtype, state["path"].shape) == (kept, path_shape)
                for key in SCALARS:
                    assert (state[key].dtype, state[key].shape) == (torch.float32, ()), key
                assert not any(value.requires_grad for value in state.values())


def test_memory_of_the_state(variant: str, fused: bool) -> None:
    """8.25 bytes per parameter of large tensors, where Adam has 8."""
    params = parameters([(256, 1024), (512, 3072)])
    optimizer = VARIANTS[variant](params, fused=fused)
    train(optimizer, 1)
    entries = {id(t): t for p in params for t in optimizer.state[p].values()}
    held = sum(t.untyped_storage().nbytes() for t in entries.values())
    assert held <= 8.26 * sum(p.numel() for p in params)


def test_no_tensors_in_groups_but_the_users(optimizer: torch.optim.Optimizer) -> None:
    options = snapshot(optimizer)["options"]
    train(optimizer, 3)
    optimizer.lr_scales()
    optimizer.effective_lrs()
    assert snapshot(optimizer)["options"] == options
    for group in optimizer.param_groups:
        assert not any(isinstance(value, torch.Tensor) for key, value in group.items() if key != "params")


NUMBERS = {
    "numpy float32": np.float32(0.25),
    "numpy float64": np.float64(0.25),
    "numpy array": np.array(0.25),
    "fraction": Fraction(1, 4),
    "integer": 1,
}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_lr_may_be_any_real_number(number: Any, variant: str, fused: bool) -> None:
    params = parameters()
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    twins = VARIANTS[variant](clones(params), fused=fused, **LIVELY[variant])
    for opt, lr in ((optimizer, number), (twins, float(number))):
        opt.param_groups[0]["lr"] = lr
        train(opt, 2)
    assert results(optimizer) == results(twins)
    torch.testing.assert_close(optimizer.effective_lrs(), twins.effective_lrs(), rtol=0, atol=0)
    train(VARIANTS[variant](parameters(), lr=number, fused=fused), 2)


TENSOR_OPTIONS: dict[str, Any] = {
    "betas": (torch.tensor(0.8), torch.tensor(0.99, dtype=torch.float64)),
    "eps": torch.tensor(1e-6),
    "weight_decay": torch.tensor([0.1]),
    "smoothing": torch.tensor(0.2),
    "damping": np.float64(0.3),
    "clip": (np.float32(0.5), torch.tensor(1.25)),
    "scale_bounds": (torch.tensor(0.25), torch.tensor(4.0)),
    "reference": torch.tensor(0.5),
    "path_fraction": torch.tensor(0.25),
    "initial_scale": torch.tensor(0.5),
}


@pytest.mark.parametrize("name", TENSOR_OPTIONS)
@pytest.mark.parametrize("place", ["constructor", "group", "mid-run"])
def test_options_may_be_tensors(place: str, name: str, variant: str, fused: bool) -> None:
    """torch.optim.Adam takes tensors for betas; RLlib writes checkpoints with more of them."""

    def plain(value: Any) -> Any:
        return tuple(float(v) for v in value) if isinstance(value, tuple) else float(value)

    given, params = {name: TENSOR_OPTIONS[name]}, parameters()
    options = {k: v for k, v in LIVELY[variant].items() if k != name}
    if place == "constructor":
        optimizer = VARIANTS[variant](params, fused=fused, **options, **given)
    elif place == "group":
        optimizer = VARIANTS[variant]([{"params": params, **given}], fused=fused, **options)
    else:
        optimizer = VARIANTS[variant](params, fused=fused, **options)
        optimizer.param_groups[0].update(given)
    twins = VARIANTS[variant](clones(params), fused=fused, **options, **{name: plain(TENSOR_OPTIONS[name])})
    for opt in (optimizer, twins):
        train(opt, 3)
    for a, b in zip(params, all_params(twins), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_lr_beyond_floating_point_changes_nothing(variant: str, fused: bool) -> None:
    params = parameters()
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    train(optimizer, 2)
    optimizer.param_groups[0]["lr"] = 10**400
    before = snapshot(optimizer)
    with pytest.raises(OverflowError):
        optimizer.step()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("tensor", [False, True])
def test_lr_is_never_written(variant: str, tensor: bool, fused: bool) -> None:
    """The original AdamClara wrote group["lr"], so that schedulers and it overwrote each other."""
    lr = torch.tensor(0.03) if tensor else 0.03
    optimizer = VARIANTS[variant](parameters(), **{**LIVELY[variant], "lr": lr}, fused=fused)
    train(optimizer, 5)
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(0.03)
    assert optimizer.lr_scales()[0][0].item() != 1.0


@pytest.mark.parametrize("steps_before", [0, 3])
def test_add_param_group(variant: str, steps_before: int, fused: bool) -> None:
    """apex never trains groups that are added later. Global's newcomers take the scale in force."""
    old, new = parameters(), parameters([(4, 4), (3,)], seed=1)
    options = LIVELY[variant]
    optimizer = VARIANTS[variant](old, fused=fused, **options)
    check = StepCheck(variant, optimizer)
    for step in range(steps_before):
        set_gradients(old, step)
        check.step()
    optimizer.add_param_group({"params": new, "lr": 0.2, "weight_decay": 0.3})
    assert optimizer.param_groups[1]["smoothing"] == options["smoothing"]
    start = [p.detach().clone() for p in new]
    for step in range(steps_before, steps_before + 3):
        set_gradients(old + new, step)
        check.step()
    assert all(not torch.equal(p, s) for p, s in zip(new, start, strict=True))
    assert [optimizer.state[p]["step"].item() for p in (old[0], new[0])] == [steps_before + 3, 3]


def test_parameters_that_need_no_gradient_are_left_alone(optimizer: torch.optim.Optimizer) -> None:
    frozen_param = all_params(optimizer)[1]
    frozen_param.requires_grad_(False)
    before = frozen(frozen_param)
    for _ in range(2):
        set_gradients([p for p in all_params(optimizer) if p.requires_grad], 0)
        optimizer.step()
    assert frozen(frozen_param) == before and frozen_param not in optimizer.state


def test_step_without_any_gradient_does_nothing(optimizer: torch.optim.Optimizer) -> None:
    before = snapshot(optimizer)
    assert optimizer.step() is None
    assert snapshot(optimizer) == before
    train(optimizer, 2)
    optimizer.zero_grad()
    before = snapshot(optimizer)
    optimizer.step()
    assert snapshot(optimizer) == before


def test_zero_grad(optimizer: torch.optim.Optimizer) -> None:
    train(optimizer, 1)
    grads = [p.grad for p in all_params(optimizer)]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is g and not g.any() for p, g in zip(all_params(optimizer), grads, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in all_params(optimizer))


def test_gradients_are_not_modified(variant: str, fused: bool) -> None:
    """Users log gradients after the step: weight decay, maximize and unscaling must not be written into them."""
    params = parameters()
    optimizer = VARIANTS[variant](params, maximize=True, fused=fused, **LIVELY[variant])
    set_gradients(params, 0)
    grads = [frozen(p.grad) for p in params]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    optimizer.step()
    assert [frozen(p.grad) for p in params] == grads


def test_step_makes_no_graph_and_keeps_parameters_leaves(optimizer: torch.optim.Optimizer) -> None:
    params = all_params(optimizer)
    identities = [(id(p), p.data_ptr()) for p in params]
    versions = [p._version for p in params]
    train(optimizer, 2)
    grad_versions = [p.grad._version for p in params]
    optimizer.step()
    assert [p.grad._version for p in params] == grad_versions, "a graph through the gradients could not go backward"
    assert [(id(p), p.data_ptr()) for p in params] == identities
    assert all(p.is_leaf and p.requires_grad for p in params)
    assert all(p._version > v for p, v in zip(params, versions, strict=True))


def test_backward_after_step_notices_the_change(optimizer: torch.optim.Optimizer) -> None:
    """Autograd must see that a saved parameter was changed in place, or it would return wrong gradients."""
    param = all_params(optimizer)[0]
    loss = (param**2 * param).sum()
    train(optimizer, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------------------------------------------------------------
# Closures and hooks


def test_closure_runs_under_grad_and_gives_the_loss(optimizer: torch.optim.Optimizer) -> None:
    calls = []

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        calls.append(1)
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in all_params(optimizer))
        loss.backward()
        return loss

    first = optimizer.step(closure)
    with torch.no_grad():
        second = optimizer.step(closure=closure)
    assert len(calls) == 2 and second < first
    assert all(s["step"].item() == 2 for s in optimizer.state.values())


def test_closure_that_raises_changes_nothing(optimizer: torch.optim.Optimizer) -> None:
    train(optimizer, 1)
    before = snapshot(optimizer)

    def closure() -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert snapshot(optimizer) == before
    train(optimizer, 1, first=1)


def test_step_hooks(optimizer: torch.optim.Optimizer) -> None:
    seen = []
    handles = [
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(("pre", opt is optimizer))),
        optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("post", opt is optimizer))),
    ]
    train(optimizer, 1)
    assert seen == [("pre", True), ("post", True)]
    for handle in handles:
        handle.remove()
    train(optimizer, 1)
    assert len(seen) == 2


def test_pre_hook_may_set_gradients(optimizer: torch.optim.Optimizer) -> None:
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: set_gradients(all_params(opt), 0))
    optimizer.step()
    assert all(s["step"].item() == 1 for s in optimizer.state.values())


def test_state_dict_hooks(variant: str, fused: bool) -> None:
    optimizer = VARIANTS[variant](parameters(), fused=fused)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("state_dict pre"))
    optimizer.register_state_dict_post_hook(lambda opt, sd: {**sd, "added": 1})
    optimizer.register_load_state_dict_pre_hook(lambda opt, sd: seen.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("load post"))
    train(optimizer, 1)
    taken = optimizer.state_dict()
    assert taken["added"] == 1
    optimizer.load_state_dict(taken)
    assert seen == ["state_dict pre", "load pre", "load post"]


def test_a_state_dict_hook_may_return_anything(variant: str, fused: bool) -> None:
    source = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    source.register_state_dict_post_hook(lambda opt, sd: {"wrapped": sd})
    train(source, 2)
    target = VARIANTS[variant](clones(all_params(source)), fused=fused, **LIVELY[variant])
    target.register_load_state_dict_pre_hook(lambda opt, sd: sd["wrapped"])
    target.load_state_dict(source.state_dict())
    assert results(target) == results(source)


def test_load_hook_may_replace_the_state_dict(variant: str, fused: bool) -> None:
    source = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    train(source, 2)
    target = VARIANTS[variant](clones(all_params(source)), fused=fused, **LIVELY[variant])
    target.register_load_state_dict_pre_hook(lambda opt, sd: source.state_dict())
    target.load_state_dict(target.state_dict())
    assert results(target) == results(source)


def test_profile_hook_names_the_step(optimizer: torch.optim.Optimizer) -> None:
    with torch.profiler.profile() as profile:
        train(optimizer, 1)
    assert any(event.key.startswith("Optimizer.step#") for event in profile.key_averages())


# ---------------------------------------------------------------------------------------------------------------------
# Schedulers

Scheduler = Callable[[torch.optim.Optimizer], Any]
SCHEDULERS: dict[str, Scheduler] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.001, 3),
}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, tensor_lr: bool, variant: str, fused: bool) -> None:
    """Rates and betas as under torch.optim.Adam, and used: with adapt_lr=False the parameters agree as well."""
    mine = VARIANTS[variant](parameters(), lr=torch.tensor(0.05) if tensor_lr else 0.05, adapt_lr=False, fused=fused)
    adam = torch.optim.Adam(parameters(), lr=torch.tensor(0.05) if tensor_lr else 0.05)
    lr = mine.param_groups[0]["lr"]
    history: list[list[Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for optimizer in (mine, adam):
            scheduler = SCHEDULERS[name](optimizer)
            history.append([])
            for step in range(10):
                train(optimizer, 1, first=step)
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
                group = optimizer.param_groups[0]
                history[-1].append((float(group["lr"]), *map(float, group["betas"])))
    assert history[0] == history[1]
    assert len(set(history[0])) > 1
    if tensor_lr:
        assert mine.param_groups[0]["lr"] is lr
    for a, b in zip(all_params(mine), all_params(adam), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR", "CosineAnnealingLR"])
def test_schedulers_with_adaptation(name: str, variant: str, fused: bool) -> None:
    """The rate in force is the scheduler's times the scale; changed betas enter reference and bias corrections."""
    optimizer = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    scheduler = SCHEDULERS[name](optimizer)
    for step in range(10):
        set_gradients(all_params(optimizer), step)
        check.step()
        scheduler.step()


def test_options_are_read_afresh(variant: str, fused: bool) -> None:
    """Every option may change between steps, also after many steps with the same ones (caches)."""
    optimizer = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    changes: list[dict[str, Any]] = [
        {"lr": 0.01},
        {"betas": (0.5, 0.9)},
        {"eps": 1e-2},
        {"weight_decay": 0.0},
        {"weight_decay": 0.2},
        {"decoupled_weight_decay": True},
        {"maximize": True},
        {"amsgrad": True},
        {"smoothing": 0.6},
        {"damping": 0.2},
        {"reference": 0.5},
        {"reference": "random_walk"},
        {"clip": None},
        {"clip": (0.9, 1.1)},
        {"scale_bounds": (0.5, 1.01)},
        {"adapt_lr": False},
        {"adapt_lr": True},
        {"lr": 0.0},
        {"lr": torch.tensor(0.02)},
    ]
    if variant == "Smoothed":
        changes.append({"lr_smoothing": 0.1})
    for number, change in enumerate(changes):
        optimizer.param_groups[0].update(change)
        for step in range(2):
            set_gradients(all_params(optimizer), 2 * number + step)
            check.step()


def test_options_changed_in_place_are_noticed(variant: str, fused: bool) -> None:
    """Pairs may be lists, as a user writes into a group, and a list can change without being replaced."""
    pairs = {"betas": [0.9, 0.99], "clip": [0.5, 1.6], "scale_bounds": [1e-8, 1e8]}
    optimizer = VARIANTS[variant](parameters(), fused=fused, **{**LIVELY[variant], **pairs})
    group = optimizer.param_groups[0]
    group.update(pairs)
    check = StepCheck(variant, optimizer)
    for step, (name, end, value) in enumerate([("betas", 0, 0.5), ("clip", 1, 1.01), ("scale_bounds", 1, 1.0)]):
        set_gradients(all_params(optimizer), 2 * step)
        check.step()
        group[name][end] = value
        set_gradients(all_params(optimizer), 2 * step + 1)
        check.step()
    group["betas"][0] = 1.0
    with pytest.raises(ValueError, match="Invalid beta parameter at index 0"):
        optimizer.step()


def test_step_may_be_replaced_on_the_instance(optimizer: torch.optim.Optimizer) -> None:
    """Accelerate does it, and LR schedulers wrap the bound method."""
    calls = []
    original = optimizer.step

    def patched(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    optimizer.step = types.MethodType(patched, optimizer)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    train(optimizer, 2)
    scheduler.step()
    assert len(calls) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Copies


def copies(optimizer: torch.optim.Optimizer) -> dict[str, torch.optim.Optimizer]:
    return {"pickle": pickle.loads(pickle.dumps(optimizer)), "deepcopy": copy.deepcopy(optimizer)}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_pickle_and_deepcopy_continue_alike(how: str, steps: int, variant: str, fused: bool) -> None:
    optimizer = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    train(optimizer, steps)
    optimizer.zero_grad()  # copies of parameters have no gradients
    other = copies(optimizer)[how]
    assert type(other) is type(optimizer)
    assert snapshot(other) == snapshot(optimizer)
    before = snapshot(optimizer)
    train(other, 3, first=steps)
    assert snapshot(optimizer) == before, "the copy shares memory with its original"
    train(optimizer, 3, first=steps)
    assert snapshot(other) == snapshot(optimizer)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_keep_constructor_and_user_settings(how: str, variant: str) -> None:
    """`fused` and `enable_fused_amp` are no group options: the base class would forget them."""
    optimizer = VARIANTS[variant](parameters(), fused=False)
    optimizer.enable_fused_amp()
    other = copies(optimizer)[how]
    assert other._step_supports_amp_scaling
    train(other, 2)
    assert other.param_groups[0].keys() == optimizer.param_groups[0].keys()


def test_deepcopy_of_model_and_optimizer_together(variant: str, fused: bool) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = VARIANTS[variant](model.parameters(), fused=fused)
    set_gradients(model.parameters(), 0)
    optimizer.step()
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    assert optimizer2.param_groups[0]["params"][0] is model2.weight
    set_gradients(model2.parameters(), 1)
    optimizer2.step()
    assert optimizer2.state[model2.weight]["step"].item() == 2
    assert optimizer.state[model.weight]["step"].item() == 1


def test_groups_of_one_optimizer_make_another(variant: str, fused: bool) -> None:
    """copy.copy of param groups, as samplers of ensembles do."""
    source = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    train(source, 2)
    groups = [copy.copy(group) for group in source.param_groups]
    other = VARIANTS[variant](groups, fused=fused)
    for option in GLOBAL_OPTIONS:
        assert other.param_groups[0][option] == source.param_groups[0][option]
    train(other, 1)


def test_repr_shows_the_options(variant: str) -> None:
    text = repr(VARIANTS[variant](parameters(), lr=0.125))
    assert VARIANTS[variant].__name__ in text
    assert "lr: 0.125" in text and "smoothing: 0.05" in text


def test_dead_optimizers_are_freed(variant: str, fused: bool) -> None:
    """Caches must not keep parameters alive (torch's fused AdamW leaks under FSDP2)."""
    optimizer = VARIANTS[variant](parameters(), fused=fused)
    train(optimizer, 2)
    witness = weakref.ref(all_params(optimizer)[0])
    del optimizer
    gc.collect()
    assert witness() is None


def test_steps_do_not_accumulate_memory(optimizer: torch.optim.Optimizer) -> None:
    """torch's fused AdamW leaks an object per parameter and step under FSDP2."""
    train(optimizer, 3)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(50):
        optimizer.step()
    gc.collect()
    assert len(gc.get_objects()) - before < 40


def test_parameters_swapped_before_the_first_step(variant: str, fused: bool) -> None:
    """Accelerate's FSDP2 preparation puts placeholders, then the real parameters, into the groups."""
    optimizer = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    new = parameters(seed=3)
    optimizer.param_groups[0]["params"] = new
    train(optimizer, 2)
    assert all(optimizer.state[p]["step"].item() == 2 for p in new) and len(optimizer.state) == len(new)


def test_storage_replaced_between_steps(variant: str, fused: bool) -> None:
    """`param.data = ...` (weight surgery, FSDP1, offloading): never write through a stale pointer."""
    params = parameters()
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    old = []
    for step in range(6):
        set_gradients(params, step)
        if step % 2:
            for param in params:
                old.append((param.data, param.data.clone()))
                param.data = param.data.clone()
        if step == 4:
            for state in optimizer.state.values():
                for key in ("exp_avg", "exp_avg_sq", "path"):
                    state[key] = state[key].clone()
        check.step()
    assert all(torch.equal(tensor, values) for tensor, values in old)


def test_state_changed_by_the_user(variant: str, fused: bool) -> None:
    """State tensors are the state: what a user writes into them counts at the next step."""
    params = parameters()
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    for step in range(6):
        set_gradients(params, step)
        check.step()
        if step == 2:
            for state in optimizer.state.values():
                state["exp_avg"].mul_(0.5)
                state["path"].zero_()
                state["step"].fill_(11.0)
        if step == 3:
            for state in optimizer.state.values():
                state["lr_scale"].fill_(0.25)


def test_state_cleared_by_the_user(variant: str, fused: bool) -> None:
    """optimizer.state.clear() starts again (some trainers do it after warmup)."""
    params = parameters()
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    train(optimizer, 3)
    optimizer.state.clear()
    check = StepCheck(variant, optimizer)
    set_gradients(params, 3)
    check.step()
    assert all(s["step"].item() == 1 for s in optimizer.state.values())


def test_entries_of_the_users_beside_the_states_of_parameters(variant: str, fused: bool) -> None:
    """torch.optim keeps, saves and loads whatever is in optimizer.state under a key that is no parameter."""
    params = parameters()
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    for step in range(3):
        set_gradients(params, step)
        check.step()
        optimizer.state["note"] = step
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["note"] == 2
    assert copy.deepcopy(optimizer).state["note"] == 2
    assert all(torch.isfinite(scales).all() for scales in optimizer.lr_scales())


def test_trains_under_inference_and_default_dtype_settings(variant: str, fused: bool) -> None:
    """A default dtype of float64 must not leak into step and lr_scale."""
    torch.set_default_dtype(torch.float64)
    params = parameters()
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    for step in range(3):
        set_gradients(params, step)
        check.step()
    assert optimizer.state[params[0]]["step"].dtype == torch.float32
    assert optimizer.lr_scales()[0].dtype == torch.float32
