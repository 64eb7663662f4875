"""Models of images: classifiers, a segmenter, a detector, a spatial transformer. All see scikit-learn's digits."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo import data
from benchmarks.zoo.case import Batch, Case, classes_loss

CLASSES = 10


def pooled_head(width: int) -> list[nn.Module]:
    """The mean over all places, then the classes."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]


def plain_conv_net(width: int = 16, depth: int = 6) -> nn.Module:
    """3×3 convolutions and ReLU, no norm."""
    channels = [1, *[width] * depth]
    pairs = itertools.pairwise(channels)
    layers = [layer for i, o in pairs for layer in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, *pooled_head(width))


def conv_bn(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    """Convolution and batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def normed_conv_net(width: int = 24, depth: int = 4) -> nn.Module:
    """VGG-like, with batch norm."""
    channels = [1, *[width] * depth]
    layers = [layer for i, o in itertools.pairwise(channels) for layer in (conv_bn(i, o), nn.ReLU())]
    return nn.Sequential(*layers, *pooled_head(width))


class BasicBlock(nn.Module):
    """The basic block of a ResNet; the norm at its end starts at 0, so that the block is the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = conv_bn(width, width), conv_bn(width, width)
        nn.init.zeros_(self.second[1].weight)

    def forward(self, image: Tensor) -> Tensor:
        return torch.relu(image + self.second(torch.relu(self.first(image))))


def resnet(width: int = 16, depth: int = 4) -> nn.Module:
    """As torchvision's with zero_init_residual."""
    blocks = [BasicBlock(width) for _ in range(depth)]
    model = nn.Sequential(conv_bn(1, width), nn.ReLU(), *blocks, *pooled_head(width))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


class FixupBlock(nn.Module):
    """Without norms: a scale, four shifts, the last convolution 0 and the first smaller by the depth (Zhang et al.)."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shifts, self.scale = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(1))
        nn.init.normal_(self.first.weight, std=math.sqrt(2 / (9 * width)) / math.sqrt(depth))
        nn.init.zeros_(self.second.weight)

    def forward(self, image: Tensor) -> Tensor:
        inner = torch.relu(self.first(image + self.shifts[0]) + self.shifts[1])
        return torch.relu(image + self.second(inner + self.shifts[2]) * self.scale + self.shifts[3])


def fixup_net(width: int = 16, depth: int = 6) -> nn.Module:
    """A ResNet without norms; the head starts at 0."""
    blocks = [FixupBlock(width, depth) for _ in range(depth)]
    model = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), *blocks, *pooled_head(width))
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    return model


class UnnormedBlock(nn.Module):
    """A residual block without any norm, as PyTorch draws it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return image + self.second(torch.relu(self.first(image)))


def unnormed_resnet(width: int = 16, depth: int = 8) -> nn.Module:
    """As the trunk of EDSR and other networks for super-resolution."""
    blocks = [UnnormedBlock(width) for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), *blocks, nn.ReLU(), *pooled_head(width))


class InvertedResidual(nn.Module):
    """Of MobileNet-v2: wider, depthwise, narrower; the last one linear."""

    def __init__(self, width: int, expansion: int = 3) -> None:
        super().__init__()
        inner = width * expansion
        wider, depthwise = conv_bn(width, inner, 1), conv_bn(inner, inner, 3, groups=inner)
        self.layers = nn.Sequential(wider, nn.ReLU6(), depthwise, nn.ReLU6(), conv_bn(inner, width, 1))

    def forward(self, image: Tensor) -> Tensor:
        output: Tensor = image + self.layers(image)
        return output


def mobilenet(width: int = 16, depth: int = 3) -> nn.Module:
    """As torchvision's: He in fan_out mode, head N(0, 0.01)."""
    blocks = [InvertedResidual(width) for _ in range(depth)]
    model = nn.Sequential(conv_bn(1, width), nn.ReLU6(), *blocks, *pooled_head(width))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    nn.init.normal_(model[-1].weight, 0, 0.01)
    nn.init.zeros_(model[-1].bias)
    return model


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7, norm, two linear layers, and a LayerScale of 10⁻⁶."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.wider, self.narrower = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.layer_scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.depthwise(image).permute(0, 2, 3, 1))
        x = self.layer_scale * self.narrower(F.gelu(self.wider(x)))
        return image + x.permute(0, 3, 1, 2)


def convnext(width: int = 16, depth: int = 2) -> nn.Module:
    """All N(0, .02) cut at ±2, biases 0."""
    blocks = [ConvNeXtBlock(width) for _ in range(depth)]
    model = nn.Sequential(nn.Conv2d(1, width, 2, 2), *blocks, nn.GroupNorm(1, width), *pooled_head(width))
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return model


class EqualisedConv(nn.Conv2d):
    """Weights N(0, 1), scaled by He's constant whenever they are used (Karras et al. 2018)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)
        self.scale = math.sqrt(2 / (9 * inputs))

    def forward(self, image: Tensor) -> Tensor:
        return F.conv2d(image, self.weight * self.scale, self.bias, padding=1)


def equalised_net(width: int = 24, depth: int = 4) -> nn.Module:
    """Convolutions with an equalised learning rate, leaky ReLU."""
    pairs = itertools.pairwise([1, *[width] * depth])
    layers = [layer for i, o in pairs for layer in (EqualisedConv(i, o), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers, *pooled_head(width))


def weight_normed_net(width: int = 24, depth: int = 4) -> nn.Module:
    """Weight normalisation on every layer."""
    model = plain_conv_net(width, depth)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.utils.parametrizations.weight_norm(module)
    return model


def selu_net(width: int = 64, depth: int = 8) -> nn.Module:
    """Self-normalising: LeCun's normal, as SELU needs it, biases 0."""
    pairs = itertools.pairwise([64, *[width] * depth])
    layers = [layer for i, o in pairs for layer in (nn.Linear(i, o), nn.SELU())]
    model = nn.Sequential(*layers, nn.Linear(width, CLASSES))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    return model


def deep_mlp(width: int = 64, depth: int = 20, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """As PyTorch draws it, without norms."""
    pairs = itertools.pairwise([64, *[width] * depth])
    layers = [layer for i, o in pairs for layer in (nn.Linear(i, o), activation())]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def tanh_mlp(width: int = 64, depth: int = 8) -> nn.Module:
    """Glorot's own: tanh, Xavier, biases 0."""
    model = deep_mlp(width, depth, nn.Tanh)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return model


class Highway(nn.Module):
    """Layers whose gates start nearly closed: bias −2 (Srivastava et al. 2015)."""

    def __init__(self, width: int = 48, depth: int = 8) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, width), nn.Linear(width, CLASSES)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        for gate in self.gates:
            nn.init.constant_(gate.bias, -2.0)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.first(pixels)
        for layer, gate in zip(self.layers, self.gates, strict=True):
            opening = gate(x).sigmoid()
            x = opening * layer(x).relu() + (1 - opening) * x
        logits: Tensor = self.head(x)
        return logits


class GatedMLPBlock(nn.Module):
    """Of gMLP: the gate's matrix over positions starts near 0, its bias at 1 (Liu et al. 2021)."""

    def __init__(self, width: int, positions: int) -> None:
        super().__init__()
        self.norm, self.wider, self.narrower = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(2 * width, width),
        )
        self.gate_norm, self.gate = nn.LayerNorm(2 * width), nn.Linear(positions, positions)
        nn.init.uniform_(self.gate.weight, -1e-3 / positions, 1e-3 / positions)
        nn.init.ones_(self.gate.bias)

    def forward(self, x: Tensor) -> Tensor:
        signal, gate = F.gelu(self.wider(self.norm(x))).chunk(2, -1)
        gate = self.gate(self.gate_norm(gate).transpose(1, 2)).transpose(1, 2)
        output: Tensor = x + self.narrower(signal * gate)
        return output


class GatedMLP(nn.Module):
    """gMLP over the rows of an image."""

    def __init__(self, width: int = 24, depth: int = 3) -> None:
        super().__init__()
        self.rows, self.head = nn.Linear(8, width), nn.Linear(width, CLASSES)
        self.blocks = nn.Sequential(*(GatedMLPBlock(width, 8) for _ in range(depth)))

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.rows(rows)).mean(1))
        return logits


class RecurrentClassifier(nn.Module):
    """Reads the rows of an image; all as PyTorch draws it."""

    def __init__(self, kind: type[nn.RNNBase], width: int = 48, depth: int = 1) -> None:
        super().__init__()
        self.body, self.head = kind(8, width, depth, batch_first=True), nn.Linear(width, CLASSES)

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(rows)[0][:, -1])
        return logits


class UNet(nn.Module):
    """Down twice, up twice, with shortcuts; where is ink?"""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down1, self.down2 = self.double(1, width), self.double(width, 2 * width)
        self.middle = self.double(2 * width, 2 * width)
        self.up2, self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2), nn.ConvTranspose2d(width, width, 2, 2)
        self.merge2, self.merge1 = self.double(3 * width, width), self.double(2 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    @staticmethod
    def double(inputs: int, outputs: int) -> nn.Sequential:
        first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

    def forward(self, image: Tensor) -> Tensor:
        fine = self.down1(image)
        coarse = self.down2(F.max_pool2d(fine, 2))
        up = self.up2(self.middle(F.max_pool2d(coarse, 2)))
        up = self.up1(self.merge2(torch.cat([up, coarse], 1)))
        logits: Tensor = self.head(self.merge1(torch.cat([up, fine], 1)))
        return logits


def ink_loss(network: nn.Module, batch: Batch) -> Tensor:
    """Binary cross-entropy of every pixel."""
    image, ink = batch
    return F.binary_cross_entropy_with_logits(network(image), ink)


def detector(width: int = 16) -> nn.Module:
    """As RetinaNet's head: tower and head N(0, 0.01), and a prior of 1 % in the last bias."""
    body = [conv_bn(1, width), nn.ReLU(), nn.MaxPool2d(2), conv_bn(width, width), nn.ReLU(), nn.MaxPool2d(2)]
    tower = [layer for _ in range(2) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
    head = nn.Conv2d(width, CLASSES, 3, padding=1)
    for module in (*tower, head):
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    nn.init.constant_(head.bias, -math.log(99))
    return nn.Sequential(*body, *tower, head)


def focal_loss(network: nn.Module, batch: Batch) -> Tensor:
    """Of Lin et al. 2017, summed, for each digit there is."""
    image, centres = batch
    logits = network(image)
    right = torch.where(centres > 0, logits, -logits)
    weight = torch.where(centres > 0, 0.25, 0.75)
    return -(weight * (1 - right.sigmoid()) ** 2 * F.logsigmoid(right)).sum() / len(image)


class SpatialTransformer(nn.Module):
    """A network that turns the image first; how far starts at not at all (Jaderberg et al. 2015)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        look = [nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU()]
        self.look, self.turn = nn.Sequential(*look), nn.Linear(32, 6)
        nn.init.zeros_(self.turn.weight)
        self.turn.bias.data.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]))
        layers = [nn.Conv2d(1, width, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, width, 3), nn.ReLU()]
        self.classify = nn.Sequential(*layers, nn.Flatten(), nn.Linear(25 * width, CLASSES))

    def forward(self, image: Tensor) -> Tensor:
        turn = self.turn(self.look(image)).view(-1, 2, 3)
        grid = F.affine_grid(turn, list(image.shape), align_corners=False)
        logits: Tensor = self.classify(F.grid_sample(image, grid, align_corners=False))
        return logits


class TwoTowers(nn.Module):
    """As CLIP: two encoders, projections N(0, 1/width), a temperature of 1/.07."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        towers = [nn.Sequential(nn.Linear(32, width), nn.GELU(), nn.LayerNorm(width)) for _ in range(2)]
        self.upper, self.lower = towers
        self.projections = nn.ModuleList(nn.Linear(width, 24, bias=False) for _ in range(2))
        for projection in self.projections:
            nn.init.normal_(projection.weight, std=width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, upper: Tensor, lower: Tensor) -> Tensor:
        towers = zip((self.upper, self.lower), self.projections, (upper, lower), strict=True)
        first, second = (F.normalize(projection(tower(half)), dim=-1) for tower, projection, half in towers)
        return self.logit_scale.exp() * first @ second.T


def matching_loss(network: nn.Module, batch: Batch) -> Tensor:
    """Which lower half belongs to which upper half, and the other way round."""
    scores = network(*batch)
    pairs = torch.arange(len(scores))
    return (F.cross_entropy(scores, pairs) + F.cross_entropy(scores.T, pairs)) / 2


class LowRank(nn.Module):
    """A frozen linear layer and a trained detour beside it: down as PyTorch draws it, up 0 (Hu et al. 2021)."""

    def __init__(self, linear: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(x) + self.up(self.down(x))
        return output


def adapted() -> nn.Module:
    """A network trained on digits, frozen, with low-rank detours; upside-down digits are to be learned."""
    pixels, classes = data.rows()
    body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    optimizer = torch.optim.AdamW(body.parameters(), 3e-3)
    for start in range(0, 1400, 35):
        optimizer.zero_grad()
        F.cross_entropy(body(pixels[start : start + 35]), classes[start : start + 35]).backward()
        optimizer.step()
    body.zero_grad()
    return nn.Sequential(*(LowRank(layer) if isinstance(layer, nn.Linear) else layer for layer in body))


def upside_down_loss(network: nn.Module, batch: Batch) -> Tensor:
    pixels, classes = batch
    return classes_loss(network, (pixels.flip(1), classes))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    images: dict[str, Any] = {"num_channels": 1, "num_labels": CLASSES, "image_size": 8, "patch_size": 2}
    return ViTForImageClassification(ViTConfig(**sizes, **images))


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    sizes: dict[str, Any] = {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 16,
        "window_size": 4,
        "drop_path_rate": 0.0,
    }
    images: dict[str, Any] = {"num_channels": 1, "num_labels": CLASSES}
    return SwinForImageClassification(SwinConfig(**sizes, **images, depths=[2, 1], num_heads=[2, 4]))


on_images = partial(Case, data=data.images, loss=classes_loss, batch_size=16)
on_rows = partial(Case, data=data.rows, loss=classes_loss)
on_sequences = partial(Case, data=data.sequences, loss=classes_loss)

CASES = [
    on_images("ViT", "all N(0, .02) cut at ±2, class token and positions too", vit),
    on_images("Swin", "all N(0, .02), bias tables 0", swin, data=data.large_images, steps=100),
    on_images("conv net, plain", "PyTorch's", plain_conv_net),
    on_images("conv net, batch norm", "PyTorch's", normed_conv_net),
    on_images("ResNet, zero-γ", "He by fan_out, last norms 0", resnet),
    on_images("ResNet, Fixup", "last layers and head 0, first ones smaller, no norm", fixup_net),
    on_images("ResNet, no norm", "PyTorch's", unnormed_resnet),
    on_images("MobileNet", "He by fan_out, head N(0, .01)", mobilenet),
    on_images("ConvNeXt", "all N(0, .02) cut at ±2, LayerScale 10⁻⁶", convnext),
    on_images("equalised learning rate", "N(0, 1), scaled when used", equalised_net),
    on_images("weight norm", "PyTorch's", weight_normed_net),
    on_images("U-Net", "PyTorch's", UNet, data=data.noisy_images, loss=ink_loss, steps=100),
    on_images("detector", "tower and head N(0, .01), prior of 1 %", detector, data=data.scenes, loss=focal_loss,
              steps=300),
    on_images("spatial transformer", "last layer 0, its bias the identity", SpatialTransformer,
              data=data.turned_images, batch_size=32),
    on_rows("MLP 20 layers", "PyTorch's", deep_mlp),
    on_rows("MLP SELU", "LeCun's normal", selu_net),
    on_rows("MLP tanh", "Xavier", tanh_mlp),
    on_rows("Highway", "gates' biases −2, else PyTorch's", Highway),
    on_sequences("gMLP", "gates near 0, their biases 1", GatedMLP),
    on_sequences("LSTM", "PyTorch's", partial(RecurrentClassifier, nn.LSTM)),
    on_sequences("GRU, 2 layers", "PyTorch's", partial(RecurrentClassifier, nn.GRU, depth=2)),
    Case("two towers", "projections N(0, 1/width), temperature .07", TwoTowers, data.halves, matching_loss),
    on_rows("LoRA", "trained body frozen, up 0", adapted, loss=upside_down_loss, learning_rate=3e-3),
]  # fmt: skip
