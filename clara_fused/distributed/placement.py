"""Who holds what: the ranks among which a parameter is divided, and the collectives that make its sums whole again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..step import Location
from .dtensors import is_dtensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

ParamGroups = Sequence[Mapping[str, Any]]


class ProcessGroupReference:
    """Holds the `process_group` of an optimizer through deepcopy (shared) and pickling (lost: groups are per process).

    `lost` tells an optimizer that came out of a pickle to ask for its group instead of summing over none.
    """

    def __init__(self, group: ProcessGroup | None, lost: bool = False) -> None:
        self.group = group
        self.lost = lost

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessGroupReference:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return ProcessGroupReference, (None, self.lost or self.group is not None)


def check_process_group(group: object) -> None:
    """Check that an optimizer can sum over this process group, or that there is none.

    Raises:
        TypeError: not a torch.distributed process group.
        ValueError: a group that this rank does not belong to.
    """
    if group is None:
        return
    dist = torch.distributed
    if not dist.is_available() or not isinstance(group, (dist.ProcessGroup, type(dist.GroupMember.NON_GROUP_MEMBER))):
        raise TypeError(
            f"process_group must be None or a torch.distributed.ProcessGroup (torch.distributed.group.WORLD after "
            f"init_process_group, for example), got {type(group).__name__}"
        )
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: this rank does not belong to the group")


def needs_sums(param_groups: ParamGroups, process_group: ProcessGroup | None) -> bool:
    """Whether some parameter may be spread over several ranks."""
    return process_group is not None or any(is_dtensor(param) for _, param in located(param_groups))


def located(param_groups: ParamGroups) -> Iterator[tuple[Location, Tensor]]:
    """All parameters, with their places."""
    for group_index, group in enumerate(param_groups):
        for param_index, param in enumerate(group["params"]):
            yield Location(group_index, param_index), param


def signature_of(param_groups: ParamGroups) -> list[object]:
    """What decides which rank adds what: the parameters, and the placements of those that are DTensors."""
    return [
        (id(param), param.device_mesh, param.placements) if is_dtensor(param) else id(param)  # type: ignore[attr-defined]
        for _, param in located(param_groups)
    ]


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


def ranks_of(group: ProcessGroup) -> tuple[int, ...]:
    """Global ranks of a process group, sorted."""
    return tuple(sorted(torch.distributed.get_process_group_ranks(group)))


@dataclass(frozen=True)
class Placed:
    """A parameter of the optimizer and the ranks among which it is divided."""

    location: Location
    param: Tensor
    mesh: Any  # DeviceMesh; None for a plain tensor
    sharded_dims: frozenset[int]  # mesh dimensions that shard it
    holders: tuple[int, ...]  # global ranks whose parts make up the whole tensor, sorted


def place(location: Location, param: Tensor, process_group: ProcessGroup | None) -> Placed:
    """Where a parameter is; a plain one is divided among `process_group`, or whole without one."""
    if is_dtensor(param):
        mesh, placements = cast("DTensor", param).device_mesh, cast("DTensor", param).placements
        dims = frozenset(
            dim for dim, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(dim) > 1
        )
        return Placed(location, param, mesh, dims, _ranks_along(mesh, dims))
    alone = (torch.distributed.get_rank(),)
    return Placed(location, param, None, frozenset(), alone if process_group is None else ranks_of(process_group))


def _ranks_along(mesh: Any, dims: frozenset[int]) -> tuple[int, ...]:
    """Global ranks that differ from this one in these dimensions of the mesh only; this one alone if outside of it."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return (torch.distributed.get_rank(),)
    index = tuple(slice(None) if dim in dims else coordinate[dim] for dim in range(mesh.ndim))
    return tuple(sorted(mesh.mesh[index].reshape(-1).tolist()))


@dataclass(frozen=True)
class Collective:
    """One sum over a process group, and the tensors that go into it.

    Each tensor is weighted with 1 / (number of copies in the group), so that what several ranks hold alike counts
    once, whoever contributes it, and everybody ends up with the same bits.
    """

    group: Any
    ranks: tuple[int, ...]
    mesh: Any  # DeviceMesh whose dimensions the group consists of; None for the user's `process_group`
    members: tuple[Placed, ...]

    @property
    def groups_to_agree(self) -> list[Any]:
        """Process groups that together hold all ranks that must agree: copies of a shard are trained alike as well."""
        if self.mesh is None:
            return [self.group]
        if self.mesh.get_coordinate() is None:
            return []
        return [self.mesh.get_group(dim) for dim in range(self.mesh.ndim) if self.mesh.size(dim) > 1]

    def weight(self, member: Placed) -> float:
        return len(member.holders) / len(self.ranks)

    @cached_property
    def device(self) -> torch.device:
        """Where the numbers have to be to be sent."""
        return sending_device(self.group, self.members)


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
        ranks = _ranks_along(mesh, dims)
        group = None
        if len(ranks) > 1:
            group = mesh.get_group(next(iter(dims))) if len(dims) == 1 else group_of(ranks)
        collectives.append(Collective(group, ranks, mesh, tuple(members)))
    if process_group is not None:
        collectives.append(Collective(process_group, ranks_of(process_group), None, tuple(plain)))
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
    return [replace(collective, members=tuple(members)) for collective, members in kept]
