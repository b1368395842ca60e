#!/usr/bin/env python3
"""Bring the tables and plots of README.md and docs/ up to date with the recorded benchmark results.

    python benchmarks/figures.py          rewrite what differs
    python benchmarks/figures.py --check  exit with status 1 if anything differs

What stands between `<!-- figure: NAME -->` and `<!-- end of figure -->` is generated from benchmarks/results/*.json; no
number there is typed by hand. `--list` tells the names.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from harness import plots
from harness.contenders import CONTENDERS
from harness.environment import REPOSITORY, short_name
from harness.plots import load
from harness.report import DEFAULT_RESULTS, bytes_text, duration

IMAGES = "docs/images"
MARKED = re.compile(r"(<!-- figure: (\S+) -->\n)(.*?)(<!-- end of figure -->)", re.DOTALL)
HEADLINE_MODELS = ("gpt2-small", "gpt2-xl", "resnet50", "small-1000x64")
HEADLINE_OPTIMIZERS = ("adam-fused", "adam-foreach", "apex", "global", "local", "smoothed")
# GPT-2 small as the headline of a machine with a CPU alone, GPT-2 XL of one with a GPU.
HEADLINE_PLOTS = {"cpu": ("gpt2-small", "small-1000x64"), "cuda": ("gpt2-xl", "small-1000x64")}

Document = dict[str, Any]
Row = dict[str, Any]


# --- tables ----------------------------------------------------------------------------------------------------------


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


def time_and_ratio(row: Row) -> str:
    return f"{duration(row['seconds']['median'])} ({row['ratio']['median']:.2f}×)"


def provenance(document: Document) -> str:
    """Where the numbers come from, in one sentence."""
    machine, versions = document["machine"], document["versions"]
    on = f"{machine['gpu']['name']}, " if "gpu" in machine else ""
    cuda = f", CUDA {versions['cuda']}" if "cuda" in versions else ""
    where = f"{on}{machine['cpu']}, {machine['threads']} threads; PyTorch {versions['torch']}{cuda}"
    return f"{where}; commit {document['commit']}.\n"


def headline_table(document: Document) -> str:
    rows = [
        row for row in document["results"]
        if row["dtype"] == "float32" and row["model"] in HEADLINE_MODELS and row["optimizer"] in HEADLINE_OPTIMIZERS
    ]  # fmt: skip
    table = pivot(rows, "model", lambda row: row["description"], time_and_ratio)
    return f"{table}\nTime per step, float32, and its ratio to `torch.optim.Adam(fused=True)`. {provenance(document)}"


def step_time_tables(document: Document) -> str:
    """Per dtype a table of times, then one of the share of the simple loop's bandwidth and the memory taken."""
    blocks = [provenance(document)]
    for dtype in dict.fromkeys(row["dtype"] for row in document["results"]):
        rows = [row for row in document["results"] if row["dtype"] == dtype]
        blocks.append(f"**{dtype}**, time per step and ratio:\n\n"
                      + pivot(rows, "model", lambda row: row["description"], time_and_ratio))  # fmt: skip
        large = [row for row in rows if row["elements"] >= 10_000_000 and row["bandwidth_share"]]
        if large:
            blocks.append("bytes per element, share of the simple loop's bandwidth, memory taken during a step:\n\n"
                          + pivot(large, "model", lambda row: row["description"], achieved))  # fmt: skip
    return "\n".join(blocks)


def achieved(row: Row) -> str:
    extra = row["peak_extra_bytes"]
    memory = "" if extra is None else f", {bytes_text(extra)}"
    return f"{row['bytes_per_element']:.4g} B, {row['bandwidth_share']['median']:.0%}{memory}"


def bandwidth_table(document: Document) -> str:
    lines = [
        [row["model"], row["dtype"], *(f"{row[name]['median'] / 1e9:.1f} GB/s" for name in ("copy", "in-place"))]
        for row in document["bandwidths"]
    ]
    return markdown_table(["measured beside", "dtype", "copy", "in-place update"], lines)


def overhead_table(document: Document) -> str:
    blocks = [provenance(document)]
    for gradients, title in (("all", "gradients in all tensors"), ("changing", "in another random half at every step")):
        rows = [row for row in document["results"] if row["gradients"] == gradients]
        blocks.append(f"{title}:\n\n" + pivot(rows, "tensors", tensors_title, time_and_ratio))
    costs: dict[str, dict[str, str]] = {}
    for cost in document["costs"]:
        cells = costs.setdefault(cost["label"], {})
        cells[cost["gradients"]] = duration(cost["seconds_per_tensor"])
        if cost["gradients"] == "all":
            cells["step"] = duration(cost["seconds_per_step"])
    lines = [[label, *(cells.get(key, "–") for key in ("step", "all", "changing"))] for label, cells in costs.items()]
    blocks.append("Fitted line through each row:\n\n" + markdown_table(
        ["optimizer", "per step", "per tensor", "per tensor, gradients that come and go"], lines))  # fmt: skip
    return "\n".join(blocks)


def tensors_title(row: Row) -> str:
    return f"{row['tensors']} tensors"


def training_table(document: Document) -> str:
    def cell(row: Row) -> str:
        return f"{time_and_ratio(row)}, optimizer {row['optimizer_share']:.0%}"

    def title(row: Row) -> str:
        return f"{row['size']}: {row['elements'] / 1e6:.3g} M"

    return f"{provenance(document)}\n{pivot(document['results'], 'size', title, cell)}"


def state_table(document: Document) -> str:
    rows = [row for row in document["results"] if row["dtype"] == "float32"]
    cell = "{bytes_per_parameter:.2f} B"
    table = pivot(rows, "model", lambda row: row["description"], lambda row: cell.format(**row))
    return f"{table}\nOptimizer state per float32 parameter, after a step.\n"


def bytes_table() -> str:
    """Bytes per element that must move: from the algorithm, not from a measurement."""
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


# --- plots -----------------------------------------------------------------------------------------------------------


PLOTS: dict[str, tuple[str, str, Callable[[Document], Any]]] = {
    "step-time-headline": (
        "step_time", "Time per optimizer step", lambda d: plots.bars(d, "float32", HEADLINE_PLOTS[d["device"]])
    ),
    "step-time-float32": ("step_time", "Time per optimizer step, float32", lambda d: plots.bars(d, "float32")),
    "cpu-overhead": ("cpu_overhead", "Host time per step over the number of tensors", plots.cpu_overhead),
}  # fmt: skip
TABLES: dict[str, tuple[str, Callable[[Document], str]]] = {
    "table-headline": ("step_time", headline_table),
    "table-step-time": ("step_time", step_time_tables),
    "table-bandwidth": ("step_time", bandwidth_table),
    "table-cpu-overhead": ("cpu_overhead", overhead_table),
    "table-end-to-end": ("end_to_end", training_table),
    "table-state": ("state_bytes", state_table),
}
DEVICES = ("cpu", "cuda")
# Of no device, and from no result.
CONSTANTS: dict[str, Callable[[], str]] = {"table-bytes": bytes_table}
NAMES = [*CONSTANTS, *(f"{name}-{device}" for device in DEVICES for name in (*PLOTS, *TABLES))]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Figures:
    """Generates figures by name from the results in a folder."""

    def __init__(self, results: Path, repository: Path) -> None:
        self.results, self.repository = results, repository

    def source(self, benchmark: str, device: str) -> Path:
        return self.results / f"{benchmark}-{device}.json"

    def generate(self, name: str, folder: Path) -> str:
        """Markdown for a figure in a file of `folder`.

        Raises:
            KeyError: no figure has that name.
        """
        if name in CONSTANTS:
            return CONSTANTS[name]()
        kind, _, device = name.rpartition("-")
        if device not in DEVICES or kind not in (*PLOTS, *TABLES):
            raise KeyError(f"no figure {name!r}; there are {', '.join(NAMES)}")
        source = self.source((PLOTS.get(kind) or TABLES[kind])[0], device)
        if not source.exists():
            return f"*Not yet measured on {'a GPU' if device == 'cuda' else 'a CPU'}.*\n"
        if kind in TABLES:
            return TABLES[kind][1](load(source))
        up = "../" * len(folder.relative_to(self.repository).parts)
        link = (up + f"{IMAGES}/{name}.png").replace("../docs/", "", 1)
        return f"![{PLOTS[kind][1]}, {short_name(load(source)['machine'])}]({link})\n"

    def is_drawn(self, name: str) -> bool:
        """Whether the picture of a plot was drawn from the results as they are."""
        kind, _, device = name.rpartition("-")
        if kind not in PLOTS or not self.source(PLOTS[kind][0], device).exists():
            return True
        picture = self.repository / IMAGES / f"{name}.png"
        if not picture.exists():
            return False
        with Image.open(picture) as image:
            return image.info.get(plots.SOURCE_DIGEST) == digest(self.source(PLOTS[kind][0], device))

    def draw(self, name: str) -> None:
        kind, _, device = name.rpartition("-")
        source = self.source(PLOTS[kind][0], device)
        picture = self.repository / IMAGES / f"{name}.png"
        plots.save(PLOTS[kind][2](load(source)), picture, source_digest=digest(source))

    def update(self, check: bool = False) -> list[str]:
        """Rewrite texts and pictures that differ, or with `check` only tell; returns their paths."""
        changed: list[str] = []
        for path in sorted([*self.repository.glob("*.md"), *(self.repository / "docs").glob("**/*.md")]):
            before = path.read_text(encoding="utf-8")
            text = MARKED.sub(lambda match: match[1] + self.generate(match[2], path.parent) + match[4], before)  # noqa: B023
            if text != before:
                changed.append(str(path.relative_to(self.repository)))
                if not check:
                    path.write_text(text, encoding="utf-8")
            for name in (match[2] for match in MARKED.finditer(before)):
                if not self.is_drawn(name):
                    changed.append(f"{IMAGES}/{name}.png")
                    if not check:
                        self.draw(name)
        return list(dict.fromkeys(changed))


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if something is out of date")
    parser.add_argument("--list", action="store_true", help="print the names of all figures")
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS, metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(arguments)
    if args.list:
        print(*NAMES, sep="\n")
        return 0
    changed = Figures(args.results, REPOSITORY).update(check=args.check)
    for path in changed:
        print(f"{'out of date' if args.check else 'renewed'}: {path}")
    if not changed:
        print("all figures are up to date")
    return 1 if args.check and changed else 0


if __name__ == "__main__":
    raise SystemExit(main())
