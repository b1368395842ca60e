#!/usr/bin/env python3
"""Train on real data with Adam and with the optimizers that find their own learning rate, and compare.

    python examples/train.py --data text --optimizer adam local --lr 1e-5 1e-3
    python examples/train.py --data digits --optimizer smoothed --set lr_smoothing=0.8 --set initial_scale=1
    python examples/train.py --data my_notes.txt --optimizer local --steps 2000 --save checkpoints
    python examples/train.py --data my_notes.txt --optimizer local --steps 4000 --resume checkpoints

Every optimizer is run from every initial learning rate, on the same batches. The output folder gets a JSON log per
run and curves.png.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor, nn

from training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from training.data import DigitsData, TextData, load_data
from training.history import History
from training.models import CharGPT, digits_mlp
from training.optimizers import OPTIMIZERS, check_options_are_known, effective_lrs, options_for, parse_option
from training.plot import plot_results
from training.report import Result, print_table, progress_bars

STEPS_PER_FLUSH = 10  # how often the device is waited for, to show loss and effective lr


def main(arguments: list[str] | None = None) -> list[Result]:
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        return run_all(args)
    except (ValueError, TypeError, CheckpointError) as error:
        parser.error(str(error))


def build_parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="text", help="digits, text (source of Python's standard library), or a file or folder")
    add("--optimizer", nargs="+", choices=list(OPTIMIZERS), default=["adam", "local"], metavar="NAME",
        help=f"one or more of {', '.join(OPTIMIZERS)}")  # fmt: skip
    add("--lr", nargs="+", type=float, default=[1e-3], help="initial learning rates")
    add("--set", action="append", default=[], metavar="NAME=VALUE", dest="options",
        help="an option of the optimizers that have it; may be repeated")  # fmt: skip
    add("--steps", type=positive_int, default=500, help="default: %(default)s")
    add("--batch-size", type=positive_int, help="default: 24 for text, 64 for digits")
    add("--seed", type=int, default=0, help="of the initial weights and the batches")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--out", type=Path, default=Path("runs"), metavar="FOLDER", help="default: %(default)s")
    add("--evaluate-every", type=positive_int, default=50, metavar="STEPS", help="default: %(default)s")
    add("--save", type=Path, metavar="FOLDER", help="write a checkpoint per run there")
    add("--save-every", type=positive_int, default=500, metavar="STEPS", help="and at the end; default: %(default)s")
    add("--resume", type=Path, metavar="FOLDER", help="go on from the checkpoints there")
    return parser


def run_all(args: argparse.Namespace) -> list[Result]:
    make_repeatable()
    device = usable_device(args.device)
    options = dict(parse_option(text) for text in args.options)
    check_options_are_known(options, args.optimizer)
    data = load_data(args.data, device)
    pairs = list(dict.fromkeys(itertools.product(args.lr, args.optimizer)))
    for lr, optimizer in pairs:  # a bad option shows now, not after the runs before it
        build_optimizer(optimizer, nn.Linear(1, 1), lr, options)

    if args.resume and not any(args.resume.glob("*.pt")):
        raise CheckpointError(f"no checkpoint in {args.resume}")

    console = Console()
    results: list[Result] = []
    with progress_bars(console) as progress:
        for lr, optimizer in pairs:
            result = run(args, data, device, optimizer, lr, options, progress)
            result.write_json(args.out / f"{result.name}.json")
            results.append(result)
            if not console.is_terminal:  # where bars cannot move, a line per run tells how far it is
                console.print(f"{result.name}: validation loss {result.history.validation_loss[-1]:.3f}")
    print_table(console, results)
    picture = args.out / "curves.png"
    plot_results(results, picture, f"{data.name}, batches of {results[0].settings['batch_size']}, seed {args.seed}")
    console.print(f"curves: {picture}; a JSON log per run beside it")
    return results


def run(
    args: argparse.Namespace,
    data: DigitsData | TextData,
    device: torch.device,
    optimizer_name: str,
    lr: float,
    options: dict[str, Any],
    progress: Progress,
) -> Result:
    """Trains one optimizer from one initial learning rate. Runs differ in nothing else, the batches included."""
    torch.manual_seed(args.seed)
    batch_generator = torch.Generator().manual_seed(args.seed)
    model = build_model(data).to(device)
    optimizer = build_optimizer(optimizer_name, model, lr, options)
    history = History()
    batch_size = args.batch_size or data.default_batch_size
    name = f"{data.name}-{optimizer_name}-lr{lr:g}"
    settings = {
        "data": args.data,
        "optimizer": optimizer_name,
        "lr": lr,
        "options": {key: repr(value) for key, value in options_for(optimizer_name, options).items()},
        "batch_size": batch_size,
        "seed": args.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    checkpoint = args.resume / f"{name}.pt" if args.resume else None
    if checkpoint and not checkpoint.exists():
        progress.console.print(f"no checkpoint of {name}: from the beginning")
    elif checkpoint:
        history = load_checkpoint(checkpoint, settings, model, optimizer, batch_generator)
        if len(history.training_loss) > args.steps:
            raise CheckpointError(f"{checkpoint} is at step {len(history.training_loss)}, beyond --steps {args.steps}")
    first_step = len(history.training_loss) + 1
    if first_step == 1:
        history.record_validation(0, *evaluate(model, *data.validation))
    bar = progress.add_task(
        f"{optimizer_name:8} from {lr:<6g}", total=args.steps, completed=first_step - 1, loss=float("nan"), lr=lr
    )

    started = time.perf_counter()
    for step in range(first_step, args.steps + 1):
        inputs, targets = data.training_batch(batch_size, batch_generator)
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.record(loss, effective_lrs(optimizer))

        if step % args.evaluate_every == 0:
            history.record_validation(step, *evaluate(model, *data.validation))
        if step % STEPS_PER_FLUSH == 0:
            show(progress, bar, history)
        if args.save and step % args.save_every == 0:
            save_checkpoint(args.save / f"{name}.pt", settings, model, optimizer, batch_generator, history)

    if history.validation_steps[-1:] != [args.steps]:
        history.record_validation(args.steps, *evaluate(model, *data.validation))
    show(progress, bar, history)
    if args.save:
        save_checkpoint(args.save / f"{name}.pt", settings, model, optimizer, batch_generator, history)
    return Result(name, optimizer_name, lr, settings, history, time.perf_counter() - started)


def show(progress: Progress, bar: TaskID, history: History) -> None:
    history.flush()
    progress.update(
        bar,
        completed=len(history.training_loss),
        loss=history.recent_training_loss(),
        lr=history.lr_median[-1],
    )


def build_model(data: DigitsData | TextData) -> nn.Module:
    return CharGPT(data.vocabulary_size, data.context) if isinstance(data, TextData) else digits_mlp()


def build_optimizer(name: str, model: nn.Module, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    return OPTIMIZERS[name](model.parameters(), lr=lr, **options_for(name, options))  # type: ignore[call-arg]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all predictions: logits [..., classes], targets [...]."""
    return F.cross_entropy(logits.flatten(end_dim=-2), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """Loss and accuracy on held-out data."""
    logits = model(inputs)
    accuracy = (logits.argmax(dim=-1) == targets).float().mean()
    return cross_entropy(logits, targets).item(), accuracy.item()


def make_repeatable() -> None:
    """The same seed gives the same bits, also on a GPU; resuming relies on it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    main()
