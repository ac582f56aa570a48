"""Qwen v1, converted, gives the logits of the original up to ``seq_length``, and is refused past it.

Compared once with the original model code too, on 2026-11-24, as read in the public repository zhangningboo/Qwen-7B,
run under transformers 4.41.2. Largest difference in fp32, over every configuration below: the converted model 0.0
with and without padding and cache, the reference of these tests 3.8e-6, and 2.3e-6 past ``seq_length``, in one
pass; logits of scale 3.5 to 4.4.
"""

from __future__ import annotations

import pytest
import torch
from reference import qwen
from reference.checking import (
    TOLERANCE,
    assert_equivalent,
    assert_inverts,
    converted,
    random_weights,
    run_native,
    run_reference,
    sample_ids,
)

from helpers.errors import HelpersError
from helpers.native import check_length

ORIGINAL = {
    "model_type": "qwen",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "seq_length": 64,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "no_bias": True,
    "scale_attn_weights": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "tie_word_embeddings": False,
}
"""The published configuration in every switch, and small in every size."""

CHANGES = {
    "as published": {},
    "odd vocabulary": {"vocab_size": 131},
    "narrow heads": {"num_attention_heads": 8, "kv_channels": 8},
    "one wide head": {"num_attention_heads": 1, "kv_channels": 64},
    "other rotary base": {"rotary_emb_base": 500},
    "as long as seq_length": {"seq_length": 12},
    "neither NTK nor log-n": {"use_dynamic_ntk": False, "use_logn_attn": False},
    "other epsilon": {"layer_norm_epsilon": 1e-2},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_logits_equal_the_reference(tmp_path, change):
    original = ORIGINAL | change
    weights = random_weights(qwen.shapes(original))
    model = converted(tmp_path, original, weights)
    assert_equivalent(model, qwen.logits, original, weights)
    assert_inverts(model, original, weights)


@pytest.mark.parametrize("switch", ["use_dynamic_ntk", "use_logn_attn"])
def test_past_seq_length_is_refused_because_it_would_differ(tmp_path, switch):
    off = {"seq_length": 8, "use_dynamic_ntk": False, "use_logn_attn": False}
    original = ORIGINAL | off | {switch: True}
    weights = random_weights(qwen.shapes(original))
    model = converted(tmp_path, original, weights)
    check_length(model, 8)
    with pytest.raises(HelpersError, match=r"9 tokens are too many: .* ends at 8 tokens"):
        check_length(model, 9)

    ids = sample_ids(original["vocab_size"], tokens=9)
    mask = torch.ones_like(ids)
    difference = run_native(model, ids, mask) - run_reference(qwen.logits, original, weights, ids, mask)
    assert difference[:, -1].abs().max() > 100 * TOLERANCE
