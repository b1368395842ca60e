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

from PIL import Image

from harness import plots
from harness.environment import REPOSITORY, short_name
from harness.plots import load
from harness.report import DEFAULT_RESULTS, bytes_text, duration

IMAGES = "docs/images"
MARKED = re.compile(r"(<!-- figure: (\S+) -->\n)(.*?)(<!-- end of figure -->)", re.DOTALL)
HEADLINE_MODELS = ("gpt2-small", "resnet50", "small-1000x64")
HEADLINE_OPTIMIZERS = (
    "adam-fused", "adam-foreach", "apex", "published", "global", "local", "smoothed",
    "global-deferred", "local-deferred", "smoothed-deferred",
)  # fmt: skip
# GPT-2 small as the headline of a machine with a CPU alone, GPT-2 XL of one with a GPU.
HEADLINE_PLOTS = {"cpu": ("gpt2-small", "small-1000x64"), "cuda": ("gpt2-xl", "small-1000x64")}

Document = dict[str, Any]


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column left, the others right aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def pivot(
    rows: Sequence[dict[str, Any]],
    column_key: str,
    column_title: Callable[[dict[str, Any]], str],
    cell: Callable[[dict[str, Any]], str],
    corner: str = "optimizer",
) -> str:
    """A line per optimizer, a column per value of `column_key`."""
    columns = {row[column_key]: column_title(row) for row in rows}
    labels = {row["optimizer"]: row["label"] for row in rows}
    found = {(row["optimizer"], row[column_key]): cell(row) for row in rows}
    lines = [[label, *(found.get((name, key), "–") for key in columns)] for name, label in labels.items()]
    return markdown_table([corner, *columns.values()], lines)


def time_and_ratio(row: dict[str, Any]) -> str:
    return f"{duration(row['seconds']['median'])} ({row['ratio']['median']:.2f}×)"


def provenance(document: Document) -> str:
    """Where the numbers come from, in one sentence."""
    machine, versions = document["machine"], document["versions"]
    on = f"{machine['gpu']['name']}, " if "gpu" in machine else ""
    cuda = f", CUDA {versions['cuda']}" if "cuda" in versions else ""
    return (
        f"{on}{machine['cpu']}, {machine['threads']} threads; PyTorch {versions['torch']}{cuda}; "
        f"commit {document['commit']}."
    )


def headline_table(document: Document) -> str:
    rows = [
        row for row in document["results"]
        if row["dtype"] == "float32" and row["model"] in HEADLINE_MODELS and row["optimizer"] in HEADLINE_OPTIMIZERS
    ]  # fmt: skip
    table = pivot(rows, "model", lambda row: row["description"], time_and_ratio)
    return f"{table}\nTime per step, float32, and its ratio to `torch.optim.Adam(fused=True)`. {provenance(document)}\n"


def step_time_tables(document: Document) -> str:
    blocks = [f"{provenance(document)}\n"]
    for dtype in dict.fromkeys(row["dtype"] for row in document["results"]):
        for model in dict.fromkeys(row["model"] for row in document["results"] if row["dtype"] == dtype):
            rows = [row for row in document["results"] if row["dtype"] == dtype and row["model"] == model]
            blocks.append(model_table(rows, dtype))
    return "\n".join(blocks)


def model_table(rows: Sequence[dict[str, Any]], dtype: str) -> str:
    first = rows[0]
    title = f"**{first['description']}**, {dtype}: {first['elements']:,} elements in {first['tensors']} tensors\n\n"
    header = [
        "optimizer", "per step", "quartiles", "ratio", "± 95%", "bytes per element", "of simple loop", "extra memory",
    ]  # fmt: skip
    lines = []
    for row in rows:
        seconds, ratio, share, extra = row["seconds"], row["ratio"], row["bandwidth_share"], row["peak_extra_bytes"]
        lines.append(
            [
                row["label"],
                duration(seconds["median"]),
                f"{duration(seconds['quartile_low'])} – {duration(seconds['quartile_high'])}",
                f"{ratio['median']:.2f}",
                f"{ratio['error']:.2f}",
                str(row["bytes_per_element"]),
                "–" if share is None or first["elements"] < 10_000_000 else f"{share['median']:.0%}",
                "–" if extra is None else bytes_text(extra),
            ]
        )
    return title + markdown_table(header, lines)


def bandwidth_table(document: Document) -> str:
    lines = [
        [row["model"], row["dtype"], *(f"{row[name]['median'] / 1e9:.1f} GB/s" for name in ("copy", "in-place"))]
        for row in document["bandwidths"]
    ]
    return markdown_table(["measured beside", "dtype", "copy", "in-place update"], lines)


def overhead_table(document: Document) -> str:
    table = pivot(document["results"], "tensors", lambda row: f"{row['tensors']} tensors", time_and_ratio)
    costs = [
        [cost["label"], duration(cost["seconds_per_step"]), duration(cost["seconds_per_tensor"])]
        for cost in document["costs"]
    ]
    fitted = markdown_table(["optimizer", "per step", "per tensor"], costs)
    return f"{provenance(document)}\n\n{table}\nFitted line through each row:\n\n{fitted}"


def training_table(document: Document) -> str:
    def cell(row: dict[str, Any]) -> str:
        return f"{time_and_ratio(row)}, optimizer {row['optimizer_share']:.0%}"

    def title(row: dict[str, Any]) -> str:
        return f"{row['size']}: {row['elements'] / 1e6:.3g} M"

    return f"{provenance(document)}\n\n{pivot(document['results'], 'size', title, cell)}"


def bytes_table() -> str:
    """Bytes per element that each kernel must move, read + written: from the algorithm, not from a measurement."""

    def cells(count: Callable[[int, int, int], tuple[int, int]]) -> list[str]:
        # Sizes of parameter and gradient, moment, path.
        pairs = [count(*sizes) for sizes in ((4, 4, 4), (2, 4, 4), (2, 4, 2))]
        return [f"{read} + {written} = {read + written}" for read, written in pairs]

    lines = [
        ["`clara.measure`", *cells(lambda p, m, q: (p + 2 * m + q, 2 * m + q))],
        ["`clara.apply`", *cells(lambda p, m, q: (p + 2 * m, p))],
        ["immediate step", *cells(lambda p, m, q: (2 * p + 4 * m + q, p + 2 * m + q))],
        ["`clara.measure_and_apply`, deferred step", *cells(lambda p, m, q: (2 * p + 2 * m + q, p + 2 * m + q))],
        ["Adam with such moments", *cells(lambda p, m, q: (2 * p + 2 * m, p + 2 * m))],
    ]
    return markdown_table(["bytes per element", "float32", "bfloat16", "bfloat16, `path_dtype=torch.bfloat16`"], lines)


# --- plots -----------------------------------------------------------------------------------------------------------


def headline_plot(document: Document) -> Any:
    return plots.bars(document, "float32", HEADLINE_PLOTS[document["device"]])


def bars_plot(dtype: str) -> Callable[[Document], Any]:
    return lambda document: plots.bars(document, dtype)


PLOTS: dict[str, tuple[str, str, Callable[[Document], Any]]] = {
    "step-time-headline": ("step_time", "Time per optimizer step", headline_plot),
    "step-time-float32": ("step_time", "Time per optimizer step, float32", bars_plot("float32")),
    "step-time-bfloat16": ("step_time", "Time per optimizer step, bfloat16", bars_plot("bfloat16")),
    "roofline": ("step_time", "Time per element over bytes per element", plots.roofline),
    "cpu-overhead": ("cpu_overhead", "Host time per step over the number of tensors", plots.cpu_overhead),
    "end-to-end": ("end_to_end", "Training step and the optimizer's part of it", plots.end_to_end),
}
TABLES: dict[str, tuple[str, Callable[[Document], str]]] = {
    "table-headline": ("step_time", headline_table),
    "table-step-time": ("step_time", step_time_tables),
    "table-bandwidth": ("step_time", bandwidth_table),
    "table-cpu-overhead": ("cpu_overhead", overhead_table),
    "table-end-to-end": ("end_to_end", training_table),
}
DEVICES = ("cpu", "cuda")
# Of no device, and from no result.
CONSTANTS: dict[str, Callable[[], str]] = {"table-bytes": bytes_table}
NAMES = [*CONSTANTS, *(f"{name}-{device}" for device in DEVICES for name in (*PLOTS, *TABLES))]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def drawn_from(picture: Path) -> str | None:
    """Digest of the JSON file that a picture was drawn from, as recorded in it; None if there is none."""
    if not picture.exists():
        return None
    with Image.open(picture) as image:
        return image.info.get(plots.SOURCE_DIGEST)


class Figures:
    """Generates figures by name from the results in a folder."""

    def __init__(self, results: Path, repository: Path) -> None:
        self.results = results
        self.repository = repository

    def source(self, benchmark: str, device: str) -> Path:
        return self.results / f"{benchmark}-{device}.json"

    def generate(self, name: str, relative_to: Path) -> str:
        """Markdown for a figure in a file of the folder `relative_to`.

        Raises:
            KeyError: no figure has that name.
        """
        if name in CONSTANTS:
            return CONSTANTS[name]()
        kind, _, device = name.rpartition("-")
        if device not in DEVICES or kind not in (*PLOTS, *TABLES):
            raise KeyError(f"no figure {name!r}; there are {', '.join(NAMES)}")
        source = self.source(PLOTS[kind][0] if kind in PLOTS else TABLES[kind][0], device)
        if not source.exists():
            return f"*Not measured yet on {'a GPU' if device == 'cuda' else 'a CPU'}.*\n"
        if kind in TABLES:
            return TABLES[kind][1](load(source))
        picture = self.repository / IMAGES / f"{name}.png"
        link = Path(*[".."] * len(relative_to.relative_to(self.repository).parts)) / IMAGES / picture.name
        if relative_to == self.repository / "docs":
            link = Path("images") / picture.name
        return f"![{PLOTS[kind][1]}, {short_name(load(source)['machine'])}]({link.as_posix()})\n"

    def is_drawn(self, name: str) -> bool:
        """Whether the picture of a plot was drawn from the results as they are."""
        kind, _, device = name.rpartition("-")
        if kind not in PLOTS:
            return True
        source = self.source(PLOTS[kind][0], device)
        return not source.exists() or drawn_from(self.repository / IMAGES / f"{name}.png") == digest(source)

    def draw(self, name: str) -> None:
        kind, _, device = name.rpartition("-")
        source = self.source(PLOTS[kind][0], device)
        picture = self.repository / IMAGES / f"{name}.png"
        plots.save(PLOTS[kind][2](load(source)), picture, source_digest=digest(source))

    def files(self) -> list[Path]:
        """Texts that may hold figures."""
        return sorted([*self.repository.glob("*.md"), *(self.repository / "docs").glob("**/*.md")])

    def renewed(self, path: Path) -> tuple[str, list[str]]:
        """The text of a file with its figures generated anew, and their names."""
        names: list[str] = []

        def replace(match: re.Match[str]) -> str:
            names.append(match[2])
            return match[1] + self.generate(match[2], path.parent) + match[4]

        return MARKED.sub(replace, path.read_text(encoding="utf-8")), names

    def outdated(self) -> list[str]:
        """What `update` would change."""
        found = []
        for path in self.files():
            text, names = self.renewed(path)
            if text != path.read_text(encoding="utf-8"):
                found.append(str(path.relative_to(self.repository)))
            found += [f"{IMAGES}/{name}.png" for name in names if not self.is_drawn(name)]
        return found

    def update(self) -> list[str]:
        """Rewrite texts and pictures that differ; returns their paths."""
        changed = []
        for path in self.files():
            text, names = self.renewed(path)
            if text != path.read_text(encoding="utf-8"):
                path.write_text(text, encoding="utf-8")
                changed.append(str(path.relative_to(self.repository)))
            for name in names:
                if not self.is_drawn(name):
                    self.draw(name)
                    changed.append(f"{IMAGES}/{name}.png")
        return changed


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
    figures = Figures(args.results, REPOSITORY)
    changed = figures.outdated() if args.check else figures.update()
    for path in changed:
        print(f"{'out of date' if args.check else 'renewed'}: {path}")
    if not changed:
        print("all figures are up to date")
    return 1 if args.check and changed else 0


if __name__ == "__main__":
    raise SystemExit(main())
