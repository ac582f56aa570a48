"""Atom, Llama2-Chinese and other Llama checkpoints, converted, give the logits of the original.

The publishers' config.json (GitHub HuengchI/Atom-7B, read on 2026-11-24) brings no code and names LlamaForCausalLM of
transformers 4.31. Run on that day under transformers 4.41.2 with the weights of ``CHANGES``, 24 tokens, with and
without cache and padding, that class differs by 0 from the converted model and by 7.1e-6 from our reference.
"""

from __future__ import annotations

import json

import pytest
import torch
from reference import llama
from reference.checking import (
    assert_equivalent,
    assert_inverts,
    compare,
    converted,
    random_weights,
    run_native,
    run_reference,
    sample_ids,
)

ORIGINAL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
"""The published configuration of Atom-7B in every switch, and small in every size."""

CHANGES = {
    "as published": {},
    "one key-value head": {"num_key_value_heads": 1},
    "four key-value heads": {"num_key_value_heads": 4},
    "five heads": {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5},
    "rope_theta": {"rope_theta": 500_000.0},
    "linear positions": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "bias": {"attention_bias": True},
    "odd vocabulary": {"vocab_size": 131},
    "odd feed-forward": {"intermediate_size": 107},
    "other epsilon": {"rms_norm_eps": 1e-2},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_logits_equal_the_reference(tmp_path, change):
    original = ORIGINAL | change
    weights = random_weights(llama.shapes(original))
    model = converted(tmp_path, original, weights, shards=3)
    assert_equivalent(model, llama.logits, original, weights)
    assert_inverts(model, original, weights)


@pytest.mark.parametrize("stored", [True, False], ids=["head stored twice", "head not stored"])
def test_a_tied_head_is_the_embedding(tmp_path, stored):
    original = ORIGINAL | {"tie_word_embeddings": True}
    weights = random_weights(llama.shapes(original))
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    model = converted(tmp_path, original, weights | head if stored else weights)
    assert_equivalent(model, llama.logits, original, weights)
    assert_inverts(model, original, weights | head)


def test_a_config_of_the_first_llama(tmp_path):
    """It has no key-value heads, no rotary base, another name for the context, and buffers among its weights."""
    gone = ("num_key_value_heads", "max_position_embeddings", "rope_scaling", "tie_word_embeddings", "pad_token_id")
    original = {key: value for key, value in ORIGINAL.items() if key not in gone} | {"max_sequence_length": 64}
    original |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    weights = random_weights(llama.shapes(original))
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((4,), 7.0) for i in range(3)}
    model = converted(tmp_path, original, weights | buffers, shards=2, suffix="bin")
    assert_equivalent(model, llama.logits, original | {"max_position_embeddings": 64}, weights)
    assert_inverts(model, original, weights)


@pytest.mark.parametrize("prefill", [None, 6, 12], ids=["one pass", "KV cache from inside", "KV cache from beyond"])
def test_dynamic_positions_stretch_past_the_limit(tmp_path, prefill):
    original = ORIGINAL | {"max_position_embeddings": 8, "rope_scaling": {"type": "dynamic", "factor": 3.0}}
    weights = random_weights(llama.shapes(original))
    model = converted(tmp_path, original, weights)
    ids = sample_ids(original["vocab_size"], tokens=24)
    reference = run_reference(llama.logits, original, weights, ids, torch.ones_like(ids), prefill)
    compare("past the limit", run_native(model, ids, torch.ones_like(ids), prefill), reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_values_do_not_change(tmp_path, dtype):
    weights = random_weights(llama.shapes(ORIGINAL), dtype=dtype)
    model = converted(tmp_path, ORIGINAL, weights, suffix="bin")
    assert json.loads((tmp_path / "native" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert_inverts(model.to(dtype), ORIGINAL, weights)
