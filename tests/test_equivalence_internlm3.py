"""InternLM3, converted, gives the logits of our reference; Llama cannot express every config of it, and says so."""

from __future__ import annotations

import pytest
import torch
from reference import internlm3
from reference.checking import (
    assert_equivalent,
    assert_inverts,
    compare,
    converted,
    random_weights,
    run_native,
    run_reference,
    sample_ids,
    write_original,
)

from helpers import native
from helpers.errors import HelpersError

ORIGINAL = {
    "architectures": ["InternLM3ForCausalLM"],
    "attention_dropout": 0.0,
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 112,
    "max_position_embeddings": 64,
    "model_type": "internlm3",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "qkv_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
    "rope_theta": 50_000_000,
    "tie_word_embeddings": False,
    "vocab_size": 160,
}
"""The published configuration in every switch, and small in every size."""

CHANGES = {
    "as published": {},
    "biases everywhere": {"bias": True, "qkv_bias": True},
    "heads wider together than the model": {"head_dim": 24},
    "narrow heads, one key-value head": {"head_dim": 8, "num_key_value_heads": 1},
    "three heads a group": {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8},
    "no scaling": {"rope_scaling": None, "rope_theta": 10_000},
    "odd vocabulary and feed-forward": {"vocab_size": 131, "intermediate_size": 107},
    "other epsilon": {"rms_norm_eps": 1e-2},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_logits_equal_the_reference(tmp_path, change):
    original = ORIGINAL | change
    weights = random_weights(internlm3.shapes(original))
    model = converted(tmp_path, original, weights, shards=3)
    assert_equivalent(model, internlm3.logits, original, weights)
    assert_inverts(model, original, weights)


@pytest.mark.parametrize("prefill", [None, 6, 12], ids=["one pass", "KV cache from inside", "KV cache from beyond"])
def test_dynamic_positions_stretch_past_the_limit(tmp_path, prefill):
    original = ORIGINAL | {"max_position_embeddings": 8, "rope_theta": 10_000}
    weights = random_weights(internlm3.shapes(original))
    ids = sample_ids(original["vocab_size"], tokens=24)
    whole = torch.ones_like(ids)
    reference = run_reference(internlm3.logits, original, weights, ids, whole, prefill)
    unstretched = run_reference(internlm3.logits, original | {"rope_scaling": None}, weights, ids, whole, prefill)
    assert (reference - unstretched).abs().max() > 0.01, "the rule makes no difference here: this test sees nothing"
    compare("past the limit", run_native(converted(tmp_path, original, weights), ids, whole, prefill), reference)


@pytest.mark.parametrize("switch", ["bias", "qkv_bias"])
def test_biases_in_some_projections_only_are_refused(tmp_path, switch):
    original = ORIGINAL | {switch: True}
    folder = write_original(tmp_path / "original", original, random_weights(internlm3.shapes(original)))
    with pytest.raises(HelpersError, match=r"config\.json says qkv_bias="):
        native.convert(folder, tmp_path / "native")
