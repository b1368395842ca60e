"""Data that needs no download: scikit-learn's digits, and text from the Python installation or from your own files."""

from __future__ import annotations

import sysconfig
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

MAX_CHARACTERS = 4_000_000
VOCABULARY_SIZE = 128
HELD_OUT_BLOCK = 8192  # characters; long enough that few windows cross from one block into the next


class DigitsData:
    """The 1797 handwritten digits of scikit-learn, 8x8 pixels each; every fifth is held out.

    ``validation`` holds inputs [359, 64] (float32, 0 to 1) and their classes [359] (int64).
    """

    name = "digits"
    default_batch_size = 64

    def __init__(self, device: torch.device) -> None:
        from sklearn.datasets import load_digits

        pixels, classes = load_digits(return_X_y=True)
        inputs = torch.tensor(pixels / 16, dtype=torch.float32, device=device)
        targets = torch.tensor(classes, dtype=torch.int64, device=device)
        held_out = torch.arange(len(inputs), device=device) % 5 == 4
        self.inputs, self.targets = inputs[~held_out], targets[~held_out]
        self.validation = (inputs[held_out], targets[held_out])

    def training_batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs [batch, 64] and classes [batch], drawn with replacement."""
        chosen = torch.randint(len(self.inputs), (batch_size,), generator=generator).to(self.inputs.device)
        return self.inputs[chosen], self.targets[chosen]


class TextData:
    """Characters of a text; one block of 8192 in ten is held out.

    The vocabulary is the 127 most frequent characters of the text; all others share the index 0. ``validation`` holds
    windows [n, context] of the held-out blocks and, as their targets, the same windows one character later.
    """

    default_batch_size = 24

    def __init__(
        self,
        device: torch.device,
        path: Path | None = None,
        context: int = 64,
        validation_windows: int = 480,
    ) -> None:
        self.name = "text" if path is None else path.stem
        self.context = context
        text = read_text(path)
        if len(text) < 10 * HELD_OUT_BLOCK:
            raise ValueError(
                f"{path or 'text'} holds {len(text)} characters; at least {10 * HELD_OUT_BLOCK} are needed"
            )
        most_frequent = Counter(text).most_common(VOCABULARY_SIZE - 1)
        self.vocabulary = sorted(character for character, _ in most_frequent)
        self.vocabulary_size = len(self.vocabulary) + 1
        index_of = {character: index for index, character in enumerate(self.vocabulary, start=1)}
        indices = torch.tensor([index_of.get(character, 0) for character in text], device=device)

        blocks = indices[: len(indices) // HELD_OUT_BLOCK * HELD_OUT_BLOCK].view(-1, HELD_OUT_BLOCK)
        held_out = torch.arange(len(blocks), device=device) % 10 == 9
        self.characters = blocks[~held_out].flatten()
        self.validation = self._evenly_spaced_windows(blocks[held_out].flatten(), validation_windows)

    def training_batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Windows [batch, context] that start anywhere, and the same windows one character later."""
        starts = torch.randint(len(self.characters) - self.context, (batch_size,), generator=generator)
        return self._windows(self.characters, starts.to(self.characters.device))

    def _evenly_spaced_windows(self, characters: Tensor, count: int) -> tuple[Tensor, Tensor]:
        last_start = len(characters) - self.context - 1
        starts = torch.linspace(0, last_start, count, dtype=torch.float64, device=characters.device).long()
        return self._windows(characters, starts)

    def _windows(self, characters: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        positions = starts[:, None] + torch.arange(self.context + 1, device=starts.device)
        windows = characters[positions]
        return windows[:, :-1], windows[:, 1:]


def load_data(source: str, device: torch.device) -> DigitsData | TextData:
    """``digits``, ``text`` (the source of Python's standard library), or the path of a text file or folder."""
    if source == "digits":
        return DigitsData(device)
    return TextData(device, None if source == "text" else Path(source))


def read_text(path: Path | None) -> str:
    """The first 4 million characters of a file, of a folder's files in sorted order, or of the standard library.

    Files that are not UTF-8 text and hidden ones are left out of a folder.
    """
    if path is None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not is_hidden(file.relative_to(path)))
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(f"{path}: no such file or folder; --data takes digits, text, or a path to text")

    texts: list[str] = []
    length = 0
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            if file == path:
                raise ValueError(f"{path} is not UTF-8 text") from None
            continue
        length += len(texts[-1])
        if length >= MAX_CHARACTERS:
            break
    return "".join(texts)[:MAX_CHARACTERS]


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
