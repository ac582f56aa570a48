"""InternLM2, converted, gives the logits of the original.

On 2026-11-24 the model's own code (GitHub NanSang2000/S1mpleAgent) ran under transformers 4.41.2 with the weights of
``CHANGES`` and of the test past the limit, 24 tokens, with and without cache and padding. Largest difference of a
logit: converted model 6.5e-6, our reference 6.6e-6. Past the limit with padding and a cache the reference is not
comparable: it numbers tokens from the first real one, the original from the first place.
"""

from __future__ import annotations

import pytest
import torch
from reference import internlm2
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
    "model_type": "internlm2",
    "architectures": ["InternLM2ForCausalLM"],
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
"""The published configuration in every switch, and small in every size."""

CHANGES = {
    "as published": {},
    "one group": {"num_key_value_heads": 1},
    "a group a head": {"num_key_value_heads": 8},
    "three heads a group": {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
    "bias": {"bias": True},
    "rope_theta": {"rope_theta": 10_000, "rope_scaling": None},
    "linear positions": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "odd vocabulary": {"vocab_size": 131},
    "odd feed-forward": {"intermediate_size": 107},
    "other epsilon": {"rms_norm_eps": 1e-2},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_logits_equal_the_reference(tmp_path, change):
    original = ORIGINAL | change
    weights = random_weights(internlm2.shapes(original))
    model = converted(tmp_path, original, weights, shards=3)
    assert_equivalent(model, internlm2.logits, original, weights)
    assert_inverts(model, original, weights)


@pytest.mark.parametrize("prefill", [None, 6, 12], ids=["one pass", "KV cache from inside", "KV cache from beyond"])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_dynamic_positions_stretch_past_the_limit_as_in_the_original(tmp_path, prefill, factor):
    """Keys keep the base that held when they were cached, on both sides: a cached run is not a run in one pass."""
    original = ORIGINAL | {
        "max_position_embeddings": 8,
        "rope_theta": 10_000,
        "rope_scaling": {"type": "dynamic", "factor": factor},
    }
    weights = random_weights(internlm2.shapes(original))
    ids = sample_ids(original["vocab_size"], tokens=24)
    whole = torch.ones_like(ids)
    reference = run_reference(internlm2.logits, original, weights, ids, whole, prefill)
    unstretched = run_reference(internlm2.logits, original | {"rope_scaling": None}, weights, ids, whole, prefill)
    assert (reference - unstretched).abs().max() > 0.01, "the rule makes no difference here: this test sees nothing"

    model = converted(tmp_path, original, weights)
    compare("past the limit", run_native(model, ids, whole, prefill), reference)
