"""Hugging Face Trainer with AdamClara: a tiny GPT-2 on Python's documentation strings, logged to TensorBoard.

    pip install transformers accelerate tensorboard
    python examples/hf_trainer.py --steps 60
    tensorboard --logdir runs/hf_trainer

Beside the loss the log has, per param group, the learning rate in force and the scale.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from clara_fused import AdamClaraSmoothed
from clara_fused.integrations.telemetry import find_optimizer
from clara_fused.integrations.transformers import AdamClaraCallback, adam_clara
from tiny_text import CONTEXT, VOCABULARY, encoded_text


class Windows(Dataset):
    """Overlapping windows of the text; the model shifts the labels itself."""

    def __init__(self) -> None:
        self.text = encoded_text()

    def __len__(self) -> int:
        return (len(self.text) - CONTEXT) // (CONTEXT // 2)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.text[index * (CONTEXT // 2) :][:CONTEXT]
        return {"input_ids": window, "labels": window}


class ScaleHistograms(TrainerCallback):
    """One TensorBoard histogram of all learning-rate scales per log."""

    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(str(folder))

    def on_log(self, args, state, control, optimizer=None, **kwargs) -> None:
        found = find_optimizer(optimizer)
        if found is not None:
            for index, scales in enumerate(found.lr_scales()):
                self._writer.add_histogram(f"clara/group{index}/lr_scale", scales, state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--folder", type=Path, default=Path("runs/hf_trainer"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    arguments = parser.parse_args()

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    args = TrainingArguments(
        output_dir=str(arguments.folder),
        max_steps=arguments.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=arguments.lr,
        weight_decay=0.1,
        warmup_steps=5,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        logging_steps=10,
        save_steps=max(1, arguments.steps // 2),
        report_to="none",
    )
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=args,
        train_dataset=Windows(),
        # The Trainer hands learning rate, betas and epsilon to its own optimizers only; this hands them over.
        optimizer_cls_and_kwargs=adam_clara(AdamClaraSmoothed, args),
        callbacks=[AdamClaraCallback(), ScaleHistograms(arguments.folder / "tensorboard")],
    )
    trainer.train(resume_from_checkpoint=arguments.resume or None)


if __name__ == "__main__":
    main()
