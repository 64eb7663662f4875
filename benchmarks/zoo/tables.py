"""Models of rows of numbers, of series, of graphs, of who likes what, and of what to do next."""

from __future__ import annotations

import itertools
import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo import data
from benchmarks.zoo.case import Batch, Case, classes_loss, squared_loss


def mlp(*widths: int) -> nn.Sequential:
    """ReLU between the layers, as PyTorch draws them."""
    layers = [layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class LinearRegression(nn.Module):
    """One linear layer: nothing but a head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(10, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(x)
        return output


class DeepRanking(nn.Module):
    """As DLRM: tables uniform ±√(1/rows), layers N(0, √(2/(in + out))), all pairs multiplied (Naumov et al. 2019)."""

    def __init__(self, width: int = 8, tables: int = 15, classes: int = 17) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(classes, width) for _ in range(tables))
        for table in self.tables:
            nn.init.uniform_(table.weight, -math.sqrt(1 / classes), math.sqrt(1 / classes))
        self.bottom = mlp(15, 32, width)
        self.top = mlp(width + (tables + 1) * tables // 2, 32, 2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=math.sqrt(2 / (module.in_features + module.out_features)))
                nn.init.normal_(module.bias, std=math.sqrt(1 / module.out_features))

    def forward(self, numbers: Tensor, classes: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        rows = [table(column) for table, column in zip(self.tables, classes.unbind(1), strict=True)]
        vectors = torch.stack([dense, *rows], 1)
        first, second = torch.triu_indices(len(rows) + 1, len(rows) + 1, 1)
        products = (vectors @ vectors.transpose(1, 2))[:, first, second]
        logits: Tensor = self.top(torch.cat([dense, products], 1))
        return logits


class Recommender(nn.Module):
    """Matrix factorisation: factors N(0, .1), biases of users and items 0."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(500, width), nn.Embedding(64, width)
        self.user_biases, self.item_biases = nn.Embedding(500, 1), nn.Embedding(64, 1)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.1)
        for table in (self.user_biases, self.item_biases):
            nn.init.zeros_(table.weight)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        product = (self.users(users) * self.items(items)).sum(1)
        return product + self.user_biases(users).squeeze(1) + self.item_biases(items).squeeze(1)


class FeatureTokenizer(nn.Module):
    """A vector for each number, as FT-Transformer has it: uniform ±1/√width (Gorishniy et al. 2021)."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(features, width)), nn.Parameter(torch.empty(features, width))
        self.summary = nn.Parameter(torch.empty(width))
        for parameter in (self.weight, self.bias, self.summary):
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[..., None] * self.weight + self.bias
        return torch.cat([self.summary.expand(len(x), 1, -1), tokens], 1)


class FeatureTransformer(nn.Module):
    """FT-Transformer on 30 measurements."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.tokenizer = FeatureTokenizer(30, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.tokenizer(x))[:, 0])
        return logits


class ResidualMLP(nn.Module):
    """Of TiDE: two layers and a linear way around them (Das et al. 2023)."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.layers, self.around = mlp(inputs, width, outputs), nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(x) + self.around(x)
        return output


class TiDE(nn.Module):
    """Residual MLPs in a row, and the past's own linear way to the future. Nothing is normalised."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.body = nn.Sequential(*(ResidualMLP(i, width, o) for i, o in ((48, width), (width, width), (width, 12))))
        self.around = nn.Linear(48, 12)

    def forward(self, past: Tensor) -> Tensor:
        future: Tensor = self.body(past) + self.around(past)
        return future


class NHiTS(nn.Module):
    """Blocks that each forecast at a coarser scale and take away what they explain (Challu et al. 2023)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.scales = (4, 2, 1)
        self.blocks = nn.ModuleList(mlp(48 // scale, width, width, 48 + 12 // scale) for scale in self.scales)

    def forward(self, past: Tensor) -> Tensor:
        forecast = past[:, -1:].expand(-1, 12)
        for scale, block in zip(self.scales, self.blocks, strict=True):
            explained, coarse = block(F.max_pool1d(past[:, None], scale).squeeze(1)).split([48, 12 // scale], 1)
            past = past - explained
            forecast = forecast + F.interpolate(coarse[:, None], 12, mode="linear").squeeze(1)
        return forecast


class DLinear(nn.Module):
    """Two linear layers whose weights all start at 1/48: a mean of the past (Zeng et al. 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.season, self.trend = nn.Linear(48, 12), nn.Linear(48, 12)
        for layer in (self.season, self.trend):
            nn.init.constant_(layer.weight, 1 / 48)

    def forward(self, past: Tensor) -> Tensor:
        trend = F.avg_pool1d(F.pad(past[:, None], (6, 6), mode="replicate"), 13, 1).squeeze(1)
        future: Tensor = self.season(past - trend) + self.trend(trend)
        return future


class GCN(nn.Module):
    """Kipf & Welling 2017: Glorot's weights, biases 0."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, width), nn.Linear(width, 10)
        for layer in (self.first, self.second):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        pixels, _, adjacency = data.graph()
        self.register_buffer("pixels", pixels)
        self.register_buffer("adjacency", adjacency)

    def forward(self, nodes: Tensor) -> Tensor:
        hidden = (self.adjacency @ self.first(self.pixels)).relu()
        return (self.adjacency @ self.second(hidden))[nodes]


class ActorCritic(nn.Module):
    """As in CleanRL: all orthogonal with √2, the policy's last layer .01, the value's 1 (Huang et al. 2022)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.actor, self.critic = (
            nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs))
            for outputs in (4, 1)
        )
        for network, last in ((self.actor, 0.01), (self.critic, 1.0)):
            for n, gain in ((0, math.sqrt(2)), (2, math.sqrt(2)), (4, last)):
                nn.init.orthogonal_(network[n].weight, gain)
                nn.init.zeros_(network[n].bias)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(state), self.critic(state).squeeze(1)


def imitation_loss(network: nn.Module, batch: Batch) -> Tensor:
    """What actions to take, what states are worth, and a bonus for undecidedness."""
    states, actions, values = batch
    logits, worth = network(states)
    undecidedness = torch.distributions.Categorical(logits=logits).entropy().mean()
    return F.cross_entropy(logits, actions) + 0.5 * F.mse_loss(worth, values) - 0.01 * undecidedness


class ContinuousActor(nn.Module):
    """As in DDPG: hidden layers uniform ±1/√fan_in, the last ±.003, then tanh (Lillicrap et al. 2016)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = mlp(8, width, width, 2)
        for n, bound in ((0, 8**-0.5), (2, width**-0.5), (4, 3e-3)):
            nn.init.uniform_(self.layers[n].weight, -bound, bound)
            nn.init.uniform_(self.layers[n].bias, -bound, bound)

    def forward(self, state: Tensor) -> Tensor:
        return self.layers(state).tanh()


def steering_loss(network: nn.Module, batch: Batch) -> Tensor:
    """How far an action is from the one that leads home."""
    states, _, values = batch
    wanted = torch.stack([torch.sin(states[:, 0]), values.clamp(-1, 1)], 1)
    return F.mse_loss(network(states), wanted)


class RoutedExperts(nn.Module):
    """Four experts, of which the best counts, by a router N(0, .1/√width) (Fedus et al. 2022)."""

    def __init__(self, width: int = 48, experts: int = 4) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, width), nn.Linear(width, 10)
        self.router = nn.Linear(width, experts, bias=False)
        nn.init.trunc_normal_(self.router.weight, std=math.sqrt(0.1 / width))
        self.experts = nn.ModuleList(mlp(width, 2 * width, width) for _ in range(experts))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.first(pixels).relu()
        shares = self.router(x).softmax(1)
        chosen = F.one_hot(shares.argmax(1), len(self.experts)) * shares
        x = x + (torch.stack([expert(x) for expert in self.experts], 2) * chosen[:, None]).sum(2)
        logits: Tensor = self.head(x)
        return logits


CASES = [
    Case("linear regression", "PyTorch's", LinearRegression, data.patients, squared_loss, learning_rate=1e-2),
    Case("MLP regressor", "PyTorch's", partial(mlp, 10, 64, 64, 1), data.patients, squared_loss, steps=150),
    Case("MLP classifier", "PyTorch's", partial(mlp, 30, 64, 64, 2), data.tumours, classes_loss, steps=60),
    Case("DLRM", "tables uniform ±√(1/rows), layers by fans", DeepRanking, data.binned_tumours, classes_loss, steps=80),
    Case("matrix factorisation", "factors N(0, .1), biases 0", Recommender, data.ratings, squared_loss, batch_size=256,
         learning_rate=1e-2),
    Case("FT-Transformer", "tokens uniform ±1/√width, else PyTorch's", FeatureTransformer, data.tumours, classes_loss,
         steps=100),
    Case("TiDE", "PyTorch's", TiDE, data.series, squared_loss, steps=300),
    Case("N-HiTS", "PyTorch's", NHiTS, data.series, squared_loss, steps=300),
    Case("DLinear", "all weights 1/48", DLinear, data.series, squared_loss, steps=300),
    Case("GCN", "Glorot's", GCN, data.nodes, classes_loss, learning_rate=1e-2),
    Case("actor and critic", "orthogonal √2, policy's last .01", ActorCritic, data.states, imitation_loss, steps=400),
    Case("DDPG actor", "uniform ±1/√fan_in, last ±.003", ContinuousActor, data.states, steering_loss, steps=400),
    Case("routed experts", "router small, else PyTorch's", RoutedExperts, data.rows, classes_loss),
]  # fmt: skip
