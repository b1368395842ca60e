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
from ranks import World
from sharded_models import LAYOUTS, LIVELY, VARIANTS, make_model, on_all_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import clara_fused


def gradient_on_some_ranks_only(variant: str, use_group: bool) -> list[list[float]]:
    """Two shards per rank; rank 1 has no gradient for the second before step 3, then none at all for a step."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank = dist.get_rank()

    def parameter(values: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(values if use_group else DTensor.from_local(values, mesh, [Shard(0)], run_check=False))

    params = [parameter(torch.full((4,), 1.0 + i, dtype=torch.float64)) for i in range(2)]
    optimizer = VARIANTS[variant](params, **LIVELY, process_group=dist.group.WORLD if use_group else None)
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
    return history


@pytest.mark.parametrize("use_group", [False, True], ids=["dtensor", "process_group"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scales_stay_equal_where_gradients_are_missing(world2: World, variant: str, use_group: bool) -> None:
    first, second = world2.run(gradient_on_some_ranks_only, variant, use_group)
    assert first == second
    assert all(a != b for a, b in itertools.pairwise(first))


def rank_without_parameters_of_its_own() -> list[float]:
    """ZeRO with more ranks than parameters: some ranks never step anything."""
    param = nn.Parameter(torch.ones(3, dtype=torch.float64))
    make = functools.partial(clara_fused.AdamClaraGlobal, **LIVELY, process_group=dist.group.WORLD)
    optimizer = torch.distributed.optim.ZeroRedundancyOptimizer([param], optimizer_class=make)
    for step in range(5):
        param.grad = torch.randn(3, generator=torch.Generator().manual_seed(step), dtype=torch.float64) + 1.0
        optimizer.step()
    return param.tolist()


def test_rank_without_parameters_takes_part(world2: World) -> None:
    first, second = world2.run(rank_without_parameters_of_its_own)
    assert first == second != [1.0, 1.0, 1.0]


# --- disagreement ----------------------------------------------------------------------------------------------------


def message_of_disagreement(layout: str, variant: str, first: dict[str, Any], later: dict[str, Any]) -> tuple[int, str]:
    """Rank 1 differs from rank 0, from the start or from step 2 on; the step that raised, and what it said."""
    differs = dist.get_rank() == 1
    options = {**LIVELY, **(first if differs else {})}
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
    refuse(ValueError, lambda: clara_fused.AdamClaraLocal([nn.Parameter(torch.ones(1)), partial]))
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
    sharded, alone = VARIANTS[variant](params, **LIVELY), VARIANTS[variant](wholes, **LIVELY)
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
    optimizer = clara_fused.AdamClaraLocal([param], **LIVELY, process_group=dist.group.WORLD)

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
    optimizer = clara_fused.AdamClaraLocal([param], **LIVELY)
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
    sharded = LAYOUTS["fsdp2-2"][1](make_model(torch.float32), functools.partial(VARIANTS[variant], **LIVELY))
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
