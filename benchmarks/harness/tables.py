"""Tables of benchmark results, as Markdown: the programs print those that the docs show."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from harness.contenders import CONTENDERS
from harness.models import MODELS

Document = dict[str, Any]
"""What a program writes as JSON."""
Row = dict[str, Any]
"""One of a document's results."""

HEADLINE_MODELS = ("gpt2-small", "gpt2-xl", "resnet50", "small-1000x64")
HEADLINE_OPTIMIZERS = ("adam-fused", "adam-foreach", "apex", "global", "local", "smoothed")


def load(path: Path) -> Document:
    return json.loads(path.read_text(encoding="utf-8"))


# --- cells and lines -------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """With three digits and a fitting unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def bytes_text(count: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def time_and_ratio(row: Row) -> str:
    return f"{duration(row['seconds']['median'])} ({row['ratio']['median']:.2f}×)"


def description(row: Row) -> str:
    return row["description"]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column left, the others right aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def pivot(rows: Sequence[Row], key: str, title: Callable[[Row], str], cell: Callable[[Row], str]) -> str:
    """A line per optimizer, a column per value of `key`."""
    columns = {row[key]: title(row) for row in rows}
    labels = {row["optimizer"]: row["label"] for row in rows}
    found = {(row["optimizer"], row[key]): cell(row) for row in rows}
    lines = [[label, *(found.get((name, key), "–") for key in columns)] for name, label in labels.items()]
    return markdown_table(["optimizer", *columns.values()], lines)


def aligned(markdown: str) -> str:
    """The text as a terminal should show it: every column of a table as wide as its widest cell."""

    def padded(table: re.Match[str]) -> str:
        first, *others = zip(*(line.strip("|\n").split("|") for line in table[0].splitlines()), strict=True)
        columns = [[cell.ljust(max(map(len, first))) for cell in first]]
        columns += [[cell.rjust(max(map(len, column))) for cell in column] for column in others]
        return "".join(f"|{'|'.join(cells)}|\n" for cells in zip(*columns, strict=True))

    return re.sub(r"(?m)(^\|.*\n)+", padded, markdown)


def provenance(document: Document) -> str:
    """Where the numbers come from, in one sentence."""
    machine, versions = document["machine"], document["versions"]
    on = f"{machine['gpu']['name']}, " if "gpu" in machine else ""
    cuda = f", CUDA {versions['cuda']}" if "cuda" in versions else ""
    where = f"{on}{machine['cpu']}, {machine['threads']} threads; PyTorch {versions['torch']}{cuda}"
    return f"{where}; commit {document['commit']}.\n"


# --- time per step ---------------------------------------------------------------------------------------------------


def headline_table(document: Document) -> str:
    rows = [
        row for row in document["results"]
        if row["dtype"] == "float32" and row["model"] in HEADLINE_MODELS and row["optimizer"] in HEADLINE_OPTIMIZERS
    ]  # fmt: skip
    table = pivot(rows, "model", description, time_and_ratio)
    return f"{table}\nTime per step, float32, and its ratio to `torch.optim.Adam(fused=True)`. {provenance(document)}"


def step_time_tables(document: Document) -> str:
    """Per dtype a table of times, then one of the share of the simple loop's bandwidth and the memory taken."""
    blocks = [provenance(document)]
    for dtype in dict.fromkeys(row["dtype"] for row in document["results"]):
        rows = [row for row in document["results"] if row["dtype"] == dtype]
        blocks.append(f"**{dtype}**, time per step and ratio:\n\n" + pivot(rows, "model", description, time_and_ratio))
        large = [row for row in rows if row["elements"] >= 10_000_000 and row["bandwidth_share"]]
        if large:
            blocks.append("bytes per element, share of the simple loop's bandwidth "
                          f"({simple_loops(document, dtype)}), memory taken during a step:\n\n"
                          + pivot(large, "model", description, achieved))  # fmt: skip
    return "\n".join(blocks)


def achieved(row: Row) -> str:
    extra = row["peak_extra_bytes"]
    memory = "" if extra is None else f", {bytes_text(extra)}"
    return f"{row['bytes_per_element']:.4g} B, {row['bandwidth_share']['median']:.0%}{memory}"


def simple_loops(document: Document, dtype: str) -> str:
    """What the loops reached that a bandwidth is a share of; beside most models they reach the same."""
    rows = [row for row in document["bandwidths"] if row["dtype"] == dtype]
    return ", ".join(
        f"{name} {median(row[key]['median'] for row in rows) / 1e9:.4g} GB/s"
        for key, name in (("copy", "copy"), ("in-place", "in-place update"))
    )


def ratio_table(document: Document) -> str:
    """The ratios alone, for a second processor."""

    def both(row: Row) -> str:
        found = {each["dtype"]: each["ratio"]["median"] for each in document["results"]
                 if (each["model"], each["optimizer"]) == (row["model"], row["optimizer"])}  # fmt: skip
        return ", ".join(f"{ratio:.2f}×" for ratio in found.values())

    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in document["results"]))
    return f"{provenance(document)}\n{dtypes}:\n\n{pivot(document['results'], 'model', description, both)}"


# --- other measurements ----------------------------------------------------------------------------------------------


def overhead_table(document: Document) -> str:
    def title(row: Row) -> str:
        return f"{row['tensors']} tensors"

    blocks = [provenance(document)]
    for gradients, what in (("all", "gradients in all tensors"), ("changing", "in another random half at every step")):
        rows = [row for row in document["results"] if row["gradients"] == gradients]
        blocks.append(f"{what}:\n\n" + pivot(rows, "tensors", title, time_and_ratio))
    blocks.append(f"Fitted line through each row:\n\n{host_costs(document)}")
    return "\n".join(blocks)


def host_cost_table(document: Document) -> str:
    counts = [row["tensors"] for row in document["results"]]
    line = f"A line fitted through the steps of {min(counts)} to {max(counts)} tensors:"
    return f"{provenance(document)}\n{line}\n\n{host_costs(document)}"


def host_costs(document: Document) -> str:
    costs: dict[str, dict[str, str]] = {}
    for cost in document["costs"]:
        cells = costs.setdefault(cost["label"], {})
        cells[cost["gradients"]] = duration(cost["seconds_per_tensor"])
        if cost["gradients"] == "all":
            cells["step"] = duration(cost["seconds_per_step"])
    lines = [[label, *(cells.get(key, "–") for key in ("step", "all", "changing"))] for label, cells in costs.items()]
    return markdown_table(["optimizer", "per step", "per tensor", "per tensor, gradients that come and go"], lines)


def state_table(document: Document, dtype: str = "float32") -> str:
    rows = [row for row in document["results"] if row["dtype"] == dtype]
    table = pivot(rows, "model", description, lambda row: f"{row['bytes_per_parameter']:.2f} B")
    return f"{table}\nOptimizer state per {dtype} parameter, after a step.\n"


def traffic_table(document: Document) -> str:
    """What each kernel moved to and from DRAM, and the sum against what must move.

    Written bytes that are still in the L2 cache when a kernel ends are not counted: up to that cache's size is missing.
    """
    elements, must_move = document["elements"], document["bytes_per_element_that_must_move"]
    lines, moved = [], 0.0
    for kernel in document["kernels"]:
        read, written = kernel["read_bytes"], kernel["written_bytes"]
        moved += (read + written) / elements
        lines.append([
            short_kernel_name(kernel["name"]), str(kernel["launches"]), duration(kernel["seconds"]),
            f"{read / elements:.2f}", f"{written / elements:.2f}",
            f"{(read + written) / kernel['seconds'] / 1e9:.0f}", str(kernel["registers"]),
        ])  # fmt: skip
    title = f"{CONTENDERS[document['optimizer']].label}, {MODELS[document['model']].description}, {document['dtype']}"
    header = ["kernel", "launches", "time", "read B/element", "written B/element", "GB/s", "registers"]
    comparison = f"moved {moved:.2f} bytes per element; {must_move:.4g} must move: {moved / must_move:.3f}×"
    return f"{title}:\n\n{markdown_table(header, lines)}\n{comparison}\n"


def short_kernel_name(name: str) -> str:
    """Without arguments and return type; template arguments stay."""
    return name.replace("(anonymous namespace)::", "").partition("(")[0].removeprefix("void ")


def loss_table(document: Document) -> str:
    def title(run: Row) -> str:
        return f"from {run['rate']:.0e}"

    table = pivot(document["runs"], "rate", title, lambda run: loss_text(run["validation_loss"]))
    settings = document["settings"]
    size = f"{document['parameters'] / 1e6:.0f} M parameters, {settings['precision']}"
    steps = f"{document['steps']} steps of {settings['batch'] * settings['context']:,} tokens"
    return f"{table}\nValidation loss after {steps}, {size}. {provenance(document)}"


def loss_text(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


# --- from the algorithm, not from a measurement ----------------------------------------------------------------------


def bytes_table() -> str:
    """Bytes per element that must move, and that a state takes."""
    lines = []
    for label, name in (
        ("`torch.optim.Adam`", "adam-fused"),
        ("apex FusedAdam", "apex"),
        ("these, a path for 1 element in 16", "local"),
        ("these, `path_fraction=1`", "local-whole"),
    ):
        traffics = [CONTENDERS[name].traffic(dtype) for dtype in (torch.float32, torch.bfloat16)]
        lines.append([label, *(f"{value:.6g}" for t in traffics for value in (t.moved, t.state))])
    return markdown_table(["bytes per element", "float32: moved", "state", "bfloat16: moved", "state"], lines)
