"""Lightning with AdamClara: a tiny GPT on Python's documentation strings, logged to TensorBoard with histograms.

    pip install lightning tensorboard
    python examples/lightning_trainer.py --steps 60
    tensorboard --logdir runs/lightning

Beside the loss the log has, per param group, the learning rate in force and the scale.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import lightning
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from clara_fused import AdamClaraSmoothed
from clara_fused.integrations.lightning import AdamClaraCallback
from tiny_text import TinyGPT, batch, encoded_text


class Batches(IterableDataset):
    """Endless random windows of the text, already in batches."""

    def __iter__(self):
        text = encoded_text()
        for seed in range(sys.maxsize):
            yield batch(text, 16, seed)


class Model(lightning.LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = TinyGPT()

    def training_step(self, windows, index: int):
        inputs, targets = windows
        loss = nn.functional.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return AdamClaraSmoothed(self.parameters(), lr=self.hparams.lr)

    def on_train_batch_end(self, outputs, windows, index: int) -> None:
        # `self.optimizers()` is Lightning's wrapper; the optimizer itself is inside.
        if self.logger is not None and self.global_step % self.trainer.log_every_n_steps == 0:
            for group, scales in enumerate(self.optimizers().optimizer.lr_scales()):
                self.logger.experiment.add_histogram(f"clara/group{group}/lr_scale", scales, self.global_step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--folder", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--resume", type=Path, help="a checkpoint (.ckpt) to go on from")
    arguments = parser.parse_args()

    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_steps=arguments.steps,
        log_every_n_steps=10,
        gradient_clip_val=1.0,
        logger=TensorBoardLogger(arguments.folder),
        callbacks=[AdamClaraCallback()],
        default_root_dir=arguments.folder,
    )
    trainer.fit(Model(arguments.lr), DataLoader(Batches(), batch_size=None), ckpt_path=arguments.resume)
    print(f"loss {trainer.callback_metrics['loss'].item():.3f}")


if __name__ == "__main__":
    main()
