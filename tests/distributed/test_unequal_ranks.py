"""Ranks that are not alike: without gradients or parameters, with other hyperparameters. No hang, no drift."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import why_not_core
from ranks import World
from sharded_models import LAYOUTS, MOVING, VARIANTS, Sharded, full_parameters, make_model, on_all_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import clara_fused
from clara_fused.state import SCALARS


def gradient_on_some_ranks_only(variant: str, use_group: bool) -> list[list[float]]:
    """Two shards per rank; rank 1 has no gradient for the second before step 3, then none at all for a step."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank = dist.get_rank()

    def parameter(values: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(values if use_group else DTensor.from_local(values, mesh, [Shard(0)], run_check=False))

    params = [parameter(torch.full((4,), 1.0 + i, dtype=torch.float64)) for i in range(2)]
    optimizer = VARIANTS[variant](params, **MOVING, process_group=dist.group.WORLD if use_group else None)
    history = []
    for step in range(6):
        for i, param in enumerate(params):
            generator = torch.Generator().manual_seed(10 * step + i + rank)
            grad = torch.randn(4, generator=generator, dtype=torch.float64) + 1.0
            param.grad = grad if use_group else DTensor.from_local(grad, mesh, [Shard(0)], run_check=False)
        if rank == 1 and step < 3:
            params[1].grad = None
        if rank == 1 and step == 4:
            params[0].grad = params[1].grad = None
        optimizer.step()
        history.append(optimizer.lr_scales()[0].tolist())
    assert len(optimizer.state) == 2
    if not (use_group and variant == "Global"):  # there each rank has the walk of what it holds
        history += [[entry[name].item() for name in SCALARS] for entry in optimizer.state.values()]
    return history


@pytest.mark.parametrize("use_group", [False, True], ids=["dtensor", "process_group"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scales_stay_equal_where_gradients_are_missing(world2: World, variant: str, use_group: bool) -> None:
    first, second = world2.run(gradient_on_some_ranks_only, variant, use_group)
    assert first == second
    assert all(a != b for a, b in itertools.pairwise(first[:6]))


def amsgrad_switched_on_without_a_gradient(use_group: bool) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    values = torch.ones(4)
    param = nn.Parameter(values if use_group else DTensor.from_local(values, mesh, [Shard(0)], run_check=False))
    options = {**MOVING, "process_group": dist.group.WORLD if use_group else None}
    optimizer = clara_fused.AdamClaraLocal([param], **options)
    for step in range(2):
        if step == 1:
            optimizer.param_groups[0]["amsgrad"] = True
        param.grad = None if step == 1 and dist.get_rank() == 1 else torch.ones_like(param)
        optimizer.step()
    return sorted(optimizer.state[param])


@pytest.mark.parametrize("use_group", [False, True], ids=["dtensor", "process_group"])
def test_all_ranks_have_the_same_entries(world2: World, use_group: bool) -> None:
    """Whoever gathers a whole state calls every rank for every entry."""
    first, second = world2.run(amsgrad_switched_on_without_a_gradient, use_group)
    assert first == second
    assert "max_exp_avg_sq" in first


def rank_without_parameters_of_its_own() -> list[float]:
    """ZeRO with more ranks than parameters: some ranks never step anything."""
    param = nn.Parameter(torch.ones(3, dtype=torch.float64))
    make = functools.partial(clara_fused.AdamClaraGlobal, **MOVING, process_group=dist.group.WORLD)
    optimizer = torch.distributed.optim.ZeroRedundancyOptimizer([param], optimizer_class=make)
    for step in range(5):
        param.grad = torch.randn(3, generator=torch.Generator().manual_seed(step), dtype=torch.float64) + 1.0
        optimizer.step()
    return param.tolist()


def test_rank_without_parameters_takes_part(world2: World) -> None:
    first, second = world2.run(rank_without_parameters_of_its_own)
    assert first == second != [1.0, 1.0, 1.0]


def copies_beside_an_expert(variant: str, own_group: bool, options: dict[str, Any]) -> list[float]:
    """A model under DDP, and a parameter that only rank 1 has; what DDP keeps equal, in the end."""
    model = make_model()
    wrapped = nn.parallel.DistributedDataParallel(model)
    expert = [nn.Parameter(torch.full((50,), 9.0, dtype=torch.float64))] if dist.get_rank() == 1 else []
    shared = list(wrapped.parameters())
    groups = [{"params": shared}, {"params": expert}] if own_group else [{"params": [*shared, *expert]}]
    optimizer = VARIANTS[variant](groups, **{**MOVING, "lr": 0.3, "initial_scale": "cautious", **options})
    sharded = Sharded(wrapped, optimizer, dist.get_rank(), dist.get_world_size())
    for step in range(5):
        for param in expert:
            param.grad = torch.randn(50, generator=torch.Generator().manual_seed(step), dtype=torch.float64) + 1.0
        sharded.step(step)
    return nn.utils.parameters_to_vector(shared).tolist()


@pytest.mark.parametrize("variant", ["Local", "Smoothed"])
def test_ddp_beside_parameters_of_one_rank(world2: World, variant: str) -> None:
    """docs/distributed.md: a group of their own, or a number as the initial scale; the copies drift apart without."""
    for advice in ((True, {}), (False, {"initial_scale": 0.1})):
        first, second = world2.run(copies_beside_an_expert, variant, *advice)
        assert first == second, advice
    first, second = world2.run(copies_beside_an_expert, variant, False, {})
    assert first != second


def scale_of_a_rank_without_state() -> list[list[float]]:
    """FSDP1 with shards so small that rank 1 has nothing: what it knows of the one scale is lost with a checkpoint."""
    param = nn.Parameter(torch.ones(3 if dist.get_rank() == 0 else 0, dtype=torch.float64))

    def make() -> Any:
        # Without decay the path does not depend on where the parameter is.
        options = {**MOVING, "weight_decay": 0.0}
        return clara_fused.AdamClaraGlobal([param], **options, process_group=dist.group.WORLD)

    def step(optimizer: Any, number: int) -> None:
        if dist.get_rank() == 0:
            param.grad = torch.randn(3, generator=torch.Generator().manual_seed(number), dtype=torch.float64) + 1.0
        optimizer.step()

    first = make()
    for number in range(4):
        step(first, number)
    second = make()
    second.load_state_dict(first.state_dict())
    step(first, 4)
    step(second, 4)
    return [optimizer.lr_scales()[0].tolist() for optimizer in (first, second)]


def test_rank_without_state_learns_the_one_scale_after_loading(world2: World) -> None:
    scales = [scale for rank_scales in world2.run(scale_of_a_rank_without_state) for scale in rank_scales]
    assert scales[0] != [1.0]
    assert scales == [scales[0]] * 4


def scales_before_the_first_step(variant: str) -> list[float]:
    param = nn.Parameter(torch.ones(3))
    optimizers = [
        VARIANTS[variant]([param], lr=1.0, initial_scale=initial, process_group=dist.group.WORLD)
        for initial in (0.25, "cautious")
    ]
    return [optimizer.lr_scales()[0].item() for optimizer in optimizers]


def test_scales_before_the_first_step_ask_no_other_rank(world2: World, variant: str) -> None:
    """A number is known; how large the parameters are only all ranks together know."""
    assert world2.run(scales_before_the_first_step, variant) == [[0.25, 1.0]] * 2


def group_that_only_one_rank_needs() -> list[float]:
    """DTensors on both ranks, and under `process_group` a plain parameter on rank 1 alone, first in its list."""
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.ones(4, dtype=torch.float64), mesh, [Shard(0)]))
    plain = [nn.Parameter(torch.ones(2, dtype=torch.float64))] if dist.get_rank() == 1 else []
    wholes = [nn.Parameter(torch.ones(size, dtype=torch.float64)) for size in (2, 4)]
    optimizer = clara_fused.AdamClaraGlobal([*plain, param], **MOVING, process_group=dist.group.WORLD)
    alone = clara_fused.AdamClaraGlobal(wholes, **MOVING)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for whole in wholes:
            whole.grad = torch.randn(len(whole), generator=generator, dtype=torch.float64) + 1.0
        for each in plain:
            each.grad = wholes[0].grad
        param.grad = distribute_tensor(wholes[1].grad, mesh, [Shard(0)], src_data_rank=None)
        optimizer.step()
        alone.step()
    scale = optimizer.lr_scales()[0][-1].item()
    assert scale == pytest.approx(alone.lr_scales()[0][0].item(), rel=2e-7)
    return [scale]


def test_rank_without_plain_parameters_takes_part_in_the_groups_sum(world2: World) -> None:
    first, second = world2.run(group_that_only_one_rank_needs)
    assert first == second != [1.0]


def shard_that_one_rank_lacks() -> str:
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    plain = [nn.Parameter(torch.ones(2))] if dist.get_rank() == 1 else []
    optimizer = clara_fused.AdamClaraLocal([param, *plain], process_group=dist.group.WORLD)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    return str(caught.value)


def test_rank_without_plain_parameters_is_told_where_each_must_have_a_shard(world2: World) -> None:
    for message in world2.run(shard_that_one_rank_lacks):
        assert "rank 0 has 'number of sharded parameters: 0', rank 1 has 'number of sharded parameters: 1'" in message


# --- disagreement ----------------------------------------------------------------------------------------------------


def message_of_disagreement(layout: str, variant: str, first: dict[str, Any], later: dict[str, Any]) -> tuple[int, str]:
    """Rank 1 differs from rank 0, from the start or from step 2 on; the step that raised, and what it said."""
    differs = dist.get_rank() == 1
    options = {**MOVING, **(first if differs else {})}
    sharded = LAYOUTS[layout][1](make_model(), functools.partial(VARIANTS[variant], **options))
    optimizer = getattr(sharded.optimizer, "optim", sharded.optimizer)
    for step in range(4):
        sharded.backward(step)
        if step == 2 and differs:
            for group in optimizer.param_groups:
                group.update(later)
        try:
            optimizer.step()
        except RuntimeError as error:
            return step, str(error)
    return -1, ""


@pytest.mark.parametrize(
    ("layout", "variant"), [("fsdp2-2", "Local"), ("fsdp2-2", "Global"), ("zero1-2", "Global"), ("tp-2", "Smoothed")]
)
def test_other_hyperparameters_from_the_start(world2: World, layout: str, variant: str) -> None:
    for step, message in world2.run(message_of_disagreement, layout, variant, {"damping": 0.9}, {}):
        assert step == 0
        assert "param group 0: damping = 0.7" in message
        assert "param group 0: damping = 0.9" in message


@pytest.mark.parametrize("change", [{"lr": 0.021}, {"betas": (0.8, 0.999)}, {"weight_decay": 0.2}], ids=str)
@pytest.mark.parametrize("variant", ["Smoothed", "Global"])
def test_hyperparameters_that_part_later(world2: World, variant: str, change: dict[str, Any]) -> None:
    for step, message in world2.run(message_of_disagreement, "fsdp2-2", variant, {}, change):
        assert step == 2
        assert "disagree on hyperparameters" in message


def replicas_that_differ(mesh_shape: tuple[int, ...], placements: list[Any], variant: str) -> str:
    """The second half of the ranks, which holds the same shards as the first, has another damping."""
    mesh = init_device_mesh("cpu", mesh_shape)
    param = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, placements))
    param.grad = distribute_tensor(torch.ones(4, 4), mesh, placements)
    in_second_half = dist.get_rank() >= dist.get_world_size() // 2
    optimizer = VARIANTS[variant]([param], **{**MOVING, "damping": 0.9 if in_second_half else 0.7})
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    assert not optimizer.state
    return str(caught.value)


@pytest.mark.parametrize("variant", ["Global", "Local"])
def test_copies_of_a_shard_must_agree_as_well(worlds, variant: str) -> None:
    for size, *mesh_and_placements in ((4, (2, 2), [Replicate(), Shard(0)]), (2, (2,), [Replicate()])):
        for message in worlds[size].run(replicas_that_differ, *mesh_and_placements, variant):
            assert f"rank 0 has 'param group 0: damping = 0.7', rank {size // 2} has" in message


def hyperparameters_written_differently() -> list[float]:
    """As a rank may have them that read them from a file: lists, integers, numbers of numpy."""
    numpy = pytest.importorskip("numpy")
    options = {"betas": (0.75, 0.5), "lr": 1.0, "weight_decay": 0.0, "clip": (0.5, 2.0), "damping": 0.5}
    if dist.get_rank() == 1:
        options |= {"betas": [numpy.float64(0.75), 0.5], "lr": 1, "weight_decay": 0, "clip": [0.5, 2]}
    param = nn.Parameter(torch.ones(4))
    optimizer = clara_fused.AdamClaraLocal([param], **options, process_group=dist.group.WORLD)
    for _ in range(2):
        param.grad = torch.ones(4)
        optimizer.step()
    return optimizer.lr_scales()[0].tolist()


def test_equal_numbers_agree_however_they_are_written(world2: World) -> None:
    first, second = world2.run(hyperparameters_written_differently)
    assert first == second != [1.0]


def _bad_option(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["smoothing"] = 7.0


def _groups_that_differ(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[1]["damping"] = 0.9


def _bad_gradient(optimizer: torch.optim.Optimizer) -> None:
    param = optimizer.param_groups[1]["params"][0]
    # With another shape no gradient can be assigned, so it is the parameter that has changed.
    param.data = torch.ones(9)


def step_that_fails_on_one_rank(variant: str, at_step: int, spoil: Any, amp: bool) -> tuple[str, str]:
    params = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = VARIANTS[variant]([{"params": [p]} for p in params], **MOVING, process_group=dist.group.WORLD)
    for step in range(at_step + 1):
        for param in params:
            param.grad = torch.ones(4) + step
        if amp:
            # The number 0 is what a GradScaler finds on a rank without gradients.
            optimizer.found_inf = torch.tensor(0.0) if dist.get_rank() == 0 else 0
        if step == at_step and dist.get_rank() == 1:
            spoil(optimizer)
        try:
            optimizer.step()
        except Exception as error:
            assert step == at_step, error
            return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("variant", "spoil", "error"),
    [
        ("Local", _bad_option, "Invalid smoothing value: 7.0"),
        ("Global", _bad_option, "Invalid smoothing value: 7.0"),
        ("Global", _groups_that_differ, "damping must be equal in all groups"),
        ("Smoothed", _bad_gradient, "gradient has shape (4,), expected (9,)"),
    ],
)
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("at_step", [0, 2])
def test_a_step_that_fails_on_one_rank_fails_on_all(
    world2: World, variant: str, at_step: int, amp: bool, spoil: Any, error: str
) -> None:
    (kind, message), (own_kind, own_message) = world2.run(step_that_fails_on_one_rank, variant, at_step, spoil, amp)
    assert own_kind == "ValueError"
    assert error in own_message
    assert kind == "RanksDisagreeError"
    if at_step == 0 and spoil is not _bad_gradient:
        assert "rank 1 has 'error: " in message
        assert error in message
    else:
        assert "the step of a rank has failed" in message


def step_that_fails_on_a_grid(variant: str, layout: str) -> str:
    """Of four ranks 0 fails, which shares one sum with rank 1, another one with rank 2, and none with rank 3."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    places = {"dp": (grid["dp"], [Shard(0)]), "tp": (grid["tp"], [Shard(0)]), "grid": (grid, [Shard(0), Shard(1)])}
    params = [nn.Parameter(distribute_tensor(torch.ones(4, 6), *places[name])) for name in layout.split()]
    optimizer = VARIANTS[variant](params, **MOVING)
    for param in params:
        param.grad = torch.ones_like(param)
    if dist.get_rank() == 0:
        _bad_option(optimizer)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        optimizer.step()
    return type(caught.value).__name__


@pytest.mark.parametrize("layout", ["dp grid", "grid dp", "dp tp"])
@pytest.mark.parametrize("variant", ["Local", "Global"])
def test_a_first_step_that_fails_on_one_rank_of_a_grid_fails_on_all(world4: World, variant: str, layout: str) -> None:
    """Ranks that had agreed in one sum went on to the next, where those that had not never came."""
    assert world4.run(step_that_fails_on_a_grid, variant, layout) == ["ValueError"] + ["RanksDisagreeError"] * 3


def step_that_fails_beside_gradients_to_be_placed(at_step: int) -> str:
    mesh = init_device_mesh("cpu", (2,))
    replicated = nn.Parameter(distribute_tensor(torch.ones(40), mesh, [Replicate()]))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    optimizer = clara_fused.AdamClaraLocal([sharded, replicated], **MOVING)
    for step in range(at_step + 1):
        sharded.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
        replicated.grad = DTensor.from_local(torch.ones(40), mesh, [Partial()])
        if step == at_step and dist.get_rank() == 1:
            optimizer.state[sharded]["exp_avg"] = 3
        try:
            optimizer.step()
        except Exception as error:
            assert step == at_step, error
            return type(error).__name__
    return ""


@pytest.mark.parametrize("at_step", [0, 2])
def test_a_step_that_fails_beside_gradients_to_be_placed(world2: World, at_step: int) -> None:
    """The others' gradients are brought to their placements, for which all ranks send: sums of unlike things met."""
    found = world2.run(step_that_fails_beside_gradients_to_be_placed, at_step)
    assert found == ["RanksDisagreeError", "ValueError"]


def failure_where_nothing_is_summed() -> str:
    """Rank 1 fails; the other one brings its gradient to its parameter's placements, for which it needs both."""
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
    optimizer = clara_fused.AdamClaraLocal([param])
    optimizer.found_inf = torch.tensor(0.0)
    for step in range(2):
        param.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
        if step == 1 and dist.get_rank() == 1:
            _bad_option(optimizer)
            with pytest.raises(ValueError) as caught:
                optimizer.step()
            return str(caught.value)
        optimizer.step()
    return ""


def test_a_step_that_fails_where_nothing_is_summed_has_its_own_error(world2: World) -> None:
    first, second = world2.run(failure_where_nothing_is_summed)
    assert not first
    assert "Invalid smoothing value: 7.0" in second


def gradient_that_cannot_be_placed(of_plain: bool) -> str:
    mesh, other_mesh = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    sharded, plain = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)])), nn.Parameter(torch.ones(4))
    optimizer = clara_fused.AdamClaraLocal([sharded, plain], **MOVING)
    for step in range(2):
        sharded.grad, plain.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)]), torch.ones(4)
        if step == 1 and dist.get_rank() == 1:
            if of_plain:
                plain.grad = DTensor.from_local(torch.ones(4), mesh, [Replicate()], run_check=False)
            else:
                sharded.grad = DTensor.from_local(torch.ones(4), other_mesh, [Replicate()] * 2, run_check=False)
        try:
            optimizer.step()
        except Exception as error:
            assert step == 1, error
            return type(error).__name__
    return ""


@pytest.mark.parametrize("of_plain", [True, False], ids=["of a plain parameter", "on another mesh"])
def test_a_gradient_that_cannot_be_placed_is_told_to_all(world2: World, of_plain: bool) -> None:
    first, second = world2.run(gradient_that_cannot_be_placed, of_plain)
    assert first == "RanksDisagreeError"
    assert second == "TypeError" if of_plain else second not in ("", first)


def thawing(variant: str, one_group: bool) -> None:
    """A part that is trained from the third step on begins as in one process."""

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).double()

    models = build(), build()
    for module in (*models[0], models[0]):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    optimizers = []
    for model in models:
        model[0].requires_grad_(False)
        parts = [model] if one_group else model
        optimizers.append(VARIANTS[variant]([{"params": list(part.parameters())} for part in parts], lr=0.1))
    for step in range(4):
        torch.manual_seed(step)
        inputs = torch.randn(6, 8).double()
        for model, optimizer in zip(models, optimizers, strict=True):
            model[0].requires_grad_(step >= 2)
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        ours, alone = (torch.cat(optimizer.lr_scales()) for optimizer in optimizers)
        torch.testing.assert_close(ours, alone, rtol=1e-6, atol=0.0)
        assert ours.max() < 0.5


@pytest.mark.parametrize("one_group", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_part_that_thaws_begins_cautiously(world2: World, variant: str, one_group: bool) -> None:
    """Its size was taken when all of it was frozen, as 0: it began at mu = 1."""
    world2.run(thawing, variant, one_group)


def step_that_fails_on_all_ranks(at_step: int) -> str:
    param = nn.Parameter(torch.ones(4))
    optimizer = clara_fused.AdamClaraLocal([param], **MOVING, process_group=dist.group.WORLD)
    for _ in range(at_step):
        param.grad = torch.ones(4)
        optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["smoothing"] = 7.0 + dist.get_rank()
    with pytest.raises(ValueError) as caught:
        optimizer.step()
    assert torch.equal(param, before)
    optimizer.param_groups[0]["smoothing"] = 0.3
    optimizer.step()
    return str(caught.value)


@pytest.mark.parametrize("at_step", [0, 2])
def test_a_step_that_fails_on_all_ranks_has_its_own_error_and_can_be_repeated(world2: World, at_step: int) -> None:
    first, second = world2.run(step_that_fails_on_all_ranks, at_step)
    assert "smoothing value: 7.0" in first
    assert "smoothing value: 8.0" in second


def tensor_lr_that_differs() -> str:
    lr = torch.tensor(0.02 + 0.001 * dist.get_rank())
    sharded = LAYOUTS["fsdp2-2"][1](make_model(), functools.partial(clara_fused.AdamClaraLocal, lr=lr))
    sharded.backward(0)
    with pytest.raises(RuntimeError) as caught:
        sharded.optimizer.step()
    return str(caught.value)


def test_tensor_learning_rate_is_compared_too(world2: World) -> None:
    for message in world2.run(tensor_lr_that_differs):
        assert "lr = 0.02" in message


def number_of_parameters_that_differs(variant: str) -> str:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2 + dist.get_rank())]
    optimizer = VARIANTS[variant](params, process_group=dist.group.WORLD)
    for param in params:
        param.grad = torch.ones(2)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def test_whole_parameters_under_a_process_group_are_refused_where_shards_are_meant(world2: World) -> None:
    for message in world2.run(number_of_parameters_that_differs, "Local"):
        assert "number of sharded parameters" in message
        assert "ZeroRedundancyOptimizer" in message
    assert world2.run(number_of_parameters_that_differs, "Global") == ["", ""]


# --- bad input -------------------------------------------------------------------------------------------------------


def refusals() -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    messages = []

    def refuse(error: type[Exception], call: Any) -> None:
        with pytest.raises(error) as caught:
            call()
        messages.append(str(caught.value))

    partial = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False))
    refuse(ValueError, clara_fused.AdamClaraLocal([nn.Parameter(torch.ones(1)), partial]).step)
    param = nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Shard(0)]))
    other_mesh = init_device_mesh("cpu", (1, 2))
    optimizer = clara_fused.AdamClaraLocal([param])
    # What autograd would not accept as a gradient can still come from a swapped parameter.
    wrong = distribute_tensor(torch.ones(3), other_mesh, [Replicate(), Shard(0)])
    param.grad = wrong
    refuse(TypeError, optimizer.step)
    assert not optimizer.state
    return messages


def test_bad_dtensors_are_refused_by_name(world2: World) -> None:
    for partial, mesh in world2.run(refusals):
        assert "param group 0, parameter 1 (shape (3,)" in partial
        assert "partial" in partial.lower()
        assert "param group 0, parameter 0 (shape (3,)" in mesh
        assert "gradient is a DTensor on" in mesh


def gradients_with_other_placements(variant: str, placements: list[Any]) -> None:
    """DTensor's autograd leaves gradients of replicated parameters as sums to be done."""
    mesh = init_device_mesh("cpu", (2,))
    rank = dist.get_rank()
    params = [nn.Parameter(distribute_tensor(torch.arange(1.0, 6.0), mesh, [p])) for p in placements]
    wholes = [nn.Parameter(torch.arange(1.0, 6.0)) for _ in params]
    sharded, alone = VARIANTS[variant](params, **MOVING), VARIANTS[variant](wholes, **MOVING)
    for step in range(5):
        grad = torch.randn(5, generator=torch.Generator().manual_seed(step)) + 1.0
        part = grad * (0.25 if rank == 0 else 0.75)
        for param, whole in zip(params, wholes, strict=True):
            # Alternately as it should lie and as an unfinished sum, so that a kept plan meets both.
            param.grad = DTensor.from_local(part, mesh, [Partial()], run_check=False)
            if step % 2:
                param.grad = param.grad.redistribute(mesh, param.placements)
            whole.grad = grad.clone()
        sharded.step()
        alone.step()
    for param, whole in zip(params, wholes, strict=True):
        torch.testing.assert_close(param.full_tensor(), whole.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sharded.lr_scales(), alone.lr_scales(), rtol=1e-5, atol=0)


# Unfinished sums of a copied parameter have its shape, so that nothing but their placement tells them apart.
@pytest.mark.parametrize("placements", [[Replicate()], [Shard(0)], [Replicate(), Shard(0)]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_brought_to_their_parameters_placements(world2: World, variant: str, placements: Any) -> None:
    world2.run(gradients_with_other_placements, variant, placements)


# --- process_group ---------------------------------------------------------------------------------------------------


def test_process_group_must_be_one() -> None:
    with pytest.raises(TypeError, match=r"process_group must be None or a torch\.distributed\.ProcessGroup"):
        clara_fused.AdamClaraLocal([nn.Parameter(torch.ones(1))], process_group="WORLD")


def foreign_group() -> str:
    group = dist.new_group([0])
    if dist.get_rank() == 0:
        clara_fused.AdamClaraLocal([nn.Parameter(torch.ones(1))], process_group=group)
        return ""
    with pytest.raises(ValueError) as caught:
        clara_fused.AdamClaraLocal([nn.Parameter(torch.ones(1))], process_group=group)
    return str(caught.value)


def test_process_group_of_others_is_refused(world2: World) -> None:
    assert "does not belong" in world2.run(foreign_group)[1]


def copies_and_pickles() -> None:
    param = nn.Parameter(torch.ones(4) + dist.get_rank())
    optimizer = clara_fused.AdamClaraLocal([param], **MOVING, process_group=dist.group.WORLD)

    def step(optimizer: torch.optim.Optimizer, number: int) -> list[float]:
        (param,) = optimizer.param_groups[0]["params"]
        param.grad = torch.randn(4, generator=torch.Generator().manual_seed(number + dist.get_rank())) + 1.0
        optimizer.step()
        return optimizer.lr_scales()[0].tolist()

    step(optimizer, 0)
    twin = copy.deepcopy(optimizer)
    assert twin.process_group is dist.group.WORLD
    thawed = pickle.loads(pickle.dumps(optimizer))
    assert thawed.process_group is None
    with pytest.raises(RuntimeError, match=r"set optimizer\.process_group"):
        step(thawed, 1)
    # Pickling once more must not make it forget.
    thawed = pickle.loads(pickle.dumps(thawed))
    with pytest.raises(RuntimeError, match=r"set optimizer\.process_group"):
        step(thawed, 1)
    thawed.process_group = dist.group.WORLD
    scales = [step(each, 1) for each in (optimizer, twin, thawed)]
    assert scales[0] == scales[1] == scales[2]
    assert all(other == scales for other in on_all_ranks(scales))


def test_copies_share_the_group_and_pickles_ask_for_it(world2: World) -> None:
    world2.run(copies_and_pickles)


def group_given_later() -> list[float]:
    param = nn.Parameter(torch.ones(4))
    optimizer = clara_fused.AdamClaraLocal([param], **MOVING)
    for step in range(6):
        if step == 3:
            optimizer.process_group = dist.group.WORLD
        param.grad = torch.randn(4, generator=torch.Generator().manual_seed(step + dist.get_rank())) + 1.0
        if step == 3:
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.state[param]["lr_scale"].fill_(1.0)
        optimizer.step()
    return optimizer.lr_scales()[0].tolist()


def test_process_group_can_be_set_between_steps(world2: World) -> None:
    first, second = world2.run(group_given_later)
    assert first == second != [1.0]


# --- AMP -------------------------------------------------------------------------------------------------------------


def overflow_on_a_sharded_model(variant: str) -> None:
    """found_inf, as a GradScaler sets it on all ranks, leaves everything as it was, and nobody waits for anybody."""
    sharded = LAYOUTS["fsdp2-2"][1](make_model(torch.float32), functools.partial(VARIANTS[variant], **MOVING))
    optimizer = sharded.optimizer
    for step in range(3):
        sharded.step(step, torch.float32)
    before = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
    before += [p.detach().clone() for p in sharded.model.parameters()]
    sharded.backward(3, torch.float32)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.grad_scale = torch.tensor(2.0)
    optimizer.step()
    after = [value for entry in optimizer.state.values() for value in entry.values()]
    after += [p.detach() for p in sharded.model.parameters()]
    for old, new in zip(before, after, strict=True):
        old, new = (t.to_local() if isinstance(t, DTensor) else t for t in (old, new))
        assert torch.equal(old, new)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    scale = optimizer.lr_scales()[0].tolist()
    assert all(other == scale for other in on_all_ranks(scale))


@pytest.mark.parametrize("variant", VARIANTS)
def test_overflow_changes_nothing(world2: World, variant: str) -> None:
    world2.run(overflow_on_a_sharded_model, variant)


def overflow_on_one_rank(variant: str, use_group: bool, fused: bool) -> None:
    """`found_inf` as a scaler sets it that looks at this rank's gradients only: all skip the step, like one process."""
    mesh = init_device_mesh("cpu", (2,))
    rank = dist.get_rank()
    whole = nn.Parameter(torch.linspace(1.0, 2.0, 6))
    part = whole.detach().chunk(2)[rank].clone()
    param = nn.Parameter(part if use_group else distribute_tensor(whole.detach(), mesh, [Shard(0)]))
    options = {**MOVING, "fused": fused}
    optimizer = VARIANTS[variant]([param], **options, process_group=dist.group.WORLD if use_group else None)
    alone = VARIANTS[variant]([whole], **options)
    for step in range(6):
        whole.grad = torch.randn(6, generator=torch.Generator().manual_seed(step)) + 1.0
        part = whole.grad.chunk(2)[rank].clone()
        param.grad = part if use_group else distribute_tensor(whole.grad, mesh, [Shard(0)], src_data_rank=None)
        overflow_here, overflow = (step == 2 and rank == 1) or step == 4, step in (2, 4)
        optimizer.found_inf, alone.found_inf = torch.tensor([float(overflow_here)]), torch.tensor(float(overflow))
        optimizer.step()
        alone.step()
        assert optimizer.found_inf.item() == overflow_here
        assert optimizer.state[param]["step"] == alone.state[whole]["step"]
        mine = param if use_group else param.to_local()
        torch.testing.assert_close(mine.detach(), whole.detach().chunk(2)[rank], rtol=1e-5, atol=1e-6)
        scale = optimizer.lr_scales()[0].item()
        assert on_all_ranks(scale) == [scale] * 2
        assert scale == pytest.approx(alone.lr_scales()[0].item(), rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("use_group", [False, True], ids=["dtensor", "process_group"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_overflow_on_one_rank_skips_the_step_on_all(world2: World, variant: str, use_group: bool, fused: bool) -> None:
    if fused and (reason := why_not_core("cpu", torch.float32)):
        pytest.skip(reason)
    world2.run(overflow_on_one_rank, variant, use_group, fused)


def scaled_training(variant: str, fused_amp: bool) -> float:
    """A GradScaler, with an overflow in the shard of one rank; the largest difference from one process."""
    make = functools.partial(VARIANTS[variant], **MOVING)
    model = make_model()
    sharded = LAYOUTS["fsdp2-2"][1](make_model(), make)
    alone = Sharded(model, make(model.parameters()), 0, 1)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3) for _ in range(2)]
    for step in range(8):
        for run, scaler in zip((sharded, alone), scalers, strict=True):
            run.optimizer.enable_fused_amp(fused_amp)
            run.backward(step, scaled=scaler.scale)
        if step == 4:
            model.up.weight.grad[-1, -1] = torch.inf
            part = sharded.model.up.weight.grad.to_local()
            if dist.get_rank() == dist.get_world_size() - 1:
                part[-1, -1] = torch.inf
        for run, scaler in zip((sharded, alone), scalers, strict=True):
            scaler.step(run.optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        scale = sharded.optimizer.lr_scales()[0].tolist()
        assert all(other == scale for other in on_all_ranks(scale))
    assert {int(entry["step"]) for entry in sharded.optimizer.state.values()} == {7}
    params = full_parameters(sharded)
    return max((params[name] - param).abs().max().item() for name, param in model.named_parameters())


@pytest.mark.parametrize("fused_amp", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_grad_scaler_finds_the_overflow_of_any_rank(world2: World, variant: str, fused_amp: bool) -> None:
    assert max(world2.run(scaled_training, variant, fused_amp)) < 5e-8


def step_in_inference_mode(variant: str) -> float:
    model = fully_shard(nn.Linear(8, 8), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = VARIANTS[variant](model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    with torch.inference_mode():
        optimizer.step()
    return float(optimizer.lr_scales()[0][0])


@pytest.mark.parametrize("variant", ["Local", "Global"])
def test_a_first_step_in_inference_mode(world2: World, variant: str) -> None:
    """torch.optim.Adam takes it; detached parameters have no version that a step could count on."""
    first, second = world2.run(step_in_inference_mode, variant)
    assert first == second > 0.0
