"""What is sent: how many collectives a step, over which ranks, how much; and nothing that grows."""

from __future__ import annotations

import functools
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import World
from sharded_models import LAYOUTS, MOVING, VARIANTS, make_model, on_all_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import clara_fused
from clara_fused.distributed import collectives

CHECKSUM_BYTES = 32 * 8
ROW_BYTES = 9 * 8  # of adaptation.PathSums
TOTAL_BYTES = 8 * 8  # of adaptation.Evidence


class SentSums:
    """Records every all-reduce that runs while it is active: the ranks, and the bytes."""

    def __enter__(self) -> list[tuple[tuple[int, ...], int]]:
        self._original = dist.all_reduce
        sent: list[tuple[tuple[int, ...], int]] = []

        def recording(tensor: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
            sent.append((tuple(dist.get_process_group_ranks(group)), tensor.numel() * tensor.element_size()))
            return self._original(tensor, *args, group=group, **kwargs)

        dist.all_reduce = recording
        return sent

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._original


def collectives_of_a_step(layout: str, variant: str) -> tuple[list[tuple[tuple[int, ...], int]], dict[str, int]]:
    """What one step sends after the first, as the optimizer's calls and as PyTorch's own communication counter."""
    sharded = LAYOUTS[layout][1](make_model(), functools.partial(VARIANTS[variant], **MOVING))
    sharded.step(0)
    sharded.backward(1)
    optimizer = getattr(sharded.optimizer, "optim", sharded.optimizer)  # ZeRO's own broadcasts are not ours
    with CommDebugMode() as counter, SentSums() as sent:
        optimizer.step()
    return sent, {str(op): count for op, count in counter.get_comm_counts().items()}


# Per layout, seen from rank 0: the ranks of the sums and the number of tensors in each, under Local and under Global;
# and whether Global sums its totals too. The model has 9 parameters; tensor parallelism places 4 of them on its mesh.
ALL = (0, 1, 2, 3)
Sums = list[tuple[tuple[int, ...], int]]
EXPECTED: dict[str, tuple[Sums, Sums, bool]] = {
    "fsdp2-4": ([(ALL, 9)], [(ALL, 9)], False),
    "hsdp-2x2": ([((0, 1), 9)], [((0, 1), 9)], False),  # mesh [[0, 1], [2, 3]]: never over the replicas
    "tp-2": ([((0, 1), 4)], [((0, 1), 9)], False),  # Global: copies as well, for the scale's last bit
    # Two meshes: data x tensor parallel for 4 parameters, data parallel alone (ranks 0 and 2) for 5.
    "fsdp2-tp-2x2": ([(ALL, 4), ((0, 2), 5)], [(ALL, 9)], False),
    "fsdp1-4": ([(ALL, 9)], [(ALL, 9)], True),
    "zero1-2": ([], [], True),
    "ddp-2": ([], [], False),
}


def test_the_page_says_how_much_is_sent() -> None:
    page = " ".join((Path(__file__).resolve().parents[2] / "docs/distributed.md").read_text(encoding="utf-8").split())
    assert f"{CHECKSUM_BYTES} bytes for a checksum of the hyperparameters, plus {ROW_BYTES} bytes per tensor" in page
    assert f"AdamClaraGlobal sends {CHECKSUM_BYTES + TOTAL_BYTES} bytes more" in page


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", EXPECTED)
def test_one_collective_per_mesh_over_the_ranks_that_shard(worlds, layout: str, variant: str) -> None:
    size = LAYOUTS[layout][0]
    sent, counted = worlds[size].run(collectives_of_a_step, layout, variant)[0]
    by_tensor, by_tensor_global, totals = EXPECTED[layout]
    expected = [
        (ranks, CHECKSUM_BYTES + ROW_BYTES * rows)
        for ranks, rows in (by_tensor_global if variant == "Global" else by_tensor)
    ]
    if variant == "Global" and totals:
        expected.append((tuple(range(size)), CHECKSUM_BYTES + TOTAL_BYTES))
    assert sorted(sent) == sorted(expected)
    assert sum(counted.values()) == len(expected), counted


def objects_over_steps(layout: str, variant: str) -> list[tuple[int, int]]:
    """Numbers of Python objects and of tensors after every 50 steps, each with fresh gradients."""
    sharded = LAYOUTS[layout][1](make_model(), functools.partial(VARIANTS[variant], **MOVING))
    sharded.step(0)
    gradients = [(param, param.grad) for param in sharded.model.parameters()]
    counts = []
    for step in range(300):
        for param, grad in gradients:
            param.grad = grad.clone()
        sharded.optimizer.step()
        if step % 50 == 49:
            gc.collect()
            objects = gc.get_objects()
            counts.append((len(objects), sum(isinstance(o, torch.Tensor) for o in objects)))
            del objects
    return counts


@pytest.mark.parametrize(("layout", "variant"), [("fsdp2-2", "Smoothed"), ("tp-2", "Global")])
def test_nothing_grows_over_hundreds_of_steps(world2: World, layout: str, variant: str) -> None:
    for counts in world2.run(objects_over_steps, layout, variant):
        (objects, tensors), (last_objects, last_tensors) = counts[1], counts[-1]
        assert last_tensors == tensors, counts
        assert last_objects - objects <= 20, counts  # of 200 steps: less than one object in ten steps


def _placed(mesh: Any, values: torch.Tensor, *placements: Any) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(values, mesh, placements, src_data_rank=None))


def mixed_placements(variant: str) -> tuple[list[float], list[float], list[tuple[tuple[int, ...], int]]]:
    """Plain, replicated, sharded over one or both mesh dimensions: scales, those of whole copies, what is sent."""
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(1)
    wholes = [nn.Parameter(torch.randn(5, 3, dtype=torch.float64)) for _ in range(5)]
    copied, rows, columns = Replicate(), Shard(0), Shard(1)
    placements = [None, (copied, copied), (rows, copied), (copied, columns), (rows, columns)]
    params = [
        nn.Parameter(whole.detach().clone()) if placed is None else _placed(mesh, whole.detach().clone(), *placed)
        for whole, placed in zip(wholes, placements, strict=True)
    ]
    sharded, alone = (VARIANTS[variant](ps, **MOVING) for ps in (params, wholes))
    sent: list[tuple[tuple[int, ...], int]] = []
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        for size, (param, whole) in enumerate(zip(params, wholes, strict=True), start=1):
            whole.grad = size * (torch.randn(5, 3, generator=generator, dtype=torch.float64) + 1.0)
            param.grad = (
                distribute_tensor(whole.grad.clone(), mesh, param.placements, src_data_rank=None)
                if isinstance(param, DTensor)
                else whole.grad.clone()
            )
        with SentSums() as recorded:
            sharded.step()
        sent = recorded
        alone.step()
    return sharded.lr_scales()[0].tolist(), alone.lr_scales()[0].tolist(), sent


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_placements_count_every_element_once(world4: World, variant: str) -> None:
    by_rank = world4.run(mixed_placements, variant)
    for scales, expected, sent in by_rank:
        assert scales == by_rank[0][0]
        assert scales == pytest.approx(expected, rel=2e-7)
        assert max(abs(scale - 1.0) for scale in scales) > 0.05
        # All dimensions shard something, so one collective over all of the mesh serves everything.
        assert sent == [(ALL, CHECKSUM_BYTES + ROW_BYTES * (5 if variant == "Global" else 4))]


def sub_mesh_of_a_larger_world(variant: str) -> float:
    """Two meshes side by side, each with other values."""
    sides = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("side", "rows", "columns"))
    mesh = sides["rows", "columns"]
    torch.manual_seed(dist.get_rank() // 2)
    param = _placed(mesh, torch.randn(6, 4, dtype=torch.float64), Shard(0), Shard(1))
    optimizer = VARIANTS[variant]([param], **MOVING)
    whole = nn.Parameter(param.full_tensor().detach().clone())
    alone = VARIANTS[variant]([whole], **MOVING)
    for step in range(4):
        whole.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64) + 1.0
        param.grad = distribute_tensor(whole.grad, mesh, param.placements, src_data_rank=None)
        optimizer.step()
        alone.step()
        assert optimizer.lr_scales()[0].item() == pytest.approx(alone.lr_scales()[0].item(), rel=2e-7)
    return optimizer.lr_scales()[0].item()


@pytest.mark.parametrize("variant", ["Local", "Global"])
def test_meshes_side_by_side_do_not_mix(world4: World, variant: str) -> None:
    scales = world4.run(sub_mesh_of_a_larger_world, variant)
    assert scales[0] == scales[1]
    assert scales[2] == scales[3]
    assert scales[0] != scales[2]


def groups_over_several_dimensions() -> tuple[list[int], bool]:
    """A group for a mesh that is neither one dimension nor the world, as 2-D meshes in a larger world need it."""
    ranks = (0, 1) if dist.get_rank() < 2 else (2, 3)
    group = collectives.group_of(ranks)
    rank = torch.tensor([dist.get_rank()])
    dist.all_reduce(rank, group=group)
    world = collectives.group_of((0, 1, 2, 3))
    return rank.tolist(), collectives.group_of(ranks) is group and world is dist.group.WORLD


def test_groups_over_several_dimensions_are_made_once(world4: World) -> None:
    assert world4.run(groups_over_several_dimensions) == [([1], True)] * 2 + [([5], True)] * 2


def unsharded_mesh_of_one(variant: str) -> int:
    mesh = init_device_mesh("cpu", (1,))
    param = _placed(mesh, torch.ones(3), Shard(0))
    param.grad = distribute_tensor(torch.ones(3), mesh, [Shard(0)])
    with SentSums() as sent:
        VARIANTS[variant]([param]).step()
    return len(sent)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_rank_sends_nothing(world1: World, variant: str) -> None:
    assert world1.run(unsharded_mesh_of_one, variant) == [0]


def scales_with_differing_copies() -> list[float]:
    """Copies of a plain parameter whose gradients differ in the last bits, beside a sharded one, under Global."""
    mesh = init_device_mesh("cpu", (4,))
    plain = nn.Parameter(torch.ones(7, dtype=torch.float64))
    sharded = _placed(mesh, torch.ones(8, dtype=torch.float64), Shard(0))
    optimizer = clara_fused.AdamClaraGlobal([plain, sharded], **MOVING)
    for step in range(20):
        noise = torch.randn(8, generator=torch.Generator().manual_seed(step), dtype=torch.float64) + 1.0
        plain.grad = noise[:7] * (1.0 + 1e-6 * dist.get_rank())
        sharded.grad = distribute_tensor(noise, mesh, [Shard(0)], src_data_rank=None)
        optimizer.step()
        scales = on_all_ranks(optimizer.lr_scales()[0].tolist())
        assert all(s == scales[0] for s in scales), scales
    return optimizer.lr_scales()[0].tolist()


def test_global_scale_is_one_although_copies_differ(world4: World) -> None:
    world4.run(scales_with_differing_copies)
