"""Baichuan-7B and Baichuan2-7B, converted, give the logits of the original.

On 2026-11-24 the models' own code (GitHub baichuan-inc/Baichuan-7B and pandong2011/Baichuan2 at ad4d81e, ``models/``)
ran under transformers 4.41.2 with the weights of ``CHANGES``, 24 tokens, with and without cache and padding. Largest
difference of a logit: converted model 3.4e-6 (Baichuan 1) and 0 (Baichuan 2), our reference 4.6e-6.
"""

from __future__ import annotations

import pytest
import torch
from reference import baichuan
from reference.checking import assert_equivalent, assert_inverts, compare, converted, random_weights, write_original

from helpers import native
from helpers.errors import HelpersError

ORIGINAL = {
    "model_type": "baichuan",
    "architectures": ["BaiChuanForCausalLM"],
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""The published configuration of Baichuan-7B in every switch, and small in every size."""

CHANGES = {
    "as published": {},
    "odd vocabulary": {"vocab_size": 131},
    "five heads": {"hidden_size": 40, "num_attention_heads": 5},
    "odd feed-forward": {"intermediate_size": 107},
    "other epsilon": {"rms_norm_eps": 1e-2},
}

NORM_HEAD = {"architectures": ["BaichuanForCausalLM"], "z_loss_weight": 0}
"""What marks a Baichuan 2 of a vocabulary other than the published one."""


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_baichuan_1_equals_the_reference(tmp_path, change):
    original = ORIGINAL | change
    weights = random_weights(baichuan.shapes(original))
    model = converted(tmp_path, original, weights, shards=3, suffix="bin")
    assert_equivalent(model, baichuan.logits, original, weights)
    assert_inverts(model, original, weights)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_baichuan_2_equals_the_reference(tmp_path, change):
    original = ORIGINAL | NORM_HEAD | change
    weights = uneven_head(random_weights(baichuan.shapes(original)))
    model = converted(tmp_path, original, weights, shards=3)
    assert_equivalent(model, baichuan.norm_head_logits, original, weights)


def test_baichuan_2_is_known_by_its_vocabulary(tmp_path):
    original = ORIGINAL | {"vocab_size": 125_696, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    weights = uneven_head(random_weights(baichuan.shapes(original)))
    model = converted(tmp_path, original, weights)
    assert_equivalent(model, baichuan.norm_head_logits, original, weights)


def test_a_folded_head_stays_as_it_is_when_converted_again(tmp_path):
    """The head's lengths are gone after a conversion, and every other tensor comes back bit for bit."""
    original = ORIGINAL | NORM_HEAD
    weights = uneven_head(random_weights(baichuan.shapes(original)))
    model = converted(tmp_path / "first", original, weights)
    folded = native.to_original(original, model.state_dict())
    rows = weights["lm_head.weight"] / weights["lm_head.weight"].norm(dim=-1, keepdim=True)
    compare("folded head", folded["lm_head.weight"], rows, 1e-6)
    assert_inverts(model, original, weights | {"lm_head.weight": folded["lm_head.weight"]})

    again = converted(tmp_path / "second", original, folded)
    compare("head folded twice", again.lm_head.weight, model.lm_head.weight, 1e-6)


def test_rotary_buffers_of_old_exports_are_left_out(tmp_path):
    weights = random_weights(baichuan.shapes(ORIGINAL))
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((8,), 7.0) for i in range(3)}
    model = converted(tmp_path, ORIGINAL, weights | buffers, suffix="bin")
    assert_equivalent(model, baichuan.logits, ORIGINAL, weights)


def test_a_config_without_a_length_is_refused(tmp_path):
    original = {key: value for key, value in ORIGINAL.items() if key != "max_position_embeddings"}
    folder = write_original(tmp_path / "original", original, random_weights(baichuan.shapes(original)))
    with pytest.raises(HelpersError, match="no 'max_position_embeddings' or 'model_max_length'"):
        native.convert(folder, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def uneven_head(weights):
    """Give the rows of the output head lengths from 0.5 to 2, so that leaving them be shows."""
    head = weights["lm_head.weight"]
    return weights | {"lm_head.weight": head * torch.linspace(0.5, 2, head.shape[0])[:, None]}
