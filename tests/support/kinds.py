"""Networks of many kinds with the initial weights their users give them; each maps 64 pixels to 10 logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tests.support.models import CLASSES, RowLSTM, RowTransformer, conv_net, mlp

Build = Callable[[], nn.Module]


def with_weights(build: Build, draw: Callable[[Tensor], object], zero_biases: bool = True) -> nn.Module:
    """What a user's loop over ``modules()`` does: all weight matrices, and mostly the biases too."""
    model = build()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            draw(module.weight)
            if zero_biases and module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def without_biases(width: int = 128) -> nn.Sequential:
    sizes = [64, width, width, CLASSES]
    layers = [nn.Linear(*sizes[i : i + 2], bias=False) for i in range(3)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


class Residual(nn.Module):
    """The basic block of a ResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, image: Tensor) -> Tensor:
        return torch.relu(image + self.second(self.first(image)))


def resnet() -> nn.Module:
    """As torchvision's with ``zero_init_residual``: He in fan_out mode, the last norm of each branch 0."""
    stem = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)]
    model = nn.Sequential(*stem, Residual(16), Residual(16), *head)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, Residual):
            norm = module.second[1]
            assert isinstance(norm, nn.BatchNorm2d)
            nn.init.zeros_(norm.weight)
    return model


def dcgan_style() -> nn.Module:
    """The DCGAN recipe: convolutions N(0, 0.02), norm weights N(1, 0.02)."""
    model = with_weights(conv_net, partial(nn.init.normal_, std=0.02), zero_biases=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)
    return model


def lstm_with_open_forget_gates() -> nn.Module:
    """The usual loop: Xavier, orthogonal, zero biases but 1 for the forget gate."""
    model = RowLSTM(16, 2)
    for name, parameter in model.lstm.named_parameters():
        if "weight_ih" in name:
            nn.init.xavier_uniform_(parameter)
        elif "weight_hh" in name:
            nn.init.orthogonal_(parameter)
        else:
            nn.init.zeros_(parameter)
            parameter.data[16:32] = 1.0
    return model


class SequenceToSequence(nn.Module):
    """``nn.Transformer``, which redraws all its matrices by Xavier's rule; classes from ten learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(8, 16)
        self.queries = nn.Embedding(CLASSES, 16)
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        queries = self.queries.weight.expand(len(pixels), -1, -1)
        logits: Tensor = self.head(self.transformer(self.rows(pixels.unflatten(1, (8, 8))), queries)).squeeze(-1)
        return logits


class VisionTransformer(nn.Module):
    """As torchvision's: class token 0, positions N(0, 0.02), biases of the blocks' MLPs N(0, 1e-6)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 17, width).normal_(std=0.02))
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)
        self.reset()

    def reset(self) -> None:
        nn.init.trunc_normal_(self.patches.weight, std=math.sqrt(1 / 4))
        nn.init.zeros_(self.patches.bias)
        for layer in self.encoder.layers:
            for linear in (layer.linear1, layer.linear2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patches(pixels.view(-1, 1, 8, 8)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(pixels), -1, -1), patches], 1)
        logits: Tensor = self.head(self.encoder(tokens + self.positions)[:, 0])
        return logits


class LanguageModel(nn.Module):
    """Reads the brightness of the pixels as words; the output layer is the lookup table, and 10 words are classes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(20, width)
        nn.init.normal_(self.words.weight, std=0.02)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 20)
        self.head.weight = self.words.weight

    def forward(self, pixels: Tensor) -> Tensor:
        words = ((pixels[:, ::4] + 1) * 6).clamp(0, 19).long()
        logits: Tensor = self.head(self.lstm(self.words(words))[0][:, -1])[:, :CLASSES]
        return logits


def detector_style() -> nn.Module:
    """A head that starts at a prior of 1 %, and one whose bias is a grid under zero weights, as offsets have."""
    head = nn.Linear(32, CLASSES)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.constant_(head.bias, -math.log(99))
    offsets = nn.Linear(32, 32)
    nn.init.zeros_(offsets.weight)
    offsets.bias.data.copy_(torch.linspace(-1, 1, 32))
    model = with_weights(partial(mlp, 32, 2), nn.init.kaiming_uniform_)
    return nn.Sequential(*list(model.children())[:-1], offsets, head)


def group_norm_net() -> nn.Module:
    first = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.SiLU()]
    second = [nn.Conv2d(8, 8, 3, groups=4), nn.GroupNorm(2, 8), nn.SiLU()]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(128, CLASSES))


def rms_norm_net() -> nn.Module:
    """No bias anywhere, weights N(0, 0.02): only the norms can tell."""
    layers = [nn.Linear(64, 32, bias=False), nn.RMSNorm(32), nn.SiLU(), nn.Linear(32, 32, bias=False), nn.RMSNorm(32)]
    net = partial(nn.Sequential, *layers, nn.Linear(32, CLASSES, bias=False))
    return with_weights(net, partial(nn.init.normal_, std=0.02))


def prelu_net() -> nn.Module:
    layers = [nn.Linear(64, 32, bias=False), nn.PReLU(32), nn.Linear(32, CLASSES, bias=False)]
    return with_weights(partial(nn.Sequential, *layers), nn.init.orthogonal_)


def normed_weights() -> nn.Module:
    """Weight normalisation: the weights are not looked at, the biases are."""
    model = with_weights(partial(mlp, 32, 2), nn.init.kaiming_normal_)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.utils.parametrizations.weight_norm(module)
    return model


def decoder() -> nn.Module:
    layers = [nn.Linear(64, 32), nn.ReLU(), nn.Unflatten(1, (8, 2, 2)), nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, CLASSES))


KINDS: dict[str, Build] = {
    "mlp": mlp,
    "mlp without biases": without_biases,
    "xavier": partial(with_weights, mlp, nn.init.xavier_uniform_),
    "kaiming normal": partial(with_weights, mlp, nn.init.kaiming_normal_),
    "kaiming uniform": partial(with_weights, mlp, partial(nn.init.kaiming_uniform_, nonlinearity="relu")),
    "normal 0.02": partial(with_weights, mlp, partial(nn.init.normal_, std=0.02)),
    "truncated": partial(with_weights, mlp, partial(nn.init.trunc_normal_, std=0.02)),
    "own weights, torch's biases": partial(with_weights, partial(mlp, 512), nn.init.xavier_uniform_, zero_biases=False),
    "batch norm": conv_net,
    "resnet": resnet,
    "dcgan": dcgan_style,
    "lstm": partial(RowLSTM, 32),
    "open forget gates": lstm_with_open_forget_gates,
    "transformer encoder": RowTransformer,
    "nn.Transformer": SequenceToSequence,
    "vision transformer": VisionTransformer,
    "tied head": LanguageModel,
    "priors": detector_style,
    "group norm": group_norm_net,
    "rms norm": rms_norm_net,
    "prelu": prelu_net,
    "weight norm": normed_weights,
    "decoder": decoder,
}
"""Every kind shows it is trained after a single step of AdamW with a learning rate of 1e-3."""

UNDECIDED: dict[str, Build] = {
    "orthogonal, no biases": partial(with_weights, without_biases, nn.init.orthogonal_),
    "normal, no biases": partial(with_weights, without_biases, partial(nn.init.normal_, std=0.05)),
    "xavier, no biases": partial(with_weights, without_biases, nn.init.xavier_uniform_),
    "torch's biases, few": partial(with_weights, mlp, nn.init.kaiming_normal_, zero_biases=False),
}
"""Fresh these give no sign either; but after one step the weights still look like a draw."""
