"""A tiny model with a tokenizer of bytes and a few merges."""

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from linnet.model import Model, ModelConfig
from linnet.text import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat and the hat, the bat 🦜 你好\n"] * 3, vocab_size=290)


@pytest.fixture(scope="session")
def plain_tokenizer() -> Tokenizer:
    """Build a tokenizer as MiniMax-M1's: the think tags are several tokens of plain text."""
    backend = tokenizers.Tokenizer(models.BPE())
    words = tokenizers.Regex(r" ?[\p{L}\p{N}]+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    split = pre_tokenizers.Split(words, behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<end_of_sentence>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["<think>\nthe cat\n</think>\n\nthe hat 🦜"] * 3, trainer)
    return Tokenizer(backend, eos_token="<end_of_sentence>")


@pytest.fixture
def model(tokenizer) -> Model:
    """Build a model that writes all sorts of tokens: its logits are not flat and not stuck."""
    config = ModelConfig(
        vocab_size=300,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_type_list=(0, 0, 1),
        rotary_dim=4,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = Model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5, generator=generator)
        model.embed_tokens.weight.mul_(5)
    model.tokenizer = tokenizer
    return model.eval()
