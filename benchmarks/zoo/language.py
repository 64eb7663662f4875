"""Models of text: those of ``transformers`` as they are, tiny, and what people write by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo import data
from benchmarks.zoo.case import Batch, Case, classes_loss, next_word_loss

WIDTH = 64
TIME = data.LENGTH - 1


def causal_mask(length: int) -> Tensor:
    """Nobody sees what comes later."""
    return nn.Transformer.generate_square_subsequent_mask(length)


class TiedByModule(nn.Module):
    """As in nanoGPT: words and learned positions are added, the head is the table, everything N(0, 0.02)."""

    def __init__(self, width: int = WIDTH, depth: int = 2) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(data.WORDS, width), nn.Embedding(TIME, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, data.WORDS, bias=False)
        self.head.weight = self.words.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "linear2.weight")):  # those that write into the residual stream
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth))

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.positions.weight[: words.shape[1]]
        logits: Tensor = self.head(self.body(x, causal_mask(words.shape[1]), is_causal=True))
        return logits


class TiedByFunction(nn.Module):
    """The table is read a second time by ``F.linear``; table N(0, 1/width), the rest as PyTorch draws it."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(data.WORDS, width), nn.Embedding(TIME, width)
        for table in (self.words, self.positions):
            nn.init.normal_(table.weight, std=width**-0.5)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.positions.weight[: words.shape[1]]
        return F.linear(self.body(x, causal_mask(words.shape[1]), is_causal=True), self.words.weight)


class Tutorial(nn.Module):
    """PyTorch's tutorial on language models: tables and head uniform ±0.1, words × √width, sinusoids, norms last."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(data.WORDS, width), nn.Linear(width, data.WORDS)
        nn.init.uniform_(self.words.weight, -0.1, 0.1)
        nn.init.uniform_(self.head.weight, -0.1, 0.1)
        nn.init.zeros_(self.head.bias)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        angles = torch.arange(TIME)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
        self.register_buffer("sinusoids", torch.stack([angles.sin(), angles.cos()], 2).flatten(1))

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) * math.sqrt(self.words.embedding_dim) + self.sinusoids[: words.shape[1]]
        logits: Tensor = self.head(self.body(x, causal_mask(words.shape[1]), is_causal=True))
        return logits


class Untouched(nn.Module):
    """Everything as PyTorch draws it: tables N(0, 1), Xavier in attention, a head of its own."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(data.WORDS, width), nn.Embedding(TIME, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, data.WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.positions.weight[: words.shape[1]]
        logits: Tensor = self.head(self.body(x, causal_mask(words.shape[1]), is_causal=True))
        return logits


class ReZero(nn.Module):
    """Ten layers without norms, each behind a factor that starts at 0 (Bachlechner et al. 2020)."""

    def __init__(self, width: int = WIDTH, depth: int = 8) -> None:
        super().__init__()
        self.words = nn.Embedding(data.WORDS, width)
        self.mixers = nn.ModuleList(nn.Conv1d(width, width, 4, padding=3) for _ in range(depth))
        self.factors = nn.Parameter(torch.zeros(depth))
        self.head = nn.Linear(width, data.WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words).transpose(1, 2)
        for mixer, factor in zip(self.mixers, self.factors, strict=True):
            x = x + factor * mixer(x)[..., : words.shape[1]].relu()
        logits: Tensor = self.head(x.transpose(1, 2))
        return logits


class RecurrentLanguageModel(nn.Module):
    """As in PyTorch's word_language_model: table and head uniform ±0.1, tied, LSTM as PyTorch draws it."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(data.WORDS, width), nn.LSTM(width, width, 2, batch_first=True)
        self.head = nn.Linear(width, data.WORDS)
        nn.init.uniform_(self.words.weight, -0.1, 0.1)
        nn.init.zeros_(self.head.bias)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.words(words))[0])
        return logits


class WaveNet(nn.Module):
    """Dilated causal convolutions with tanh·sigmoid gates, residual and skip sums; as PyTorch draws it."""

    def __init__(self, width: int = WIDTH, depth: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(data.WORDS, width)
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**n, padding=2**n) for n in range(depth))
        self.onward = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(depth))
        self.skips = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(depth))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(width, width, 1), nn.ReLU(), nn.Conv1d(width, data.WORDS, 1))

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words).transpose(1, 2)
        skipped = torch.zeros_like(x)
        for gate, onward, skip in zip(self.gates, self.onward, self.skips, strict=True):
            signal, opening = gate(x)[..., : words.shape[1]].chunk(2, 1)
            gated = signal.tanh() * opening.sigmoid()
            x, skipped = x + onward(gated), skipped + skip(gated)
        logits: Tensor = self.head(skipped).transpose(1, 2)
        return logits


class Word2Vec(nn.Module):
    """Words uniform ±1/(2 width), contexts 0, as in the original C code."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words, self.contexts = nn.Embedding(data.WORDS, width), nn.Embedding(data.WORDS, width)
        nn.init.uniform_(self.words.weight, -0.5 / width, 0.5 / width)
        nn.init.zeros_(self.contexts.weight)

    def forward(self, centres: Tensor, contexts: Tensor) -> Tensor:
        scores: Tensor = torch.einsum("bd,bcd->bc", self.words(centres), self.contexts(contexts))
        return scores


def negative_sampling_loss(network: nn.Module, batch: Batch) -> Tensor:
    """The first context is a neighbour, the others are not."""
    scores = network(*batch)
    return F.softplus(torch.cat([-scores[:, :1], scores[:, 1:]], 1)).sum(1).mean()


SIZES: dict[str, Any] = {
    "vocab_size": data.WORDS + 1,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TIME + 1,
}
MARKS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes: dict[str, Any] = {"vocab_size": data.WORDS, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": TIME}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **MARKS))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(OPTConfig(**SIZES, **MARKS, ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH, dropout=0.0))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, **MARKS, intermediate_size=128, num_key_value_heads=2))


def gemma() -> nn.Module:
    from transformers import GemmaConfig, GemmaForCausalLM

    sizes: dict[str, Any] = {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
    return GemmaForCausalLM(GemmaConfig(**SIZES, **MARKS, **sizes))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = SIZES | {"num_hidden_layers": 2}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, **MARKS, intermediate_size=64, num_key_value_heads=2, num_local_experts=4)
    )


def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(vocab_size=data.WORDS, hidden_size=32, num_hidden_layers=2, state_size=4, use_cache=False, **MARKS)
    )


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SIZES, **NO_DROPOUT, intermediate_size=128))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: dict[str, Any] = {"vocab_size": data.WORDS, "d_model": WIDTH, "d_kv": 16, "d_ff": 128, "num_layers": 2}
    start: dict[str, Any] = {"decoder_start_token_id": 0}  # every config takes it, none declares it
    return T5ForConditionalGeneration(T5Config(**sizes, **start, num_heads=4, dropout_rate=0.0))


def translation_loss(network: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the second text, a word at a time, given the first."""
    words, labels = batch
    return network(input_ids=words, labels=labels).loss


def text_case(
    name: str,
    kind: str,
    build: Callable[[], nn.Module],
    source: Callable[[], Batch] = data.text,
    loss: Callable[[nn.Module, Batch], Tensor] = next_word_loss,
    **settings: Any,
) -> Case:
    """A model that reads eight lines a step; it predicts the next word unless another loss is given."""
    return Case(name, kind, build, source, loss, **{"steps": 150, "batch_size": 8, **settings})


CASES = [
    text_case("GPT-2", "all N(0, .02), residual writers smaller, tied", gpt2),
    text_case("OPT", "all N(0, .02), tied, learned positions", opt),
    text_case("Llama", "all N(0, .02), RMS norms", llama),
    text_case("Gemma", "all N(0, .02), tied, table × √width, norms around 0", gemma),
    text_case("Mixtral", "all N(0, .02), routed experts", mixtral),
    text_case("Mamba", "time steps and decay set", mamba, steps=100),
    text_case("BERT", "all N(0, .02), tied, three tables added", bert, data.masked_text, classes_loss),
    text_case("T5", "scales by fan, tied, no biases", t5, data.reversed_text, translation_loss, steps=100),
    text_case("LM tied by module", "all N(0, .02), residual writers smaller, tied", TiedByModule),
    text_case("LM tied by F.linear", "tables 1/√width, else PyTorch's", TiedByFunction),
    text_case("LM of the tutorial", "table and head uniform ±.1, else PyTorch's", Tutorial),
    text_case("LM untouched", "PyTorch's", Untouched),
    text_case("ReZero", "factors 0, else PyTorch's", ReZero),
    text_case("LSTM LM", "table uniform ±.1, tied, else PyTorch's", RecurrentLanguageModel, learning_rate=3e-3),
    text_case("WaveNet", "PyTorch's", WaveNet),
    text_case("word2vec", "words uniform ±1/(2 width), contexts 0", Word2Vec, data.skip_grams, negative_sampling_loss,
              learning_rate=5e-3, batch_size=128, steps=200),
]  # fmt: skip
