"""Models that make something: densities, images, and functions of a place."""

from __future__ import annotations

import itertools
import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo import data
from benchmarks.zoo.case import Batch, Case, squared_loss


class Coupling(nn.Module):
    """Half of the numbers are scaled and shifted by a network of the other half, whose last layer starts at 0."""

    def __init__(self, width: int, is_swapped: bool) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )
        nn.init.zeros_(self.network[-1].weight)
        nn.init.zeros_(self.network[-1].bias)
        self.is_swapped = is_swapped

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = points.flip(1).split(1, 1) if self.is_swapped else points.split(1, 1)
        log_scale, shift = self.network(kept).chunk(2, 1)
        log_scale = log_scale.tanh()
        moved = moved * log_scale.exp() + shift
        both = torch.cat([moved, kept] if self.is_swapped else [kept, moved], 1)
        return both, log_scale.squeeze(1)


class Flow(nn.Module):
    """RealNVP: eight couplings in turn, the identity at first (Dinh et al. 2017)."""

    def __init__(self, width: int = 32, depth: int = 8) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(width, bool(n % 2)) for n in range(depth))

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        log_volume = torch.zeros(len(points))
        for coupling in self.couplings:
            points, log_scale = coupling(points)
            log_volume = log_volume + log_scale
        return points, log_volume


def likelihood_loss(network: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood of points under a normal distribution that the flow bends."""
    points, log_volume = network(*batch)
    return (points.square().sum(1) / 2 + math.log(2 * math.pi) - log_volume).mean()


class VAE(nn.Module):
    """Encoder and decoder of one hidden layer each (Kingma & Welling 2014)."""

    def __init__(self, width: int = 64, latent: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, 64))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(pixels).chunk(2, 1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decoder(code), mean, log_variance


def evidence_loss(network: nn.Module, batch: Batch) -> Tensor:
    """Negative evidence lower bound."""
    (pixels,) = batch
    logits, mean, log_variance = network(pixels)
    likelihood = F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum(1)
    return (likelihood + (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2).mean()


def autoencoder(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Hinton & Salakhutdinov's shape: narrow in the middle, six layers."""
    pairs = itertools.pairwise([64, 48, 32, 6, 32, 48, 64])
    layers = [layer for i, o in pairs for layer in (nn.Linear(i, o), activation())]
    return nn.Sequential(*layers[:-1])


def rebuilding_loss(network: nn.Module, batch: Batch) -> Tensor:
    """How far an image is from what the network makes of it."""
    return squared_loss(network, (*batch, *batch))


class AdaptiveBlock(nn.Module):
    """Of a diffusion transformer: what scales, shifts and gates depends on the time and starts at 0 (adaLN-Zero)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        inner = self.norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(inner, inner, inner, need_weights=False)[0]
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """A diffusion transformer (Peebles & Xie 2023): Xavier, time's network N(0, .02), modulation and head 0."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patches, self.head = nn.Linear(4, width), nn.Linear(width, 4)
        self.positions = nn.Parameter(torch.empty(16, width).normal_(std=0.02))
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(AdaptiveBlock(width) for _ in range(depth))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time[0], self.time[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.head, *(block.modulation[1] for block in self.blocks)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        x = self.patches(F.unfold(image, 2, stride=2).transpose(1, 2)) + self.positions
        angles = 10 * time[:, None] * torch.arange(1, 9)
        condition = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        for block in self.blocks:
            x = block(x, condition)
        return F.fold(self.head(x).transpose(1, 2), 8, 2, stride=2)


def denoising_loss(network: nn.Module, batch: Batch) -> Tensor:
    """How far the velocity from noise to image is from the right one, at a random time between."""
    image, _ = batch
    noise, time = torch.randn_like(image), torch.rand(len(image))
    between = torch.lerp(noise, image, time[:, None, None, None])
    return F.mse_loss(network(between, time), image - noise)


class Sine(nn.Module):
    """sin(30 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


def siren(width: int = 64, depth: int = 3) -> nn.Module:
    """Sitzmann et al. 2020: the first layer uniform ±1/fan_in, the others ±√(6/fan_in)/30."""
    layers = [layer for i, o in itertools.pairwise([2, *[width] * depth]) for layer in (nn.Linear(i, o), Sine())]
    model = nn.Sequential(*layers, nn.Linear(width, 3))
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    nn.init.uniform_(linear[0].weight, -1 / 2, 1 / 2)
    for layer in linear[1:]:
        bound = math.sqrt(6 / layer.in_features) / 30
        nn.init.uniform_(layer.weight, -bound, bound)
    return model


class FourierFeatures(nn.Module):
    """Sines and cosines of random frequencies, frozen (Tancik et al. 2020)."""

    def __init__(self, count: int = 32, scale: float = 3.0) -> None:
        super().__init__()
        self.frequencies = nn.Linear(2, count, bias=False)
        nn.init.normal_(self.frequencies.weight, std=scale)
        self.frequencies.requires_grad_(False)

    def forward(self, places: Tensor) -> Tensor:
        angles = 2 * torch.pi * self.frequencies(places)
        return torch.cat([angles.sin(), angles.cos()], 1)


class LearnedFourierFeatures(FourierFeatures):
    """The same, trained: only its scale tells that it is no ordinary layer."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies.requires_grad_(True)


def fourier_net(features: type[FourierFeatures], width: int = 64) -> nn.Module:
    """As NeRF: features of the place, then ReLU layers as PyTorch draws them."""
    pairs = itertools.pairwise([64, width, width, width])
    layers = [layer for i, o in pairs for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(features(), *layers, nn.Linear(width, 3))


def physics_net(width: int = 32, depth: int = 4) -> nn.Module:
    """As in DeepXDE: tanh, Xavier, biases 0."""
    layers = [layer for i, o in itertools.pairwise([1, *[width] * depth]) for layer in (nn.Linear(i, o), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(width, 1))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def equation_loss(network: nn.Module, batch: Batch) -> Tensor:
    """u″ = −4π² sin 2πx between ends where u is 0."""
    with torch.enable_grad():
        place = batch[0].clone().requires_grad_(True)
        solution = network(place)
        (slope,) = torch.autograd.grad(solution.sum(), place, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), place, create_graph=True)
        residual = bend / (4 * torch.pi**2) + torch.sin(2 * torch.pi * place)
        return residual.square().mean() + network(torch.tensor([[0.0], [1.0]])).square().mean()


CASES = [
    Case("RealNVP", "last layers 0", Flow, data.moons, likelihood_loss, batch_size=128),
    Case("VAE", "PyTorch's", VAE, data.unlabelled, evidence_loss, steps=400),
    Case("autoencoder", "PyTorch's", autoencoder, data.unlabelled, rebuilding_loss, steps=400),
    Case("DiT", "Xavier, time's network N(0, .02), modulation and head 0", DiT, data.images, denoising_loss),
    Case("Siren", "uniform, by the author's formula", siren, data.photograph, squared_loss, batch_size=512,
         learning_rate=5e-4, steps=300),
    Case("Fourier features", "frozen N(0, 9), else PyTorch's", partial(fourier_net, FourierFeatures), data.photograph,
         squared_loss, batch_size=512, steps=300),
    Case("Fourier features, learned", "N(0, 9), else PyTorch's", partial(fourier_net, LearnedFourierFeatures),
         data.photograph, squared_loss, batch_size=512, steps=300),
    Case("physics-informed", "Xavier", physics_net, data.interval, equation_loss, batch_size=64, steps=300),
]  # fmt: skip
