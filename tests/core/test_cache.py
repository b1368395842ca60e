"""The core keeps addresses between steps. Whatever is replaced, resized or re-typed in between, it must not use them.

A fuzz test does all of that at random, with the PyTorch back end as the reference. After every step both sides must
agree; then the reference takes over the core's values, so that roundings do not add up and tolerances can be tight.
"""

from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import VARIANTS, core_available, train

from clara_fused import core_backend

pytestmark = pytest.mark.skipif(not core_available(), reason="needs the compiled core")

SHAPES = [(), (1,), (7,), (64,), (5, 3), (3, 4, 2), (0,), (33, 2), (130,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
STEPS = 700
# Relative to the largest element, one step's worth of rounding. A scale is a float32, also that of float64 parameters.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-8, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# A watch made in the step before the change: with the exchange API, and with Python attributes (torch 2.9).
WATCHES = ["exchange_api", "attributes"]


class Twins:
    """Two optimizers that get the same treatment: one runs the core, the other PyTorch."""

    def __init__(self, variant: str, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.decoys: list[torch.Tensor] = []
        first = [[self.new_param() for _ in range(4)] for _ in range(2)]
        self.core, self.reference = (
            VARIANTS[variant]([{"params": [p[side] for p in params]} for params in first], lr=0.01, fused=fused)
            for side, fused in ((0, True), (1, False))
        )
        self.options = {"smoothing": 0.3, "damping": 0.7}
        self.for_all_groups(**self.options)

    # --- helpers ---

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def in_some_layout(self, values: torch.Tensor) -> torch.Tensor:
        """The same values in fresh memory, contiguous, permuted or with gaps."""
        how = self.random.choice(["contiguous"] * 6 + ["permuted", "offset", "gaps"])
        if how == "permuted" and values.dim() > 1:
            return torch.empty_like(values.transpose(0, 1).contiguous()).transpose(0, 1).copy_(values)
        if how == "gaps" and values.dim() > 0:
            return torch.empty(*values.shape, 3, dtype=values.dtype).select(-1, 1).copy_(values)
        if how == "offset":
            return torch.empty(values.numel() + 3, dtype=values.dtype)[3:].view(values.shape).copy_(values)
        return values.clone()

    def new_param(self) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        values = self.normal(self.random.choice(SHAPES), self.random.choice(DTYPES))
        layout = self.in_some_layout(values)
        return torch.nn.Parameter(layout), torch.nn.Parameter(layout.clone(memory_format=torch.preserve_format))

    def params(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [
            pair
            for mine, other in zip(self.core.param_groups, self.reference.param_groups, strict=True)
            for pair in zip(mine["params"], other["params"], strict=True)
        ]

    def some_param(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.random.choice(self.params())

    def some_group(self) -> tuple[dict[str, Any], dict[str, Any]]:
        index = self.random.randrange(len(self.core.param_groups))
        return self.core.param_groups[index], self.reference.param_groups[index]

    def for_all_groups(self, **options: Any) -> None:
        for group in (*self.core.param_groups, *self.reference.param_groups):
            group.update(options)

    # --- what happens between steps ---

    def fill_gradients_in_place(self) -> None:
        for mine, other in self.params():
            if mine.grad is not None:
                mine.grad.copy_(self.normal(tuple(mine.shape), mine.dtype))
                other.grad = mine.grad.clone(memory_format=torch.preserve_format)

    def fresh_gradients(self) -> None:
        for mine, other in self.params():
            self.give_gradient(mine, other, self.normal(tuple(mine.shape), mine.dtype))

    def give_gradient(self, mine: torch.Tensor, other: torch.Tensor, values: torch.Tensor | None) -> None:
        mine.grad = values
        other.grad = None if values is None else values.clone()

    def drop_gradient(self) -> None:
        self.give_gradient(*self.some_param(), None)

    def gradient_in_other_layout(self) -> None:
        mine, other = self.some_param()
        self.give_gradient(mine, other, self.in_some_layout(self.normal(tuple(mine.shape), mine.dtype)))

    def float32_gradient(self) -> None:
        mine, other = self.some_param()
        if mine.dtype in (torch.bfloat16, torch.float16) and hasattr(mine, "grad_dtype"):
            mine.grad_dtype = other.grad_dtype = None
            self.give_gradient(mine, other, self.normal(tuple(mine.shape), torch.float32))

    def move_memory_of_param(self) -> None:
        for param in self.some_param():
            param.data = param.data.clone(memory_format=torch.preserve_format)

    def param_in_other_layout(self) -> None:
        mine, other = self.some_param()
        mine.data = self.in_some_layout(mine.data)
        other.data = mine.data.clone()

    def retype_param(self) -> None:
        mine, other = self.some_param()
        dtype = self.random.choice(DTYPES)
        for param in (mine, other):
            param.grad = None
            param.data = param.data.to(dtype)
        self.give_gradient(mine, other, self.normal(tuple(mine.shape), dtype))

    def resize_param(self) -> None:
        mine, other = self.some_param()
        values = self.normal(self.random.choice(SHAPES), mine.dtype)
        for optimizer, param in ((self.core, mine), (self.reference, other)):
            param.grad = None
            param.data = values.clone()
            optimizer.state.pop(param, None)
        self.give_gradient(mine, other, self.normal(tuple(values.shape), values.dtype))

    def change_state(self, change: Callable[[dict[str, Any], str], None]) -> None:
        mine, other = self.some_param()
        if mine in self.core.state:
            names = [name for name in self.core.state[mine] if name != "lr_scale"]
            name = self.random.choice(names)
            change(self.core.state[mine], name)
            if name not in self.core.state[mine]:
                self.reference.state[other].pop(name)

    def move_memory_of_state(self) -> None:
        def move(state: dict[str, Any], name: str) -> None:
            state[name].data = state[name].data.clone()

        self.change_state(move)

    def replace_state(self) -> None:
        self.change_state(lambda state, name: state.update({name: state[name].clone()}))

    def state_in_other_layout(self) -> None:
        self.change_state(lambda state, name: state.update({name: self.in_some_layout(state[name])}))

    def retype_state(self) -> None:
        mine, other = self.some_param()
        if mine in self.core.state:
            for state in (self.core.state[mine], self.reference.state[other]):
                state["exp_avg"] = state["exp_avg"].to(torch.bfloat16)

    def reorder_state(self) -> None:
        mine, _ = self.some_param()
        if mine in self.core.state:
            self.core.state[mine] = self.core.state.pop(mine)

    def forget_state(self) -> None:
        mine, other = self.some_param()
        self.core.state.pop(mine, None)
        self.reference.state.pop(other, None)

    def swap_params_of_group(self) -> None:
        mine, other = self.some_group()
        order = list(range(len(mine["params"])))
        self.random.shuffle(order)
        for group in (mine, other):
            group["params"][:] = [group["params"][i] for i in order]

    def replace_param(self) -> None:
        mine, other = self.some_group()
        if mine["params"]:
            index = self.random.randrange(len(mine["params"]))
            new = self.new_param()
            for optimizer, group, param in ((self.core, mine, new[0]), (self.reference, other, new[1])):
                optimizer.state.pop(group["params"][index], None)
                group["params"][index] = param
            self.give_gradient(*new, self.normal(tuple(new[0].shape), new[0].dtype))

    def remove_param(self) -> None:
        mine, other = self.some_group()
        if len(mine["params"]) > 2:
            for optimizer, group in ((self.core, mine), (self.reference, other)):
                optimizer.state.pop(group["params"].pop(), None)

    def add_param(self) -> None:
        if len(self.params()) < 10:
            mine, other = self.some_group()
            new = self.new_param()
            mine["params"].append(new[0])
            other["params"].append(new[1])

    def add_group(self) -> None:
        if len(self.core.param_groups) < 4:
            new = self.new_param()
            shared = {k: v for k, v in self.core.param_groups[0].items() if k != "params"}
            self.core.add_param_group({**shared, "params": [new[0]]})
            self.reference.add_param_group({**shared, "params": [new[1]]})

    def remove_group(self) -> None:
        if len(self.core.param_groups) > 2:
            for optimizer in (self.core, self.reference):
                for param in optimizer.param_groups.pop()["params"]:
                    optimizer.state.pop(param, None)

    def change_options(self) -> None:
        mine, other = self.some_group()
        option: dict[str, Any] = self.random.choice(
            [
                {"lr": self.random.uniform(0.0, 0.02)},
                {"lr": torch.tensor(self.random.uniform(0.0, 0.02))},
                {"betas": (self.random.choice([0.0, 0.5, 0.9]), 0.99)},
                {"weight_decay": self.random.choice([0.0, 0.1])},
                {"decoupled_weight_decay": self.random.random() < 0.5},
                {"maximize": self.random.random() < 0.5},
                {"amsgrad": self.random.random() < 0.5},
                {"path_dtype": self.random.choice([None, torch.float32, torch.bfloat16])},
            ]
        )
        mine.update(option)
        other.update(option)

    def change_options_of_all(self) -> None:
        self.for_all_groups(
            **self.random.choice(
                [
                    {"deferred": self.random.random() < 0.5},
                    {"adapt_lr": self.random.random() < 0.8},
                    {"smoothing": self.random.choice([0.05, 0.3])},
                    {"reference": self.random.choice(["random_walk", 0.7])},
                ]
            )
        )

    def reload(self) -> None:
        self.core.load_state_dict(self.core.state_dict())
        self.reference.load_state_dict(self.reference.state_dict())

    def tidy_up(self) -> None:
        """Contiguous memory everywhere, so that the core needs no copies and keeps its plan for a while."""
        for mine, other in self.params():
            for param in (mine, other):
                param.data = param.data.contiguous()
        self.fresh_gradients()

    def scatter_memory(self) -> None:
        """Let freed memory be taken by somebody else, who fills it with something conspicuous."""
        self.decoys = [torch.full(shape, 1e30) for shape in SHAPES * 3 for _ in range(2)]

    # --- the step ---

    def step_and_compare(self) -> None:
        self.core.step()
        self.reference.step()
        for index, (mine, other) in enumerate(self.params()):
            assert_close(mine, other, f"parameter {index}")
            states = self.core.state.get(mine, {}), self.reference.state.get(other, {})
            assert set(states[0]) == set(states[1]), index
            for name in states[0]:
                assert_close(states[0][name], states[1][name], f"{name} of parameter {index}")
                states[1][name].copy_(states[0][name])
            other.data.copy_(mine.data)


def assert_close(mine: torch.Tensor, other: torch.Tensor, what: str) -> None:
    assert mine.dtype == other.dtype and mine.shape == other.shape, what
    # Roundings are relative to the terms, not to what is left when they cancel.
    tolerance = TOLERANCE[mine.dtype]
    size = float(other.detach().abs().max()) if other.numel() else 0.0
    torch.testing.assert_close(
        mine.detach(), other.detach(), rtol=0.0, atol=tolerance * max(size, 1.0), msg=lambda m: f"{what}: {m}"
    )


CHANGES = [
    name
    for name, member in vars(Twins).items()
    if callable(member)
    and not name.startswith("_")
    and name
    not in (
        "normal",
        "in_some_layout",
        "new_param",
        "params",
        "some_param",
        "some_group",
        "for_all_groups",
        "give_gradient",
        "change_state",
        "step_and_compare",
    )
]


@pytest.mark.parametrize("watch", WATCHES)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_core_never_uses_a_stale_address(variant: str, watch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLARA_TENSOR_WATCH", watch)
    twins = Twins(variant, seed=list(VARIANTS).index(variant))
    twins.fresh_gradients()
    kept = renewed = 0
    for _ in range(STEPS):
        plan = twins.core._plan
        for _ in range(twins.random.choice([0, 0, 0, 1, 1, 2])):
            getattr(twins, twins.random.choice(CHANGES))()
        if twins.random.random() < 0.3:
            twins.fresh_gradients()
        else:
            twins.fill_gradients_in_place()
        twins.step_and_compare()
        if plan is not None and twins.core._plan is plan:
            kept += 1
        else:
            renewed += 1
    # Both the cached and the fresh way were taken often.
    assert kept > STEPS // 10 and renewed > STEPS // 10, (kept, renewed)


@pytest.mark.parametrize("watch", WATCHES)
def test_a_plan_survives_fresh_gradients_and_new_learning_rates(watch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLARA_TENSOR_WATCH", watch)
    params = [torch.nn.Parameter(torch.randn(5, 3)) for _ in range(3)]
    optimizer = VARIANTS["Smoothed"](params, fused=True)
    for step in range(4):
        for param in params:
            param.grad = torch.randn(5, 3)
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.param_groups[0]["betas"] = (0.9 - 0.01 * step, 0.99)
        optimizer.step()
        if step == 0:
            plan = optimizer._plan
            assert plan is not None
            assert plan._watch.uses_exchange_api == (watch == "exchange_api" and hasattr(torch.Tensor, API))
        assert optimizer._plan is plan


API = "__dlpack_c_exchange_api__"


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5,)])
def test_a_gradient_that_is_the_negative_of_its_memory(shape: tuple[int, ...]) -> None:
    """torch.imag of a conjugate is a view with a negative bit; its memory holds the opposite sign."""
    param = torch.nn.Parameter(torch.ones(shape))
    twin = torch.nn.Parameter(torch.ones(shape))
    optimizer, other = VARIANTS["Local"]([param], fused=True), VARIANTS["Local"]([twin], fused=True)
    for step in range(3):
        value = torch.full(shape, complex(0.0, 2.0 + step))
        param.grad = torch.imag(value.conj() if step == 1 else value)
        assert param.grad.is_neg() == (step == 1)
        twin.grad = param.grad.clone().resolve_neg()
        optimizer.step()
        other.step()
        assert torch.equal(param, twin)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_gradient_without_memory(steps_before: int) -> None:
    """Forward-mode autograd stands zeros in for tangents that nothing reached; reading them would crash."""
    param = torch.nn.Parameter(torch.ones(6))
    twin = torch.nn.Parameter(torch.ones(6))
    optimizer, other = VARIANTS["Local"]([param], fused=True), VARIANTS["Local"]([twin], fused=True)
    train(optimizer, steps_before)
    train(other, steps_before)
    for grad in (torch._efficientzerotensor(6), torch.ones(6)):
        param.grad, twin.grad = grad, grad.clone() + 0.0
        optimizer.step()
        other.step()
        assert torch.equal(param, twin)


def one_parameter(fused: bool | None = True) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    param = torch.nn.Parameter(torch.randn(10))
    param.grad = torch.randn(10)
    return param, VARIANTS["Local"]([param], fused=fused)


def test_switching_the_core_off_takes_effect() -> None:
    _, optimizer = one_parameter()
    optimizer.step()
    assert optimizer._plan is not None
    optimizer.fused = False
    optimizer.step()
    assert optimizer._plan is None


def test_plans_of_alternating_sets_of_gradients_are_kept() -> None:
    """Two losses in turn, say. Each of the steps is compared with PyTorch's."""
    params = [torch.nn.Parameter(torch.randn(5)) for _ in range(3)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer, other = VARIANTS["Global"](params, fused=True), VARIANTS["Global"](twins, fused=False)
    used = []
    for step in range(16):
        idle = step % 3 if step < 12 else step % 2
        for index, (param, twin) in enumerate(zip(params, twins, strict=True)):
            param.grad = None if index == idle else torch.randn(5)
            twin.grad = param.grad
        optimizer.step()
        other.step()
        used.append(optimizer._plan)
        for param, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(param, twin)
    # A plan knows the state of all parameters, which was complete after the second step.
    assert len({id(plan) for plan in used[2:]}) == 3
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer._plan is None and not optimizer._idle_plans


def test_state_that_cannot_be_watched_costs_the_plan_alone() -> None:
    param, optimizer = one_parameter()
    idle = torch.nn.Parameter(torch.randn(3))
    optimizer.add_param_group({"params": [idle]})
    optimizer.state[idle]["step"] = 7
    for _ in range(2):
        optimizer.step()
    assert optimizer.state[param]["step"] == 2
    assert optimizer._plan is None


class TestCudaGraphs:
    """What can be tested of capturing without a GPU: what may not be captured, and what must outlive it."""

    @pytest.fixture
    def capturing(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
        return lambda now: monkeypatch.setattr(core_backend, "is_capturing", lambda: now)

    @pytest.mark.parametrize("fused", [True, False], ids=["core", "torch"])
    def test_a_first_step_cannot_be_captured(self, fused: bool, capturing: Callable[[bool], None]) -> None:
        param, optimizer = one_parameter(fused)
        before = param.detach().clone()
        capturing(True)
        with pytest.raises(RuntimeError, match=r"param group 0, parameter 0 .* a CUDA graph is being captured"):
            optimizer.step()
        assert torch.equal(param, before) and not optimizer.state
        capturing(False)
        optimizer.step()
        capturing(True)
        optimizer.step()
        assert optimizer.state[param]["step"] == 2

    def test_a_step_of_the_core_that_needs_copies_cannot_be_captured(self, capturing: Callable[[bool], None]) -> None:
        param, optimizer = one_parameter()
        for now in (False, True):
            param.grad = torch.randn(10, 2)[:, 0]
            capturing(now)
            if now:
                with pytest.raises(RuntimeError, match="in another memory layout"):
                    optimizer.step()
            else:
                optimizer.step()
        assert optimizer.state[param]["step"] == 1

    def test_what_a_graph_has_captured_outlives_the_plan(self) -> None:
        param, optimizer = one_parameter()
        for captured in (False, True):
            optimizer.step()
            plan = weakref.ref(optimizer._plan)
            optimizer._plan.batches[0].captured = captured
            param.grad = None
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            gc.collect()
            assert (plan() is not None) == captured
            param.grad = torch.randn(10)
        assert not copy.deepcopy(optimizer)._captured_plans


def test_the_watch_keeps_no_tensor_alive() -> None:
    param = torch.nn.Parameter(torch.randn(1000))
    param.grad = torch.randn(1000)
    optimizer = VARIANTS["Local"]([param], fused=True)
    optimizer.step()
    assert optimizer._plan is not None
    grad, path = weakref.ref(param.grad), weakref.ref(optimizer.state[param]["path"])
    param.grad = None
    optimizer.state.clear()
    gc.collect()
    assert grad() is None
    assert path() is None


@pytest.mark.parametrize("verb", ["step", "measure"])
def test_gradients_live_until_the_core_has_read_them(verb: str) -> None:
    """Another thread may drop a gradient while a step computes: the core works without the GIL."""
    param, optimizer = one_parameter()
    optimizer.step()
    plan = optimizer._plan
    watch, bucket = plan._watch, plan.batches[0]._bucket
    sums = torch.zeros(1, 2, dtype=torch.float64)
    arguments = (sums.data_ptr(), 1, 0) if verb == "measure" else (1, 0)

    def checked_then_dropped() -> weakref.ref[torch.Tensor]:
        param.grad = torch.ones_like(param)
        gradient = weakref.ref(param.grad)
        assert watch.unchanged(optimizer.param_groups, optimizer.state)
        param.grad = None
        gc.collect()
        return gradient

    gradient = checked_then_dropped()
    assert gradient() is not None
    getattr(bucket, verb)(*arguments)
    assert gradient() is None
    gradient = checked_then_dropped()
    assert not watch.unchanged(optimizer.param_groups, optimizer.state)
    assert gradient() is None


def test_pickle_and_deepcopy_leave_the_cache_behind() -> None:
    param = torch.nn.Parameter(torch.randn(10))
    param.grad = torch.randn(10)
    optimizer = VARIANTS["Local"]([param], fused=True)
    optimizer.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin._plan is None
        twin.param_groups[0]["params"][0].grad = torch.randn(10)
        twin.step()


def test_a_malformed_group_is_no_crash() -> None:
    param = torch.nn.Parameter(torch.randn(10))
    param.grad = torch.randn(10)
    optimizer = VARIANTS["Local"]([param], fused=True)
    optimizer.step()
    watch = optimizer._plan._watch
    assert watch.unchanged(optimizer.param_groups, optimizer.state)
    assert not watch.unchanged([], optimizer.state)
    assert not watch.unchanged([None], optimizer.state)
    assert not watch.unchanged([{"params": None}], optimizer.state)
    assert not watch.unchanged([{"params": [None]}], optimizer.state)
    assert not watch.unchanged(optimizer.param_groups, {})
    assert not watch.unchanged(optimizer.param_groups, {param: None})
    with pytest.raises(ValueError, match="cannot watch"):
        core_backend._core_module().TensorWatch([{"params": [None]}], {})
    with pytest.raises(IndexError):
        watch.route(0, 7, optimizer._plan.batches[0]._bucket, 0)
