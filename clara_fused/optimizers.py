"""AdamClaraGlobal, AdamClaraLocal, AdamClaraSmoothed: torch.optim's contract, and nothing numeric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import state, tensors, torch_backend
from .core import buckets as core_buckets
from .distributed import sharding
from .options import (
    OPTIONS,
    Constructor,
    OptionReader,
    SmoothedConstructor,
    check_switches,
    drop_switches,
    read_lr,
)
from .step import Bucket, Location, Ranks, StepInputs, TensorWork, adapt_together, moved
from .adaptation import total_evidence

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
        self._forget_caches()
        Optimizer.__init__(self, arguments["params"], {name: arguments[name] for name in self.option_names})

    def _forget_caches(self) -> None:
        """Drop what was derived from groups, parameters and state; the next step derives it anew."""
        self._options = OptionReader(self.option_names, self.one_scale)
        self._core = core_buckets.Gatherer(self.one_scale)
        self._ranks: sharding.RankSums | None = None
        # Under AdamClaraGlobal the one scale, by device that holds it; empty where not known.
        self._scales: dict[torch.device, Tensor] = {}
        # Initial scales by group (-1: of all groups, under AdamClaraGlobal), as the group's first state got them.
        self._initial_scales: dict[int, Tensor] = {}

    @property
    def process_group(self) -> Any:
        """The group over which plain parameters are sharded, or None.

        A pickled optimizer comes back without its group: set it again before the next step. A deep copy shares it.
        """
        return self._process_group.group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        sharding.check_process_group(group)
        self._process_group = sharding.ProcessGroupReference(group)
        self._ranks = None

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
                paths may have taken up the gradients then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        inputs, ranks, buckets = self._begin_step()
        if ranks is None and (not self.one_scale or (len(buckets) == 1 and len(self._shared_scales()) == 1)):
            for bucket in buckets:
                bucket.step()
        else:
            sums = [bucket.measure() for bucket in buckets]
            sums = sums if ranks is None else ranks.whole_sums(buckets, sums)
            evidence = [bucket.advance(rows) for bucket, rows in zip(buckets, sums, strict=True)]
            if self.one_scale and (buckets or ranks is not None):
                total = total_evidence(evidence) if ranks is None else ranks.total(buckets, evidence)
                adapt_one_scale(total, self._shared_scales().values(), inputs)
            elif not self.one_scale:
                for bucket, rows in zip(buckets, evidence, strict=True):
                    bucket.rescale(rows)
            for bucket in buckets:
                bucket.update()
        return loss

    def _begin_step(self) -> tuple[StepInputs, Ranks | None, Sequence[Bucket]]:
        """All checks, and what the step works on; an error is raised on all ranks that share parameters."""
        try:
            inputs = self._read_inputs()
            ranks, inputs = sharding.join(self, inputs)
            return inputs, ranks, self._gather(inputs)
        except Exception as error:
            sharding.fail_together(self, error)
            raise

    def _read_inputs(self) -> StepInputs:
        """Read and check everything a step depends on beside the tensors."""
        options = self._options.read(self.param_groups)
        lrs = [read_lr(group["lr"], index) for index, group in enumerate(self.param_groups)]
        amp = [getattr(self, name, None) for name in ("grad_scale", "found_inf")]
        # Where no parameter has a gradient the scaler's found_inf is a sum over nothing: the number 0.
        grad_scale, found_inf = (
            value if value is None or isinstance(value, Tensor) else torch.tensor(float(value), device="cpu")
            for value in amp
        )
        return StepInputs(options, lrs, grad_scale, found_inf, self.one_scale)

    def _gather(self, inputs: StepInputs) -> Sequence[Bucket]:
        """Buckets of all tensors with a gradient: the core's, and PyTorch's of what the core cannot serve or is not to."""
        buckets, irregular = self._core.gather(self, inputs) if self.fused is not False else ([], None)
        if irregular is not None and not irregular:
            return buckets
        works = self._prepare(inputs, irregular)
        if irregular is not None:  # what only lacked its state is regular now
            buckets, irregular = self._core.gather(self, inputs)
            if irregular and self.fused:
                self._core.require(self, irregular)
            works = [works[location] for location in irregular]
        return [*buckets, *torch_backend.buckets_of(list(works.values()), inputs)]

    def _prepare(self, inputs: StepInputs, locations: Iterable[Location] | None) -> dict[Location, TensorWork]:
        """Check tensors (None: all) that have a gradient; only then create or complete their state."""
        works = {}
        return works
