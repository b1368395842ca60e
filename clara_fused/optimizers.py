"""AdamClaraGlobal, AdamClaraLocal, AdamClaraSmoothed: torch.optim's contract, and nothing numeric.

A step is measure -> adapt -> apply over batches of tensors; the back ends do the work.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import adaptation, core_backend, sharding, state, torch_backend, validation
from .batches import Batch, Location, StepInputs, TensorWork, moved
from .options import GLOBAL_OPTION_NAMES, GroupOptions, Variant, option_names, option_values, read_options

# A step tries them in vain when it has changed otherwise, so few.
_MAX_IDLE_PLANS = 3
# What an instance keeps beside torch.optim.Optimizer's own attributes; survives pickling and deepcopy.
_PERSISTENT_ATTRIBUTES = ("fused", "_process_group", "_max_temporary_bytes", "_step_supports_amp_scaling")


class AdamClara(Optimizer):
    """What the three optimizers share. Use one of them.

    Adam with CLARA: each parameter's steps are summed up in a decaying path, whose squared length is compared with
    what a random walk of the same steps would give. A long path (steps agree) raises the learning-rate scale mu, a
    short one (steps cancel) lowers it; the rate in force is ``lr * mu``. ``param_group["lr"]`` stays the user's.

    Args:
        params: parameters or param groups, as for ``torch.optim.Adam``. float32, bfloat16, float16 or float64, dense.
        lr: learning rate >= 0, float or one-element tensor.
        betas: decay of the moments, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: >= 0; added to the gradient, or decoupled as in AdamW.
        amsgrad: use the running maximum of the second moment.
        maximize: ascend instead of descend.
        decoupled_weight_decay: decay the parameter (AdamW) instead of the gradient.
        smoothing: weight of a new step in the path, in (0, 1]; the path remembers about 1/smoothing steps.
        damping: > 0; a larger one makes the scale follow the path more slowly.
        reference: what the path is compared with. ``"random_walk"``: Adam steps on pure noise; ``"measured_walk"``: a
            walk of steps as long as the one just measured, which wants ``damping=0.5`` (Smoothed: ``damping=0.25,
            lr_smoothing=0.5``); a number > 0: this squared path of one element.
        clip: bounds of the scale's factor in one step, 0 < low <= high, or None.
        accumulate: the factor multiplies the scale; False: it replaces it.
        deferred: step with the scale measured in the step before, which saves one pass over memory.
        initial_scale: mu before the first step, inside ``scale_bounds``; 1 unless ``accumulate``.
        scale_bounds: mu stays inside, 0 < low <= high.
        adapt_lr: False keeps mu as it is; the path is still tracked.
        path_dtype: dtype of the path, torch.float32 or torch.bfloat16; None: the moments' dtype.
        fused: True runs the compiled core and raises at the first step if it cannot serve; False runs PyTorch; None
            runs the core where it can and PyTorch elsewhere.
        process_group: parameters are shards over this group (see docs/distributed.md).

    Raises:
        ValueError: an option is out of range, or a parameter cannot be updated in place.
        TypeError: an option or a parameter has the wrong type.

    Source: Atamna, Maus, Kievelitz, Glasmachers, arXiv 2508.05408; all formulas in docs/algorithm.md.
    """

    variant: ClassVar[Variant]

    fused: bool | None
    # Plans of the core: the last step's; lately used ones for other sets of gradients, latest first (a step that
    # alternates between losses); those that a CUDA graph has captured, whose tables on the device it goes on using.
    _plan: core_backend.Plan | None = None
    _idle_plans: tuple[core_backend.Plan, ...] = ()
    _captured_plans: tuple[core_backend.Plan, ...] = ()
    # Read by GradScaler and by frameworks; see enable_fused_amp.
    _step_supports_amp_scaling: bool = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        smoothing: float = 0.05,
        damping: float = 2.5,
        reference: str | float = "random_walk",
        clip: tuple[float, float] | None = (0.5, 1.05),
        accumulate: bool = True,
        deferred: bool = False,
        initial_scale: float = 1.0,
        scale_bounds: tuple[float, float] = (1e-4, 1e4),
        adapt_lr: bool = True,
        path_dtype: torch.dtype | None = None,
        fused: bool | None = None,
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "smoothing": smoothing,
            "damping": damping,
            "reference": reference,
            "clip": clip,
            "accumulate": accumulate,
            "deferred": deferred,
            "initial_scale": initial_scale,
            "scale_bounds": scale_bounds,
            "adapt_lr": adapt_lr,
            "path_dtype": path_dtype,
        }
        self._initialize(params, defaults, fused, process_group)

    def _initialize(
        self, params: ParamsT, defaults: dict[str, Any], fused: bool | None, process_group: Any
    ) -> None:
        if fused is not None and not isinstance(fused, bool):  # 0 equals False, but is not what a step asks for
            raise TypeError(f"fused must be None, True or False, got {fused!r}")
        self.fused = fused
        self.process_group = process_group
        self.max_temporary_bytes = None
        self._forget_caches()
        super().__init__(params, defaults)

    @property
    def max_temporary_bytes(self) -> int | None:
        """Bound of the PyTorch back end's scratch memory in one step, in bytes; None chooses by device.

        Raises (when set):
            TypeError, ValueError: neither None nor an integer of at least 1.
        """
        return self._max_temporary_bytes

    @max_temporary_bytes.setter
    def max_temporary_bytes(self, limit: int | None) -> None:
        validation.check_max_temporary_bytes(limit)
        self._max_temporary_bytes = limit

    @property
    def process_group(self) -> Any:
        """The group over which plain parameters are sharded, or None.

        A pickled optimizer comes back without its group: set it again before the next step. A deep copy shares it.
        """
        return self._process_group.group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        validation.check_process_group(group)
        self._process_group = sharding.ProcessGroupReference(group)
        self._drop_plans()

    def _forget_caches(self) -> None:
        """Drop what was derived from groups, parameters and state; the next step derives it anew."""
        self._drop_plans()
        self._whole_sums: sharding.WholeTensorSums | None = None
        self._hyperparameters: tuple[object, list[str]] = (None, [])
        # Scales of sharded parameters that other ranks have stepped and this one has not: they have no state here.
        # Under AdamClaraGlobal the one scale, with key None, on a rank that has no state at all.
        self._stateless_scales: dict[Tensor | None, Tensor] = {}
        # Per group: the option values last seen and what was made of them.
        self._options_cache: list[tuple[tuple[Any, ...], GroupOptions]] = []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; see ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError, TypeError: bad options or parameters; the group is not added then.
        """
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        group = self.param_groups[index]
        try:
            validation.check_lr(group["lr"], index, read_tensor=True)
            read_options(group, index, self.variant)
            for param_index, param in enumerate(group["params"]):
                validation.check_param(param, index, param_index)
        except Exception:
            self.param_groups.pop()
            raise

    def enable_fused_amp(self, enabled: bool = True) -> None:
        """Let a ``GradScaler`` leave unscaling and the skipping of overflowed steps to the optimizer.

        Saves a pass over the gradients and the scaler's host synchronization. Off by default: frameworks that watch
        for skipped steps would not see them.
        """
        self._step_supports_amp_scaling = enabled

    # --- the step ---

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
                moments may have taken up the gradients then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            inputs, batches, planned = self._begin_step()
        except sharding.RanksDisagreeError:
            raise
        except Exception as error:
            self._fail_on_other_ranks(error)
            raise
        if self._whole_sums is not None and not self._whole_sums.idle:
            self._run_sharded(batches, inputs, self._whole_sums)
        else:
            self._run(batches, inputs)
        # The core writes through raw pointers, unseen by autograd: without this, a backward pass through a graph
        # that saved a parameter before the step would quietly use the new values.
        if planned and self._plan is not None:
            stepped = self._plan.params_with_grad(self.param_groups)
        else:
            stepped = [p for _, _, p in self._enumerate_params() if p.grad is not None]
        torch.autograd.graph.increment_version(stepped)
        if not planned:
            self._make_plan(batches, inputs)
        return loss

    def _begin_step(self) -> tuple[StepInputs, Sequence[Batch], bool]:
        """All checks, and what the step works on; whether that is still the plan of the step before."""
        inputs = self._read_inputs()
        # Without DTensors and process_group nothing is summed over ranks, and the plan would notice new DTensors.
        planned = self._planned_batches(inputs) if self._whole_sums is None else None
        if planned is None:
            self._prepare_sums_over_ranks(inputs)
            if self._whole_sums is not None:
                inputs = self._whole_sums.with_overflow_of_all_ranks(inputs)
                planned = self._planned_batches(inputs)
        if planned is not None:
            return inputs, planned, True
        self._drop_plans(keep_idle=_MAX_IDLE_PLANS)
        return inputs, self._batches(self._collect(inputs.options), inputs), False

    def _fail_on_other_ranks(self, error: Exception) -> None:
        """Make the ranks raise that share parameters with this one: they would wait for it in their sums."""
        if not sharding.needs_sums(self.param_groups, self.process_group):
            return
        # What the others make of it is theirs to raise; this rank has its own error.
        with contextlib.suppress(RuntimeError):
            if self._whole_sums is not None and self._whole_sums.serves(self.param_groups, self.process_group):
                self._whole_sums.send_failure(self._amp_scalar("found_inf"))
            else:
                is_global = self.variant is Variant.GLOBAL
                sharding.WholeTensorSums(self.param_groups, self.process_group, is_global, [f"error: {error}"])

    def _planned_batches(self, inputs: StepInputs) -> Sequence[Batch] | None:
        """The batches of the step before, ready for this one, if nothing but gradients has changed since."""
        if self.fused is False or not self._find_plan(inputs) or self._plan is None:
            return None
        if self._whole_sums is not None and not sharding.gradients_lie_as_parameters(self.param_groups):
            return None
        return self._plan.batches

    def _find_plan(self, inputs: StepInputs) -> bool:
        """Whether there is a plan that stands for what is in groups and state now; it is the one in use then."""
        if self._plan is not None and self._plan.prepare(self.param_groups, self.state, inputs):
            return True
        for plan in self._idle_plans:
            if plan.prepare(self.param_groups, self.state, inputs):
                self._set_plan_aside()
                self._idle_plans = tuple(idle for idle in self._idle_plans if idle is not plan)
                self._plan = plan
                return True
        return False

    def _set_plan_aside(self) -> None:
        if self._plan is not None:
            self._idle_plans = (self._plan, *self._idle_plans)
            self._plan = None

    def _drop_plans(self, keep_idle: int = 0) -> None:
        """Forget all plans but the `keep_idle` latest ones."""
        self._set_plan_aside()
        dropped = self._idle_plans[keep_idle:]
        self._idle_plans = self._idle_plans[:keep_idle]
        self._captured_plans += tuple(plan for plan in dropped if plan.captured)

    def _make_plan(self, batches: Sequence[Batch], inputs: StepInputs) -> None:
        if self._whole_sums is None or sharding.gradients_lie_as_parameters(self.param_groups):
            self._plan = core_backend.plan_of(self.param_groups, self.state, batches, inputs)

    def _read_inputs(self) -> StepInputs:
        """Read and check everything a step depends on beside the tensors."""
        lrs: list[float | Tensor] = []
        for index, group in enumerate(self.param_groups):
            validation.check_lr(group["lr"], index)
            # Here, not in the back ends: an integer beyond float64 must fail before anything is changed.
            lrs.append(group["lr"] if isinstance(group["lr"], Tensor) else float(group["lr"]))
        options = self._read_options()
        return StepInputs(options, lrs, self._amp_scalar("grad_scale"), self._amp_scalar("found_inf"))

    def _amp_scalar(self, name: str) -> Tensor | None:
        """`grad_scale` or `found_inf`, which a GradScaler sets before step() and deletes after."""
        value: Tensor | float | None = getattr(self, name, None)
        # Where no parameter has a gradient the scaler's found_inf is a sum over nothing: the number 0.
        return value if value is None or isinstance(value, Tensor) else torch.tensor(float(value))

    def _read_options(self) -> list[GroupOptions]:
        seen = [option_values(group, self.variant) for group in self.param_groups]
        if seen != [values for values, _ in self._options_cache]:
            fresh = [read_options(group, index, self.variant) for index, group in enumerate(self.param_groups)]
            if self.variant is Variant.GLOBAL:
                validation.check_equal_in_all_groups(fresh, GLOBAL_OPTION_NAMES)
            self._options_cache = list(zip(seen, fresh, strict=True))
        return [options for _, options in self._options_cache]

    def _collect(self, options: Sequence[GroupOptions]) -> list[TensorWork]:
        """Gather the tensors that have gradients: first check all of them, only then create or adjust state."""
        taking_part = []
        capturing = core_backend.is_capturing()
        for group_index, param_index, param in self._enumerate_params():
            grad = param.grad
            if grad is None:
                continue
            validation.check_param(param, group_index, param_index)
            validation.check_grad(param, grad, group_index, param_index)
            # .get: reading self.state[param] would create an empty entry.
            param_state = self.state.get(param, {})
            state.check(param_state, param, options[group_index], group_index, param_index)
            if self.fused:
                core_backend.require(param, grad, options[group_index], group_index, param_index)
            if capturing:
                by_core = self.fused is not False and core_backend.serves(param, grad, options[group_index])
                validation.check_capture(param, bool(param_state), by_core, group_index, param_index)
            taking_part.append((group_index, param_index, param, grad))
        for group_index, _, param, _ in taking_part:
            state.prepare(self.state[param], param, options[group_index])
            key = None if self.variant is Variant.GLOBAL else param
            if key in self._stateless_scales:
                self.state[param]["lr_scale"] = moved(self._stateless_scales.pop(key), param.device)
        if self.variant is Variant.GLOBAL:
            state.share_scale(self._param_states())
        return [sharding.local_work(*located, self.state[located[2]]) for located in taking_part]

    def _enumerate_params(self) -> Iterator[tuple[int, int, Tensor]]:
        for group_index, group in enumerate(self.param_groups):
            for param_index, param in enumerate(group["params"]):
                yield group_index, param_index, param

    def _batches(self, works: Sequence[TensorWork], inputs: StepInputs) -> list[Batch]:
        """The batches of a step; tensors whose sums other ranks have a part in apart from those that need none."""
        if self._whole_sums is None or self.variant is Variant.GLOBAL:
            return self._batches_of(works, inputs)
        sharded = [work for work in works if self._whole_sums.covers(work.location)]
        rest = [work for work in works if not self._whole_sums.covers(work.location)]
        return [*self._batches_of(sharded, inputs), *self._batches_of(rest, inputs)]

    def _batches_of(self, works: Sequence[TensorWork], inputs: StepInputs) -> list[Batch]:
        """The compiled core's batches, and PyTorch's for what the core cannot serve or is not to."""
        for_core: list[TensorWork] = []
        for_torch: list[TensorWork] = []
        for work in works:
            (for_core if self._core_serves(work, inputs) else for_torch).append(work)
        torch_batches = torch_backend.batches_of(for_torch, inputs, self.variant, self.max_temporary_bytes)
        core_batches = core_backend.batches_of(for_core, inputs, self.variant)
        batches: list[Batch] = [*core_batches, *torch_batches]
        # AdamClaraGlobal's one scale follows the sums over all batches, and is to move on all devices that hold it.
        if self.variant is not Variant.GLOBAL or (len(batches) == 1 and len(self._shared_scales()) == 1):
            for batch in core_batches:
                batch.adapts_alone = True
        return batches

    def _core_serves(self, work: TensorWork, inputs: StepInputs) -> bool:
        return self.fused is not False and core_backend.serves(work.param, work.grad, inputs.options[work.group_index])

    def _run(self, batches: Sequence[Batch], inputs: StepInputs) -> None:
        """measure -> adapt -> apply."""
        for batch in batches:
            if isinstance(batch, core_backend.CoreBatch) and batch.adapts_alone:
                batch.step()
        batches = [b for b in batches if not (isinstance(b, core_backend.CoreBatch) and b.adapts_alone)]
        if not batches:
            return
        sums = [batch.measure() for batch in batches]
        if self.variant is Variant.GLOBAL:
            self._adapt_shared_scale(adaptation.total_sums(sums), inputs)
            for batch in batches:
                batch.adapt(None)
        else:
            for batch, own_sums in zip(batches, sums, strict=True):
                batch.adapt(own_sums)
        for batch in batches:
            batch.apply()

    def _param_states(self) -> Iterator[state.State]:
        """The states of parameters; torch.optim lets a user keep anything else beside them."""
        return (entry for param, entry in self.state.items() if isinstance(param, Tensor))

    def _shared_scales(self) -> dict[torch.device, Tensor]:
        """The one scale of AdamClaraGlobal, by device that holds it."""
        scales = (entry["lr_scale"] for entry in self._param_states() if "lr_scale" in entry)
        return {scale.device: scale for scale in scales}

    def _adapt_shared_scale(self, totals: Tensor, inputs: StepInputs) -> None:
        """Move the one scale of AdamClaraGlobal, on every device that holds it."""
        scales = self._shared_scales()
        if not scales:
            scale = self._stateless_scales.setdefault(
                None, torch.full((), inputs.options[0].initial_scale, device=totals.device)
            )
            scales = {scale.device: scale}
        scale = moved(next(iter(scales.values())), totals.device)
        new_scale = self._scales_after(scale, totals, inputs.options[0], inputs)
        for device, target in scales.items():
            target.copy_(moved(new_scale, device))

    def _scales_after(self, scales: Tensor, sums: Tensor, options: GroupOptions, inputs: StepInputs) -> Tensor:
        """Adapted scales; the old ones if a GradScaler found an overflow."""
        new_scales = adaptation.adapted_scales(scales, sums, options, self.variant)
        if inputs.found_inf is None:
            return new_scales
        return torch.where(moved(inputs.found_inf, scales.device).reshape(()) != 0, scales, new_scales)

    # --- the step of sharded parameters ---

    def _prepare_sums_over_ranks(self, inputs: StepInputs) -> None:
        """Set `_whole_sums`, which adds up the sums of sharded tensors; None if there can be none."""
        if self._process_group.lost:
            raise RuntimeError(
                "this optimizer was unpickled, and its process_group is lost: set optimizer.process_group first"
            )
        if not sharding.needs_sums(self.param_groups, self.process_group):
            if self._whole_sums is not None:
                self._drop_plans()
                self._whole_sums = None
        elif self._whole_sums is None or not self._whole_sums.serves(self.param_groups, self.process_group):
            for group_index, param_index, param in self._enumerate_params():
                validation.check_placements(param, group_index, param_index)
            self._drop_plans()
            self._whole_sums = sharding.WholeTensorSums(
                self.param_groups,
                self.process_group,
                self.variant is Variant.GLOBAL,
                self._describe_hyperparameters(inputs),
            )
            if self.variant is Variant.GLOBAL:
                self._take_over_missing_shared_scale(self._whole_sums)
            else:
                self._take_over_missing_scales(self._whole_sums)

    def _take_over_missing_scales(self, whole_sums: sharding.WholeTensorSums) -> None:
        """Learn from the other ranks the scales of sharded parameters that have no state on this one.

        FSDP1 loads no state for an empty shard, so only the others know where the scale was.
        """
        params = {Location(g, p): param for g, p, param in self._enumerate_params()}
        known = {}
        for location, param in params.items():
            scale = self.state.get(param, {}).get("lr_scale", self._stateless_scales.get(param))
            if scale is not None:
                known[location] = scale
        for location, scale in whole_sums.largest_over_ranks(known).items():
            if location not in known and scale > 0.0:
                self._stateless_scales[params[location]] = scale.clone()

    def _take_over_missing_shared_scale(self, whole_sums: sharding.WholeTensorSums) -> None:
        """Learn from the other ranks the one scale of AdamClaraGlobal if this rank has no state that holds it."""
        own = next(iter(self._shared_scales().values()), self._stateless_scales.get(None))
        shared = whole_sums.largest_of_all(own)
        if own is None and shared is not None:
            self._stateless_scales[None] = shared

    def _describe_hyperparameters(self, inputs: StepInputs) -> list[str]:
        """One line per group and option, made again only when a value changes."""
        lrs = [float(lr) if not isinstance(lr, Tensor) or lr.device.type == "cpu" else None for lr in inputs.lrs]
        seen = (lrs, list(inputs.options))
        if self._hyperparameters[0] != seen:
            lines = [f"optimizer: {type(self).__name__}"]
            for index, (lr, options) in enumerate(zip(lrs, inputs.options, strict=True)):
                values = {"lr": lr, **dataclasses.asdict(options)}
                lines += [f"param group {index}: {name} = {value!r}" for name, value in values.items()]
            self._hyperparameters = (seen, lines)
        return self._hyperparameters[1]

    def _run_sharded(
        self, batches: Sequence[Batch], inputs: StepInputs, whole_sums: sharding.WholeTensorSums
    ) -> None:
        """measure -> sum over ranks -> adapt -> apply; also on a rank with nothing to step, as the others wait."""
        hyperparameters = self._describe_hyperparameters(inputs)
        if self.variant is Variant.GLOBAL:
            sharded = batches
            sums = [batch.measure() for batch in sharded]
            self._adapt_shared_scale(whole_sums.total(_locations_of(sharded), sums, hyperparameters), inputs)
            for batch in sharded:
                batch.adapt(None)
        else:
            sharded = [batch for batch in batches if whole_sums.covers(batch.locations[0])]
            sums = [batch.measure() for batch in sharded]
            pending = whole_sums.start(_locations_of(sharded), sums, hyperparameters)
            # Meanwhile what needs no other rank.
            self._run([batch for batch in batches if not whole_sums.covers(batch.locations[0])], inputs)
            reduced, absent = pending.result()
            rows = reduced.split_with_sizes([len(own) for own in sums])
            for batch, own, whole in zip(sharded, sums, rows, strict=True):
                batch.adapt(moved(whole, own.device))
            self._follow_other_ranks(absent, inputs)
        for batch in sharded:
            batch.apply()

    def _follow_other_ranks(self, absent: Sequence[sharding.Absent], inputs: StepInputs) -> None:
        """Adapt the scales of sharded parameters that have a gradient on other ranks only (FSDP1: empty shards)."""
        by_group: dict[tuple[int, torch.device], list[tuple[Tensor, Tensor]]] = {}
        for group_index, param_index, sums in absent:
            param = self.param_groups[group_index]["params"][param_index]
            if not param.requires_grad:
                continue
            scale = self.state.get(param, {}).get("lr_scale", self._stateless_scales.get(param))
            if scale is None:
                initial_scale = inputs.options[group_index].initial_scale
                scale = self._stateless_scales[param] = torch.full((), initial_scale, device=sums.device)
            by_group.setdefault((group_index, scale.device), []).append((scale, sums))
        for (group_index, device), pairs in by_group.items():
            scales = [scale for scale, _ in pairs]
            sums = moved(torch.stack([row for _, row in pairs]), device)
            adapted = self._scales_after(torch.stack(scales), sums, inputs.options[group_index], inputs)
            torch._foreach_copy_(scales, list(adapted.unbind()))

    # --- telemetry ---

    @torch.no_grad()
    def lr_scales(self) -> list[Tensor]:
        """The learning-rate scale mu of every parameter.

        Returns:
            per param group a float32 tensor [number of parameters], in order, on the parameters' device; a copy.
            A parameter that was never stepped has its group's ``initial_scale``, under AdamClaraGlobal the one mu.
        """
        shared = None
        if self.variant is Variant.GLOBAL:
            held = (entry["lr_scale"] for entry in self._param_states() if "lr_scale" in entry)
            shared = next(held, self._stateless_scales.get(None))
        return [self._group_scales(group, shared) for group in self.param_groups]

    def _group_scales(self, group: dict[str, Any], shared: Tensor | None) -> Tensor:
        params = group["params"]
        if not params:
            return torch.empty(0)
        device = params[0].device
        scales = []
        for param in params:
            scale = self.state.get(param, {}).get("lr_scale", self._stateless_scales.get(param, shared))
            if scale is None:
                scale = torch.full((), group["initial_scale"], dtype=torch.float32, device=device)
            scales.append(moved(scale, device))
        return torch.stack(scales)

    @torch.no_grad()
    def effective_lrs(self) -> list[Tensor]:
        """The learning rate in force, lr * mu, of every parameter.

        Does not wait for the device, so it can be called at every step; read the values later, or seldom.

        Returns:
            as `lr_scales`: per param group a float32 tensor [number of parameters]; later steps do not change it.
        """
        return [
            scales * moved(group["lr"], scales.device).reshape(()).to(torch.float32)
            if isinstance(group["lr"], Tensor)
            else scales * float(group["lr"])
            for group, scales in zip(self.param_groups, self.lr_scales(), strict=True)
        ]

    # --- saving and loading ---

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, of ``torch.optim.Adam``/``AdamW`` or of apex FusedAdam.

        Dtypes are kept bit for bit; tensors are copied, also when ``state_dict`` holds the live ones of another
        optimizer. What another Adam lacks starts fresh: ``path`` at zeros, ``lr_scale`` at ``initial_scale``, options
        as this optimizer has them.

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
        return {**super().__getstate__(), **kept}

    def __setstate__(self, new: dict[str, Any]) -> None:
        """Restore from a pickle (all attributes) or from ``load_state_dict`` (state and param groups)."""
        new = dict(new)
        groups = new["param_groups"]
        group_steps = [group.get("step") for group in groups]
        templates = self.param_groups if hasattr(self, "param_groups") else [new["defaults"]] * len(groups)
        for index, (group, template) in enumerate(zip(groups, templates, strict=True)):
            for name in state.FOREIGN_GROUP_OPTIONS:
                group.pop(name, None)
            for name in ("lr", *option_names(self.variant)):
                group.setdefault(name, template[name])
            read_options(group, index, self.variant)
        for group_index, group in enumerate(groups):
            for param_index, param in enumerate(group["params"]):
                entry = new["state"].get(param)
                if entry and any(isinstance(value, state.Verbatim) for value in entry.values()):
                    new["state"][param] = state.adopt(
                        entry, param, group, group_steps[group_index], group_index, param_index
                    )
        super().__setstate__(new)
        if self.variant is Variant.GLOBAL:
            state.share_scale(self._param_states())
        self._forget_caches()


def _locations_of(batches: Sequence[Batch]) -> list[Location]:
    return [location for batch in batches for location in batch.locations]


class AdamClaraGlobal(AdamClara):
    """Adam with one learning-rate scale for all parameters of all groups: the most stable; for large models.

    The options ``smoothing, damping, reference, clip, accumulate, deferred, initial_scale, scale_bounds, adapt_lr``
    must be equal in all groups.
    """

    variant = Variant.GLOBAL


class AdamClaraLocal(AdamClara):
    """Adam with one learning-rate scale per parameter tensor: the fastest to react; small models, experiments."""

    variant = Variant.LOCAL


class AdamClaraSmoothed(AdamClara):
    """Adam with one smoothed learning-rate scale per parameter tensor: balanced, the general-purpose choice.

    The scale is a moving average of what the factor asks for: mu <- b mu + (1 - b) mu f, with b = ``lr_smoothing``
    in [0, 1). The other arguments are those of `AdamClara`.
    """

    variant = Variant.SMOOTHED

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        smoothing: float = 0.05,
        damping: float = 0.5,
        reference: str | float = "random_walk",
        clip: tuple[float, float] | None = (0.5, 2.0),
        lr_smoothing: float = 0.9,
        accumulate: bool = True,
        deferred: bool = False,
        initial_scale: float = 1.0,
        scale_bounds: tuple[float, float] = (1e-4, 1e4),
        adapt_lr: bool = True,
        path_dtype: torch.dtype | None = None,
        fused: bool | None = None,
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "smoothing": smoothing,
            "damping": damping,
            "reference": reference,
            "clip": clip,
            "lr_smoothing": lr_smoothing,
            "accumulate": accumulate,
            "deferred": deferred,
            "initial_scale": initial_scale,
            "scale_bounds": scale_bounds,
            "adapt_lr": adapt_lr,
            "path_dtype": path_dtype,
        }
        self._initialize(params, defaults, fused, process_group)
