"""Parameter lists shaped like real models: an optimizer's cost depends on nothing else of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Shape = tuple[int, ...]

NOISE_BLOCK = 1 << 16  # values


@dataclass(frozen=True)
class ModelShapes:
    """Name and parameter shapes of a model."""

    name: str
    description: str
    shapes: tuple[Shape, ...]

    @cached_property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def parameters(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Parameters and gradients of random values; one block of them, repeated: to draw all takes longer."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(NOISE_BLOCK, generator=generator).to(dtype=dtype, device=device)
        params = []
        for shape in self.shapes:
            param = repeated(0.02 * noise, shape).requires_grad_()
            param.grad = repeated(0.01 * noise.flip(0), shape)
            params.append(param)
        return params


def repeated(block: Tensor, shape: Shape) -> Tensor:
    """A tensor of that shape, filled with the block again and again."""
    filled = torch.empty(shape, dtype=block.dtype, device=block.device)
    flat = filled.view(-1)
    whole = flat.numel() // block.numel() * block.numel()
    flat[:whole].view(-1, block.numel()).copy_(block)
    flat[whole:].copy_(block[: flat.numel() - whole])
    return filled


def gpt2(layers: int, width: int) -> tuple[Shape, ...]:
    """GPT-2: learned positions, biases everywhere, output tied to the embedding."""
    block: list[Shape] = [
        (width,), (width,),  # layer norm
        (width, 3 * width), (3 * width,), (width, width), (width,),  # attention
        (width,), (width,),  # layer norm
        (width, 4 * width), (4 * width,), (4 * width, width), (width,),  # perceptron
    ]  # fmt: skip
    return ((50257, width), (1024, width), *(block * layers), (width,), (width,))


def llama(layers: int, width: int, hidden: int, key_value_width: int, vocabulary: int) -> tuple[Shape, ...]:
    """Llama 3.2: grouped-query attention, gated perceptron, RMS norms, no biases, output tied to the embedding."""
    block: list[Shape] = [
        (width, width), (key_value_width, width), (key_value_width, width), (width, width),  # q, k, v, output
        (hidden, width), (hidden, width), (width, hidden),  # gate, up, down
        (width,), (width,),  # norms
    ]  # fmt: skip
    return ((vocabulary, width), *(block * layers), (width,))


def resnet50() -> tuple[Shape, ...]:
    """ResNet-50: bottleneck blocks of three convolutions with a batch norm (weight and bias) behind each."""
    shapes: list[Shape] = []

    def convolution(inputs: int, outputs: int, kernel: int) -> None:
        shapes.extend([(outputs, inputs, kernel, kernel), (outputs,), (outputs,)])

    convolution(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(channels, width, 1)
            convolution(width, width, 3)
            convolution(width, 4 * width, 1)
            if block == 0:
                convolution(channels, 4 * width, 1)
            channels = 4 * width
    shapes.extend([(1000, channels), (1000,)])
    return tuple(shapes)


def small_tensors(count: int) -> ModelShapes:
    """`count` tensors so small that only the cost per tensor is left."""
    return ModelShapes(f"small-{count}x64", f"{count} tensors of 64", ((64,),) * count)


MODELS: dict[str, ModelShapes] = {
    model.name: model
    for model in (
        ModelShapes("gpt2-small", "GPT-2 small", gpt2(12, 768)),
        ModelShapes("gpt2-xl", "GPT-2 XL", gpt2(48, 1600)),
        ModelShapes("llama-1b", "Llama 3.2 1B", llama(16, 2048, 8192, 512, 128256)),
        ModelShapes("resnet50", "ResNet-50", resnet50()),
        small_tensors(1000),
        small_tensors(148),
        ModelShapes("one-100m", "one tensor of 100 M", ((100_000_000,),)),
        ModelShapes("one-350m", "one tensor of 350 M", ((350_000_000,),)),
    )
}

DEFAULT_MODELS = {
    "cpu": ("gpt2-small", "resnet50", "one-100m", "small-1000x64", "small-148x64"),
    "cuda": ("gpt2-small", "gpt2-xl", "llama-1b", "resnet50", "one-350m", "small-1000x64"),
}


def path_elements(shape: Shape, fraction: float) -> int:
    """How many elements of a contiguous tensor have a path (../docs/algorithm.md, "Which elements have a path")."""
    numel = math.prod(shape)
    inner = numel // shape[0] if len(shape) > 1 else numel
    run = min(inner & -inner, 1024)
    if numel < 65_536 or run < 64:
        return numel
    return numel * max(1, 2 ** math.floor(math.log2(run * fraction) + 0.5)) // run
