"""Plots of benchmark results, drawn from the JSON files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.environment import short_name
from harness.tables import Document, Row

OURS = "#1b6ca8"
OTHERS = "#9a9a9a"
BASELINE_COLOR = "#404040"
SOURCE_DIGEST = "Source SHA-256"


def color_of(row: Row, baseline: str) -> str:
    if row["optimizer"] == baseline:
        return BASELINE_COLOR
    return OURS if row["label"].startswith("AdamClara") and "@" not in row["optimizer"] else OTHERS


def save(figure: Figure, path: Path, source_digest: str) -> None:
    """Write a PNG; `source_digest` is kept in it, so that one can tell which data it shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None, SOURCE_DIGEST: source_digest})
    plt.close(figure)


def bars(document: Document, dtype: str) -> Figure:
    """Time relative to the baseline, a panel per model; spread as the interval of the median."""
    rows = [row for row in document["results"] if row["dtype"] == dtype]
    shown = list(dict.fromkeys(row["model"] for row in rows))
    most = max(sum(row["model"] == model for row in rows) for model in shown)
    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(6.4 * columns, lines * (0.9 + 0.27 * most)), squeeze=False, layout="constrained"
    )
    for axis, model in zip(axes.flat, shown, strict=False):
        model_bars(axis, [row for row in rows if row["model"] == model], document["settings"]["baseline"])
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    figure.suptitle(f"Time per step, {dtype} parameters, {short_name(document['machine'])}", fontsize=11)
    return figure


def model_bars(axis: Axes, rows: Sequence[Row], baseline: str) -> None:
    limit = 1.15 * max(row["ratio"]["median"] for row in rows)
    if limit > 5:  # slow peers would squeeze the others to nothing
        limit = max(2.5, 1.6 * max(row["ratio"]["median"] for row in rows if row["ratio"]["median"] <= 5))
    for place, row in enumerate(reversed(rows)):
        ratio = row["ratio"]["median"]
        inside = ratio > 0.65 * limit
        error = 0.0 if inside else row["ratio"]["error"]
        axis.barh(place, min(ratio, limit), xerr=error or None, error_kw={"linewidth": 0.8}, height=0.75,
                  color=color_of(row, baseline))  # fmt: skip
        axis.text(
            0.98 * min(ratio, limit) if inside else ratio + error + 0.015 * limit, place,
            f"{ratio:.2f}×  {row['seconds']['median'] * 1e3:.3g} ms",
            ha="right" if inside else "left", va="center", fontsize=8, color="white" if inside else "black",
        )  # fmt: skip
    axis.set_yticks(range(len(rows)), [row["label"] for row in reversed(rows)], fontsize=8)
    axis.axvline(1.0, color=BASELINE_COLOR, linewidth=0.8, linestyle=":")
    axis.set_xlim(0, limit)
    axis.set_xlabel("time relative to torch Adam fused", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    first = rows[0]
    large = first["elements"] >= 1_000_000 and first["tensors"] > 1
    size = f": {first['elements'] / 1e6:.3g} M elements in {first['tensors']} tensors" if large else ""
    axis.set_title(first["description"] + size, fontsize=9)


def cpu_overhead(document: Document) -> Figure:
    """Host time per step over the number of tensors; dashed: with gradients that come and go."""
    figure, axis = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    ends = []
    for name, gradients in dict.fromkeys((row["optimizer"], row["gradients"]) for row in document["results"]):
        rows = [r for r in document["results"] if (r["optimizer"], r["gradients"]) == (name, gradients)]
        times = [row["seconds"]["median"] * 1e6 for row in rows]
        color = color_of(rows[0], document["settings"]["baseline"])
        line = "-" if gradients == "all" else "--"
        axis.plot([row["tensors"] for row in rows], times, line, marker="o", markersize=3, linewidth=1.2, color=color)
        if gradients == "all":
            ends.append((times[-1], rows[-1]["tensors"], rows[0]["label"], color))
    height = 0.0
    for time, last, label, color in sorted(ends):  # at the right end, pushed apart where lines meet
        height = max(time, height * 1.32)
        axis.annotate(label, (last, time), xytext=(last * 1.15, height), fontsize=7, color=color, va="center")
    axis.set(xscale="log", yscale="log", xlabel="tensors", ylabel="host time per step, µs")
    axis.set_xlim(right=12 * max(end[1] for end in ends))
    axis.set_ylim(top=2 * height)
    axis.grid(alpha=0.2)
    axis.set_title(f"Host time per step (dashed: gradients come and go), {short_name(document['machine'])}", fontsize=9)
    return figure
