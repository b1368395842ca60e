"""Large tensors keep the path of a sample: the same elements, however the tensor is sharded.

Gradients are given, so that every rank sees its part of the very numbers that one process sees.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import World
from sharded_models import MOVING, VARIANTS, on_all_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

ROWS, COLUMNS = 132, 512  # 67,584 elements: large; runs of 512, of which 32 have a path
SAMPLED = (ROWS, COLUMNS // 16)
STEPS = 3


def given(step: int, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(step)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") + 0.3


def initial(shape: tuple[int, ...]) -> Tensor:
    return torch.linspace(-1.0, 1.0, given(0, shape).numel(), dtype=torch.float64, device="cpu").reshape(shape)


def distributed(values: Tensor, mesh: Any, placements: Any) -> Tensor:
    return distribute_tensor(values.clone(), mesh, placements, src_data_rank=None)


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def compare(
    variant: str,
    mesh_shape: tuple[int, ...],
    placements: list[Any],
    shape: tuple[int, ...],
    fraction: float = 1 / 16,
    fused: bool | None = None,
) -> tuple[int, ...]:
    """A sharded and a whole parameter, of which this fraction has a path, step by step; the shape of the path."""
    mesh = init_device_mesh("cpu", mesh_shape)
    alone = nn.Parameter(initial(shape))
    param = nn.Parameter(distributed(alone.detach(), mesh, placements))
    sharded_optimizer = VARIANTS[variant]([param], **MOVING, fused=fused)
    optimizer = VARIANTS[variant]([alone], **MOVING, path_fraction=fraction)
    for step in range(STEPS):
        alone.grad = given(step, shape)
        param.grad = distributed(alone.grad, mesh, placements)
        sharded_optimizer.step()
        optimizer.step()
        torch.testing.assert_close(whole(param.detach()), alone.detach(), rtol=1e-7, atol=1e-9)
        path, expected = sharded_optimizer.state[param]["path"], optimizer.state[alone]["path"]
        assert isinstance(path, DTensor)
        assert path.device_mesh == mesh
        assert path.placements == param.placements
        assert path.shape == expected.shape
        torch.testing.assert_close(whole(path), expected, rtol=1e-9, atol=1e-12)
        scale = sharded_optimizer.lr_scales()[0].item()
        assert scale == pytest.approx(optimizer.lr_scales()[0].item(), rel=2e-7)
        assert scale != 1.0
    assert len(set(on_all_ranks(sharded_optimizer.lr_scales()[0].item()))) == 1
    return tuple(path.shape)


KEEPS_THE_SAMPLE: dict[str, tuple[tuple[int, ...], list[Any], tuple[int, ...]]] = {
    "rows": ((2,), [Shard(0)], (ROWS, COLUMNS)),
    "rows-uneven": ((2,), [Shard(0)], (131, 1024)),
    "rows-some-empty": ((2,), [Shard(0)], (1, 131072)),
    "copies": ((2,), [Replicate()], (ROWS, COLUMNS)),
    "whole-runs-of-columns": ((2,), [Shard(1)], (64, 2048)),
    "rows-of-three-dimensions": ((2,), [Shard(0)], (33, 32, 64)),
    "one-dimension": ((2,), [Shard(0)], (131072,)),
}


@pytest.mark.parametrize("fused", [False, None], ids=["torch", "any"])
@pytest.mark.parametrize("variant", ["Global", "Local"])
@pytest.mark.parametrize("case", KEEPS_THE_SAMPLE)
def test_shards_keep_the_path_of_the_same_sample(world2: World, case: str, variant: str, fused: bool | None) -> None:
    """Also shards so small that a tensor of their size would keep its whole path."""
    for path in world2.run(compare, variant, *KEEPS_THE_SAMPLE[case], 1 / 16, fused):
        assert math.prod(path) * 16 == math.prod(KEEPS_THE_SAMPLE[case][2])


def test_rows_over_two_mesh_dimensions(world4: World) -> None:
    for path in world4.run(compare, "Smoothed", (2, 2), [Shard(0), Shard(0)], (ROWS, COLUMNS)):
        assert path == SAMPLED
    for path in world4.run(compare, "Local", (2, 2), [Shard(0), Shard(1)], (64, 2048)):
        assert path == (64, 128)


@pytest.mark.parametrize(
    ("placements", "shape"),
    [([Shard(1)], (ROWS, COLUMNS)), ([Shard(0)], (65600,)), ([Shard(2)], (16, 64, 128))],
    ids=["runs-cut", "runs-cut-1d", "other-dimension"],
)
def test_shards_that_cut_runs_keep_the_whole_path(world2: World, placements: Any, shape: tuple[int, ...]) -> None:
    for path in world2.run(compare, "Local", (2,), placements, shape, 1.0):
        assert path == shape


def plain_shards(variant: str) -> None:
    """Under process_group nobody knows what whole tensor the shards are of."""
    param = nn.Parameter(initial((ROWS, COLUMNS)).chunk(2)[dist.get_rank()].clone())
    optimizer = VARIANTS[variant]([param], **MOVING, process_group=dist.group.WORLD)
    alone = nn.Parameter(initial((ROWS, COLUMNS)))
    expected = VARIANTS[variant]([alone], **MOVING, path_fraction=1.0)
    for step in range(STEPS):
        alone.grad = given(step)
        param.grad = alone.grad.chunk(2)[dist.get_rank()].clone()
        optimizer.step()
        expected.step()
    assert optimizer.state[param]["path"].shape == param.shape
    torch.testing.assert_close(param.detach(), alone.detach().chunk(2)[dist.get_rank()], rtol=1e-7, atol=1e-9)
    assert optimizer.lr_scales()[0].item() == pytest.approx(expected.lr_scales()[0].item(), rel=2e-7)


@pytest.mark.parametrize("variant", ["Global", "Local"])
def test_plain_shards_keep_the_whole_path(world2: World, variant: str) -> None:
    world2.run(plain_shards, variant)


# --- checkpoints -----------------------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def layer_on(ranks: int) -> tuple[OneLayer, Any]:
    mesh = init_device_mesh("cpu", (ranks,)) if ranks > 1 else None
    values = initial((ROWS, COLUMNS))
    return OneLayer(values if mesh is None else distributed(values, mesh, [Shard(0)])), mesh


def take(optimizer: torch.optim.Optimizer, layer: OneLayer, mesh: Any, step: int) -> None:
    grad = given(step)
    layer.weight.grad = grad if mesh is None else distributed(grad, mesh, layer.weight.placements)
    optimizer.step()


def outcome(optimizer: Any, layer: OneLayer) -> tuple[list[float], float, float]:
    weight, path = whole(layer.weight.detach()), whole(optimizer.state[layer.weight]["path"])
    return weight.flatten()[::997].tolist(), path.square().sum().item(), optimizer.lr_scales()[0].item()


def saved(ranks: int, variant: str, folder: str) -> Any:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    layer, mesh = layer_on(ranks)
    optimizer = VARIANTS[variant](layer.parameters(), **MOVING)
    for step in range(2):
        take(optimizer, layer, mesh, step)
    state = {"model": layer.state_dict(), "optimizer": get_optimizer_state_dict(layer, optimizer)}
    dcp.save(state, checkpoint_id=folder)
    take(optimizer, layer, mesh, 2)
    return outcome(optimizer, layer)


def resumed(ranks: int, variant: str, folder: str) -> Any:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    layer, mesh = layer_on(ranks)
    optimizer = VARIANTS[variant](layer.parameters(), **MOVING)
    state = {"model": layer.state_dict(), "optimizer": get_optimizer_state_dict(layer, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    layer.load_state_dict(state["model"])
    set_optimizer_state_dict(layer, optimizer, state["optimizer"])
    assert optimizer.state[layer.weight]["path"].shape == SAMPLED
    take(optimizer, layer, mesh, 2)
    return outcome(optimizer, layer)


@pytest.mark.parametrize("variant", ["Global", "Smoothed"])
def test_sampled_paths_are_resharded(worlds, tmp_path: Path, variant: str) -> None:
    """4 -> 2 -> 1 ranks and back."""
    expected = worlds[4].run(saved, 4, variant, str(tmp_path / "4"))[0]
    for ranks in (2, 1):
        for values in worlds[ranks].run(resumed, ranks, variant, str(tmp_path / "4")):
            for got, want in zip(values, expected, strict=True):
                assert got == pytest.approx(want, rel=2e-7, abs=1e-9)
    expected = worlds[1].run(saved, 1, variant, str(tmp_path / "1"))[0]
    for values in worlds[4].run(resumed, 4, variant, str(tmp_path / "1")):
        for got, want in zip(values, expected, strict=True):
            assert got == pytest.approx(want, rel=2e-7, abs=1e-9)


def through_full_state_dict(cpu_offload: bool) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    layer, mesh = layer_on(2)
    optimizer = VARIANTS["Local"](layer.parameters(), **MOVING)
    for step in range(2):
        take(optimizer, layer, mesh, step)
    options = StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload)
    state = copy.deepcopy(get_optimizer_state_dict(layer, optimizer, options=options))
    if state:
        assert state["state"]["weight"]["path"].shape == SAMPLED
    second, _ = layer_on(2)
    with torch.no_grad():
        second.weight.copy_(layer.weight)
    other = VARIANTS["Local"](second.parameters(), **MOVING)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(second, other, state, options=options)
    take(optimizer, layer, mesh, 2)
    take(other, second, mesh, 2)
    assert outcome(other, second) == outcome(optimizer, layer)
    path = other.state[second.weight]["path"]
    assert path.placements == second.weight.placements


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_sampled_paths_in_full_state_dicts(world2: World, cpu_offload: bool) -> None:
    world2.run(through_full_state_dict, cpu_offload)


def between_whole_and_sharded() -> None:
    """optimizer.state_dict() of shards into a whole parameter and back, also where the other one keeps all elements."""
    layer, mesh = layer_on(2)
    optimizer = VARIANTS["Local"](layer.parameters(), **MOVING)
    alone = OneLayer(initial((ROWS, COLUMNS)))
    everything = VARIANTS["Local"](alone.parameters(), **MOVING, path_fraction=1.0)
    for step in range(2):
        take(everything, alone, None, step)
    optimizer.load_state_dict(everything.state_dict())
    optimizer.param_groups[0]["path_fraction"] = 1 / 16
    optimizer.load_state_dict({**everything.state_dict(), "param_groups": optimizer.state_dict()["param_groups"]})
    path = optimizer.state[layer.weight]["path"]
    assert path.shape == SAMPLED  # a whole path is sampled where this optimizer samples
    runs = everything.state[alone.weight]["path"].view(ROWS, -1, 512)
    torch.testing.assert_close(whole(path), runs[..., :32].flatten(1))
    take(optimizer, layer, mesh, 2)
    sampled = VARIANTS["Local"]([nn.Parameter(initial((ROWS, COLUMNS)))], **MOVING)
    sampled.load_state_dict(optimizer.state_dict())
    (entry,) = sampled.state.values()
    torch.testing.assert_close(entry["path"], whole(optimizer.state[layer.weight]["path"]), rtol=0, atol=0)


def test_state_dicts_between_shards_and_whole_tensors(world2: World) -> None:
    world2.run(between_whole_and_sharded)
