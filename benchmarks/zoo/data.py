"""What the models learn from. Nothing is downloaded: scikit-learn's small data sets, a photograph, Python's manual."""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_sample_image, make_moons
from torch import Tensor

from benchmarks.zoo.case import Batch

WORDS = 97
"""The 96 most frequent characters of the manual, and 0 for all others."""

LENGTH = 33
"""Characters in a line of text: the last is only predicted."""


@cache
def text() -> Batch:
    """Lines of Python's manual, a word for each character. [lines, characters]"""
    from pydoc_data.topics import topics

    letters = "".join(topics[name] for name in sorted(topics))
    frequent = sorted(set(letters), key=lambda letter: (-letters.count(letter), letter))[: WORDS - 1]
    number = {letter: n for n, letter in enumerate(frequent, 1)}
    words = torch.tensor([number.get(letter, 0) for letter in letters[: 4000 * LENGTH]])
    return (words.view(-1, LENGTH),)


@cache
def masked_text() -> Batch:
    """Lines with every sixth word or so hidden, and the hidden ones; -100, which no loss counts, elsewhere."""
    (words,) = text()
    hidden = torch.rand(words.shape, generator=torch.Generator().manual_seed(0)) < 0.15
    return words.masked_fill(hidden, WORDS), words.masked_fill(~hidden, -100)


@cache
def reversed_text() -> Batch:
    """Short lines, and the same from back to front."""
    (words,) = text()
    return words[:, :16].contiguous(), words[:, :16].flip(1)


@cache
def skip_grams() -> Batch:
    """A word, one of its neighbours, and five words from elsewhere."""
    words = text()[0].flatten()
    generator = torch.Generator().manual_seed(0)
    centres = torch.randint(2, len(words) - 2, (20000,), generator=generator)
    offsets = torch.tensor([-2, -1, 1, 2])[torch.randint(4, (20000,), generator=generator)]
    others = words[torch.randint(len(words), (20000, 5), generator=generator)]
    return words[centres], torch.cat([words[centres + offsets][:, None], others], 1)


@cache
def images() -> Batch:
    """Digits, mean 0 and variance 1 over all pixels, and their classes. [1797, 1, 8, 8], [1797]"""
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None]
    return (pixels - pixels.mean()) / pixels.std(), torch.from_numpy(digits.target)


@cache
def rows() -> Batch:
    """Digits as rows of 64 pixels."""
    pixels, classes = images()
    return pixels.flatten(1), classes


@cache
def sequences() -> Batch:
    """Digits as eight rows of eight pixels, one after another."""
    pixels, classes = images()
    return pixels.squeeze(1), classes


@cache
def large_images() -> Batch:
    """Digits at twice the size. [1797, 1, 16, 16]"""
    pixels, classes = images()
    return torch.nn.functional.interpolate(pixels, scale_factor=2, mode="bilinear"), classes


@cache
def unlabelled() -> Batch:
    """Digits as rows of 64 pixels between 0 and 1."""
    return (torch.from_numpy(load_digits().data).float() / 16,)


@cache
def noisy_images() -> Batch:
    """Digits under noise, and where there is ink."""
    pixels, _ = large_images()
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return pixels + noise, (pixels > 0).float()


@cache
def scenes() -> Batch:
    """Canvases with one digit each, and where the middle of which class is. [1797, 1, 24, 24], [1797, 10, 6, 6]"""
    pixels, classes = images()
    generator = torch.Generator().manual_seed(0)
    canvas, centres = torch.full((len(pixels), 1, 24, 24), float(pixels.min())), torch.zeros(len(pixels), 10, 6, 6)
    corners = torch.randint(17, (len(pixels), 2), generator=generator)
    for n, (y, x) in enumerate(corners.tolist()):
        canvas[n, :, y : y + 8, x : x + 8] = pixels[n]
        centres[n, classes[n], (y + 4) // 4, (x + 4) // 4] = 1
    return canvas, centres


@cache
def turned_images() -> Batch:
    """Digits turned by up to a quarter, and their classes."""
    pixels, classes = large_images()
    angles = (torch.rand(len(pixels), generator=torch.Generator().manual_seed(0)) - 0.5) * torch.pi
    zero = torch.zeros_like(angles)
    turn = torch.stack([angles.cos(), -angles.sin(), zero, angles.sin(), angles.cos(), zero], 1).view(-1, 2, 3)
    grid = torch.nn.functional.affine_grid(turn, list(pixels.shape), align_corners=False)
    return torch.nn.functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False), classes


@cache
def halves() -> Batch:
    """The upper and the lower half of each digit."""
    pixels, _ = rows()
    return pixels[:, :32].contiguous(), pixels[:, 32:].contiguous()


@cache
def photograph() -> Batch:
    """Places in a photograph, between -1 and 1, and their colours, between -1 and 1. [16384, 2], [16384, 3]"""
    colours = torch.from_numpy(load_sample_image("flower.jpg").copy())[100:356:2, 200:456:2].float() / 127.5 - 1
    side = torch.linspace(-1, 1, 128)
    places = torch.cartesian_prod(side, side)
    mixed = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    return places[mixed], colours.reshape(-1, 3)[mixed]


@cache
def patients() -> Batch:
    """Ten measurements of diabetes patients and how far the illness went a year later; mean 0, variance 1."""
    measurements, progress = load_diabetes(return_X_y=True)
    return _standardised(torch.from_numpy(measurements)), _standardised(torch.from_numpy(progress)[:, None])


@cache
def tumours() -> Batch:
    """30 measurements, mean 0 and variance 1, and whether the tumour is malignant."""
    measurements, classes = load_breast_cancer(return_X_y=True)
    return _standardised(torch.from_numpy(measurements)), torch.from_numpy(classes).long()


@cache
def binned_tumours() -> Batch:
    """Half of the measurements as numbers, half as one of 16 classes of equal size; and the tumour's kind."""
    measurements, classes = tumours()
    ranks = measurements[:, 15:].argsort(0).argsort(0) * 16 // len(measurements)
    return measurements[:, :15].contiguous(), ranks, classes


@cache
def ratings() -> Batch:
    """Image, pixel and brightness: what a recommender knows of user, item and rating."""
    (pixels,) = unlabelled()
    users, items = (index.flatten() for index in torch.meshgrid(torch.arange(500), torch.arange(64), indexing="ij"))
    mixed = torch.randperm(len(users), generator=torch.Generator().manual_seed(0))
    return users[mixed], items[mixed], pixels[users[mixed], items[mixed]]


@cache
def moons() -> Batch:
    """Points on two interleaved half-circles."""
    points, _ = make_moons(4000, noise=0.08, random_state=0)
    return (_standardised(torch.from_numpy(points)),)


@cache
def series() -> Batch:
    """Windows of 48 values of noisy seasons and trends at levels of 1 to 5, and the twelve that follow."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(60.0)
    level = 1 + 4 * torch.rand(2000, 1, generator=generator)
    phase = 2 * torch.pi * torch.rand(2000, 1, generator=generator)
    trend = 0.02 * torch.randn(2000, 1, generator=generator)
    values = level + torch.sin(2 * torch.pi * time / 12 + phase) + trend * time
    values = values + 0.1 * torch.randn(values.shape, generator=generator)
    return values[:, :48].contiguous(), values[:, 48:].contiguous()


@cache
def states() -> Batch:
    """States, the actions taken there and what they were worth: a fixed policy's that pushes towards the origin."""
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(4000, 8, generator=generator)
    scores = seen @ torch.randn(8, 4, generator=generator) + (seen[:, :4] * seen[:, 4:]).roll(1, 1)
    return seen, scores.argmax(1), 0.3 * scores.max(1).values


@cache
def graph() -> tuple[Tensor, Tensor, Tensor]:
    """600 digits: pixels, classes, and the normalised adjacency of each with its eight neighbours."""
    pixels, classes = rows()
    pixels, classes = pixels[:600], classes[:600]
    nearest = torch.cdist(pixels, pixels).topk(9, largest=False).indices
    adjacency = torch.zeros(600, 600).scatter(1, nearest, 1.0)
    adjacency = torch.maximum(adjacency, adjacency.T)
    degree = adjacency.sum(1).rsqrt()
    return pixels, classes, degree[:, None] * adjacency * degree


@cache
def nodes() -> Batch:
    """Numbers of the graph's nodes, and their classes."""
    _, classes, _ = graph()
    return torch.arange(600), classes


@cache
def interval() -> Batch:
    """Places between 0 and 1 at which a differential equation is to hold."""
    return (torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)),)


def _standardised(columns: Tensor) -> Tensor:
    """Columns with mean 0 and variance 1."""
    return ((columns - columns.mean(0)) / columns.std(0)).float()
