"""AdamClaraGlobal, AdamClaraLocal, AdamClaraSmoothed: torch.optim's contract, and nothing numeric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import state, tensors, torch_backend
from .adaptation import total_evidence
from .core import buckets as core_buckets
from .core import loading
from .distributed import dtensors, placement, sharding
from .options import (
    OPTIONS,
    SWITCHES,
    Constructor,
    OptionReader,
    SmoothedConstructor,
    StepInputs,
    check_switches,
    coming_lr,
    largest_lr,
)
from .step import Bucket, Location, TensorWork, adapt_one_scale, moved

# What an instance keeps beside torch.optim.Optimizer's own attributes; survives pickling and deepcopy.
_PERSISTENT_ATTRIBUTES = ("fused", "_process_group", "_step_supports_amp_scaling")


class AdamClara(Constructor, Optimizer):
    """What the three optimizers share. Use one of them.

    Adam with CLARA: each parameter's steps are summed up in a decaying path, whose squared length is compared with
    that of a random walk of the same steps. A long path (steps agree) raises the learning-rate scale mu, a short one
    (steps cancel) lowers it; the rate in force is ``lr * mu``. ``param_group["lr"]`` stays the user's.

    Source: Atamna, Maus, Kievelitz, Glasmachers, arXiv 2508.05408; all formulas in docs/algorithm.md.
    """

    one_scale: ClassVar[bool] = False
    """One learning-rate scale for all tensors, instead of one per tensor."""
    option_names: ClassVar[tuple[str, ...]] = tuple(name for name in OPTIONS if name != "lr_smoothing")

    fused: bool | None
    # Read by GradScaler and by frameworks; see enable_fused_amp.
    _step_supports_amp_scaling: bool = False

    def _initialize(self, arguments: Mapping[str, Any]) -> None:
        check_switches(arguments["torch_switches"], f"{type(self).__name__}.__init__()")
        fused = arguments["fused"]
        if fused is not None and not isinstance(fused, bool):  # 0 equals False, but is not what a step asks for
            raise TypeError(f"fused must be None, True or False, got {fused!r}")
        self.fused = fused
        self.process_group = arguments["process_group"]
        self._tables = core_buckets.Tables()
        self._forget_caches()
        Optimizer.__init__(self, arguments["params"], {name: arguments[name] for name in self.option_names})
        self._all_groups = self.param_groups

    def _forget_caches(self) -> None:
        """Drop what was derived from groups, parameters and state; the next step derives it anew."""
        self._options = OptionReader(self.option_names, self.one_scale)
        self._ranks: sharding.RankSums | None = None
        self._shards_are_checked = False
        # What checked tensors looked like, by the parameter's id: they need not be checked again while they look so.
        self._signatures: dict[int, tuple[object, ...]] = {}
        # Under AdamClaraGlobal the one scale, by device that holds it; empty where not known.
        self._scales: dict[torch.device, Tensor] = {}
        # What the first parameter of a group to get a state began with, by its id (a weak reference would keep
        # Module.to from exchanging the parameter of a sharded model). Who joins the group later begins as it did.
        self._initial_scales: dict[int, float | Tensor] = {}

    @property
    def process_group(self) -> Any:
        """The group over which plain parameters are sharded, or None.

        A pickled optimizer comes back without its group: set it again before the next step. A deep copy shares it.
        """
        return self._process_group.group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        placement.check_process_group(group)
        self._process_group = placement.ProcessGroupReference(group)
        self._ranks = None
        self._shards_are_checked = False

    # --- the step ---

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """`step` with its hooks, as `torch.optim.Optimizer` wraps it; torch.compile goes round the whole of it."""
        return torch._disable_dynamo(Optimizer.profile_hook_step(func))  # type: ignore[attr-defined]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the gradients that are there.

        Args:
            closure: re-evaluates the model and returns the loss; called with gradients enabled.

        Returns:
            what the closure returned.

        Raises:
            ValueError, TypeError, RuntimeError: bad options, gradients or state, or ``fused=True`` cannot be served;
                nothing has been changed then.
            RuntimeError: another rank that shares parameters cannot take its step, or has other hyperparameters; the
                paths may have taken up the gradients then, and where AdamClaraGlobal sums over `process_group`, steps
                and walks as well.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._gradients_are_placed = False  # see RankSums.fail
        try:
            # A GradScaler's: tensors, or of parameters without gradients the number 0, a sum over nothing.
            amp = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
            inputs = self._options.read(self.param_groups, *amp)
            ranks, inputs = sharding.join(self, inputs)
            buckets = self._gather(inputs)
        except Exception as error:
            sharding.fail_together(self, error)  # the ranks that share parameters
            raise
        if ranks is None and (not self.one_scale or (len(buckets) == 1 and len(self._scales) == 1)):
            for bucket in buckets:
                bucket.step()
            return loss
        sums = [bucket.measure() for bucket in buckets]
        sums = sums if ranks is None else ranks.whole_sums(buckets, sums)
        evidence = [bucket.adapt(rows) for bucket, rows in zip(buckets, sums, strict=True)]
        if self.one_scale:
            total = total_evidence(evidence) if ranks is None else ranks.total(buckets, evidence)
            adapt_one_scale(total, self._shared_scales().values(), inputs)
        for bucket in buckets:
            bucket.update()
        return loss

    def _gather(self, inputs: StepInputs) -> Sequence[Bucket]:
        """Buckets of all tensors with a gradient: the core's, and PyTorch's of those that the core cannot serve."""
        core = None if self.fused is False else loading.core_or_warning()
        if core is None:
            works = self._prepare(inputs, placement.located(self.param_groups))
            return torch_backend.buckets_of(list(works.values()), inputs)
        scales = list((self._scales or self._shared_scales()).values()) if self.one_scale else None
        found, irregular = core.gather(self.param_groups, self.state, scales)
        if irregular:
            works = self._prepare(inputs, self._located(irregular))
            scales = list(self._scales.values()) if self.one_scale else None
            found, irregular = core.gather(self.param_groups, self.state, scales)  # what lacked its state
            if irregular and self.fused:
                self._refuse_shared_memory()
                raise RuntimeError(_not_fused(*self._located(irregular)[0], "state of this kind"))
            if others := [at for at in irregular if at not in works]:  # share memory with one that lacked its state
                works.update(self._prepare(inputs, self._located(others)))
        buckets: list[Bucket] = [core_buckets.CoreBucket(bucket, self._tables, inputs) for bucket in found]
        return [*buckets, *torch_backend.buckets_of([works[at] for at in irregular], inputs)] if irregular else buckets

    def _located(self, places: Iterable[tuple[int, int]]) -> list[tuple[Location, Tensor]]:
        return [(Location(*at), self.param_groups[at[0]]["params"][at[1]]) for at in places]

    def _prepare(self, inputs: StepInputs, located: Iterable[tuple[Location, Tensor]]) -> dict[Location, TensorWork]:
        """Check those of some parameters that have a gradient; only then create or complete their state."""
        works: dict[Location, TensorWork] = {}
        to_complete: list[Location] = []
        for location, param in located:
            grad = param.grad
            if grad is None:
                continue
            entry = self.state.get(param) or {}  # reading self.state[param] would create an empty entry
            options = inputs.options[location.group_index]
            signature = state.signature(entry, param, grad, options.amsgrad)
            if signature != self._signatures.get(id(param)):
                tensors.check(param, grad, *location)
                state.check(entry, param, *location)
                if not state.is_complete(entry, param, options.amsgrad):
                    to_complete.append(location)
                    if loading.is_capturing():
                        raise RuntimeError(f"{tensors.describe(*location, param)}: {_NO_STATE_IN_A_GRAPH}")
                else:
                    self._signatures[id(param)] = signature
            if self.fused:
                loading.require(param, grad, *location)
            works[location] = TensorWork(location, param, grad, entry)
        if self.one_scale:
            _refuse_duplicates(works.values())
        if to_complete:
            if self.fused:
                self._refuse_shared_memory()
            self._scales = {}  # the states that held it may be gone
        initial_scales: dict[int, float | Tensor] = {}
        for location in to_complete:
            works[location] = works[location]._replace(state=self._create_state(location, inputs, initial_scales))
        if self.one_scale:
            self._scales = {}
            self._shared_scales()
        self._gradients_are_placed = True
        return {location: dtensors.local_work(*work) for location, work in works.items()}

    def _refuse_shared_memory(self) -> None:
        found = [(at, param) for at, param in placement.located(self.param_groups) if param.grad is not None]
        for index in tensors.overlapping([param for _, param in found]):
            raise RuntimeError(_not_fused(*found[index], "parameters that share memory"))

    def _create_state(
        self, location: Location, inputs: StepInputs, initial_scales: dict[int, float | Tensor]
    ) -> dict[str, Any]:
        """Create what a parameter's state lacks, or bring it to the parameter's dtype, device and layout.

        Args:
            initial_scales: what parameters without any state begin with, by group, as far as it is known in this step.
        """
        group_index, param_index = location
        group, options = self.param_groups[group_index], inputs.options[group_index]
        param = group["params"][param_index]
        entry: dict[str, Any] = self.state[param]
        if "exp_avg" in entry and not (self.one_scale and self._shared_scales()):
            scale: float | Tensor = state.trained_scale(options)
        else:
            self._initial_scales.pop(id(param), None)  # of a state that is gone
            if group_index not in initial_scales:
                initial_scales[group_index] = self._initial_scale(group_index, inputs, in_step=True)
                if self._known_initial_scale(group) is None:
                    self._initial_scales[id(param)] = initial_scales[group_index]
            scale = initial_scales[group_index]
        state.complete(entry, param, options, scale, self.process_group is not None)
        if self.one_scale:
            own: Tensor = entry["lr_scale"]
            entry["lr_scale"] = self._scales.setdefault(own.device, own)
        return entry

    # --- scales ---

    def _shared_scales(self) -> dict[torch.device, Tensor]:
        """The one scale of AdamClaraGlobal, by device; all states of a device hold the same tensor."""
        if not self._scales:
            # torch.optim lets a user keep anything else beside the states of parameters.
            states = (entry for param, entry in self.state.items() if isinstance(param, Tensor))
            self._scales = state.shared_scales(states)
        return self._scales

    def _initial_scale(self, group_index: int, inputs: StepInputs, in_step: bool) -> float | Tensor:
        """mu of a parameter that was never stepped; found on the device, without waiting for it.

        Args:
            in_step: the ranks that share parameters have been joined, so that without `_ranks` there are none.
        """
        if self.one_scale and (shared := self._shared_scales()):
            return next(iter(shared.values()))
        own = inputs.options[group_index]
        if not own.adapt_lr or own.initial_scale:
            return own.initial_scale if own.adapt_lr else 1.0
        known = None if self.one_scale else self._known_initial_scale(self.param_groups[group_index])
        if known is not None:
            return known
        groups = list(range(len(self.param_groups))) if self.one_scale else [group_index]
        if self._ranks is not None:
            size = self._ranks.size(groups)
        elif not in_step and placement.needs_sums(self.param_groups, self.process_group):
            return 1.0  # before the first step: only the other ranks know
        else:
            params = [param for index in groups for param in self.param_groups[index]["params"]]
            size = state.size_of(list(filter(state.is_trained, params)) or params)
        lrs = [coming_lr(inputs.lrs[index], self.param_groups[index], index) for index in groups]
        return state.cautious_scale(size, largest_lr(lrs, size.device), own)

    def _known_initial_scale(self, group: dict[str, Any]) -> float | Tensor | None:
        """What the group began with, as long as it has the parameter that did, and this has its state."""
        for param in group["params"]:
            if id(param) in self._initial_scales and "lr_scale" in self.state.get(param, {}):
                return self._initial_scales[id(param)]
        return None

    @torch.no_grad()
    def lr_scales(self) -> list[Tensor]:
        """The learning-rate scale mu of every parameter.

        Returns:
            per param group a float32 tensor [number of parameters], in order, on the parameters' device (if they are
            not all on "meta", another one); a copy. A parameter that was never stepped has the scale that it would
            start with (1 where only other ranks know).
        """
        inputs = self._options.read(self.param_groups)
        self._scales = {}  # the states that held it may be gone
        initial_scale = cache(lambda index: self._initial_scale(index, inputs, in_step=False))
        return [
            self._group_scales(group["params"], partial(initial_scale, 0 if self.one_scale else index))
            for index, group in enumerate(self.param_groups)
        ]

    def _group_scales(self, params: Sequence[Tensor], initial_scale: Callable[[], float | Tensor]) -> Tensor:
        devices = [param.device for param in params]
        device = next((each for each in devices if each.type != "meta"), (*devices, torch.device("cpu"))[0])
        scales = []
        for param in params:
            scale = self.state.get(param, {}).get("lr_scale")
            if scale is None:
                scale = initial_scale()
            if not isinstance(scale, Tensor):
                scale = torch.full((), scale, dtype=torch.float32, device=device)
            scales.append(moved(scale, device))
        return torch.stack(scales) if scales else torch.empty(0, dtype=torch.float32, device=device)

    @torch.no_grad()
    def effective_lrs(self) -> list[Tensor]:
        """The learning rate in force, lr * mu, of every parameter.

        Does not wait for the device, so it can be called at every step; read the values later, or seldom.

        Returns:
            as `lr_scales`: per param group a float32 tensor [number of parameters]; later steps do not change it.
        """
        effective = []
        lrs = self._options.read(self.param_groups).lrs
        for lr, scales in zip(lrs, self.lr_scales(), strict=True):
            lr = moved(lr, scales.device).reshape(()).to(torch.float32) if isinstance(lr, Tensor) else lr
            effective.append(scales * lr)
        return effective

    # --- groups, saving and loading ---

    def enable_fused_amp(self, enabled: bool = True) -> None:
        """Let a ``GradScaler`` leave unscaling and the skipping of overflowed steps to the optimizer.

        Saves a pass over the gradients and the scaler's host synchronization. Off by default: frameworks that watch
        for skipped steps would not see them.
        """
        self._step_supports_amp_scaling = enabled

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; see ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError, TypeError: bad options or parameters; the group is not added then.
        """
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        group = self.param_groups[index]
        try:
            check_switches({name: group[name] for name in SWITCHES if name in group}, f"param group {index}")
            self._options.read_group(group, index)
            if len(set(map(id, group["params"]))) < len(group["params"]):
                raise ValueError(f"param group {index}: a parameter appears more than once in the group")
        except Exception:
            self.param_groups.pop()
            raise
        self._options.normalize(group)
        self._shards_are_checked = False

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``; no two entries share memory, so that safetensors takes them."""
        if not self.one_scale:
            return super().state_dict()
        # Before the user's hooks, which may return anything.
        handle = self.register_state_dict_post_hook(_unshare_the_scale, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, of ``torch.optim.Adam`` or ``AdamW``, or of apex FusedAdam.

        Dtypes are kept bit for bit; tensors are copied, also when ``state_dict`` holds the live ones of another
        optimizer. What another Adam lacks starts fresh: ``path`` at zeros, ``lr_scale`` at 1 (or a number given as
        ``initial_scale``), options as this optimizer has them.

        Raises:
            ValueError: groups or shapes do not match; nothing has been changed then.
        """
        # Registered here, so it runs after the user's hooks.
        handle = self.register_load_state_dict_pre_hook(lambda _, final_state_dict: state.shield(final_state_dict))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in _PERSISTENT_ATTRIBUTES}
        params = (param for group in self.param_groups for param in group["params"])
        began = [(param, self._initial_scales[id(param)]) for param in params if id(param) in self._initial_scales]
        return {**super().__getstate__(), **kept, "_initial_scales": began}

    def __setstate__(self, new: dict[str, Any]) -> None:
        """Restore from a pickle (all attributes) or from ``load_state_dict`` (state and param groups)."""
        new = dict(new)
        groups, began = new["param_groups"], new.pop("_initial_scales", ())
        reader = OptionReader(self.option_names, self.one_scale)
        templates = self.param_groups if hasattr(self, "param_groups") else [new["defaults"]] * len(groups)
        group_steps = [group.get("step") for group in groups]
        for group, template in zip(groups, templates, strict=True):
            state.adopt_group(group, template, self.option_names)
            reader.normalize(group)
        options = reader.read(groups).options
        process_group: placement.ProcessGroupReference = new.get("_process_group") or self._process_group
        all_elements = process_group.group is not None
        for group_index, group in enumerate(groups):
            for param_index, param in enumerate(group["params"]):
                entry = new["state"].get(param)
                if entry and any(isinstance(value, state.Verbatim) for value in entry.values()):
                    location, group_step = (group_index, param_index), group_steps[group_index]
                    new["state"][param] = state.adopt(
                        entry, param, options[group_index], group_step, location, all_elements
                    )
        super().__setstate__(new)
        self._all_groups = self.param_groups
        if not hasattr(self, "_tables"):  # out of a pickle; else what CUDA graphs have captured has to stay
            self._tables = core_buckets.Tables()
        self._forget_caches()
        self._initial_scales = {id(param): scale for param, scale in began}
        if self.one_scale:
            self._shared_scales()


_NO_STATE_IN_A_GRAPH = (
    "a CUDA graph is being captured, and the parameter has no state yet, which every replay would create anew; take "
    "one or more steps before the capture"
)


def _not_fused(location: Location, param: Tensor, what: str) -> str:
    problem = f"fused=True: the compiled core does not serve {what}; use fused=None or fused=False"
    return f"{tensors.describe(*location, param)}: {problem}"


def _refuse_duplicates(works: Iterable[TensorWork]) -> None:
    """Check that no parameter has been put into a group again, after the group was made.

    Adam steps it twice in a row. Under one scale all tensors are measured before any is updated, so that there is no
    "in a row". The core hands such parameters over to PyTorch, so that its own steps need not look for them.
    """
    first: dict[int, Location] = {}
    for location, param, *_ in works:
        if first.setdefault(id(param), location) != location:
            where = "param group {}, parameter {}".format(*first[id(param)])
            raise ValueError(f"{tensors.describe(*location, param)} is {where} as well; AdamClaraGlobal takes it once")


def _unshare_the_scale(_: Optimizer, state_dict: dict[str, Any]) -> None:
    state_dict["state"] = {
        key: {**entry, "lr_scale": entry["lr_scale"].clone()}
        if isinstance(entry, Mapping) and isinstance(entry.get("lr_scale"), Tensor)
        else entry
        for key, entry in state_dict["state"].items()
    }


class AdamClaraGlobal(AdamClara):
    """Adam with one learning-rate scale for all parameters: the most stable; keeps the ratios of the groups' rates.

    The options that decide on the scale (``initial_scale, smoothing, damping, clip, reference, scale_bounds,
    adapt_lr``) must be equal in all groups.
    """

    one_scale = True


class AdamClaraLocal(AdamClara):
    """Adam with one learning-rate scale per parameter tensor: the fastest to react; small models, experiments."""


class AdamClaraSmoothed(SmoothedConstructor, AdamClara):
    """Adam with one smoothed learning-rate scale per parameter tensor: balanced, the general-purpose choice.

    The scale is a moving average of what the factor asks for: mu <- b mu + (1 - b) mu f, with b = ``lr_smoothing``.
    """

    option_names = tuple(OPTIONS)
