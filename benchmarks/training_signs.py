"""How often does the guard see that a model was trained, and how often does it take a fresh one for trained?

Every kind of model is drawn as PyTorch or its author draws it, looked at, trained for some steps, and looked at again
after its weights were loaded into a new model, so that nothing but the numbers tells. *False* are signs in fresh
models, *missed* are trained models without a sign, of so many draws each.

``python -m benchmarks.training_signs --out docs/training_signs.md`` takes about eight minutes on two cores.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_init.initialization.rules import Request
from lightning_init.initialization.survey import survey, with_empty_memory_marked
from lightning_init.initialization.training_signs import signs_of_training

Build = Callable[[], nn.Module]
Draw = Callable[[Tensor], object]

BATCH = 32
RATES = (1e-4, 1e-3, 1e-2)
STEPS = (1, 10, 100, 1000)


def mlp(bias: bool) -> nn.Module:
    """Three layers and ReLU."""
    sizes = itertools.pairwise([64, 64, 64, 10])
    layers = [layer for i, o in sizes for layer in (nn.Linear(i, o, bias=bias), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def conv_net(norm: bool) -> nn.Module:
    """Two convolutions without biases, with batch norms or without, and a linear layer without a bias."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for inputs, outputs in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), *([nn.BatchNorm2d(outputs)] * norm), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10, bias=False))


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        output: Tensor = self.head(self.rows(pixels.view(-1, 8, 8))[0][:, -1])
        return output


class Attentive(nn.Module):
    """A transformer layer over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.body = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        output: Tensor = self.head(self.body(self.embed(pixels.view(-1, 8, 8))).mean(1))
        return output


KINDS: dict[str, Build] = {
    "MLP": lambda: mlp(bias=True),
    "MLP, no biases": lambda: mlp(bias=False),
    "conv net, batch norms": lambda: conv_net(norm=True),
    "conv net, no biases, no norms": lambda: conv_net(norm=False),
    "LSTM": Recurrent,
    "transformer": Attentive,
}
DRAWS: dict[str, Draw | None] = {
    "PyTorch's": None,
    "Xavier uniform": nn.init.xavier_uniform_,
    "He normal": nn.init.kaiming_normal_,
    "N(0, 0.02²)": lambda weight: nn.init.normal_(weight, std=0.02),
    "orthogonal": nn.init.orthogonal_,
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}


def drawn(kind: str, draw: str, seed: int) -> nn.Module:
    """A fresh model; an author's draw is that of all weights, whose biases stay."""
    torch.manual_seed(seed)
    model, fill = KINDS[kind](), DRAWS[draw]
    for parameter in model.parameters() if fill is not None else ():
        if parameter.ndim > 1:
            fill(parameter)
    return model


def has_signs(model: nn.Module) -> bool:
    """Whether the guard would refuse."""
    request = Request.of("he_normal")
    return bool(signs_of_training(with_empty_memory_marked(survey(model, request)), model))


def is_seen_after(kind: str, draw: str, seed: int, optimizer: str, rate: float, steps: Sequence[int]) -> list[bool]:
    """Whether training shows after each number of steps, once the weights are loaded into another model."""
    pixels, classes = (torch.as_tensor(one) for one in load_digits(return_X_y=True))
    pixels = pixels.float() / 16
    model = drawn(kind, draw, seed)
    stepper = OPTIMIZERS[optimizer](model.parameters(), lr=rate)
    seen = []
    for step in range(max(steps)):
        chosen = torch.randint(len(pixels), (BATCH,))
        stepper.zero_grad()
        F.cross_entropy(model(pixels[chosen]), classes[chosen]).backward()
        stepper.step()
        if step + 1 in steps:
            other = drawn(kind, draw, seed + 1000)
            other.load_state_dict(model.state_dict())
            seen.append(has_signs(other))
    return seen


def measure(seeds: int, rates: Sequence[float], steps: Sequence[int]) -> list[str]:
    """A line of the table for each kind and each draw."""
    head = ["model", "draw", "false", *(f"missed, {o}, {count} steps" for o in OPTIMIZERS for count in steps)]
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2)]
    print("\n".join(lines), flush=True)
    for kind, draw in itertools.product(KINDS, DRAWS):
        false = sum(has_signs(drawn(kind, draw, seed)) for seed in range(10 * seeds))
        cells = [f"{false}/{10 * seeds}"]
        for optimizer in OPTIMIZERS:
            seen = [is_seen_after(kind, draw, seed, optimizer, rate, steps) for rate in rates for seed in range(seeds)]
            cells += [f"{sum(not one for one in column)}/{len(column)}" for column in zip(*seen, strict=True)]
        lines.append(f"| {kind} | {draw} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="draws for each rate; ten times as many fresh models")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--out", type=Path, help="write the page there too")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the models are small
    lines = measure(asked.seeds, asked.rates, asked.steps)
    if asked.out:
        machine = f"{os.cpu_count()} cores, torch {torch.__version__.partition('+')[0]}"
        rates = ", ".join(f"{rate:g}" for rate in asked.rates)
        note = f"{datetime.date.today()}, {machine}; learning rates {rates}, {asked.seeds} draws of each."
        asked.out.write_text(
            "\n".join(["# Signs of training, false and missed", "", __doc__ or "", note, "", *lines, ""])
        )


if __name__ == "__main__":
    main()
