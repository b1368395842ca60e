"""Lightning: log the learning rates in force and the scales to the Trainer's loggers.

    Trainer(callbacks=[AdamClaraCallback()])

Needs the package lightning or pytorch_lightning.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

try:
    from lightning.pytorch import Callback
except ImportError:  # the package of the same content under its older name
    from pytorch_lightning import Callback  # type: ignore[no-redef, import-not-found, unused-ignore]

from .telemetry import current_lrs, find_optimizer, scale_figures


class AdamClaraCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Logs per param group min, median and max of `effective_lr` (lr * mu) and `lr_scale` (mu) of the step just taken.

    At the Trainer's `log_every_n_steps`, and only then is the device waited for. Several optimizers have figures of
    their own each, `{prefix}/optimizer{index}/...`.
    """

    def __init__(self, prefix: str = "clara") -> None:
        self.prefix = prefix
        # The rates that the optimizers have stepped with since the last batch, by their place in the Trainer.
        self._lrs: dict[int, list[float | Tensor]] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Remember the rates: the schedulers will have moved them when it is time to log."""
        stepping = find_optimizer(optimizer)
        for index, candidate in enumerate(trainer.optimizers):
            if stepping is not None and find_optimizer(candidate) is stepping:
                self._lrs[index] = current_lrs(stepping)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Log when the Trainer does: not before a step, that is not at batches whose gradients are only accumulated."""
        stepped, self._lrs = self._lrs, {}
        # Counted once per batch however many optimizers there are; this batch's step is not in it yet.
        steps = trainer.fit_loop.epoch_loop._batches_that_stepped
        if not stepped or not trainer.loggers or (steps + 1) % trainer.log_every_n_steps != 0:
            return
        several = sum(find_optimizer(each) is not None for each in trainer.optimizers) > 1
        for index, lrs in stepped.items():
            optimizer = find_optimizer(trainer.optimizers[index])
            assert optimizer is not None
            figures = scale_figures(optimizer, lrs, f"{self.prefix}/optimizer{index}" if several else self.prefix)
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=steps)
