"""What is trained: nothing that needs a download, each run seconds on one core.

A task fixes data, model, batches and number of steps. For one seed every optimizer gets the same initial parameters
and the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CPU = torch.device("cpu")
L2_PENALTY = 1e-3  # of the classification tasks; it gives separable data a finite optimum
HELD_OUT = 5  # every fifth sample


@dataclass(frozen=True)
class Evaluation:
    """Mean losses and accuracies (0 to 1) at one moment; None where a task has no such thing."""

    training_loss: float
    training_accuracy: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None


class Problem(Protocol):
    """One instance of a task: parameters, and losses on its own sequence of batches."""

    parameters: Sequence[Tensor]

    def next_loss(self) -> Tensor:
        """The loss on the next batch, to be differentiated."""
        ...

    def evaluate(self) -> Evaluation: ...


@dataclass(frozen=True)
class Task:
    """A problem for every seed, and how many steps an optimizer gets on it.

    `goal` says what a final training loss means: "loss" where its value does; "digits" where the optimum is 0 and what
    counts is the number of decimal digits by which the loss has come down.
    """

    name: str
    label: str
    steps: int
    make: Callable[[int], Problem]
    goal: str = "loss"


# --- classification --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    inputs: Tensor
    classes: Tensor


@cache
def classification_data(name: str) -> tuple[Samples, Samples]:
    """Training and held-out samples of a set that comes with scikit-learn.

    Pixels (digits) are scaled to 0 ... 1, other features standardized; all by what the training part shows.
    """
    import sklearn.datasets

    inputs, classes = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    x, y = torch.tensor(inputs, dtype=torch.float32), torch.tensor(classes, dtype=torch.int64)
    # Some sets come sorted by class.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    held_out = torch.arange(len(x)) % HELD_OUT == HELD_OUT - 1
    training = x[~held_out]
    if name == "digits":
        # Not by their own deviations: the border pixels hardly ever differ from 0.
        x = x / training.max()
    else:
        x = (x - training.mean(0)) / training.std(0)
    return Samples(x[~held_out], y[~held_out]), Samples(x[held_out], y[held_out])


class Classification:
    """Cross-entropy plus L2 penalty, on batches drawn with replacement. The penalty is no part of validation."""

    def __init__(self, data: str, build: Callable[[int, int], nn.Module], batch_size: int, seed: int) -> None:
        self._training, self._validation = classification_data(data)
        torch.manual_seed(seed)
        self._model = build(self._training.inputs.shape[1], int(self._training.classes.max()) + 1)
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self.parameters = list(self._model.parameters())

    def next_loss(self) -> Tensor:
        chosen = torch.randint(len(self._training.inputs), (self._batch_size,), generator=self._generator)
        logits = self._model(self._training.inputs[chosen])
        return F.cross_entropy(logits, self._training.classes[chosen]) + self._penalty()

    def _penalty(self) -> Tensor:
        return 0.5 * L2_PENALTY * sum(parameter.square().sum() for parameter in self.parameters)

    def evaluate(self) -> Evaluation:
        training, validation = self._training, self._validation
        training_loss, training_accuracy = loss_and_accuracy(self._model, training.inputs, training.classes)
        return Evaluation(
            training_loss + self._penalty().item(),
            training_accuracy,
            *loss_and_accuracy(self._model, validation.inputs, validation.classes),
        )


def loss_and_accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    logits = model(inputs)
    accuracy = (logits.argmax(dim=-1) == targets).float().mean().item()
    return F.cross_entropy(logits.flatten(end_dim=-2), targets.flatten()).item(), accuracy


def logistic_regression(features: int, classes: int) -> nn.Module:
    model = nn.Linear(features, classes)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def perceptron(features: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes)
    )


def small_conv_net(features: int, classes: int) -> nn.Module:
    """For square images of one channel, `features` pixels in all."""
    side = round(features**0.5)
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (side // 2) ** 2, classes),
    )


def classification(
    name: str, label: str, data: str, build: Callable[[int, int], nn.Module], *, steps: int, batch_size: int
) -> Task:
    return Task(name, label, steps, lambda seed: Classification(data, build, batch_size, seed))


# --- text ------------------------------------------------------------------------------------------------------------


@cache
def text_data():  # type: ignore[no-untyped-def]  # the class lives beside the examples
    from training.data import TextData

    return TextData(CPU, validation_windows=240)


class CharacterModel:
    """The example's small GPT on the source text of Python's standard library."""

    batch_size = 24

    def __init__(self, seed: int) -> None:
        from training.models import CharGPT

        self._data = text_data()
        torch.manual_seed(seed)
        self._model = CharGPT(self._data.vocabulary_size, self._data.context)
        self._generator = torch.Generator().manual_seed(seed)
        # The same windows for every seed, drawn from the training part.
        self._training_sample = self._data.training_batch(240, torch.Generator().manual_seed(2**31))
        self.parameters = list(self._model.parameters())

    def next_loss(self) -> Tensor:
        inputs, targets = self._data.training_batch(self.batch_size, self._generator)
        return F.cross_entropy(self._model(inputs).flatten(end_dim=-2), targets.flatten())

    def evaluate(self) -> Evaluation:
        return Evaluation(
            *loss_and_accuracy(self._model, *self._training_sample),
            *loss_and_accuracy(self._model, *self._data.validation),
        )


# --- functions -------------------------------------------------------------------------------------------------------


class Function:
    """A function with minimum 0. Multiplicative noise scales every gradient element by 1 + noise * N(0, 1)."""

    def __init__(self, value: Callable[[Tensor], Tensor], start: Tensor, noise: float, seed: int) -> None:
        self._value, self._noise = value, noise
        self._generator = torch.Generator().manual_seed(seed)
        point = start.clone().requires_grad_()
        if noise:
            point.register_hook(self._with_noise)
        self.parameters = [point]

    def _with_noise(self, grad: Tensor) -> Tensor:
        return grad * (1.0 + self._noise * torch.randn(grad.shape, generator=self._generator, dtype=grad.dtype))

    def next_loss(self) -> Tensor:
        return self._value(self.parameters[0])

    def evaluate(self) -> Evaluation:
        return Evaluation(self._value(self.parameters[0]).item())


def ill_conditioned_quadratic(seed: int, noise: float, dimensions: int = 64, condition: float = 1e4) -> Problem:
    """1/2 x^T H x, eigenvalues of H log-spaced from 1/condition to 1, in directions turned at random."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)).Q
    eigenvalues = torch.logspace(-torch.tensor(condition).log10().item(), 0, dimensions, dtype=torch.float64)
    hessian = rotation * eigenvalues @ rotation.T
    start = torch.randn(dimensions, generator=generator, dtype=torch.float64)
    return Function(lambda x: 0.5 * x @ hessian @ x, start, noise, seed)


def rosenbrock(seed: int, noise: float, dimensions: int = 16) -> Problem:
    """Sum of 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2, started near 0."""

    def value(x: Tensor) -> Tensor:
        return (100.0 * (x[1:] - x[:-1].square()).square() + (1.0 - x[:-1]).square()).sum()

    start = 0.1 * torch.randn(dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Function(value, start, noise, seed)


NOISE = 0.5

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(
            classification(
                f"logistic-{data}", f"logistic regression, {data}", data, logistic_regression,
                steps=1000, batch_size=32,
            )
            for data in ("digits", "breast_cancer", "wine", "iris")
        ),
        *(
            classification(f"mlp-{data}", f"MLP, {data}", data, perceptron, steps=1000, batch_size=32)
            for data in ("digits", "breast_cancer", "wine", "iris")
        ),
        classification("conv-digits", "conv net, digits", "digits", small_conv_net, steps=600, batch_size=32),
        Task("gpt-text", "character GPT, text", 500, CharacterModel),
        Task("quadratic", "quadratic", 2000, partial(ill_conditioned_quadratic, noise=0.0), "digits"),
        Task("quadratic-noise", "quadratic, noisy", 2000, partial(ill_conditioned_quadratic, noise=NOISE), "digits"),
        Task("rosenbrock", "Rosenbrock", 2000, partial(rosenbrock, noise=0.0), "digits"),
        Task("rosenbrock-noise", "Rosenbrock, noisy", 2000, partial(rosenbrock, noise=NOISE), "digits"),
    )
}  # fmt: skip
