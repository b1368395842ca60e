"""Hugging Face Trainer: log the learning rates in force and the scales along with the Trainer's own figures.

    Trainer(..., optimizer_cls_and_kwargs=(AdamClaraSmoothed, {}), callbacks=[AdamClaraCallback()])
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .telemetry import ScaleSummary, find_optimizer


class AdamClaraCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Adds per param group min, median and max of `effective_lr` (lr * mu) and `lr_scale` (mu) to every log.

    Reads the device only when the Trainer logs, which does so itself.
    """

    def __init__(self, prefix: str = "clara") -> None:
        self.prefix = prefix
        self._optimizer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Remember the optimizer: `on_log` is not told on all versions."""
        self._optimizer = optimizer or self._optimizer

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Extend what is being logged."""
        found = find_optimizer(optimizer or self._optimizer)
        # The summary at the end of training has no step of its own.
        if found is None or logs is None or "train_runtime" in logs:
            return
        figures = ScaleSummary(found).read(self.prefix)
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)
