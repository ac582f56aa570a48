"""ChatGLM2 and ChatGLM3, converted, give the logits of the original.

Compared once with the original model code too, on 2026-11-24, as read in the public repositories
Lionelpang/codegeex2-6b (ChatGLM2) and czk1997/chatglm3-copy (ChatGLM3), run under transformers 4.41.2. Largest
difference in fp32, over every configuration below but ``rope_ratio``, which that code does not have: the converted
model 0.0 without padding and 2.4e-6 with it, the reference of these tests 2.9e-6; logits of scale 3.6 to 4.9.
"""

from __future__ import annotations

import json

import pytest
import torch
from reference import chatglm2
from reference.checking import assert_equivalent, assert_inverts, converted, random_weights

ORIGINAL = {
    "model_type": "chatglm",
    "padded_vocab_size": 160,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_layers": 3,
    "num_attention_heads": 8,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "kv_channels": 8,
    "seq_length": 64,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "rmsnorm": True,
    "original_rope": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
}
"""The published configuration in every switch, and small in every size."""

CHANGES = {
    "as published": {},
    "one group": {"multi_query_group_num": 1},
    "four groups": {"multi_query_group_num": 4},
    "no bias": {"add_qkv_bias": False},
    "odd vocabulary": {"padded_vocab_size": 131},
    "rope_ratio": {"rope_ratio": 50},
    "wide heads": {"kv_channels": 24},
    "other epsilon": {"layernorm_epsilon": 1e-2},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_logits_equal_the_reference(tmp_path, change):
    original = ORIGINAL | change
    weights = random_weights(chatglm2.shapes(original))
    model = converted(tmp_path, original, weights)
    assert_equivalent(model, chatglm2.logits, original, weights)
    assert_inverts(model, original, weights)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_layout_of_files_gives_the_same_model(tmp_path, suffix, shards):
    weights = random_weights(chatglm2.shapes(ORIGINAL), dtype=torch.float16)
    buffer = {"transformer.rotary_pos_emb.inv_freq": torch.ones(2)}  # published checkpoints carry it; it is computed
    model = converted(tmp_path, ORIGINAL, weights | buffer, suffix=suffix, shards=shards)
    assert_inverts(model.half(), ORIGINAL, weights)

    native = tmp_path / "native"
    assert json.loads((native / "config.json").read_text())["dtype"] == "float16"
    names = ["model.safetensors"] if shards == 1 else [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    assert sorted(file.name for file in native.glob("*.safetensors")) == names
    assert (native / "model.safetensors.index.json").exists() is (shards > 1)
