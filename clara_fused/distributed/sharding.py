"""Whole-tensor sums for sharded parameters: the other ranks' part in a step.

What `measure` leaves are plain sums over elements, so those of a sharded tensor are the sums of its shards' over the
ranks that hold them. `RankSums` adds them up with one collective per mesh and step. From there on all ranks compute the
same: the walk, the evidence and the scale of a tensor are the whole tensor's on every rank.

Plain parameters under `process_group` are shards as well, with one exception: AdamClaraGlobal has no use for sums
tensor by tensor, so there each rank may hold parameters of its own, and what is added up is the evidence of all of
them. Their walks are those of what is here. (FSDP1 tells its shards by a mark, and wants 0-dim state to be equal on all
ranks; DeepSpeed's partitions can be told as well: these are summed tensor by tensor. Plain parameters beside FSDP1's,
its `ignored_modules`, are whole on every rank: every rank measures all of them, and so brings 1 / (number of ranks) of
what they say into the total.)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from .. import adaptation
from ..options import StepInputs
from ..scalars import TensorScalars
from ..state import SCALARS, is_trained, names_of, size_of
from ..step import Bucket, Location, moved
from ..tensors import check_placements
from .agreement import CHECKSUM_BITS, DisagreementWatch, RanksDisagreeError, agreed_collectives
from .collectives import Collective, on_device
from .dtensors import place_gradient
from .foreign import check_shards
from .placement import ParamGroups, holds_fsdp1_shards, located, needs_sums, signature_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def join(optimizer: Any, inputs: StepInputs) -> tuple[RankSums | None, StepInputs]:
    """Take up a step together with the ranks that share parameters; all of them call this.

    Returns:
        Their part in the step, None if this rank's parameters are all its own; and the inputs as all ranks have them.

    Raises:
        RanksDisagreeError: they differ in parameters or hyperparameters.
        RuntimeError: the process group was lost in a pickle.
        ValueError: a parameter is placed in a way that cannot be stepped.
    """
    groups, held = optimizer.param_groups, optimizer._process_group
    process_group = held.group
    if not optimizer._shards_are_checked:
        if held.lost:
            raise RuntimeError(
                "this optimizer was unpickled, and its process_group is lost: set optimizer.process_group first"
            )
        check_shards(groups, optimizer._all_groups, process_group, optimizer.one_scale)
        optimizer._shards_are_checked = True
    if not needs_sums(groups, process_group):
        optimizer._ranks = None
        return None, inputs
    if optimizer._ranks is None or not optimizer._ranks.serves(groups, process_group):
        for (group_index, param_index), param in located(groups):
            check_placements(param, group_index, param_index)
        optimizer._ranks = RankSums(optimizer, inputs)
        optimizer._ranks.learn_missing_state()
    ranks: RankSums = optimizer._ranks
    if ranks.idle:
        return None, inputs
    return ranks, ranks.begin(inputs)


def fail_together(optimizer: Any, error: Exception) -> None:
    """Make the ranks raise that share parameters with this one, whose step has failed: they would wait for it."""
    groups, process_group = optimizer.param_groups, optimizer.process_group
    if isinstance(error, RanksDisagreeError) or not needs_sums(groups, process_group):
        return
    # What the others make of it is theirs to raise; this rank has its own error.
    with contextlib.suppress(RuntimeError):
        if optimizer._ranks is not None and optimizer._ranks.serves(groups, process_group):
            optimizer._ranks.fail(getattr(optimizer, "found_inf", None))
        else:
            # The others are comparing what they have with this rank.
            params = dict(located(groups))
            agreed_collectives(params, process_group, optimizer.one_scale, [f"error: {error}"])


class RankSums:
    """The other ranks' part in the steps of an optimizer with sharded parameters.

    Made anew whenever the parameters or their placements change or state is loaded, on all ranks in the same step: the
    ranks then compare what they are about to add, so that a disagreement is an error rather than a sum of unlike
    things, and learn what they have no state for. Every later sum carries a checksum of the hyperparameters.

    Raises:
        RanksDisagreeError: the ranks disagree on parameters or hyperparameters.
    """

    def __init__(self, optimizer: Any, inputs: StepInputs) -> None:
        self._optimizer = ref(optimizer)  # which holds this
        self._process_group = optimizer.process_group
        self._params = dict(located(optimizer.param_groups))
        self._signature = signature_of(optimizer.param_groups)
        self._watch = DisagreementWatch(type(optimizer).__name__)
        self._inputs = inputs
        # Where the tensors are whose gradients are on other ranks only, and their evidence in this step.
        self._absent: list[tuple[list[Location], Tensor]] = []
        # Whether this step's `found_inf` has been told to the other ranks.
        self._overflow_is_known = False

        self._collectives, self._total = agreed_collectives(
            self._params, self._process_group, inputs.one_scale, self._watch.describe(inputs)
        )
        self._collective_of = {m.location: each for each in self._collectives for m in each.members}
        # Of a parameter outside of all collectives in the total: without FSDP1's shards each rank has others.
        copies = len(self._total.ranks) if self._total and holds_fsdp1_shards(self._params.values()) else 1
        self._share_alone = 1.0 / copies
        self._shares: tuple[list[Location], Tensor] | None = None
        self._sizes = self._whole_sizes(len(inputs.options))

    @property
    def _all_collectives(self) -> list[Collective]:
        return self._collectives if self._total is None else [*self._collectives, self._total]

    def serves(self, param_groups: ParamGroups, process_group: ProcessGroup | None) -> bool:
        """Whether parameters, placements and group are still those this was made for."""
        return self._process_group is process_group and self._signature == signature_of(param_groups)

    @property
    def idle(self) -> bool:
        """Whether every tensor is whole on its rank: nothing is ever sent."""
        return not self._all_collectives

    def size(self, group_indices: list[int]) -> Tensor:
        """`state.size_of` the whole parameters of some groups, of all ranks: those trained, or all if none is.

        As they were when this was made: a rank cannot know when others create their first state of a group.
        """
        of_frozen, of_trained = self._sizes[group_indices].sum(0)
        return torch.where(of_trained[1] > 0.0, of_trained, of_frozen)

    # --- what is learned from the other ranks, once ---

    def _whole_sizes(self, groups: int) -> Tensor:
        alone = dict(self._params)
        sizes = torch.zeros(groups, 2, 2, dtype=torch.float64, device="cpu")
        for collective in self._collectives:
            for member in collective.members:
                del alone[member.location]
            weighted = [(m.location, m.param, collective.weight(m)) for m in collective.members]
            sizes += collective.reduced(_sizes_here(groups, weighted), "SUM").cpu()
        rest = _sizes_here(groups, [(location, param, self._share_alone) for location, param in alone.items()])
        return sizes + (rest if self._total is None else self._total.reduced(rest, "SUM").cpu())

    def learn_missing_state(self) -> None:
        """Create the state that others have and this rank has not (FSDP1 loads none for empty shards)."""
        for collective in self._collectives:
            known = [self._state_of(member.location) for member in collective.members]
            rows = [[float(entry[name]) if entry else -math.inf for name in SCALARS] for entry in known]
            largest = collective.reduced(torch.tensor(rows, dtype=torch.float64, device="cpu"), "MAX").tolist()
            for member, entry, values in zip(collective.members, known, largest, strict=True):
                if not entry and values[0] > 0.0 and member.param.requires_grad:
                    entry = self._create_state(member.location)
                    for name, value in zip(SCALARS, values, strict=True):
                        entry[name].fill_(value)
        if self._total is not None:
            entry = self._any_state()
            own = torch.tensor(float(entry["lr_scale"]) if entry else 0.0, dtype=torch.float64, device="cpu")
            scale = self._total.reduced(own, "MAX").item()
            if scale > 0.0 and (entry := entry or self._keep_one_scale()):
                entry["lr_scale"].fill_(scale)

    def _state_of(self, location: Location) -> dict[str, Any] | None:
        """The state of a parameter if it has a complete one."""
        entry = self._optimizer().state.get(self._params[location])  # type: ignore[union-attr]
        names = names_of(self._inputs.options[location.group_index].amsgrad)
        return entry if entry and all(name in entry for name in names) else None

    def _create_state(self, location: Location) -> dict[str, Any]:
        return self._optimizer()._create_state(location, self._inputs, {})  # type: ignore[union-attr, no-any-return]

    def _any_state(self) -> dict[str, Any] | None:
        return next((entry for location in self._params if (entry := self._state_of(location))), None)

    def _keep_one_scale(self) -> dict[str, Any] | None:
        """AdamClaraGlobal: make a state that keeps the one scale on a rank without any; None: there is no parameter."""
        trainable = (location for location, param in self._params.items() if param.requires_grad)
        location = next(trainable, None)
        return None if location is None else self._create_state(location)

    # --- the beginning of a step ---

    def begin(self, inputs: StepInputs) -> StepInputs:
        """Take up the inputs of a step; all ranks call this.

        Returns:
            The inputs, with a GradScaler's `found_inf` set if it is on any rank: all skip the step, or none. One rank
            that skips alone would be a step behind with its shards for good.

        Raises:
            RanksDisagreeError: an earlier step has found that the ranks disagree.
        """
        self._watch.poll()
        self._absent = []
        self._overflow_is_known = False
        if inputs.found_inf is not None:
            inputs = replace(inputs, found_inf=self._overflow_of_all_ranks(inputs.found_inf))
        self._inputs = inputs
        self._watch.describe(inputs)
        return inputs

    def _overflow_of_all_ranks(self, found_inf: Tensor) -> Tensor:
        for collective in self._all_collectives:
            found_inf = collective.reduced(found_inf.to(torch.float32), "MAX")
        self._overflow_is_known = True
        return found_inf

    # --- the sums ---

    def whole_sums(self, buckets: Sequence[Bucket], sums: Sequence[Tensor]) -> list[Tensor]:
        """`measure`'s results with every sharded tensor's row summed over its shards; all ranks call this.

        Every parameter has a row in its collective, of zeros where it has no gradient, so that the ranks never differ
        in what they send. Walks, steps and scales of tensors follow that have a gradient on other ranks only.

        Raises:
            RanksDisagreeError: the ranks have come to disagree, or the step of one of them has failed.
        """
        self._overflow_is_known = False
        if not self._collectives:
            return list(sums)
        locations = [location for bucket in buckets for location in bucket.locations]
        device = self._collectives[0].device
        nothing = torch.zeros(0, len(adaptation.PathSums._fields), dtype=torch.float64, device=device)
        own = torch.cat([nothing, *(moved(part, device) for part in sums)])
        sent = []
        for collective in self._collectives:
            route = collective.route(locations, own.device)
            rows = own.new_zeros(len(collective.members), own.shape[1], device=collective.device)
            rows[route.rows] = moved(own[route.sources], collective.device) * route.weights
            sent.append((collective, route, *self._send(collective, rows)))
        whole = own.clone()
        received = [(*each, self._received(each[0], *each[2:]).view(-1, own.shape[1])) for each in sent]
        if self._total is None:  # else at its end: until then nobody may leave the others waiting
            self._watch.raise_or_defer()
        self._absent = []
        for collective, route, *_, rows in received:
            whole.index_copy_(0, route.sources, moved(rows[route.rows], whole.device))
            self._absent += self._advance_absent(collective, rows, route.absent)
        parts = whole.split_with_sizes([len(part) for part in sums])
        return [moved(part, before.device) for part, before in zip(parts, sums, strict=True)]

    def _advance_absent(
        self, collective: Collective, sums: Tensor, absent: Sequence[tuple[int, Location]]
    ) -> Iterator[tuple[list[Location], Tensor]]:
        """Take the step of a collective's tensors that have a gradient on other ranks only; makes them have state.

        FSDP1's empty shards, experts that only other ranks have used: their step count, walk and scale follow the whole
        tensor's, so that all ranks have the same; there is no gradient for moments and parameter to move by. Which have
        a gradient nowhere is known to the host on the CPU, where they are left alone; on a device they get their state
        as well, because a step never waits for the device.

        Returns:
            Where they are, and their evidence, float64 [n, 8]; by param group and device.
        """
        inputs = self._inputs
        have_gradient = _have_gradient(sums).tolist() if absent and sums.device.type == "cpu" else [True] * len(sums)
        by_kind: dict[tuple[int, torch.device], list[tuple[int, Location]]] = {}
        for row, location in absent:
            param = self._params[location]
            if param.requires_grad and have_gradient[row]:
                by_kind.setdefault((location.group_index, param.device), []).append((row, location))
        for (group_index, device), found in by_kind.items():
            rows = moved(torch.stack([sums[row] for row, _ in found]), device)
            keep = ~_have_gradient(rows)
            if inputs.found_inf is not None:
                keep |= moved(inputs.found_inf, device).reshape(()) != 0.0
            lr = inputs.lrs[group_index]
            moves = moved(lr, device).reshape(()) != 0.0 if isinstance(lr, Tensor) else lr != 0.0
            states = [self._state_of(location) or self._create_state(location) for _, location in found]
            scalars = TensorScalars(states, inputs.options[group_index], moves, keep)
            yield [location for _, location in found], scalars.adapt(rows, inputs.one_scale)

    def total(self, buckets: Sequence[Bucket], evidence: Sequence[Tensor]) -> Tensor:
        """Evidence of all tensors on all ranks, float64 [8] (AdamClaraGlobal); all ranks call this after `whole_sums`.

        Raises:
            RanksDisagreeError: as `whole_sums`.
        """
        device = self._all_collectives[0].device
        parts = [moved(part, device) for part in (*evidence, *(rows for _, rows in self._absent))]
        if self._total is not None and parts and self._collectives:
            locations = [location for bucket in buckets for location in bucket.locations]
            locations += [location for absent, _ in self._absent for location in absent]
            parts = [torch.cat(parts) * self._shares_of(locations)]
        own = moved(adaptation.total_evidence(parts), device)  # of no parts zeros, on the CPU
        if self._total is None:
            return own
        total = self._received(self._total, *self._send(self._total, own))
        self._watch.raise_or_defer()
        if (total.device.type != "cpu" or total.any()) and self._any_state() is None:
            self._keep_one_scale()
        return total

    def _shares_of(self, locations: list[Location]) -> Tensor:
        """1 / (number of ranks that bring the same evidence into the total), float64 [n, 1]."""
        assert self._total is not None
        if self._shares is None or self._shares[0] != locations:
            ranks = set(self._total.ranks)
            collectives = [self._collective_of.get(location) for location in locations]
            shares = [
                [self._share_alone if each is None else 1.0 / len(ranks & set(each.ranks))] for each in collectives
            ]
            self._shares = locations, on_device(shares, torch.float64, self._all_collectives[0].device)
        return self._shares[1]

    def _send(self, collective: Collective, numbers: Tensor) -> tuple[Tensor, Any]:
        """Start the sum of the bits of the checksum, which come first, and of `numbers`."""
        numbers = moved(numbers.reshape(-1), collective.device)
        buffer = torch.cat([self._watch.bits(collective.device), numbers])
        return buffer, collective.start(buffer)

    def _received(self, collective: Collective, buffer: Tensor, work: Any) -> Tensor:
        work.wait()
        self._watch.look_at(buffer[:CHECKSUM_BITS], len(collective.ranks))
        return buffer[CHECKSUM_BITS:]

    # --- a step that cannot be taken ---

    def fail(self, found_inf: Tensor | float | None) -> None:
        """Make the ranks that wait for this one's part in the step's sums raise; waits for them."""
        if found_inf is not None and not self._overflow_is_known and not self.idle:
            self._overflow_of_all_ranks(torch.as_tensor(found_inf, device=self._all_collectives[0].device))
        self._overflow_is_known = False
        optimizer = self._optimizer()
        if optimizer is not None and not optimizer._gradients_are_placed:  # by the others in any case
            for param in self._params.values():
                # One that cannot be placed may be what this rank's error is about.
                with contextlib.suppress(Exception):
                    if param.grad is not None:
                        place_gradient(param, param.grad)
        for collective in self._all_collectives:
            if collective is self._total:
                numbers = len(adaptation.Evidence._fields)
            else:
                numbers = len(adaptation.PathSums._fields) * len(collective.members)
            nothing = torch.full((CHECKSUM_BITS + numbers,), math.nan, dtype=torch.float64, device=collective.device)
            collective.start(nothing).wait()


def _have_gradient(sums: Tensor) -> Tensor:
    """Whether some rank has a gradient (with an element), by tensor, [n]; `sums`: over all ranks, [n, 9]."""
    return adaptation.PathSums(*sums.unbind(-1)).numel > 0.0


def _sizes_here(groups: int, weighted: Sequence[tuple[Location, Tensor, float]]) -> Tensor:
    """`size_of` this rank's parts of parameters, by group, frozen and trained, float64 [groups, 2, 2] on the CPU."""
    by_group: dict[tuple[int, bool, float], list[Tensor]] = {}
    for location, param, weight in weighted:
        by_group.setdefault((location.group_index, is_trained(param), weight), []).append(param)
    sizes = torch.zeros(groups, 2, 2, dtype=torch.float64, device="cpu")
    for (group_index, trained, weight), params in by_group.items():
        sizes[group_index, int(trained)] += weight * size_of(params).cpu()
    return sizes
