"""The picture of several runs: loss and effective learning rate over the steps."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from .files import atomic_write
from .report import Result

# Okabe and Ito's colors, told apart by color-blind readers as well.
COLORS = {"adam": "#000000", "adamw": "#999999", "global": "#0072B2", "local": "#D55E00", "smoothed": "#009E73"}
LABELS = {
    "adam": "Adam",
    "adamw": "AdamW",
    "global": "AdamClaraGlobal",
    "local": "AdamClaraLocal",
    "smoothed": "AdamClaraSmoothed",
}


def plot_results(results: list[Result], path: Path, title: str) -> None:
    """Writes a PNG: one color per optimizer, one line style per initial learning rate."""
    initial_lrs = sorted({result.lr for result in results})
    styles = dict(zip(initial_lrs, cycle(["-", "--", ":", "-."])))
    figure, (loss_axes, lr_axes) = plt.subplots(1, 2, figsize=(12, 4.6), dpi=150, layout="constrained")
    for result in results:
        history = result.history
        color, style = COLORS[result.optimizer], styles[result.lr]
        steps = np.arange(1, len(history.training_loss) + 1)
        loss_axes.plot(steps, moving_average(history.training_loss), style, color=color, alpha=0.35, linewidth=1)
        loss_axes.plot(history.validation_steps, history.validation_loss, style, color=color, linewidth=1.8)
        lr_axes.plot(steps, history.lr_median, style, color=color, linewidth=1.8)

    loss_axes.set(title="loss: held out (bold), training (thin)", xlabel="step", ylabel="cross-entropy [nats]")
    lr_axes.set(
        title="effective learning rate: median over the parameter tensors",
        xlabel="step",
        ylabel="effective learning rate",
        yscale="log",
    )
    for axes in (loss_axes, lr_axes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    optimizers = dict.fromkeys(result.optimizer for result in results)
    handles = [Line2D([], [], color=COLORS[name], linewidth=2, label=LABELS[name]) for name in optimizers]
    handles += [
        Line2D([], [], color="#555555", linestyle=style, label=f"from lr {lr:g}") for lr, style in styles.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(title)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)
    plt.close(figure)


def moving_average(values: list[float]) -> np.ndarray:
    """Mean over the latest 2% of the steps, over fewer at the start."""
    window = max(1, len(values) // 50)
    sums = np.cumsum(values)
    counts = np.minimum(np.arange(1, len(values) + 1), window)
    sums[window:] -= sums[:-window].copy()
    return sums / counts
