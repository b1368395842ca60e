"""What cannot be served is refused before anything is changed, with an error that names where, what and what else.

TransformerEngine left "print which tensor fails" as a to-do; torch's fused Adam accepts state of the wrong size. Every
case here runs after good steps, with the bad tensor last, and compares every bit before and after.
"""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    LIVELY,
    VARIANTS,
    StepCheck,
    all_params,
    core_available,
    parameters,
    set_gradients,
    snapshot,
    train,
    unforced,
    why_not_core,
)
from torch.utils._pytree import tree_map_only

NAN, INF = float("nan"), float("inf")

# ---------------------------------------------------------------------------------------------------------------------
# Hyperparameters

BAD_OPTIONS: list[tuple[str, Any, str]] = [
    # As torch.optim words them.
    ("lr", -1.0, "Invalid learning rate: -1.0"),
    ("lr", NAN, "Invalid learning rate: nan"),
    ("lr", torch.ones(2), "Tensor lr must be 1-element"),
    ("lr", torch.ones((), dtype=torch.int64), "Tensor lr must be floating point, got torch.int64"),
    ("lr", "fast", "lr"),
    ("lr", None, "lr"),
    ("eps", -1e-8, "Invalid epsilon value: -1e-08"),
    ("eps", NAN, "Invalid epsilon value"),
    ("betas", (1.0, 0.9), "Invalid beta parameter at index 0: 1.0"),
    ("betas", (-0.1, 0.9), "Invalid beta parameter at index 0: -0.1"),
    ("betas", (0.9, 1.0), "Invalid beta parameter at index 1: 1.0"),
    ("betas", (0.9, NAN), "Invalid beta parameter at index 1"),
    ("betas", 0.9, "betas"),
    ("betas", (0.9,), "betas"),
    ("weight_decay", -0.1, "Invalid weight_decay value: -0.1"),
    ("weight_decay", NAN, "Invalid weight_decay value"),
    # Our own.
    ("smoothing", 0.0, "smoothing"),
    ("smoothing", -0.1, "smoothing"),
    ("smoothing", 1.5, "smoothing"),
    ("smoothing", NAN, "smoothing"),
    ("smoothing", "much", "smoothing"),
    ("damping", 0.0, "damping"),
    ("damping", -1.0, "damping"),
    ("damping", NAN, "damping"),
    ("reference", 0.0, "reference"),
    ("reference", -1.0, "reference"),
    ("reference", NAN, "reference"),
    ("reference", "gradient", "reference"),
    ("reference", None, "reference"),
    ("clip", (0.0, 1.0), "clip"),
    ("clip", (-1.0, 1.0), "clip"),
    ("clip", (1.1, 0.9), "clip"),
    ("clip", (0.5, NAN), "clip"),
    ("clip", (0.5,), "clip"),
    ("clip", 2.0, "clip"),
    ("scale_bounds", (0.0, 1.0), "scale_bounds"),
    ("scale_bounds", (2.0, 1.0), "scale_bounds"),
    ("scale_bounds", None, "scale_bounds"),
    ("initial_scale", 0.0, "initial_scale"),
    ("initial_scale", -1.0, "initial_scale"),
    ("initial_scale", NAN, "initial_scale"),
    ("initial_scale", 1e9, "initial_scale"),
    ("initial_scale", "bold", "initial_scale"),
    ("initial_scale", None, "initial_scale"),
    ("path_fraction", 0.0, "path_fraction"),
    ("path_fraction", -0.5, "path_fraction"),
    ("path_fraction", 1.5, "path_fraction"),
    ("path_fraction", NAN, "path_fraction"),
    ("path_fraction", "all", "path_fraction"),
]
BAD_SMOOTHED = [("lr_smoothing", 1.0), ("lr_smoothing", None), ("lr_smoothing", -0.1), ("lr_smoothing", NAN)]


def option_cases() -> list[Any]:
    cases = [("Local", *case) for case in BAD_OPTIONS]
    cases += [(v, *case) for v in ("Global", "Smoothed") for case in BAD_OPTIONS if case[0] in ("lr", "clip")]
    cases += [("Smoothed", name, value, name) for name, value in BAD_SMOOTHED]
    return [pytest.param(*case, id=f"{case[0]} {case[1]}={case[2]}") for case in cases]


@pytest.mark.parametrize(("variant", "name", "value", "message"), option_cases())
def test_option_refused_by_the_constructor(variant: str, name: str, value: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        VARIANTS[variant](parameters(), **{name: value})
    first, second = parameters([(2,), (3,)])
    with pytest.raises((ValueError, TypeError), match=rf"param group 1\b.*{re.escape(message)}"):
        VARIANTS[variant]([{"params": [first]}, {"params": [second], name: value}])


@pytest.mark.parametrize(("variant", "name", "value", "message"), option_cases())
def test_option_refused_by_add_param_group(variant: str, name: str, value: Any, message: str) -> None:
    optimizer = VARIANTS[variant](parameters())
    with pytest.raises((ValueError, TypeError), match=rf"param group 1\b.*{re.escape(message)}"):
        optimizer.add_param_group({"params": parameters([(3,)]), name: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("name", "value"), [("betas", np.array([0.9, 0.99])), ("eps", torch.tensor([1e-8, 1e-8]))])
def test_an_array_between_two_steps_is_refused_like_any_other_value(
    name: str, value: Any, variant: str, fused: bool
) -> None:
    """It has no truth value when it is compared with the option of the last step."""
    optimizer = VARIANTS[variant](parameters(), fused=fused)
    train(optimizer, 2)
    optimizer.param_groups[0][name] = value
    with pytest.raises((TypeError, ValueError), match=f"param group 0: .*{name}"):
        train(optimizer, 1)


@pytest.mark.parametrize(("variant", "name", "value", "message"), option_cases())
def test_option_refused_by_the_step(variant: str, name: str, value: Any, message: str, fused: bool) -> None:
    """A scheduler or a user wrote nonsense into a group during the run."""
    params = parameters()
    optimizer = VARIANTS[variant]([{"params": params[:2]}, {"params": params[2:]}], fused=fused)
    train(optimizer, 2)
    group = optimizer.param_groups[1]
    good = group[name]
    group[name] = value
    set_gradients(params, 2)
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError), match=rf"param group 1\b.*{re.escape(message)}"):
        optimizer.step()
    assert repr(snapshot(optimizer)) == repr(before)  # repr: nan equals itself
    group[name] = good
    optimizer.step()


def test_an_initial_scale_outside_of_its_bounds_is_refused(variant: str) -> None:
    with pytest.raises(ValueError, match="initial_scale"):
        VARIANTS[variant](parameters(), initial_scale=1.0, scale_bounds=(1.5, 2.0))
    VARIANTS[variant](parameters(), initial_scale="cautious", scale_bounds=(1.5, 2.0))


def test_unknown_arguments_are_refused(variant: str) -> None:
    gone = ("deferred", "path_dtype", "accumulate", "momentum")
    for name in (*gone, *(() if variant == "Smoothed" else ("lr_smoothing",))):
        with pytest.raises(TypeError, match=name):
            VARIANTS[variant](parameters(), **{name: True})


TORCH_SWITCHES = ("foreach", "capturable", "differentiable")


def test_switches_of_torch_that_ask_for_nothing_are_taken(variant: str, fused: bool) -> None:
    """Configurations written for torch.optim.Adam have them."""
    optimizer = VARIANTS[variant](parameters(), foreach=None, capturable=False, differentiable=False, fused=fused)
    VARIANTS[variant](parameters(), foreach=False)
    assert not set(TORCH_SWITCHES) & set(optimizer.param_groups[0])
    train(optimizer, 2)


def test_groups_of_another_optimizer_stay_its_own(variant: str, fused: bool) -> None:
    """torch.optim keeps the dicts that it is given; they lost what the other one reads at every step."""
    params = parameters()
    adam = torch.optim.Adam(params, lr=0.1)
    optimizer = VARIANTS[variant](adam.param_groups, fused=fused)
    for each in (optimizer, adam, optimizer):
        set_gradients(params, 0)
        each.step()
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", TORCH_SWITCHES)
def test_switches_of_torch_that_ask_for_something_get_advice(name: str, variant: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}=True: .{{20}}"):
        VARIANTS[variant](parameters(), **{name: True})


@pytest.mark.parametrize("name", ["fused", "foreach"])
def test_switches_inside_of_a_group_are_not_ignored(name: str, variant: str) -> None:
    """torch.optim reads them there; a user who writes them there expects something."""
    with pytest.raises((TypeError, ValueError), match=name):
        VARIANTS[variant]([{"params": parameters(), name: True}])
    optimizer = VARIANTS[variant](parameters())
    with pytest.raises((TypeError, ValueError), match=name):
        optimizer.add_param_group({"params": parameters([(2,)]), name: True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("name", "value"), [("reference", "gradient"), ("reference", "measured_walk")])
def test_unknown_choice_is_a_value_error(name: str, value: Any, variant: str) -> None:
    """The type is right: what torch.optim raises for a value that is not."""
    with pytest.raises(ValueError, match=name):
        VARIANTS[variant](parameters(), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0),
        ("eps", 0.0),
        ("betas", (0.0, 0.0)),
        ("smoothing", 1.0),
        ("clip", None),
        ("clip", (1.0, 1.0)),
        ("clip", [0.5, 1.5]),
        ("scale_bounds", (1.0, 1.0)),
        ("initial_scale", 1e-3),
        ("reference", 2),
        ("initial_scale", "cautious"),
        ("path_fraction", 1),
        ("path_fraction", 1e-9),
        ("lr", 1),
    ],
    ids=str,
)
def test_ends_of_the_ranges_are_served(name: str, value: Any, variant: str, fused: bool) -> None:
    optimizer = VARIANTS[variant](parameters(), fused=fused, **{name: value})
    check = StepCheck(variant, optimizer)
    for step in range(2):
        set_gradients(all_params(optimizer), step)
        check.step()


@pytest.mark.parametrize("lr", [-1.0, NAN])
def test_tensor_lr_out_of_range_is_refused_where_reading_it_is_free(lr: float, variant: str, fused: bool) -> None:
    """On the CPU, when it is given and in mid-run, as a float would be; no step waits for a device to know it."""
    with pytest.raises(ValueError, match="Invalid learning rate"):
        VARIANTS[variant](parameters(), lr=torch.tensor(lr))
    optimizer = VARIANTS[variant](parameters(), lr=torch.tensor(0.1), fused=fused)
    train(optimizer, 2)
    for value in (lr, torch.tensor(lr)):
        if isinstance(value, float) or value.isnan():
            optimizer.param_groups[0]["lr"] = value
        else:
            optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
            optimizer.param_groups[0]["lr"].fill_(value)
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=r"param group 0\b.*Invalid learning rate"):
            optimizer.step()
        assert repr(snapshot(optimizer)) == repr(before)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters and gradients


class WithGradient(torch.nn.Parameter):
    """A parameter whose gradient is whatever a test says: autograd would refuse some."""

    forced: torch.Tensor | None = None

    @property
    def grad(self) -> torch.Tensor | None:
        return self.forced

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        self.forced = value


def with_gradient(grad: torch.Tensor, dtype: torch.dtype = torch.float32) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        param = WithGradient(torch.ones(2, 3, dtype=dtype))
        param.grad = grad
        return param

    return make


def plain(tensor: torch.Tensor, grad: torch.Tensor) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        param = tensor.clone()
        param.grad = grad.clone()
        return param

    return make


def overlapping() -> torch.Tensor:
    """Two rows that are one row of memory: an update in place would write each element twice."""
    param = torch.ones(1, 3).expand(2, 3)
    param.grad = torch.ones(2, 3)
    return param


SERVED = "torch.float32, torch.bfloat16, torch.float16, torch.float64"

BAD_TENSORS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse COO gradient": (with_gradient(torch.ones(2, 3).to_sparse()), "sparse"),
    "sparse CSR gradient": (with_gradient(torch.ones(2, 3).to_sparse_csr()), "sparse"),
    "complex gradient": (with_gradient(torch.ones(2, 3, dtype=torch.complex64)), "complex64"),
    "integer gradient": (with_gradient(torch.ones(2, 3, dtype=torch.int32)), "int32"),
    "boolean gradient": (with_gradient(torch.ones(2, 3, dtype=torch.bool)), "bool"),
    "gradient of another shape": (with_gradient(torch.ones(3, 2)), r"\(3, 2\)"),
    "gradient that would broadcast": (with_gradient(torch.ones(1, 3)), r"\(1, 3\)"),
    "gradient of fewer elements": (with_gradient(torch.ones(5)), r"\(5,\)"),
    "gradient of more elements": (with_gradient(torch.ones(2, 4)), r"\(2, 4\)"),
    "gradient on another device": (with_gradient(torch.ones(2, 3, device="meta")), "meta"),
    "integer parameter": (
        plain(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)),
        SERVED,
    ),
    "boolean parameter": (plain(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)), SERVED),
    "complex parameter": (
        plain(torch.ones(2, 3, dtype=torch.complex64), torch.ones(2, 3, dtype=torch.complex64)),
        SERVED,
    ),
    "float8 parameter": (
        plain(torch.ones(2, 3).to(torch.float8_e4m3fn), torch.ones(2, 3).to(torch.float8_e4m3fn)),
        SERVED,
    ),
    "sparse parameter": (plain(torch.ones(2, 3).to_sparse(), torch.ones(2, 3).to_sparse()), "sparse"),
    "parameter whose elements share memory": (overlapping, "share memory"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensor_refused_before_anything_changes(case: str, variant: str, fused: bool) -> None:
    """At the step: what has no gradient is nobody's business."""
    make, message = BAD_TENSORS[case]
    good = parameters([(4, 3), (5,), (2,)])
    optimizer = VARIANTS[variant]([{"params": good[:2]}, {"params": good[2:]}], fused=fused, **LIVELY[variant])
    train(optimizer, 2)
    set_gradients(good, 2)
    bad = make()
    before = snapshot(optimizer)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1)), bad]})
    before = snapshot(optimizer)
    error = rf"param group 2, parameter 1 \(shape \(2, 3\), dtype {bad.dtype}.*{message}"
    with pytest.raises((TypeError, ValueError), match=error):
        optimizer.step()
    assert snapshot(optimizer) == before
    assert bad not in optimizer.state


FROZEN: dict[str, Callable[[], torch.Tensor]] = {
    "int8": lambda: torch.ones(2, 3, dtype=torch.int8),
    "uint8": lambda: torch.ones(2, 3, dtype=torch.uint8),
    "bool": lambda: torch.ones(2, 3, dtype=torch.bool),
    "float8": lambda: torch.ones(2, 3).to(torch.float8_e4m3fn),
    "complex": lambda: torch.ones(2, 3, dtype=torch.complex64),
    "sparse": lambda: torch.ones(2, 3).to_sparse(),
    "expanded": lambda: torch.ones(1, 3).expand(2, 3),
    "meta": lambda: torch.ones(2, 3, device="meta"),
    "empty": lambda: torch.ones(0),
}


@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_parameters_of_any_kind(kind: str, variant: str, fused: bool) -> None:
    """QLoRA and the like: quantized weights stand in model.parameters() beside the trainable ones. First and later,
    saved and loaded."""
    frozen_one = torch.nn.Parameter(FROZEN[kind](), requires_grad=False)
    params = parameters([(5, 3), (7,)])
    optimizer = VARIANTS[variant]([params[0], frozen_one, params[1]], fused=fused)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
        if step == 0:
            optimizer.add_param_group({"params": [torch.nn.Parameter(FROZEN[kind](), requires_grad=False)]})
    assert frozen_one not in optimizer.state
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 3]
    assert optimizer.lr_scales()[0].shape == (3,)
    optimizer.load_state_dict(optimizer.state_dict())
    set_gradients(params, 3)
    optimizer.step()


def test_parameter_that_changes_its_shape(variant: str, fused: bool) -> None:
    """Module surgery by `.data`: the state is of the old shape, and so may the gradient be."""
    params = parameters()
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    train(optimizer, 3)
    params[2].data = torch.zeros(4, 4)
    for gradient in (params[2].grad, torch.ones(4, 4)):
        params[2].grad = None
        if gradient.shape == params[2].shape:
            params[2].grad = gradient
        else:
            params[2].data = torch.zeros(2, 3, 4)
            params[2].grad = gradient
            params[2].data = torch.zeros(4, 4)
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=r"param group 0, parameter 2 \(shape \(4, 4\)"):
            optimizer.step()
        assert snapshot(optimizer) == before


def test_parameter_that_changes_its_type(variant: str, fused: bool) -> None:
    """model.bfloat16() after some steps keeps the moments in float32; model.double() does not make them double by
    itself, so both go on or are refused, but never misread memory."""
    params = parameters()
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    train(optimizer, 3)
    for param in params:
        param.data = param.data.bfloat16()
        param.grad = None
    check = StepCheck(variant, optimizer)
    set_gradients(params, 3)
    check.step()


def test_all_good_parameters_of_the_step_stay(variant: str, fused: bool) -> None:
    """The bad gradient may come first, in the middle or last."""
    for place in range(3):
        params: list[torch.Tensor] = list(parameters())
        params[place] = WithGradient(params[place].detach().clone())
        optimizer = VARIANTS[variant](params, fused=unforced(fused), **LIVELY[variant])
        train(optimizer, 2)
        set_gradients(params, 2)
        params[place].grad = torch.ones(1)
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=rf"param group 0, parameter {place}\b"):
            optimizer.step()
        assert snapshot(optimizer) == before
        set_gradients(params, 2)
        optimizer.step()
        assert all(s["step"].item() == 3 for s in optimizer.state.values())


def test_bad_first_step_leaves_no_state(variant: str, fused: bool) -> None:
    params: list[torch.Tensor] = [*parameters(), WithGradient(torch.ones(2, 3))]
    optimizer = VARIANTS[variant](params, fused=fused)
    set_gradients(params, 0)
    params[-1].grad = torch.ones(3)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="param group 0, parameter 3"):
        optimizer.step()
    assert snapshot(optimizer) == before and not optimizer.state


# ---------------------------------------------------------------------------------------------------------------------
# fused=True where the core cannot serve


class NotServed(torch.Tensor):
    """A tensor subclass: its memory is none of the core's business."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_fused_is_served_or_refused(dtype: torch.dtype, variant: str) -> None:
    """At the first step, with the reason and what to do; fused=None goes on with PyTorch."""
    reason = why_not_core("cpu", dtype)
    params = parameters(dtype=dtype)
    optimizer = VARIANTS[variant](params, fused=True)
    set_gradients(params, 0)
    if not reason:
        optimizer.step()
        return
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="fused=True"):
        optimizer.step()
    assert snapshot(optimizer) == before
    optimizer = VARIANTS[variant](params, fused=None)
    optimizer.step()


NO_CORE = """
import sys
sys.modules["clara_fused.core._core"] = None  # as if it had not been built
import torch
from helpers import VARIANTS, parameters, set_gradients, snapshot
for variant in VARIANTS:
    params = parameters()
    optimizer = VARIANTS[variant](params, fused=True)
    set_gradients(params, 0)
    before = snapshot(optimizer)
    try:
        optimizer.step()
    except RuntimeError as error:
        message = str(error)
    assert snapshot(optimizer) == before
    assert "fused=True" in message and "fused=None" in message, message
    VARIANTS[variant](params, fused=None).step()
    print(message)
"""


@pytest.mark.skipif(not core_available(), reason="needs the compiled core")
def test_fused_says_that_it_cannot_read_the_state(variant: str) -> None:
    class Own(torch.Tensor):
        pass

    optimizer = VARIANTS[variant](parameters(), fused=True)
    train(optimizer, 1)
    state = optimizer.state[optimizer.param_groups[0]["params"][1]]
    state["exp_avg"] = state["exp_avg"].as_subclass(Own)
    set_gradients(optimizer.param_groups[0]["params"], 1)
    with pytest.raises(RuntimeError, match=r"param group 0, parameter 1 .*fused=True: .* state of this kind"):
        optimizer.step()


@pytest.mark.slow
def test_fused_where_the_core_is_missing() -> None:
    """The message says why, and what to do: install with a compiler, or fused=None."""
    where = Path(__file__).resolve().parent.parent
    run = subprocess.run([sys.executable, "-c", NO_CORE], cwd=where, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "the compiled core is not installed" in run.stdout


@pytest.mark.parametrize("value", ["yes", 2, 0, 1.0, object()], ids=["text", "number", "zero", "one", "object"])
def test_fused_takes_true_false_none(value: Any, variant: str) -> None:
    with pytest.raises((TypeError, ValueError), match="fused"):
        VARIANTS[variant](parameters(), fused=value)


# ---------------------------------------------------------------------------------------------------------------------
# Odd, but right


def test_an_element_that_overflowed_does_not_stop_the_scale(variant: str, fused: bool) -> None:
    """Its v is infinite for good, and it moves no more; as if it had never had a gradient."""

    def scale_after(drift: float, steps: int, gradient_of_one: Callable[[int], float]) -> float:
        param = torch.nn.Parameter(torch.ones(64))
        optimizer = VARIANTS[variant]([param], lr=1e-4, initial_scale=1.0, fused=fused)
        for step in range(steps):
            param.grad = drift + 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(step))
            param.grad[5] = gradient_of_one(step)
            optimizer.step()
        return optimizer.lr_scales()[0].item()

    scale = scale_after(1.0, 30, lambda step: 1.0 if step else 1e30)
    assert scale > 2.0
    assert scale == pytest.approx(scale_after(1.0, 30, lambda step: 0.0), rel=1e-5)
    # Of one that grows until it does, the walk remembers a part that all others together cannot match.
    assert scale_after(0.0, 300, lambda step: min(10.0**step, 1e30)) == pytest.approx(1.0, rel=0.1)


def test_same_parameter_in_two_groups_is_refused_as_torch_does(variant: str) -> None:
    (param,) = parameters([(3,)])
    with pytest.raises(ValueError, match="more than one parameter group"):
        VARIANTS[variant]([{"params": [param]}, {"params": [param]}])


@pytest.mark.filterwarnings("ignore:.*duplicate parameters")
@pytest.mark.parametrize("adapt_lr", [False, True])
def test_same_parameter_twice_in_a_group_is_stepped_twice(adapt_lr: bool, variant: str, fused: bool) -> None:
    """torch.optim.Adam does; the back ends of version 1 differed from it and from each other. An error would do."""

    def run(make: Callable[..., torch.optim.Optimizer]) -> torch.Tensor:
        param, other = (torch.nn.Parameter(torch.ones(n)) for n in (4, 3))
        optimizer = make([param, other, param])
        for step in range(3):
            param.grad, other.grad = torch.full((4,), 1.0 + step), torch.full((3,), 1.0)
            optimizer.step()
        return torch.cat([param.detach(), other.detach()])

    try:
        mine = run(lambda p: VARIANTS[variant](p, lr=0.1, adapt_lr=adapt_lr, initial_scale=1.0, fused=unforced(fused)))
    except ValueError as error:
        assert "more than once in the group" in str(error)
        return
    if adapt_lr:
        plain = run(lambda p: VARIANTS[variant](p, lr=0.1, initial_scale=1.0, fused=False))
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(mine, run(lambda p: torch.optim.Adam(p, lr=0.1)), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph")
def test_gradient_that_requires_grad(variant: str, fused: bool) -> None:
    """create_graph=True leaves gradients with a graph: no error, and the graph stays usable."""
    (param,) = parameters([(4,)])
    optimizer = VARIANTS[variant]([param], fused=fused, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    for _ in range(2):
        param.grad = None
        (param**3).sum().backward(create_graph=True)
        check.step()


class Wrapper(torch.Tensor):
    """Holds another tensor, as quantized ones do: it has no memory of its own, and its class does all operations."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Wrapper, lambda wrapper: wrapper.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, Wrapper, func(*args, **kwargs))


@pytest.mark.parametrize("wrapped", ["parameter", "gradient"])
def test_tensors_without_memory_of_their_own(wrapped: str, variant: str) -> None:
    """PyTorch steps them, and fused=True says that the core cannot; also once the core has stepped a plain one."""
    plain, odd = parameters([(4,)])[0], parameters([(4,)])[0]
    if wrapped == "parameter":
        odd = torch.nn.Parameter(Wrapper(odd.detach().clone()))
    expected = VARIANTS[variant]([plain], fused=False, **LIVELY[variant])
    optimizer = VARIANTS[variant]([odd], **LIVELY[variant])
    for step in range(3):
        plain.grad = torch.full((4,), step + 1.0)
        odd.grad = Wrapper(plain.grad.clone()) if wrapped == "parameter" or step > 0 else plain.grad.clone()
        expected.step()
        optimizer.step()
        after = odd.detach().inner if wrapped == "parameter" else odd.detach()
        torch.testing.assert_close(after, plain.detach())
    optimizer.fused = True
    with pytest.raises(RuntimeError, match=r"param group 0, parameter 0 .*fused=True: "):
        optimizer.step()
    torch.testing.assert_close(after, plain.detach())


def test_tensor_subclass_parameters(variant: str) -> None:
    """torch.nn.Buffer-like subclasses without own memory semantics are plain tensors."""
    param = torch.nn.Parameter(torch.ones(3).as_subclass(NotServed))
    optimizer = VARIANTS[variant]([param], **LIVELY[variant])
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[param]["step"].item() == 1
    assert (param.detach() < 1).all()


def test_options_that_were_refused_can_be_taken_back(variant: str, fused: bool) -> None:
    """AdamClaraGlobal compares the groups after it has read them: nothing of what it refused stays in force."""
    optimizers = []
    for disturbed in (False, True):
        groups = [{"params": parameters([(3,)])}, {"params": parameters([(5,)])}]
        optimizer = VARIANTS[variant](groups, fused=fused)
        train(optimizer, 2)
        if disturbed:
            group = optimizer.param_groups[0]
            kept, group["smoothing"] = group["smoothing"], 0.5
            if variant == "Global":
                with pytest.raises(ValueError, match="smoothing must be equal"):
                    optimizer.step()
            group["smoothing"] = kept
        train(optimizer, 3, first=2)
        optimizers.append(optimizer)
    assert snapshot(optimizers[0]) == snapshot(optimizers[1])


def test_an_optimizer_that_has_lost_its_groups(variant: str, fused: bool) -> None:
    optimizer = VARIANTS[variant](parameters(), fused=fused)
    train(optimizer, 1)
    optimizer.param_groups.clear()
    optimizer.step()


def test_a_learning_rate_that_requires_grad_is_read_without_a_warning(variant: str, fused: bool) -> None:
    """PyTorch gives it once per process: at least one of the cases would fail."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = VARIANTS[variant](parameters(), lr=torch.tensor(0.1, requires_grad=True), fused=fused)
        train(optimizer, 2)
