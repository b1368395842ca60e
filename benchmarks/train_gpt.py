#!/usr/bin/env python3
"""Train a GPT of 100 M parameters on Python's own source files, from several initial learning rates.

    python benchmarks/train_gpt.py --seconds 240
    python benchmarks/train_gpt.py --device cpu --layers 2 --width 64 --context 64 --batch 4 --steps 20

The question: where does a run end that starts from a learning rate nobody tuned? Every optimizer starts from the same
weights, sees the same batches and takes the same number of steps; AdamClara and torch.optim.Adam at a constant rate,
AdamW with a warm-up and a cosine decay of it. No data is needed: the text is the standard library of the interpreter
that runs this. Writes train_gpt-<device>.json with the loss curves.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clara_fused
from harness.environment import describe_environment
from harness.report import DEFAULT_RESULTS
from harness.tables import loss_text

RATES = (1e-5, 1e-3, 1e-1)
WARM_UP_SHARE = 0.05
VALIDATION_BATCHES = 20
STEPS_BEFORE_CAPTURE = 3
CURVE_POINTS = 200


# --- text ------------------------------------------------------------------------------------------------------------


def source_text(max_bytes: int) -> Iterator[str]:
    """Files of the standard library, in an order that mixes them and is the same every time."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    files = [file for file in files if "site-packages" not in file.parts and "dist-packages" not in file.parts]
    random.Random(0).shuffle(files)
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        max_bytes -= len(text)
        if max_bytes < 0:
            return
        yield text


def tokenize(texts: Sequence[str], vocabulary: int) -> Tensor:
    """The most frequent words, spaces and signs as one token each; what else there is, byte by byte."""
    words = [re.findall(r" ?[A-Za-z_]+|\n *|[^\w\s]+|\d|\s+|.", text) for text in texts]
    counts = Counter(word for file in words for word in file)
    known = {word: 256 + i for i, (word, _) in enumerate(counts.most_common(vocabulary - 256))}
    spelled: dict[str, list[int]] = {}  # every word once: most repeat
    tokens: list[int] = []
    for file in words:
        for word in file:
            if word not in spelled:
                spelled[word] = [known[word]] if word in known else list(word.encode())
            tokens += spelled[word]
    return torch.tensor(tokens, dtype=torch.int32)


@dataclass(frozen=True)
class Batches:
    """Pieces of the text, drawn by the number of the step."""

    tokens: Tensor
    batch: int
    context: int

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(self.tokens) - self.context - 1, (self.batch, 1), generator=generator)
        places = starts.to(self.tokens.device) + torch.arange(self.context + 1, device=self.tokens.device)
        pieces = self.tokens[places].long()
        return pieces[:, :-1], pieces[:, 1:]


# --- model -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Gpt(nn.Module):
    """GPT-2: learned positions, pre-norm, output tied to the embedding."""

    def __init__(self, vocabulary: int, layers: int, width: int, context: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, max(1, width // 64)) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, param in self.named_parameters():
            if param.dim() == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * layers) if deep else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.words(inputs) + self.places.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.words.weight.t()
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


# --- optimizers ------------------------------------------------------------------------------------------------------

Schedule = Callable[[int, int], float]


def constant(step: int, steps: int) -> float:
    return 1.0


def cosine(step: int, steps: int) -> float:
    """Linear warm-up, then down to a tenth."""
    warm_up = max(1, int(WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))


@dataclass(frozen=True)
class Contender:
    label: str
    build: Callable[[Any, Tensor], torch.optim.Optimizer]
    schedule: Schedule = constant


def torch_adam(optimizer_class: type[torch.optim.Adam], params: Any, lr: Tensor, **options: Any) -> torch.optim.Adam:
    return optimizer_class(params, lr=lr, fused=True, capturable=lr.is_cuda, **options)


CONTENDERS = {
    "global": Contender("AdamClara Global", lambda params, lr: clara_fused.AdamClaraGlobal(params, lr=lr)),
    "local": Contender("AdamClara Local", lambda params, lr: clara_fused.AdamClaraLocal(params, lr=lr)),
    "smoothed": Contender("AdamClara Smoothed", lambda params, lr: clara_fused.AdamClaraSmoothed(params, lr=lr)),
    "adam": Contender("torch Adam", partial(torch_adam, torch.optim.Adam)),
    "adamw-cosine": Contender("torch AdamW, cosine", partial(torch_adam, torch.optim.AdamW, weight_decay=0.1), cosine),
}


# --- a run -----------------------------------------------------------------------------------------------------------


class Run:
    """One optimizer from one rate.

    On a GPU its steps, but for the first ones, are replays of a CUDA graph: the device would wait for the host else.
    """

    def __init__(self, args: argparse.Namespace, contender: Contender, rate: float, device: torch.device) -> None:
        torch.manual_seed(args.seed)
        self.args, self.schedule, self.rate, self.device = args, contender.schedule, rate, device
        self.model = Gpt(args.vocabulary, args.layers, args.width, args.context).to(device)
        if args.precision == "bfloat16":
            self.model.to(torch.bfloat16)
        self.loss_of = torch.compile(self.model) if args.compile else self.model
        self.lr = torch.tensor(rate, device=device)  # a tensor, because a captured step reads its address
        self.optimizer = contender.build(self.model.parameters(), self.lr)
        self.steps_taken = 0

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "autocast"):
            return self.loss_of(*batch)

    def step(self, batches: Batches, step: int, steps: int) -> Tensor:
        self.lr.fill_(self.rate * self.schedule(step, steps))
        batch = batches.at(step)
        self.steps_taken += 1
        if self.device.type != "cuda" or self.steps_taken <= STEPS_BEFORE_CAPTURE:
            return self.step_with(batch)
        if self.steps_taken == STEPS_BEFORE_CAPTURE + 1:
            self.batch, self.graph = batch, torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.captured_loss = self.step_with(batch)
        for captured, new in zip(self.batch, batch, strict=True):
            captured.copy_(new)
        self.graph.replay()
        return self.captured_loss

    def step_with(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def validation_loss(self, batches: Batches) -> float:
        self.model.eval()
        return torch.stack([self.loss(batches.at(step)) for step in range(VALIDATION_BATCHES)]).mean().item()

    def scales(self) -> list[float]:
        """Lowest, median and highest learning-rate scale; nothing for the optimizers of torch."""
        if not hasattr(self.optimizer, "lr_scales"):
            return []
        scales = torch.cat(self.optimizer.lr_scales()).float()
        return [scales.min().item(), scales.median().item(), scales.max().item()]


def finished(run: Run, text: Batches, held_back: Batches, steps: int) -> dict[str, Any]:
    """Train, and tell how it went. The losses stay on the device until the end."""
    every = max(1, steps // CURVE_POINTS)
    curve, sums = [], torch.zeros((), device=run.device)
    started = time.perf_counter()
    for step in range(steps):
        sums += run.step(text, step, steps)
        if (step + 1) % every == 0:
            curve.append(sums / every)
            sums = torch.zeros((), device=run.device)
    losses = torch.stack(curve).tolist()
    seconds = time.perf_counter() - started
    last = losses[-max(1, len(losses) // 10) :]
    return {
        "training_loss": [rounded(loss) for loss in losses],
        "steps_per_point": every,
        "final_training_loss": rounded(sum(last) / len(last)),
        "validation_loss": rounded(run.validation_loss(held_back)),
        "lr_scale": run.scales(),
        "seconds_per_step": seconds / steps,
    }


def rounded(loss: float) -> float | None:
    """None: not a number any more."""
    return round(loss, 5) if math.isfinite(loss) else None


def steps_that_fit(args: argparse.Namespace, text: Batches, device: torch.device, runs: int, deadline: float) -> int:
    """So many that all runs end before `perf_counter` is there; found out with the slowest kind of run."""
    started = time.perf_counter()
    run = Run(args, CONTENDERS["smoothed"], RATES[0], device)
    building = time.perf_counter() - started
    for step in range(5):
        run.step(text, step, 5).item()
    started = time.perf_counter()
    for step in range(10):
        run.step(text, step, 10)
    run.step(text, 10, 10).item()
    per_step = (time.perf_counter() - started) / 11
    left = 0.9 * (deadline - time.perf_counter())
    return max(10, int((left / runs - building) / per_step) - VALIDATION_BATCHES)


# --- the program -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    started = time.perf_counter()
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # a graph cannot be captured on the default one
    tokens = tokenize(list(source_text(args.text_bytes)), args.vocabulary)
    held_back = len(tokens) // 20
    text = Batches(tokens[:-held_back].to(device), args.batch, args.context)
    validation = Batches(tokens[-held_back:].to(device), args.batch, args.context)
    chosen = [(name, rate) for rate in args.rates for name in args.optimizers]
    steps = args.steps or steps_that_fit(args, text, device, len(chosen), started + args.seconds)

    parameters = sum(p.numel() for p in Run(args, CONTENDERS["adam"], 0.0, device).model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {len(tokens) / 1e6:.1f} M tokens, {steps} steps of "
          f"{args.batch * args.context} tokens, {args.precision}")  # fmt: skip
    columns = "{:24} {:>8} {:>9} {:>10}  {:34} {}".format
    print(columns("optimizer", "rate", "training", "validation", "scale (lowest, median, highest)", "ms/step"))
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "device")}
    runs: list[dict[str, Any]] = []
    document = {
        "benchmark": "train_gpt", "device": device.type, **describe_environment(device), "settings": settings,
        "parameters": parameters, "tokens": len(tokens), "steps": steps, "runs": runs,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"train_gpt-{device.type}.json"
    for name, rate in chosen:
        if args.seconds and time.perf_counter() - started > args.seconds:
            print("no time left for the rest")
            break
        result = finished(Run(args, CONTENDERS[name], rate, device), text, validation, steps)
        runs.append({"optimizer": name, "label": CONTENDERS[name].label, "rate": rate, **result})
        # After each: time may run out.
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        scales = ", ".join(f"{scale:.3g}" for scale in result["lr_scale"])
        losses = [loss_text(result[key]) for key in ("final_training_loss", "validation_loss")]
        seconds = f"{result['seconds_per_step'] * 1e3:.1f}"
        print(columns(CONTENDERS[name].label, f"{rate:.0e}", *losses, scales, seconds), flush=True)
    print(f"results: {path}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    add("--out", type=Path, default=DEFAULT_RESULTS, metavar="DIR")
    add("--seconds", type=float, default=300.0, help="in all; default: %(default)s")
    add("--steps", type=int, help="of every run; default: as many as fit into the time")
    add("--optimizers", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    add("--rates", nargs="+", type=float, default=list(RATES))
    add("--precision", choices=["autocast", "bfloat16", "float32"], default="autocast",
        help="autocast: float32 parameters, bfloat16 arithmetic; bfloat16: parameters as well")  # fmt: skip
    add("--layers", type=int, default=12)
    add("--width", type=int, default=768)
    add("--context", type=int, default=512)
    add("--batch", type=int, default=8)
    add("--vocabulary", type=int, default=16384)
    add("--text-bytes", type=int, default=20_000_000, help="at most; default: %(default)s")
    add("--seed", type=int, default=0)
    add("--compile", action="store_true", help="torch.compile the model; takes a minute or two")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
