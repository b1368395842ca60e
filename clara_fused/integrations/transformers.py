"""Hugging Face Trainer: log the learning rates in force and the scales along with the Trainer's own figures.

The Trainer hands its own options to its own optimizers only, so hand them over (docs/frameworks/transformers.md):

    Trainer(args=args, optimizer_cls_and_kwargs=adam_clara(AdamClaraSmoothed, args), callbacks=[AdamClaraCallback()])
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from clara_fused.optimizers import AdamClara

from .telemetry import current_lrs, find_optimizer, scale_figures


def adam_clara(cls: type[AdamClara], args: Any, **options: Any) -> tuple[type[AdamClara], dict[str, Any]]:
    """The Trainer's `optimizer_cls_and_kwargs`, with what its AdamW would have read from the `TrainingArguments`.

    Learning rate, betas and epsilon; the decay, which the Trainer sets per group, is decoupled. `options` go before.
    """
    from_arguments = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "decoupled_weight_decay": True,
    }
    return cls, {**from_arguments, **options}


class AdamClaraCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Adds per param group min, median and max of `effective_lr` (lr * mu) and `lr_scale` (mu) to every log.

    They are those of the last step that was taken. Reads the device only when the Trainer logs, which does so itself.
    """

    def __init__(self, prefix: str = "clara") -> None:
        self.prefix = prefix
        self._optimizer: AdamClara | None = None
        self._lrs: list[float | Tensor] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Remember the rates of the step just taken: the scheduler will have moved them when it is time to log."""
        self._optimizer = find_optimizer(optimizer)
        self._lrs = [] if self._optimizer is None else current_lrs(self._optimizer)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Extend what is being logged."""
        # The summary at the end of training has no step of its own, an evaluation before it no step at all.
        if self._optimizer is None or logs is None or "train_runtime" in logs:
            return
        figures = scale_figures(self._optimizer, self._lrs, self.prefix)
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)
