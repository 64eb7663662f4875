"""Eleven architectures from ``transformers``, tiny and with random weights: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.utils import logging

logging.set_verbosity_error()  # advice on kernels that are not installed

WORDS, WIDTH = 60, 32
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
LABELS: dict[str, Any] = {"num_labels": 10}  # every config takes it, none declares it
MARKS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGES: dict[str, Any] = {"num_channels": 1, **LABELS}


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=16, **LABELS))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=16, **MARKS))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def t5() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": WORDS, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    start: dict[str, Any] = {"decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes, num_heads=4, **start))


def vit() -> nn.Module:
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    return ViTForImageClassification(ViTConfig(**sizes, **IMAGES, image_size=32, patch_size=8))


def convnext() -> nn.Module:
    sizes: dict[str, Any] = {"patch_size": 2, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    return ConvNextForImageClassification(ConvNextConfig(**sizes, **IMAGES))


def resnet() -> nn.Module:
    return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], **IMAGES))


def swin() -> nn.Module:
    sizes: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "window_size": 4, "drop_path_rate": 0.0}
    return SwinForImageClassification(SwinConfig(**sizes, **IMAGES, depths=[2, 1], num_heads=[2, 4]))


def whisper() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": WORDS, "d_model": WIDTH, "num_mel_bins": 8, "max_source_positions": 8}
    layers = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in LAYERS.items()}
    config = WhisperConfig(**sizes, **layers, **MARKS, max_target_positions=16, decoder_start_token_id=1)
    return WhisperForConditionalGeneration(config)


LAYERS = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


def mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=2, state_size=4))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4))


MODELS: dict[str, Callable[[], nn.Module]] = {
    build.__name__: build for build in (bert, gpt2, llama, t5, vit, convnext, resnet, swin, whisper, mamba, mixtral)
}


def batch_for(model: nn.Module) -> dict[str, Tensor]:
    """What the model's forward pass takes, labels included; the same every time."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, WORDS, (4, 8), generator=generator)
    classes = torch.randint(10, (4,), generator=generator)
    main_input = model.main_input_name
    if main_input == "pixel_values":
        return {"pixel_values": torch.randn(4, 1, 32, 32, generator=generator), "labels": classes}
    if main_input == "input_features":
        return {"input_features": torch.randn(4, 8, 16, generator=generator), "labels": words}
    return {"input_ids": words, "labels": classes if isinstance(model, BertForSequenceClassification) else words}
