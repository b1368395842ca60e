"""Language models on texts that come with Python: characters (a small GPT and its variations) and words."""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from training.data import TextData, read_text
from training.models import CharGPT

from .problem import Evaluation, Task, cross_entropy, mean_loss

CPU = torch.device("cpu")
CACHE = Path(__file__).resolve().parents[1] / "build" / "study"
WINDOWS = 240  # of 64 characters, for each evaluation
BATCH_SIZE = 24


class LanguageModel:
    """Next tokens, on batches of windows that start anywhere in the training part.

    Args:
        build: the model, after seeding.
        on_step: called with the number of the batch, before it is drawn.
    """

    def __init__(
        self,
        data: TextData | WordData,
        build: Callable[[], nn.Module],
        seed: int,
        device: torch.device,
        batch_size: int = BATCH_SIZE,
        on_step: Callable[[nn.Module, int], None] | None = None,
    ) -> None:
        self._data, self._device, self._batch_size, self._on_step = data, device, batch_size, on_step
        torch.manual_seed(seed)
        self._model = build().to(device)
        self._generator = torch.Generator().manual_seed(seed)
        self._batches = 0
        # The same windows for every seed.
        self._training = data.training_batch(len(data.validation[0]), torch.Generator().manual_seed(2**31))
        self.parameters = [p for p in self._model.parameters() if p.requires_grad]

    def next_loss(self) -> Tensor:
        if self._on_step is not None:
            self._on_step(self._model, self._batches)
        self._batches += 1
        inputs, targets = self._data.training_batch(self._batch_size, self._generator)
        loss = cross_entropy(self._model(inputs.to(self._device)), targets.to(self._device))
        return loss + sum(module.balance for module in self._model.modules() if isinstance(module, Experts))

    def evaluate(self) -> Evaluation:
        parts = (self._training, self._data.validation)
        return Evaluation(*(mean_loss(self._model, x.to(self._device), y.to(self._device)) for x, y in parts))


@cache
def code() -> TextData:
    """The source of the standard library."""
    return TextData(CPU, validation_windows=WINDOWS)


@cache
def prose() -> TextData:
    """Python's language reference, as the interpreter's help has it."""
    return TextData(CPU, Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py", validation_windows=WINDOWS)


def gpt(data: TextData) -> CharGPT:
    return CharGPT(data.vocabulary_size, data.context)


def character_model(seed: int, device: torch.device, batch_size: int = BATCH_SIZE) -> LanguageModel:
    return LanguageModel(code(), lambda: gpt(code()), seed, device, batch_size)


# --- mixture of experts ----------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A mixture in place of the feed-forward part: each token goes to one of the experts, weighted by its gate.

    `starving`: the expert that gets no token. `always_run`: experts without tokens get gradients of zeros; else none.
    """

    def __init__(self, width: int, experts: int = 8, hidden: int = 128, always_run: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(experts)
        )
        self.always_run = always_run
        self.starving: int | None = None
        self.balance: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(end_dim=-2)
        logits = self.router(tokens)
        if self.starving is not None:
            logits = logits.index_fill(1, torch.tensor(self.starving, device=x.device), -torch.inf)
        gates = logits.softmax(-1)
        gate, chosen = gates.max(-1)
        # Switch Transformer's loss: tokens spread evenly over the experts.
        share = torch.bincount(chosen, minlength=len(self.experts)) / len(tokens)
        self.balance = 0.01 * len(self.experts) * (share * gates.mean(0)).sum() if self.training else 0.0
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().squeeze(-1)
            if len(rows) or self.always_run:
                out = out.index_add(0, rows, expert(tokens[rows]) * gate[rows, None])
        return out.view_as(x)


def gpt_with_experts(always_run: bool) -> nn.Module:
    model = gpt(code())
    for block in model.blocks:
        block.feed_forward = Experts(model.final_norm.normalized_shape[0], always_run=always_run)
    return model


def starve(model: nn.Module, batch: int, between: tuple[int, int] = (150, 300)) -> None:
    for module in model.modules():
        if isinstance(module, Experts):
            module.starving = 0 if between[0] <= batch < between[1] else None


def experts(seed: int, device: torch.device, starves: bool) -> LanguageModel:
    return LanguageModel(
        code(), lambda: gpt_with_experts(always_run=starves), seed, device, on_step=starve if starves else None
    )


# --- low-rank adapters -----------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen linear layer plus a learned product of rank 8, zero at first."""

    def __init__(self, frozen: nn.Linear, rank: int = 8, scale: float = 2.0) -> None:
        super().__init__()
        self.frozen, self.scale = frozen, scale
        self.down = nn.Parameter(torch.randn(rank, frozen.in_features) / frozen.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.scale * (x @ self.down.T @ self.up.T)


def pretrained_state(steps: int = 1500) -> dict[str, Tensor]:
    """Of the GPT on the standard library's code, over the characters of the prose; trained once and kept in a file.

    Seeds differ in their adapters and batches, not in the base.
    """
    path = CACHE / f"pretrained-{steps}-{torch.__version__}-{sysconfig.get_python_version()}.pt"
    if not path.exists():
        code_text, data = read_text(None), prose()
        index_of = {character: index for index, character in enumerate(data.vocabulary, start=1)}
        tokens = torch.tensor([index_of.get(character, 0) for character in code_text])
        torch.manual_seed(0)
        model, generator = gpt(data), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(steps):
            inputs, targets = windows(tokens, data.context, BATCH_SIZE, generator)
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(f".{torch.initial_seed()}.{id(model)}")  # another process may be at it as well
        torch.save(model.state_dict(), partial_path)
        partial_path.replace(path)
    state: dict[str, Tensor] = torch.load(path, weights_only=True)
    return state


def gpt_with_adapters(base: dict[str, Tensor]) -> nn.Module:
    model = gpt(prose())
    model.load_state_dict(base)
    model.requires_grad_(False)
    for block in model.blocks:
        for parent in (block.attention, block.feed_forward):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Adapted(child))
    return model


def adapters(seed: int, device: torch.device) -> LanguageModel:
    base = pretrained_state()
    return LanguageModel(prose(), lambda: gpt_with_adapters(base), seed, device)


# --- words -----------------------------------------------------------------------------------------------------------


def windows(tokens: Tensor, context: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows that start anywhere, and the same windows one token later."""
    starts = torch.randint(len(tokens) - context, (count,), generator=generator)
    found = tokens[starts[:, None] + torch.arange(context + 1)]
    return found[:, :-1], found[:, 1:]


class WordData:
    """Words and signs of the standard library's source; one block of 1024 in ten is held out. Most words are rare.

    `validation` and the batches hold contexts [n, context] and the next words [n].
    """

    vocabulary_size = 8192

    def __init__(self, context: int = 6, validation: int = 2000) -> None:
        words = re.findall(r"\w+|[^\w\s]", read_text(None))
        index_of = {word: i for i, (word, _) in enumerate(Counter(words).most_common(self.vocabulary_size - 1), 1)}
        tokens = torch.tensor([index_of.get(word, 0) for word in words])
        blocks = tokens[: len(tokens) // 1024 * 1024].view(-1, 1024)
        held_out = torch.arange(len(blocks)) % 10 == 9
        self._tokens, self._context = blocks[~held_out].flatten(), context
        self.validation = self._batch(blocks[held_out].flatten(), validation, torch.Generator().manual_seed(0))

    def training_batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self._batch(self._tokens, count, generator)

    def _batch(self, tokens: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs, targets = windows(tokens, self._context, count, generator)
        return inputs, targets[:, -1]


@cache
def word_data() -> WordData:
    return WordData()


def word_model(vocabulary: int, context: int = 6, width: int = 32, hidden: int = 96) -> nn.Module:
    """Bengio's: the embeddings of the last words side by side, one hidden layer, an output for every word."""
    layers: Sequence[nn.Module] = (
        nn.Embedding(vocabulary, width), nn.Flatten(), nn.Linear(context * width, hidden), nn.Tanh(),
        nn.Linear(hidden, vocabulary),
    )  # fmt: skip
    return nn.Sequential(*layers)


def words(seed: int, device: torch.device) -> LanguageModel:
    return LanguageModel(word_data(), lambda: word_model(WordData.vocabulary_size), seed, device, batch_size=64)


LANGUAGE_TASKS = (
    Task("words", "words (8,192)", 1000, words),
    Task("gpt-text", "character GPT", 500, character_model),
    Task("gpt-experts", "GPT, 8 experts", 500, partial(experts, starves=False)),
    Task("gpt-starved", "GPT, an expert starves", 500, partial(experts, starves=True)),
    Task("gpt-adapters", "GPT, low-rank adapters", 500, adapters),
    Task("gpt-accumulated", "GPT, 4 batches a step", 500, partial(character_model, batch_size=BATCH_SIZE // 4),
         micro_batches=4),
    Task("gpt-clipped", "GPT, norm clipped to 1", 500, character_model, max_grad_norm=1.0),
)  # fmt: skip
