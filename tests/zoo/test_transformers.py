"""Models of the transformers library, tiny ones with random weights: conversion is exact on each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

import fahooks
from tests.zoo.exactness import check
from tests.zoo.shrinking import fill

SIZE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS: dict[str, Any] = {
    "vocab_size": 30,
    "use_cache": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "decoder_start_token_id": 0,
}


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}


def words(name: str = "input_ids") -> dict[str, Tensor]:
    return {name: torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(len(name)))}


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "ViT": (lambda: t.ViTForImageClassification(t.ViTConfig(**SIZE, image_size=32, patch_size=8)), pixels()),
    "Swin": (
        lambda: t.SwinForImageClassification(
            t.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4)
        ),
        pixels(),
    ),
    "ConvNeXt": (
        lambda: t.ConvNextForImageClassification(t.ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 2, 1])),
        pixels(),
    ),
    "BERT": (lambda: t.BertForSequenceClassification(t.BertConfig(**SIZE, vocab_size=30)), words()),
    "GPT-2": (lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **WORDS)), words()),
    "Llama": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZE, **WORDS, num_key_value_heads=1)), words()),
    "T5": (
        lambda: t.T5ForConditionalGeneration(t.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **WORDS)),
        words() | words("decoder_input_ids"),
    ),
}
"""What makes a model, and what it is called with."""


class Called(nn.Module):
    """A model that is called with named inputs."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *values: Tensor) -> Tensor:
        """The logits."""
        return self.model(**dict(zip(self.names, values, strict=True))).logits


@pytest.mark.parametrize("name", MODELS)
def test_conversion_is_exact(name: str):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = Called(fill(make()), list(inputs))
    assert check(model, list(inputs.values())) > 8


def test_every_weight_of_gpt2_is_converted():
    make, inputs = MODELS["GPT-2"]
    report = fahooks.convert(make(), "usf_sn")
    assert {name.split(".")[-2] for name in report.converted if name.endswith("weight")} == {"c_attn", "c_proj", "c_fc"}
    assert "lm_head" in report.converted
