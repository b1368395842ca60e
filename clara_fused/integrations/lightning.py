"""Lightning: log the learning rates in force and the scales to the Trainer's loggers.

    Trainer(callbacks=[AdamClaraCallback()])
"""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:  # the package of the same content under its older name
    from pytorch_lightning import Callback  # type: ignore[no-redef, import-not-found, unused-ignore]

from .telemetry import ScaleSummary, find_optimizer


class AdamClaraCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Logs per param group min, median and max of `effective_lr` (lr * mu) and `lr_scale` (mu).

    At the Trainer's `log_every_n_steps`, and only then is the device waited for.
    """

    def __init__(self, prefix: str = "clara") -> None:
        self.prefix = prefix

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Log when the Trainer does."""
        if not trainer.loggers or trainer.global_step % trainer.log_every_n_steps != 0:
            return
        optimizers = [found for found in map(find_optimizer, trainer.optimizers) if found is not None]
        for index, optimizer in enumerate(optimizers):
            prefix = self.prefix if len(optimizers) == 1 else f"{self.prefix}/optimizer{index}"
            figures = ScaleSummary(optimizer).read(prefix)
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
