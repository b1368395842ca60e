"""Plots of benchmark results, drawn from the JSON files alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.environment import short_name

OURS = "#1b6ca8"
OURS_DEFERRED = "#6db1e0"
OTHERS = "#9a9a9a"
BASELINE_COLOR = "#404040"
SOURCE_DIGEST = "Source SHA-256"


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def color_of(row: dict[str, Any], baseline: str) -> str:
    name = row["optimizer"]
    if name == baseline:
        return BASELINE_COLOR
    if not row["label"].startswith("AdamClara") or name == "published" or "@" in name:
        return OTHERS
    return OURS_DEFERRED if "deferred" in name else OURS


def save(figure: Figure, path: Path, source_digest: str | None = None) -> Path:
    """Write a PNG; `source_digest` is kept in it, so that one can tell which data it shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Software": None} | ({SOURCE_DIGEST: source_digest} if source_digest else {})
    figure.savefig(path, dpi=110, metadata=metadata)
    plt.close(figure)
    return path


def plot_step_time(path: Path, folder: Path) -> list[Path]:
    """Bars per model and dtype, and a roofline; returns the pictures' paths."""
    document = load(path)
    device = document["device"]
    pictures = [
        save(bars(document, dtype), folder / f"step_time-{device}-{dtype}.png")
        for dtype in dict.fromkeys(row["dtype"] for row in document["results"])
    ]
    return [*pictures, save(roofline(document), folder / f"roofline-{device}.png")]


def bars(document: dict[str, Any], dtype: str, models: Sequence[str] | None = None) -> Figure:
    """Time relative to the baseline, a panel per model; spread as the interval of the median."""
    rows = [row for row in document["results"] if row["dtype"] == dtype and (not models or row["model"] in models)]
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


def model_bars(axis: Axes, rows: Sequence[dict[str, Any]], baseline: str) -> None:
    limit = 1.15 * max(row["ratio"]["median"] for row in rows)
    # Slow peers would squeeze the others to nothing.
    close = [row["ratio"]["median"] for row in rows if row["ratio"]["median"] <= 5]
    if limit > 5:
        limit = max(2.5, 1.6 * max(close))
    for place, row in enumerate(reversed(rows)):
        ratio = row["ratio"]["median"]
        inside = ratio > 0.65 * limit
        error = 0.0 if inside else row["ratio"]["error"]
        axis.barh(
            place, min(ratio, limit), xerr=error or None, error_kw={"linewidth": 0.8}, color=color_of(row, baseline),
            height=0.75,
        )  # fmt: skip
        axis.text(
            0.98 * min(ratio, limit) if inside else ratio + error + 0.015 * limit, place,
            f"{ratio:.2f}×  {milliseconds(row['seconds']['median'])}",
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


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def roofline(document: dict[str, Any]) -> Figure:
    """Time per element over the bytes that must move per element; the line is what a simple loop would take."""
    figure, axis = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    # Small lists are bound by the cost per tensor, not by memory.
    rows = [row for row in document["results"] if row["elements"] >= 10_000_000 and "@" not in row["optimizer"]]
    if not rows:
        axis.text(0.5, 0.5, "no list of 10 M elements or more was measured", ha="center", transform=axis.transAxes)
        return figure
    rates = [loops[loops["fastest"]]["median"] for loops in document["bandwidths"]]
    bandwidth = sorted(rates)[len(rates) // 2]
    most_bytes = max(row["bytes_per_element"] for row in rows) * 1.1
    axis.plot([0, most_bytes], [0, most_bytes / bandwidth * 1e9], color="black", linewidth=1,
              label=f"simple loop, {bandwidth / 1e9:.3g} GB/s")  # fmt: skip
    markers = dict(zip(dict.fromkeys((row["model"], row["dtype"]) for row in rows), "osD^vP*Xd<>hp", strict=False))
    baseline = document["settings"]["baseline"]
    for row in rows:
        axis.scatter(
            row["bytes_per_element"], row["seconds"]["median"] / row["elements"] * 1e9,
            marker=markers.get((row["model"], row["dtype"]), "o"), color=color_of(row, baseline), s=36, alpha=0.8,
        )  # fmt: skip
    fastest_time = most_bytes / bandwidth * 1e9
    axis.set_ylim(0, 3 * fastest_time)
    for key, marker in markers.items():
        axis.scatter([], [], marker=marker, color="black", s=30, label=", ".join(key))
    colors = {
        "torch Adam fused": BASELINE_COLOR, "AdamClara": OURS, "AdamClara deferred": OURS_DEFERRED, "others": OTHERS
    }  # fmt: skip
    for label, color in colors.items():
        axis.scatter([], [], marker="s", color=color, s=30, label=label)
    above = sum(row["seconds"]["median"] / row["elements"] * 1e9 > 3 * fastest_time for row in rows)
    if above:
        note = f"{above} slower ones lie above"
        axis.text(0.99, 0.98, note, transform=axis.transAxes, ha="right", va="top", fontsize=8)
    axis.set_xlim(0, most_bytes)
    axis.set_xlabel("bytes per element that must move")
    axis.set_ylabel("ns per element")
    axis.legend(fontsize=7, loc="upper left", ncols=2)
    axis.set_title(f"Roofline of memory, {short_name(document['machine'])}", fontsize=10)
    return figure


def plot_cpu_overhead(path: Path, folder: Path) -> Path:
    """Draw `cpu_overhead`; returns the picture's path."""
    return save(cpu_overhead(load(path)), folder / f"{path.stem}.png")


def cpu_overhead(document: dict[str, Any]) -> Figure:
    """Host time per step over the number of tensors."""
    figure, axis = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    baseline = document["settings"]["baseline"]
    for name in dict.fromkeys(row["optimizer"] for row in document["results"]):
        rows = [row for row in document["results"] if row["optimizer"] == name]
        counts = [row["tensors"] for row in rows]
        times = [row["seconds"]["median"] * 1e6 for row in rows]
        color = color_of(rows[0], baseline)
        axis.plot(counts, times, marker="o", markersize=3, linewidth=1.2, color=color)
    # Labels at the right end, pushed apart where lines meet.
    last = max(row["tensors"] for row in document["results"])
    ends = sorted(
        (row["seconds"]["median"] * 1e6, row["label"], color_of(row, baseline))
        for row in document["results"]
        if row["tensors"] == last
    )
    axis.set_xscale("log")
    axis.set_yscale("log")
    height = 0.0
    for time, label, color in ends:
        height = max(time, height * 1.32)
        axis.annotate(label, (last, time), xytext=(last * 1.15, height), fontsize=7, color=color, va="center")
    axis.set_xlim(right=last * 12)
    axis.set_ylim(top=2 * height)
    axis.set_xlabel("tensors")
    axis.set_ylabel("host time per step, µs")
    axis.grid(alpha=0.2)
    axis.set_title(f"Host time per step, {short_name(document['machine'])}", fontsize=10)
    return figure


def plot_end_to_end(path: Path, folder: Path) -> Path:
    """Draw `end_to_end`; returns the picture's path."""
    return save(end_to_end(load(path)), folder / f"{path.stem}.png")


def end_to_end(document: dict[str, Any]) -> Figure:
    """Training step by size: the optimizer's part on top of the rest."""
    rows = document["results"]
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    most = max(sum(row["size"] == size for row in rows) for size in sizes)
    figure, axes = plt.subplots(
        1, len(sizes), figsize=(2.2 + 3.6 * len(sizes), 1.2 + 0.3 * most), squeeze=False, layout="constrained"
    )
    baseline = document["settings"]["baseline"]
    for column, (axis, size) in enumerate(zip(axes.flat, sizes, strict=True)):
        shown = [row for row in rows if row["size"] == size][::-1]
        places = range(len(shown))
        whole = [row["seconds"]["median"] * 1e3 for row in shown]
        own = [row["optimizer_seconds"]["median"] * 1e3 for row in shown]
        rest = [max(total - part, 0.0) for total, part in zip(whole, own, strict=True)]
        axis.barh(places, rest, color="#e3e3e3", height=0.75)
        axis.barh(places, own, left=rest, color=[color_of(row, baseline) for row in shown], height=0.75)
        for place, row in enumerate(shown):
            axis.text(0.02 * max(whole), place, f"optimizer {row['optimizer_share']:.0%}", va="center", fontsize=7)
        axis.set_yticks(places, [row["label"] for row in shown] if column == 0 else [""] * len(shown), fontsize=8)
        axis.set_title(f"{size}: {shown[0]['elements'] / 1e6:.3g} M parameters", fontsize=9)
        axis.set_xlabel("ms per training step", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Character GPT, {short_name(document['machine'])}", fontsize=11)
    return figure
