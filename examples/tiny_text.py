"""A tiny GPT, and real text that needs no download: the documentation strings of Python's standard library."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CONTEXT = 48  # characters
VOCABULARY = 128  # ASCII; everything else counts as character 0
_MODULES = ("argparse", "collections", "datetime", "decimal", "functools", "pathlib", "random", "subprocess")


def read_text() -> str:
    """All documentation strings of some standard modules, one after the other."""
    import importlib
    import inspect

    texts = []
    for name in _MODULES:
        module = importlib.import_module(name)
        texts.append(module.__doc__ or "")
        for _, member in inspect.getmembers(module):
            texts.append(inspect.getdoc(member) or "")
    return "\n\n".join(texts)


def encoded_text() -> Tensor:
    """The text as int64 character codes."""
    return torch.tensor([code if code < VOCABULARY else 0 for code in map(ord, read_text())])


def batch(text: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Windows [size, CONTEXT] of the text, and the same one character later; the same on every rank."""
    starts = torch.randint(len(text) - CONTEXT - 1, (size,), generator=torch.Generator().manual_seed(seed))
    windows = torch.stack([text[start : start + CONTEXT + 1] for start in starts.tolist()])
    return windows[:, :-1], windows[:, 1:]


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class TinyGPT(nn.Module):
    """Predicts the next of CONTEXT characters: tokens [batch, length] -> logits [batch, length, VOCABULARY]."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
