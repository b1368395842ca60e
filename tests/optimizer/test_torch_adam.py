"""adapt_lr=False is torch.optim.Adam, and AdamW with decoupled_weight_decay=True."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import VARIANTS, clones, parameters, set_gradients, why_not_core
from torch.testing._internal.common_optimizers import optim_db

# In float64 the two differ by the order of operations alone. In float32 the same, times the ratio of the roundoffs.
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.float64: {"rtol": 1e-12, "atol": 1e-13}}

REFERENCE = {info.optim_cls: info for info in optim_db if info.optim_cls in (torch.optim.Adam, torch.optim.AdamW)}


def option_table() -> list[Any]:
    cases = []
    for reference, info in REFERENCE.items():
        for case in info.optim_inputs_func(device="cpu"):
            if any(case.kwargs.get(name) for name in ("foreach", "capturable", "differentiable")):
                continue
            # At weight_decay 0 Adam and AdamW coincide: add some where torch's table has none.
            for extra in ({}, {"weight_decay": 0.1}) if "weight_decay" not in case.kwargs else ({},):
                kwargs = {**case.kwargs, **extra}
                cases.append(pytest.param(reference, kwargs, id=f"{reference.__name__}: {case.desc} {extra or ''}"))
    extras: dict[str, dict[str, Any]] = {
        "tensor lr": {"lr": torch.tensor(0.01, dtype=torch.float64), "weight_decay": 0.1},
        "amsgrad maximize": {"amsgrad": True, "maximize": True, "weight_decay": 0.1, "betas": (0.8, 0.5)},
        "betas eps": {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.2},
    }
    cases += [pytest.param(r, kwargs, id=f"{r.__name__}: {name}") for r in REFERENCE for name, kwargs in extras.items()]
    return cases


def ours(variant: str, params: Any, reference: type, kwargs: dict[str, Any], fused: bool) -> torch.optim.Optimizer:
    decoupled = reference is torch.optim.AdamW
    # AdamW decays by default, Adam does not.
    given = {"weight_decay": 1e-2 if decoupled else 0.0, **copy.deepcopy(kwargs)}
    return VARIANTS[variant](params, adapt_lr=False, decoupled_weight_decay=decoupled, fused=fused, **given)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("reference", "kwargs"), option_table())
def test_torch_option_table(
    variant: str, reference: type, kwargs: dict[str, Any], dtype: torch.dtype, fused: bool
) -> None:
    if fused and (reason := why_not_core("cpu", dtype)):
        pytest.skip(f"the compiled core cannot serve {dtype}: {reason}")
    expected = parameters([(6, 5), (33,), ()], dtype)
    actual = clones(expected)
    theirs = reference(expected, **copy.deepcopy(kwargs))
    mine = ours(variant, actual, reference, kwargs, fused)
    for step in range(12):
        for params, optimizer in ((expected, theirs), (actual, mine)):
            set_gradients(params, step)
            if step == 4:
                params[0].grad = None
            optimizer.step()
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[dtype])
        for key in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if key in theirs.state[b]:
                torch.testing.assert_close(mine.state[a][key], theirs.state[b][key], **TOLERANCE[dtype])


@pytest.mark.parametrize("reference", REFERENCE, ids=lambda cls: cls.__name__)
def test_groups_with_different_options(variant: str, reference: type, fused: bool) -> None:
    def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": params[:1], "lr": 0.01, "weight_decay": 0.1},
            {"params": params[1:2], "lr": 0.1, "betas": (0.7, 0.9), "maximize": True},
            {"params": params[2:], "eps": 0.01, "amsgrad": True},
        ]

    expected = parameters(dtype=torch.float64)
    actual = clones(expected)
    theirs = reference(groups(expected), weight_decay=0.02)
    mine = ours(variant, groups(actual), reference, {"weight_decay": 0.02}, fused)
    for step in range(10):
        for params, optimizer in ((expected, theirs), (actual, mine)):
            set_gradients(params, step)
            optimizer.step()
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[torch.float64])


def drosenbrock(tensor: torch.Tensor) -> torch.Tensor:
    x, y = tensor
    return torch.stack((-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)))


@pytest.mark.parametrize("maximize", [False, True])
def test_rosenbrock_with_schedulers(variant: str, maximize: bool, fused: bool) -> None:
    """torch's own test of an optimizer with its schedulers: two of them chained, on a function with a curved valley."""

    def run(make: Callable[..., torch.optim.Optimizer]) -> torch.Tensor:
        param = torch.nn.Parameter(torch.tensor([1.5, 1.5], dtype=torch.float64))
        optimizer = make([param], lr=2e-2, weight_decay=1e-3, maximize=maximize)
        schedulers = [
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99),
            torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.5),
        ]
        for _ in range(100):
            param.grad = drosenbrock(param.detach()) * (-1 if maximize else 1)
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
        return param.detach()

    mine = run(lambda params, **kw: VARIANTS[variant](params, adapt_lr=False, fused=fused, **kw))
    torch.testing.assert_close(mine, run(torch.optim.Adam), rtol=1e-10, atol=1e-12)


def test_signature_starts_as_adams(variant: str) -> None:
    """Positional arguments mean what they mean for torch.optim.Adam; the defaults are documented."""
    names = ["params", "lr", "betas", "eps", "weight_decay", "amsgrad"]
    signature = {
        name: p for name, p in inspect.signature(VARIANTS[variant]).parameters.items() if p.kind is not p.VAR_KEYWORD
    }
    adam = inspect.signature(torch.optim.Adam).parameters
    assert list(signature)[:6] == names == list(adam)[:6]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(signature.values())[6:])
    defaults = {n: p.default for n, p in signature.items() if n != "params"}
    shared = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
        "maximize": False,
        "decoupled_weight_decay": False,
        "initial_scale": "cautious",
        "path_fraction": 1 / 16,
        "smoothing": 0.05,
        "damping": defaults["damping"],
        "clip": (0.5, 1.05),
        "reference": "random_walk",
        "scale_bounds": (1e-8, 1e8),
        "adapt_lr": True,
        "fused": None,
        "process_group": None,
    }
    if variant == "Smoothed":
        shared.update(clip=(0.5, 2.0), lr_smoothing=defaults["lr_smoothing"])
    assert defaults == shared


def test_every_hyperparameter_is_a_group_option(variant: str) -> None:
    params = parameters([(2,), (2,)])
    optimizer = VARIANTS[variant]([{"params": params[:1], "eps": 1e-4}, {"params": params[1:]}])
    signature = inspect.signature(VARIANTS[variant]).parameters.values()
    expected = {p.name for p in signature if p.kind is not p.VAR_KEYWORD} - {"params", "fused", "process_group"}
    for group in optimizer.param_groups:
        assert expected <= set(group)
        assert not {"fused", "process_group"} & set(group)
    assert [g["eps"] for g in optimizer.param_groups] == [1e-4, 1e-8]


@pytest.mark.parametrize("decoupled", [False, True])
def test_an_infinite_element_stays_infinite_without_weight_decay(variant: str, fused: bool, decoupled: bool) -> None:
    """As in torch.optim.Adam: a decay of 0 must not make 0 * inf of a mask's elements."""
    param = torch.nn.Parameter(torch.tensor([1.0, -math.inf, 2.0]))
    optimizer = VARIANTS[variant]([param], lr=0.1, fused=fused, decoupled_weight_decay=decoupled)
    param.grad = torch.tensor([1.0, 1.0, -1.0])
    optimizer.step()
    assert param[1].item() == -math.inf
    assert param.detach()[[0, 2]].isfinite().all()


# From the smallest numbers that float32 holds to the largest, and back: v must neither stay infinite nor freeze.
SIZES = [1e-45, 1e-38, 1e-30, 1e-22, 1e-15, 1e-8, 1e-4, 1.0, 1e4, 1e8, 1e15, 1e18, 3e19, 9e19, 5e20, 1e25, 3e38]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.9, 0.9999)])
def test_gradients_of_every_size(size: float, betas: tuple[float, float], variant: str, fused: bool) -> None:
    """(1 - beta2) (g g) overflows where ((1 - beta2) g) g does not, and sqrt(v / (1 - beta2^t)) before
    sqrt(v) / sqrt(1 - beta2^t): one gradient of 3e19 froze its element for ever."""
    expected = [torch.nn.Parameter(torch.zeros(33)), torch.nn.Parameter(torch.zeros(64, 1024))]
    actual = clones(expected)
    adam = torch.optim.Adam(expected, lr=0.1, betas=betas, foreach=False)
    mine = VARIANTS[variant](actual, lr=0.1, betas=betas, adapt_lr=False, fused=fused)
    for step in range(6):
        for params in (expected, actual):
            for param in params:
                signs = 1.0 - 2.0 * (torch.arange(param.numel()) % 2).view(param.shape)
                param.grad = signs * (size if step < 2 else 1.0)
        adam.step()
        mine.step()
        for a, b in zip(actual, expected, strict=True):
            survived = b.isfinite()
            # Where torch's own arithmetic overflows, its element stays where it is: ours need not be better.
            torch.testing.assert_close(a[survived], b[survived], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [3e19, 1e20])
def test_scales_survive_gradients_of_every_size(size: float, variant: str, fused: bool) -> None:
    """One batch of such gradients, and training goes on: nothing stays infinite, neither in walk nor path."""
    (param,) = parameters([(50,)])
    optimizer = VARIANTS[variant]([param], lr=0.1, fused=fused)
    for step in range(10):
        set_gradients([param], step, size=size if step == 3 else 1.0)
        optimizer.step()
        assert all(value.isfinite().all() for value in optimizer.state[param].values()), step
    assert param.isfinite().all()
