"""The sums over ranks: who takes part in which, what goes into it, and how it is sent."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..step import Location, moved
from .placement import Placed, ranks_along, ranks_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Groups over several mesh dimensions, made at most once per set of ranks and initialized torch.distributed.
_groups_by_ranks: WeakKeyDictionary[Any, dict[tuple[int, ...], ProcessGroup]] = WeakKeyDictionary()


def group_of(ranks: tuple[int, ...]) -> ProcessGroup:
    """A process group of exactly these global ranks; called by all of them, and only by them."""
    import torch.distributed as dist

    world = dist.group.WORLD
    assert world is not None
    if len(ranks) == dist.get_world_size():
        return world
    known = _groups_by_ranks.setdefault(world, {})
    if ranks not in known:
        known[ranks] = dist.new_group(list(ranks), use_local_synchronization=True, group_desc="clara_fused")
    return known[ranks]


class Route(NamedTuple):
    """How the rows of one step's tensors map to those of a collective; kept while the same tensors take part."""

    locations: list[Location]
    sources: Tensor  # index of the tensors among the step's
    rows: Tensor  # their row in the collective
    weights: Tensor  # float64 [k, 1]
    absent: list[tuple[int, Location]]  # rows of members without a gradient on this rank


class Collective:
    """One sum over a process group, with a row for each of its members.

    Each tensor is weighted with 1 / (number of copies in the group), so that what several ranks hold alike counts
    once, whoever contributes it, and everybody ends up with the same bits.

    Args:
        mesh: DeviceMesh whose dimensions the group consists of; None for the user's `process_group`.
    """

    def __init__(self, group: Any, ranks: tuple[int, ...], mesh: Any, members: Sequence[Placed]) -> None:
        self.group, self.ranks, self.mesh, self.members = group, ranks, mesh, tuple(members)
        self._route: Route | None = None

    @property
    def groups_to_agree(self) -> list[Any]:
        """Process groups that together hold all ranks that must agree: copies of a shard are trained alike as well."""
        if self.mesh is None:
            return [self.group]
        if self.mesh.get_coordinate() is None:
            return []
        return [self.mesh.get_group(dim) for dim in range(self.mesh.ndim) if self.mesh.size(dim) > 1]

    @cached_property
    def device(self) -> torch.device:
        """Where the numbers have to be to be sent."""
        return sending_device(self.group, self.members)

    def weight(self, member: Placed) -> float:
        return len(member.holders) / len(self.ranks)

    def route(self, locations: list[Location], device: torch.device) -> Route:
        """The route of a step's tensors, whose rows are on `device`."""
        if self._route is None or self._route.locations != locations:
            members = {member.location: (row, member) for row, member in enumerate(self.members)}
            sources = [source for source, location in enumerate(locations) if location in members]
            found = [members.pop(locations[source]) for source in sources]
            self._route = Route(
                locations,
                on_device(sources, torch.int64, device),
                on_device([row for row, _ in found], torch.int64, self.device),
                on_device([self.weight(member) for _, member in found], torch.float64, self.device).unsqueeze(1),
                [(row, location) for location, (row, _) in members.items()],
            )
        return self._route

    def start(self, numbers: Tensor) -> Any:
        """Begin to sum `numbers` in place; `wait()` on what is returned."""
        return torch.distributed.all_reduce(numbers, group=self.group, async_op=True)

    def reduced(self, numbers: Tensor, operation: str) -> Tensor:
        """Element by element the "SUM" or "MAX" of the ranks' numbers, on `device`."""
        sent = moved(numbers, self.device).clone()
        torch.distributed.all_reduce(sent, op=getattr(torch.distributed.ReduceOp, operation), group=self.group)
        return sent


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of some Python numbers, without waiting for the device."""
    on_host = torch.tensor(values, dtype=dtype, device="cpu")
    return moved(on_host.pin_memory() if device.type == "cuda" else on_host, device)


def sending_device(group: Any, members: Sequence[Placed]) -> torch.device:
    """Where the tensors are, unless the group cannot send from there."""
    sendable = [device.type for device in getattr(group, "_device_types", [])]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if members:
        device = members[0].param.device
    else:
        # A rank without parameters can only guess where the others have theirs.
        device = accelerator or torch.device("cpu")
    if sendable and device.type not in sendable:
        return accelerator if accelerator is not None and accelerator.type in sendable else torch.device("cpu")
    return device


def collectives_per_mesh(placed: Sequence[Placed], process_group: ProcessGroup | None) -> list[Collective]:
    """One collective per mesh, over the ranks that differ in a shard, and one for `process_group`.

    In the same order on all ranks: meshes as the parameters come, of which `process_group` may give each rank others,
    and `process_group`, also on a rank that has no parameters for it, as the others wait.
    """
    by_mesh: dict[Any, list[Placed]] = {}
    for member in placed:
        by_mesh.setdefault(member.mesh, []).append(member)
    plain = by_mesh.pop(None, [])
    collectives = []
    for mesh, members in by_mesh.items():
        dims = frozenset[int]().union(*(member.sharded_dims for member in members))
        ranks = ranks_along(mesh, dims)
        group = None
        if len(ranks) > 1:
            group = mesh.get_group(next(iter(dims))) if len(dims) == 1 else group_of(ranks)
        collectives.append(Collective(group, ranks, mesh, members))
    if process_group is not None:
        collectives.append(Collective(process_group, ranks_of(process_group), None, plain))
    return collectives


def merged(collectives: Sequence[Collective], others: Sequence[Placed]) -> list[Collective]:
    """As few collectives as sum up everything: what lives inside the ranks of a larger one joins it.

    `others`, tensors without a collective, join as well: the copies of a plain parameter may differ in their last bits
    from rank to rank, and the one scale of AdamClaraGlobal, which follows the evidence of all tensors, must not.
    """
    kept: list[tuple[Collective, list[Placed]]] = []
    for collective in sorted(collectives, key=lambda each: -len(each.ranks)):
        for larger, members in kept:
            if set(collective.ranks) <= set(larger.ranks):
                members.extend(collective.members)
                break
        else:
            kept.append((collective, list(collective.members)))
    if kept:
        kept[0][1].extend(others)
    return [Collective(each.group, each.ranks, each.mesh, members) for each, members in kept]
