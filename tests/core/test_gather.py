"""Gather: what the core takes, what it leaves to PyTorch, and that nothing is remembered from one step to the next.

Whatever is replaced, resized or re-typed between two steps, the next must notice. A fuzz test does all of that at
random, with the PyTorch back end as the reference. After every step both sides must agree; then the reference takes
over the core's values, so that roundings do not add up and tolerances can be tight.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    LIVELY,
    SCALARS,
    VARIANTS,
    WALK,
    StepCheck,
    core_available,
    parameters,
    set_gradients,
    snapshot,
    train,
    unforced,
)

pytestmark = pytest.mark.skipif(not core_available(), reason="needs the compiled core")

SHAPES = [(), (1,), (7,), (64,), (5, 3), (3, 4, 2), (0,), (33, 2), (130,), (64, 1024)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
STEPS = 500
# Relative to the largest element, one step's worth of rounding. A scale is a float32, also that of float64 parameters.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-8, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def gathered(optimizer: torch.optim.Optimizer) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Locations of regular and of irregular parameters."""
    from clara_fused.core import _core

    scales = list(optimizer._shared_scales().values()) if isinstance(optimizer, VARIANTS["Global"]) else None
    buckets, irregular = _core.gather(optimizer.param_groups, optimizer.state, scales)
    return sorted(loc for bucket in buckets for loc in bucket.locations), sorted(irregular)


class Twins:
    """Two optimizers that get the same treatment: one runs the core, the other PyTorch."""

    def __init__(self, variant: str, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.decoys: list[torch.Tensor] = []
        first = [[self.new_param() for _ in range(4)] for _ in range(2)]
        self.core, self.reference = (
            VARIANTS[variant](
                [{"params": [p[side] for p in params]} for params in first],
                lr=0.01, fused=fused, initial_scale=1.0, smoothing=0.3, damping=0.7,
            )
            for side, fused in ((0, None), (1, False))
        )  # fmt: skip

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
        def change(state: dict[str, Any], name: str) -> None:
            # Moments in another layout tell that the parameter has changed its own, which starts a sampled path anew.
            if name != "exp_avg" or state["path"].shape == state[name].shape:
                state[name] = self.in_some_layout(state[name])

        self.change_state(change)

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
                {"path_fraction": self.random.choice([1 / 16, 1 / 4, 1.0])},
            ]
        )
        mine.update(option)
        other.update(option)

    def change_options_of_all(self) -> None:
        self.for_all_groups(
            **self.random.choice(
                [
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
        """Contiguous memory everywhere, so that the core takes all for a while."""
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
            # Over squared lengths, which where steps cancel are off by the roundings of the much longer steps.
            cancelled = max((float(states[1][name].abs()) for name in WALK if name in states[1]), default=0.0)
            for name in states[0]:
                extra = 4 * TOLERANCE[torch.float32] * cancelled**1.5 if name in WALK else 0.0
                assert_close(states[0][name], states[1][name], f"{name} of parameter {index}", extra)
                states[1][name].copy_(states[0][name])
            other.data.copy_(mine.data)

    def swap_gradients(self) -> None:
        """Two of the same shape exchange theirs, as buffers that are used in turn do."""
        pairs = [pair for pair in self.params() if pair[0].grad is not None]
        for first in pairs:
            for second in pairs:
                alike = all(
                    one.dtype == its.dtype for one, its in ((first[0], second[0]), (first[0].grad, second[0].grad))
                )
                if first is not second and first[0].shape == second[0].shape and alike:
                    for a, b in zip(first, second, strict=True):
                        a.grad, b.grad = b.grad, a.grad
                    return


def assert_close(mine: torch.Tensor, other: torch.Tensor, what: str, extra: float = 0.0) -> None:
    assert mine.dtype == other.dtype and mine.shape == other.shape, what
    # Roundings are relative to the terms, not to what is left when they cancel.
    tolerance = TOLERANCE[mine.dtype]
    size = float(other.detach().abs().max()) if other.numel() else 0.0
    torch.testing.assert_close(
        mine.detach(), other.detach(), rtol=0.0, atol=tolerance * max(size, 1.0) + extra, msg=lambda m: f"{what}: {m}"
    )


NOT_CHANGES = {
    "normal", "in_some_layout", "new_param", "params", "some_param", "some_group", "for_all_groups", "give_gradient",
    "change_state", "step_and_compare",
}  # fmt: skip
CHANGES = [
    name
    for name, member in vars(Twins).items()
    if callable(member) and not name.startswith("_") and name not in NOT_CHANGES
]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_change_between_steps_is_noticed(variant: str) -> None:
    twins = Twins(variant, seed=list(VARIANTS).index(variant))
    twins.fresh_gradients()
    regular = irregular = 0
    for _ in range(STEPS):
        for _ in range(twins.random.choice([0, 0, 0, 1, 1, 2])):
            getattr(twins, twins.random.choice(CHANGES))()
        if twins.random.random() < 0.3:
            twins.fresh_gradients()
        else:
            twins.fill_gradients_in_place()
        twins.step_and_compare()
        taken, left = gathered(twins.core)
        regular += len(taken)
        irregular += len(left)
    # Both back ends had their part.
    assert regular > STEPS and irregular > STEPS // 20, (regular, irregular)


def view_of(memory: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(memory)


class Trained:
    """An optimizer after two steps, all of whose tensors are regular."""

    def __init__(self, variant: str = "Local", **options: Any) -> None:
        self.params = parameters([(4, 6), (4, 6), (64, 1024), (1, 5)])
        self.optimizer = VARIANTS[variant](self.params, **{**LIVELY[variant], **options})
        train(self.optimizer, 2)
        set_gradients(self.params, 2)
        self.param = self.params[1]
        self.state = self.optimizer.state[self.param]
        self.large = self.optimizer.state[self.params[2]]

    def set_grad(self, grad: torch.Tensor) -> None:
        self.param.grad = grad


class Subclass(torch.Tensor):
    pass


# What makes parameter 1 irregular.
IRREGULAR: dict[str, Callable[[Trained], object]] = {
    "gradient permuted": lambda t: t.set_grad(torch.ones(6, 4).t()),
    "gradient with gaps": lambda t: t.set_grad(torch.ones(4, 12)[:, ::2]),
    "gradient expanded": lambda t: t.set_grad(torch.ones(1, 1).expand(4, 6)),
    "gradient of zeros without memory": lambda t: t.set_grad(torch._efficientzerotensor(4, 6)),
    "gradient of a subclass": lambda t: t.set_grad(torch.ones(4, 6).as_subclass(Subclass)),
    "parameter with gaps": lambda t: setattr(t.param, "data", torch.ones(4, 12)[:, ::2]),
    "parameter permuted": lambda t: setattr(t.param, "data", torch.ones(6, 4).t()),
    "no state": lambda t: t.optimizer.state.pop(t.param),
    "no path": lambda t: t.state.pop("path"),
    "no step": lambda t: t.state.pop("step"),
    "no scale": lambda t: t.state.pop("lr_scale"),
    "half a walk": lambda t: t.state.pop("walk_path_sq"),
    "amsgrad without a maximum": lambda t: t.optimizer.param_groups[0].update(amsgrad=True),
    "moment of another type": lambda t: t.state.update(exp_avg=t.state["exp_avg"].double()),
    "moment of another shape": lambda t: t.state.update(exp_avg_sq=torch.ones(6, 4)),
    "moment in another layout": lambda t: t.state.update(exp_avg_sq=torch.ones(6, 4).t()),
    "moment that is none": lambda t: t.state.update(exp_avg=None),
    "path of another shape": lambda t: t.state.update(path=torch.ones(24)),
    "step of another type": lambda t: t.state.update(step=torch.tensor(3)),
    "step that is a number": lambda t: t.state.update(step=3.0),
    "step of one dimension": lambda t: t.state.update(step=torch.ones(1)),
}


@pytest.mark.parametrize("case", IRREGULAR)
def test_what_is_irregular(case: str) -> None:
    """Left to Python, which mends, refuses or steps it; the others stay with the core."""
    trained = Trained()
    assert gathered(trained.optimizer) == ([(0, 0), (0, 1), (0, 2), (0, 3)], [])
    IRREGULAR[case](trained)
    regular, irregular = gathered(trained.optimizer)
    if case == "amsgrad without a maximum":
        assert not regular and len(irregular) == 4
    else:
        assert irregular == [(0, 1)] and len(regular) == 3


LARGE_PATHS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], bool]] = {
    "of another fraction": (lambda path: torch.zeros(64, 256), True),
    "whole": (lambda path: torch.zeros(64, 1024), True),
    "one element in a run": (lambda path: torch.zeros(64, 1), True),
    "no power of two": (lambda path: torch.zeros(64, 48), False),
    "more than all": (lambda path: torch.zeros(64, 2048), False),
    "flat": (lambda path: path.reshape(-1), False),
    "permuted": (lambda path: torch.zeros(64, 64).t(), False),
    "of float64": (lambda path: path.double(), False),
    "empty": (lambda path: torch.zeros(64, 0), False),
}


@pytest.mark.parametrize("case", LARGE_PATHS)
def test_paths_of_a_sampled_tensor(case: str) -> None:
    trained = Trained()
    make, is_regular = LARGE_PATHS[case]
    trained.large["path"] = make(trained.large["path"])
    assert gathered(trained.optimizer)[1] == ([] if is_regular else [(0, 2)])
    if is_regular:
        StepCheck("Local", trained.optimizer).step()


REGULAR: dict[str, Callable[[Trained], object]] = {
    "other strides of a dimension of one": lambda t: setattr(
        t.params[3], "grad", torch.ones(5).as_strided((1, 5), (77, 1))
    ),
    "gradient at an odd address": lambda t: t.set_grad(torch.ones(25)[1:].view(4, 6)),
    "all of them permuted": lambda t: [
        setattr(t.param, "data", torch.ones(6, 4).t()),
        t.set_grad(torch.ones(6, 4).t()),
        [t.state.update({k: torch.zeros(6, 4).t()}) for k in ("exp_avg", "exp_avg_sq", "path")],
    ],
    "entries of the user's": lambda t: t.state.update(note="mine", slow=torch.ones(3, dtype=torch.int32)),
    "state in another order": lambda t: t.optimizer.state.update({t.param: dict(reversed(t.state.items()))}),
    "a maximum without amsgrad": lambda t: t.state.update(max_exp_avg_sq=torch.ones(4, 6)),
}


@pytest.mark.parametrize("case", REGULAR)
def test_what_is_regular(case: str) -> None:
    trained = Trained()
    REGULAR[case](trained)
    assert gathered(trained.optimizer) == ([(0, 0), (0, 1), (0, 2), (0, 3)], [])
    StepCheck("Local", trained.optimizer).step()


def test_parameters_without_gradients_are_neither() -> None:
    trained = Trained()
    trained.param.grad = None
    assert gathered(trained.optimizer) == ([(0, 0), (0, 2), (0, 3)], [])


def test_buckets_are_sorted_by_types() -> None:
    """Whatever the order of the parameters, so that sums over buckets come in one order."""
    from clara_fused.core import _core

    dtypes = [torch.float16, torch.float64, torch.float32, torch.bfloat16, torch.float32]
    params = [parameters([(3,)], dtype)[0] for dtype in dtypes]
    found = []
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        optimizer = VARIANTS["Local"]([params[i] for i in order])
        train(optimizer, 1)
        set_gradients(params, 1)
        buckets, _ = _core.gather(optimizer.param_groups, optimizer.state, None)
        found.append([(bucket.params[0].dtype, len(bucket)) for bucket in buckets])
        for bucket in buckets:
            assert bucket.locations == sorted(bucket.locations)
            assert [optimizer.param_groups[0]["params"][i] for _, i in bucket.locations] == bucket.params
    assert found[0] == found[1] == found[2]
    assert [count for _, count in found[0]] == [2, 1, 1, 1]


def test_float32_gradients_of_bfloat16_parameters_have_their_bucket() -> None:
    params = parameters([(3,), (3,)], torch.bfloat16)
    optimizer = VARIANTS["Local"](params)
    train(optimizer, 1)
    if not hasattr(params[0], "grad_dtype"):
        pytest.skip("needs Tensor.grad_dtype (torch 2.10)")
    set_gradients(params, 1)
    params[0].grad = None
    params[0].grad_dtype = torch.float32
    params[0].grad = torch.ones(3)
    from clara_fused.core import _core

    assert len(_core.gather(optimizer.param_groups, optimizer.state, None)[0]) == 2
    assert not gathered(optimizer)[1]


@pytest.mark.parametrize("second", [slice(0, 10), slice(5, 15), slice(9, 12)], ids=["same", "shifted", "at its end"])
def test_overlapping_memory_is_noticed(second: slice) -> None:
    memory = torch.zeros(40)
    params = [view_of(memory[0:10]), view_of(memory[20:30]), view_of(memory[second]), view_of(memory[30:40])]
    optimizer = VARIANTS["Local"](params)
    train(optimizer, 1)
    set_gradients(params, 1)
    assert gathered(optimizer) == ([(0, 1), (0, 3)], [(0, 0), (0, 2)])


def test_memory_side_by_side_does_not_overlap() -> None:
    memory = torch.zeros(40)
    optimizer = VARIANTS["Local"]([view_of(part) for part in memory.split([7, 1, 30, 2])])
    train(optimizer, 1)
    set_gradients(optimizer.param_groups[0]["params"], 1)
    assert not gathered(optimizer)[1]


def test_the_one_scale_must_be_the_same_tensor() -> None:
    """A state loaded or made by a user brings a scale of its own: Python makes it one again."""
    trained = Trained("Global")
    assert not gathered(trained.optimizer)[1]
    trained.state["lr_scale"] = trained.state["lr_scale"].clone()
    assert gathered(trained.optimizer)[1]
    trained.optimizer.step()
    assert not gathered(trained.optimizer)[1]


def test_malformed_groups_are_no_crash() -> None:
    from clara_fused.core import _core

    trained = Trained()
    for groups in ([None], [{}], [{"params": None}], [{"params": {1, 2}}]):
        with pytest.raises(TypeError):
            _core.gather(groups, trained.optimizer.state, None)
    assert _core.gather([{"params": [None, 7, "text"]}], trained.optimizer.state, None) == ([], [])
    for state in ({}, {trained.param: None}, {"note": 1}):
        buckets, irregular = _core.gather(trained.optimizer.param_groups, state, None)
        assert not buckets and len(irregular) == 4


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5,)])
@pytest.mark.parametrize("of", ["gradient", "parameter"])
def test_what_is_the_negative_of_its_memory(of: str, shape: tuple[int, ...], variant: str, fused: bool) -> None:
    """torch.imag of a conjugate is a view with a negative bit; its memory holds the opposite sign: uphill it went."""

    def negative(values: torch.Tensor) -> torch.Tensor:
        view = torch.imag(torch.complex(torch.zeros_like(values), -values).conj())
        assert view.is_neg()
        return view

    twin = torch.nn.Parameter(torch.full(shape, 3.0))
    param = torch.nn.Parameter(negative(twin.detach()) if of == "parameter" else twin.detach().clone())
    optimizer, other = (VARIANTS[variant]([p], fused=unforced(fused), **LIVELY[variant]) for p in (param, twin))
    for step in range(4):
        set_gradients([param, twin], step)
        param.grad = twin.grad = torch.full(shape, 2.0 + step)
        if of == "gradient" and step != 2:
            param.grad = negative(twin.grad)
        optimizer.step()
        other.step()
        torch.testing.assert_close(param.detach().resolve_neg(), twin.detach(), rtol=1e-6, atol=1e-6)
    assert param.is_neg() == (of == "parameter")


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_gradient_without_memory(steps_before: int) -> None:
    """Forward-mode autograd stands zeros in for tangents that nothing reached; reading them would crash."""
    param = torch.nn.Parameter(torch.ones(6))
    twin = torch.nn.Parameter(torch.ones(6))
    optimizer, other = VARIANTS["Local"]([param]), VARIANTS["Local"]([twin])
    train(optimizer, steps_before)
    train(other, steps_before)
    for grad in (torch._efficientzerotensor(6), torch.ones(6)):
        param.grad, twin.grad = grad, grad.clone() + 0.0
        optimizer.step()
        other.step()
        torch.testing.assert_close(param, twin)


def test_switching_the_core_off_and_on_takes_effect(variant: str) -> None:
    """Same formulas, other roundings: whoever works is seen by its bits alone, and by what the other refuses."""
    trained = Trained(variant)
    optimizer = trained.optimizer
    check = StepCheck(variant, optimizer)
    for step, fused in enumerate((True, False, None, True)):
        optimizer.fused = fused
        set_gradients(trained.params, step)
        check.step()
    trained.set_grad(torch.ones(6, 4).t())
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="fused=True"):
        optimizer.step()
    assert snapshot(optimizer) == before
    optimizer.fused = None
    check.step()


def test_gather_keeps_no_tensor_alive() -> None:
    """Neither gradients nor state after the step: a freed gradient must give its memory back."""
    param = torch.nn.Parameter(torch.randn(1000))
    param.grad = torch.randn(1000)
    optimizer = VARIANTS["Local"]([param], fused=True)
    optimizer.step()
    optimizer.step()
    grad, path = weakref.ref(param.grad), weakref.ref(optimizer.state[param]["path"])
    param.grad = None
    optimizer.state.clear()
    gc.collect()
    assert grad() is None
    assert path() is None


@pytest.mark.parametrize("dropped", ["gradient", "state"])
def test_what_the_core_reads_lives_as_long_as_its_bucket(dropped: str) -> None:
    """Another thread may drop a gradient or replace a state while a step computes: the core works without the GIL."""
    from clara_fused.core import _core

    trained = Trained()
    witness = weakref.ref(trained.param.grad if dropped == "gradient" else trained.state["exp_avg"])
    buckets, _ = _core.gather(trained.optimizer.param_groups, trained.optimizer.state, None)
    trained.param.grad = None
    trained.state.clear()
    gc.collect()
    assert witness() is not None
    del buckets
    gc.collect()
    assert witness() is None


class TestCudaGraphs:
    """What can be tested of capturing without a GPU: what may not be captured."""

    @pytest.fixture
    def capturing(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
        from clara_fused.core import loading

        return lambda now: monkeypatch.setattr(loading, "is_capturing", lambda: now)

    @pytest.mark.parametrize("fused", [True, False], ids=["core", "torch"])
    def test_a_first_step_cannot_be_captured(self, fused: bool, capturing: Callable[[bool], None]) -> None:
        param = torch.nn.Parameter(torch.randn(10))
        param.grad = torch.randn(10)
        optimizer = VARIANTS["Local"]([param], fused=fused)
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


def test_scalars_of_a_state_are_what_the_core_reads() -> None:
    """Each of them, replaced by a tensor of other memory, counts at the next step."""
    trained = Trained()
    check = StepCheck("Local", trained.optimizer)
    for key in SCALARS:
        trained.state[key] = trained.state[key].clone() * 2
        set_gradients(trained.params, 3)
        check.step()
