"""Starting from a learning rate that is far too large."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import VARIANTS, StepCheck, clones, parameters, set_gradients, train
from torch import nn

from clara_fused.distributed import placement, sharding
from clara_fused.integrations.telemetry import current_lrs, scale_figures


def root_mean_square(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(torch.cat([tensor.detach().double().flatten() for tensor in tensors]).square().mean().item())


def first_scales(variant: str, params: list[Any], fused: bool, lr: Any, **options: Any) -> list[list[float]]:
    """Those that the first step starts from: the path is one step long, and so is the walk."""
    optimizer = VARIANTS[variant](params, lr=lr, fused=fused, **options)
    for group in optimizer.param_groups:
        set_gradients(group["params"], 0)
    optimizer.step()
    return [scales.tolist() for scales in optimizer.lr_scales()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_scale_is_a_fraction_of_the_parameters(dtype: torch.dtype, variant: str, fused: bool) -> None:
    params = parameters([(30, 20), (7,), (), (0, 3)], dtype)
    expected = 0.01 * root_mean_square(params) / 2.0
    assert first_scales(variant, params, fused, lr=2.0)[0] == pytest.approx([expected] * 4, rel=1e-5)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_the_first_step_taken_is_as_small_as_promised(tensor_lr: bool, variant: str, fused: bool) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(3.0 * torch.randn(40, 50)), nn.Parameter(torch.zeros(50))]
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.randn_like(param)
    VARIANTS[variant](params, lr=torch.tensor(10.0) if tensor_lr else 10.0, fused=fused).step()
    step = root_mean_square([after.detach() - start for after, start in zip(params, before, strict=True)])
    assert step == pytest.approx(0.01 * root_mean_square(before), rel=1e-3)


@pytest.mark.parametrize("lr", [1e-3, 0.0099, torch.tensor(0.005, dtype=torch.float64)], ids=str)
def test_a_rate_that_is_not_too_large_stays_as_it_is(lr: Any, variant: str, fused: bool) -> None:
    assert first_scales(variant, [nn.Parameter(torch.ones(5))], fused, lr) == [[1.0]]


@pytest.mark.parametrize("lr", [1.0, 0.0])
def test_what_says_nothing_leaves_the_rate_alone(lr: float, variant: str, fused: bool) -> None:
    """Parameters that are all zero (low-rank adapters), no elements at all, a rate of zero."""
    params = [nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(0))]
    assert first_scales(variant, params, fused, lr) == [[1.0] * 3]
    assert first_scales(variant, [nn.Parameter(torch.ones(0))], fused, lr) == [[1.0]]
    assert first_scales(variant, [nn.Parameter(torch.ones(3))], fused, 0.0) == [[1.0]]


@pytest.mark.parametrize("start", [0.0, 0.1])
def test_a_warm_up_from_zero_is_judged_by_where_it_leads(start: float, variant: str, fused: bool) -> None:
    """Transformers' schedules take their first step at 0: a rate that is far too large came through unscaled."""
    params = parameters([(30, 20)])
    expected = 0.01 * root_mean_square(params) / (50.0 if start == 0.0 else 5.0)
    optimizer = VARIANTS[variant](params, lr=50.0, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, start + step / 10))
    set_gradients(params, 0)
    optimizer.step()
    schedule.step()
    assert float(optimizer.lr_scales()[0][0]) == pytest.approx(expected, rel=1e-5)


def test_without_adaptation_it_is_adam(variant: str, fused: bool) -> None:
    """Adam's rate is the user's."""
    (param,) = params = parameters([(40,)], torch.float64)
    (twin,) = twins = clones(params)
    mine = VARIANTS[variant](params, lr=10.0, adapt_lr=False, fused=fused)
    adam = torch.optim.Adam(twins, lr=10.0)
    for optimizer in (mine, adam):
        train(optimizer, 3)
    torch.testing.assert_close(param, twin, rtol=1e-9, atol=1e-9)


def test_norms_beyond_float16_count(variant: str, fused: bool) -> None:
    param = nn.Parameter(torch.full((10_000,), 6e4, dtype=torch.float16))
    assert first_scales(variant, [param], fused, lr=1e4)[0] == pytest.approx([0.06], rel=1e-3)


def test_squares_beyond_float32_count(variant: str, fused: bool) -> None:
    param = nn.Parameter(torch.full((100,), 1e20))
    assert first_scales(variant, [param], fused, lr=1e19)[0] == pytest.approx([0.1], rel=1e-3)


def test_groups_of_their_own(variant: str, fused: bool) -> None:
    """Local and Smoothed look at one group, Global at all of them and the largest rate."""
    small, large = nn.Parameter(torch.full((10,), 0.5)), nn.Parameter(torch.full((30,), 4.0))
    groups = [{"params": [small], "lr": 1.0}, {"params": [large], "lr": 2.0}]
    if variant == "Global":
        expected = [0.01 * root_mean_square([small, large]) / 2.0] * 2
    else:
        expected = [0.01 * 0.5 / 1.0, 0.01 * 4.0 / 2.0]
    scales = first_scales(variant, groups, fused, lr=1e-3)
    assert [scale for scales in scales for scale in scales] == pytest.approx(expected, rel=1e-5)


def test_all_parameters_of_the_group_count_also_without_gradients(variant: str, fused: bool) -> None:
    """One that comes first must not be measured by itself alone."""
    params = [nn.Parameter(torch.zeros(10)), nn.Parameter(torch.ones(10))]
    optimizer = VARIANTS[variant](params, lr=1.0, fused=fused)
    set_gradients(params[:1], 0)
    optimizer.step()
    assert optimizer.state[params[0]]["lr_scale"].item() == pytest.approx(0.01 * 0.5**0.5, rel=1e-5)


def test_a_group_that_joins_later(variant: str, fused: bool) -> None:
    old, new = parameters([(30,)]), parameters([(20,)], seed=1)
    optimizer = VARIANTS[variant](old, lr=1.0, fused=fused)
    train(optimizer, 3)
    in_force = optimizer.lr_scales()[0].item()
    optimizer.add_param_group({"params": new, "lr": 4.0})
    expected = in_force if variant == "Global" else 0.01 * root_mean_square(new) / 4.0
    set_gradients(new, 0)
    old[0].grad = None
    check = StepCheck(variant, optimizer)
    check.step()
    assert optimizer.lr_scales()[1].item() == pytest.approx(expected, rel=0.06)


def test_frozen_integers_beside_them_do_not_count(variant: str, fused: bool) -> None:
    params = [nn.Parameter(torch.ones(10)), nn.Parameter(torch.full((10,), 100, dtype=torch.int8), requires_grad=False)]
    optimizer = VARIANTS[variant](params, lr=1.0, fused=fused)
    set_gradients(params[:1], 0)
    optimizer.step()
    assert optimizer.lr_scales()[0][0].item() == pytest.approx(0.01, rel=1e-5)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", ["meta", "lazy"])
def test_what_has_no_values_does_not_count(kind: str, trained: bool, variant: str, fused: bool) -> None:
    """First in the list and without a gradient, as in offloaded models and before a lazy module has run."""
    if kind == "meta":
        odd = nn.Parameter(torch.ones(2, 3, device="meta"), trained)
    else:
        odd = nn.UninitializedParameter(trained)
    param = nn.Parameter(torch.ones(10))
    optimizer = VARIANTS[variant]([odd, param], lr=1.0, fused=fused)
    for _ in range(2):
        assert optimizer.lr_scales()[0].tolist()[1] == pytest.approx(0.01, rel=1e-5)
        figures = scale_figures(optimizer, current_lrs(optimizer), "clara")
        assert figures["clara/group0/lr_scale/min"] == pytest.approx(0.01, rel=1e-5)
        set_gradients([param], 0)
        optimizer.step()
    assert odd not in optimizer.state


class Unreadable(torch.Tensor):
    """Weights that only kernels of their own can read: it makes a copy of itself, and fails at all else."""

    @staticmethod
    def __new__(cls, error: Any) -> Unreadable:
        return torch.Tensor._make_wrapper_subclass(cls, (7,), dtype=torch.float32)

    def __init__(self, error: Any) -> None:
        self.error = error

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::detach":
            return cls(args[0].error)
        error = args[0].error
        if error is NotImplemented:
            return NotImplemented
        raise error(func)


@pytest.mark.parametrize("error", [NotImplementedError, NotImplemented, RuntimeError, TypeError, AttributeError])
def test_weights_that_cannot_be_read_do_not_count(error: Any, variant: str, fused: bool) -> None:
    params = [nn.Parameter(Unreadable(error)), nn.Parameter(torch.ones(10))]
    optimizer = VARIANTS[variant](params, lr=1.0, fused=fused)
    set_gradients(params[1:], 0)
    optimizer.step()
    assert optimizer.lr_scales()[0].tolist() == pytest.approx([0.01, 0.01], rel=1e-5)


def test_an_error_of_plain_parameters_is_raised(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("clara_fused.state._sum_of_squares", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        VARIANTS[variant](parameters(), lr=1.0).lr_scales()


def test_bounds_hold_the_cautious_scale(variant: str, fused: bool) -> None:
    scales = first_scales(variant, [nn.Parameter(torch.ones(10))], fused, 1.0, scale_bounds=(0.5, 2.0))
    assert scales == [[pytest.approx(0.5, rel=0.06)]]


@pytest.mark.slow
def test_a_rate_a_thousand_times_too_large_is_survived(variant: str, fused: bool) -> None:
    def final_loss(initial_scale: str | float) -> float:
        torch.manual_seed(0)
        inputs = torch.randn(256, 16)
        targets = torch.sin(inputs @ torch.randn(16, 1))
        model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        optimizer = VARIANTS[variant](model.parameters(), lr=3.0, initial_scale=initial_scale, fused=fused)
        for _ in range(200):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
        return loss.item()

    # The variance of the targets, which the careless run hardly gets below, is about 0.5.
    assert final_loss("cautious") < 0.1
    assert final_loss(1.0) > 0.2


def first_scale_at(optimizer: Any, lr: float, seed: int = 0) -> float:
    """Of the last group's first parameter, in a step at this rate."""
    for group in optimizer.param_groups:
        set_gradients(group["params"], seed)
    optimizer.param_groups[-1]["lr"] = lr
    optimizer.step()
    return float(optimizer.lr_scales()[-1][0])


@pytest.mark.parametrize("looks", [False, True])
def test_an_optimizer_whose_state_was_dropped_begins_again(looks: bool, variant: str, fused: bool) -> None:
    """As reinforcement learning resets it; the old scale let a step through that was 100 times too large."""
    optimizer = VARIANTS[variant](parameters([(30, 20)]), lr=1e-4, initial_scale="cautious", fused=fused)
    train(optimizer, 1)  # without a look, which would search for the scale of AdamClaraGlobal anew
    optimizer.state.clear()
    expected = 0.01 * root_mean_square(optimizer.param_groups[0]["params"]) / 5.0
    optimizer.param_groups[0]["lr"] = 5.0
    if looks:
        assert float(optimizer.lr_scales()[0][0]) == pytest.approx(expected, rel=1e-5)
    assert first_scale_at(optimizer, 5.0) == pytest.approx(expected, rel=1e-5)


def a_small_and_a_large() -> tuple[nn.Parameter, nn.Parameter]:
    """At a rate of 0.5 they begin at 2e-5 and 0.2."""
    return nn.Parameter(torch.full((50,), 1e-3)), nn.Parameter(torch.full((50,), 10.0))


@pytest.mark.parametrize("variant", ["Local", "Smoothed"])
def test_a_group_does_not_begin_where_one_did_that_has_gone(variant: str, fused: bool) -> None:
    small, large = a_small_and_a_large()
    optimizer = VARIANTS[variant]([{"params": [small]}, {"params": [large]}], lr=0.5, fused=fused)
    small.grad = torch.ones(50)
    optimizer.step()
    del optimizer.param_groups[0]
    assert first_scale_at(optimizer, 0.5) == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize("variant", ["Local", "Smoothed"])
def test_a_group_does_not_begin_where_its_former_parameters_did(variant: str, fused: bool) -> None:
    small, large = a_small_and_a_large()
    optimizer = VARIANTS[variant]([small], lr=0.5, fused=fused)
    assert first_scale_at(optimizer, 0.5) == pytest.approx(2e-5, rel=1e-5)
    optimizer.param_groups[0]["params"] = [large]
    assert first_scale_at(optimizer, 0.5) == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize("variant", ["Local", "Smoothed"])
def test_who_joins_begins_as_the_others_did_wherever_the_group_is_now(variant: str, fused: bool) -> None:
    small, large = a_small_and_a_large()
    late = nn.Parameter(torch.ones(3))
    optimizer = VARIANTS[variant](
        [{"params": [small]}, {"params": [large, late]}], lr=0.5, clip=(1.0, 1.0), fused=fused
    )
    small.grad, large.grad = torch.ones(50), torch.ones(50)
    optimizer.step()
    begun = optimizer.lr_scales()[1][0]
    del optimizer.param_groups[0]
    first_scale_at(optimizer, 50.0)
    assert optimizer.lr_scales()[0].tolist() == [begun] * 2


def test_who_joins_a_group_begins_as_the_others_did(variant: str, fused: bool) -> None:
    params = parameters([(40,), (30,)])
    optimizer = VARIANTS[variant](params, lr=5.0, adapt_lr=True, clip=(1.0, 1.0), fused=fused)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    began = float(optimizer.lr_scales()[0][0])
    optimizer.param_groups[0]["lr"] = 50.0
    set_gradients(params, 1)
    optimizer.step()
    assert optimizer.lr_scales()[0].tolist() == [began] * 2


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"]
)
def test_who_joins_a_copy_begins_as_the_others_did(copied: Callable[[Any], Any], variant: str, fused: bool) -> None:
    """Under another rate than theirs: a warm-up is over, a layer thaws."""
    first, late = parameters([(40,), (30,)])
    optimizer = VARIANTS[variant]([first, late], lr=5.0, clip=(1.0, 1.0), fused=fused)
    first.grad = torch.ones_like(first)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 50.0
    twin, late_twin = copied((optimizer, late))
    late.grad, late_twin.grad = torch.ones_like(late), torch.ones_like(late)
    optimizer.step()
    twin.step()
    began = optimizer.lr_scales()[0].tolist()
    assert began[0] == began[1]
    assert twin.lr_scales()[0].tolist() == began


def test_a_first_step_looks_at_groups_and_parameters_once(
    variant: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not all groups for each parameter, nor all parameters of its group: models have thousands of either."""
    optimizer = VARIANTS[variant]([{"params": parameters([(3,)] * 10)} for _ in range(5)], fused=fused)
    calls: dict[str, int] = {}

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(optimizer, "_known_initial_scale")
    count(optimizer._options, "read")
    count(sharding, "needs_sums")
    count(placement, "needs_sums")
    last = optimizer.param_groups[0]["params"][-1]
    set_gradients([last], 0)
    optimizer.step()
    for group in optimizer.param_groups:  # unfreezes the others
        set_gradients(group["params"], 1)
    optimizer.step()
    assert calls.pop("_known_initial_scale", 0) <= 2 * 2 + 2 * 4
    assert all(count <= 2 for count in calls.values()), calls


def test_who_joins_does_not_begin_where_a_founder_did_that_began_anew(variant: str, fused: bool) -> None:
    """The first that began, a, is forgotten and comes back: the group's beginning is b's now."""
    if variant == "Global":
        pytest.skip("one scale, that of any state")
    a, b, c = params = parameters([(30,), (20,), (10,)])
    optimizer = VARIANTS[variant](params, lr=10.0, fused=fused)

    def begin(param: torch.Tensor, step: int) -> float:
        for each in params:
            each.grad = None
        set_gradients([param], step)
        optimizer.step()
        return float(optimizer.state[param]["lr_scale"])

    begin(a, 0)
    with torch.no_grad():
        torch._foreach_mul_(params, 3.0)
    del optimizer.state[a]
    expected = begin(b, 1)
    assert begin(a, 2) == pytest.approx(expected, rel=1e-5)
    assert begin(c, 3) == pytest.approx(expected, rel=1e-5)
