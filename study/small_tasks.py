"""Small tasks: classification of sets that come with scikit-learn, and functions with a known minimum."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .problem import Evaluation, Problem, Task, cross_entropy, mean_loss

L2_PENALTY = 1e-3  # it gives separable data a finite optimum
HELD_OUT = 5  # every fifth sample
BATCH_SIZE = 32
NOISE = 0.5


# --- classification --------------------------------------------------------------------------------------------------


@cache
def classification_data(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and classes of the training part, inputs and classes held out.

    Pixels (digits) are scaled to 0 ... 1, other features standardized; all by what the training part shows.
    """
    import sklearn.datasets

    inputs, classes = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    x, y = torch.tensor(inputs, dtype=torch.float32), torch.tensor(classes, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))  # some sets come sorted by class
    x, y = x[order], y[order]
    held_out = torch.arange(len(x)) % HELD_OUT == HELD_OUT - 1
    training = x[~held_out]
    # Pixels not by their own deviations: those at the border hardly ever differ from 0.
    x = x / training.max() if name == "digits" else (x - training.mean(0)) / training.std(0)
    return x[~held_out], y[~held_out], x[held_out], y[held_out]


class Classification:
    """Cross-entropy plus L2 penalty, on batches drawn with replacement. The penalty is no part of validation."""

    def __init__(self, data: str, build: Callable[[int, int], nn.Module], seed: int, device: torch.device) -> None:
        self._x, self._y, *self._held_out = (part.to(device) for part in classification_data(data))
        torch.manual_seed(seed)
        self._model = build(self._x.shape[1], int(self._y.max()) + 1).to(device)
        self._generator = torch.Generator().manual_seed(seed)
        self.parameters = list(self._model.parameters())

    def next_loss(self) -> Tensor:
        chosen = torch.randint(len(self._x), (BATCH_SIZE,), generator=self._generator).to(self._x.device)
        return cross_entropy(self._model(self._x[chosen]), self._y[chosen]) + self._penalty()

    def _penalty(self) -> Tensor:
        return 0.5 * L2_PENALTY * sum(parameter.square().sum() for parameter in self.parameters)

    def evaluate(self) -> Evaluation:
        training = mean_loss(self._model, self._x, self._y) + self._penalty().item()
        return Evaluation(training, mean_loss(self._model, *self._held_out))


def logistic_regression(features: int, classes: int) -> nn.Module:
    model = nn.Linear(features, classes)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def perceptron(features: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes))


def conv_net(features: int, classes: int, batch_norm: bool = False) -> nn.Module:
    """For square images of one channel, `features` pixels in all."""
    side = round(features**0.5)

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        norm = [nn.BatchNorm2d(outputs)] if batch_norm else []
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=not batch_norm), *norm, nn.ReLU()]

    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)), *block(1, 16), *block(16, 32), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32 * (side // 2) ** 2, classes),
    )  # fmt: skip


class CosineClassifier(nn.Module):
    """Classes are directions; a temperature, one element and learned as CLIP's, turns cosines into logits."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 32))
        self.directions = nn.Parameter(torch.randn(classes, 32))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, x: Tensor) -> Tensor:
        cosines = F.normalize(self.features(x), dim=-1) @ F.normalize(self.directions, dim=-1).T
        return self.log_scale.exp() * cosines


# --- functions -------------------------------------------------------------------------------------------------------


class Function:
    """A function with minimum 0. Multiplicative noise scales every gradient element by 1 + noise * N(0, 1)."""

    def __init__(
        self, value: Callable[[Tensor], Tensor], start: Tensor, noise: float, seed: int, device: torch.device
    ) -> None:
        self._value, self._noise = value, noise
        self._generator = torch.Generator().manual_seed(seed)
        point = start.to(device).requires_grad_()
        if noise:
            point.register_hook(self._with_noise)
        self.parameters = [point]

    def _with_noise(self, grad: Tensor) -> Tensor:
        noise = torch.randn(grad.shape, generator=self._generator, dtype=grad.dtype).to(grad.device)
        return grad * (1.0 + self._noise * noise)

    def next_loss(self) -> Tensor:
        return self._value(self.parameters[0])

    def evaluate(self) -> Evaluation:
        return Evaluation(self._value(self.parameters[0]).item())


def ill_conditioned_quadratic(
    seed: int, device: torch.device, noise: float, dimensions: int = 64, condition: float = 1e4
) -> Problem:
    """1/2 x^T H x, eigenvalues of H log-spaced from 1/condition to 1, in directions turned at random."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)).Q
    eigenvalues = torch.logspace(-math.log10(condition), 0, dimensions, dtype=torch.float64)
    hessian = (rotation * eigenvalues @ rotation.T).to(device)
    start = torch.randn(dimensions, generator=generator, dtype=torch.float64)
    return Function(lambda x: 0.5 * x @ hessian @ x, start, noise, seed, device)


def rosenbrock(seed: int, device: torch.device, noise: float, dimensions: int = 16) -> Problem:
    """Sum of 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2, started near 0."""

    def value(x: Tensor) -> Tensor:
        return (100.0 * (x[1:] - x[:-1].square()).square() + (1.0 - x[:-1]).square()).sum()

    start = 0.1 * torch.randn(dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Function(value, start, noise, seed, device)


def _classification(name: str, label: str, data: str, build: Callable[[int, int], nn.Module], steps: int) -> Task:
    return Task(name, label, steps, partial(Classification, data, build))


SETS = ("digits", "breast_cancer", "wine", "iris")
SMALL_TASKS = (
    *(_classification(f"logistic-{d}", f"logistic regression, {d}", d, logistic_regression, 1000) for d in SETS),
    *(_classification(f"mlp-{d}", f"MLP, {d}", d, perceptron, 1000) for d in SETS),
    _classification("conv-digits", "conv net, digits", "digits", conv_net, 600),
    _classification("conv-norm", "conv net with batch norm, digits", "digits", partial(conv_net, batch_norm=True), 600),
    _classification("temperature", "learnable temperature, digits", "digits", CosineClassifier, 1000),
    Task("quadratic", "quadratic", 2000, partial(ill_conditioned_quadratic, noise=0.0), "digits"),
    Task("quadratic-noise", "quadratic, noisy", 2000, partial(ill_conditioned_quadratic, noise=NOISE), "digits"),
    Task("rosenbrock", "Rosenbrock", 2000, partial(rosenbrock, noise=0.0), "digits"),
    Task("rosenbrock-noise", "Rosenbrock, noisy", 2000, partial(rosenbrock, noise=NOISE), "digits"),
)
