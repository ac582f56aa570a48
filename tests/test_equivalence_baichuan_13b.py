"""Baichuan-13B and Baichuan2-13B, converted, give the logits of the original: ALiBi, by a class of our own.

On 2026-11-24 the models' own code (GitHub Mrgengli/baichuan_python and jrd77/Baichuan2-13B-Chat at d022d72) ran under
transformers 4.41.2 with configurations like ``CHANGES`` and one of 40 heads, 24 tokens, with and without cache and
padding. Largest difference of a logit, of up to 8.7: converted model 8.8e-6 (Baichuan 1) and 5.6e-6 (Baichuan 2),
our reference 7.1e-6.
"""

from __future__ import annotations

import pytest
import torch
from reference import baichuan
from reference.checking import (
    assert_equivalent,
    assert_inverts,
    compare,
    converted,
    left_padding,
    load,
    random_weights,
    run_native,
    run_reference,
    sample_ids,
)
from test_equivalence_baichuan import uneven_head

from helpers import native
from helpers.errors import HelpersError
from helpers.native.own.alibi import AlibiLlamaConfig, AlibiLlamaForCausalLM, slopes

ORIGINAL = {
    "model_type": "baichuan",
    "architectures": ["BaichuanForCausalLM"],
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "model_max_length": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""The published configuration of Baichuan-13B in every switch, and small in every size."""

CHANGES = {
    "as published": {},
    "five heads": {"hidden_size": 40, "num_attention_heads": 5},
    "three heads, odd vocabulary": {"hidden_size": 48, "num_attention_heads": 3, "vocab_size": 131},
    "eight heads": {"num_attention_heads": 8},
    "odd feed-forward": {"intermediate_size": 107},
}

NORM_HEAD = {"tokenizer_class": "BaichuanTokenizer"}
"""What marks a Baichuan2-13B of a vocabulary other than the published one."""

LONG = {"model_max_length": 1200, "hidden_size": 40, "num_attention_heads": 5}


def model_of(folder, **change):
    """Convert a random Baichuan-13B and load it."""
    original = ORIGINAL | change
    return converted(folder, original, random_weights(baichuan.shapes(original)))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_baichuan_13b_equals_the_reference(tmp_path, change):
    original = ORIGINAL | change
    weights = random_weights(baichuan.shapes(original))
    model = converted(tmp_path, original, weights, shards=3, suffix="bin")
    assert type(model) is AlibiLlamaForCausalLM
    assert_equivalent(model, baichuan.logits, original, weights)
    assert_inverts(model, original, weights)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_baichuan2_13b_equals_the_reference(tmp_path, change):
    original = ORIGINAL | NORM_HEAD | change
    weights = uneven_head(random_weights(baichuan.shapes(original)))
    model = converted(tmp_path, original, weights, shards=3)
    assert_equivalent(model, baichuan.norm_head_logits, original, weights)


@pytest.mark.parametrize(("vocabulary", "folded"), [(64_000, False), (125_696, True)])
def test_the_published_vocabularies_say_which_model_it_is(tmp_path, vocabulary, folded):
    small = {"vocab_size": vocabulary, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    original = ORIGINAL | small | ({} if folded else NORM_HEAD)
    weights = uneven_head(random_weights(baichuan.shapes(original)))
    reference = baichuan.norm_head_logits if folded else baichuan.logits
    assert_equivalent(converted(tmp_path, original, weights), reference, original, weights)


def test_slopes_of_forty_heads():
    """As the original computes them: 32 in a series, then every second one of 64 heads."""
    assert slopes(40) == pytest.approx(baichuan.alibi_slopes(40), rel=1e-12)
    assert slopes(40)[31] == 2**-8 and slopes(40)[32] == 2 ** (-1 / 8)
    for heads in (1, 2, 3, 5, 8, 12):
        assert slopes(heads) == pytest.approx(baichuan.alibi_slopes(heads), rel=1e-12)


def test_eager_attention_equals_sdpa(tmp_path):
    original = ORIGINAL | CHANGES["five heads"]
    weights = random_weights(baichuan.shapes(original))
    model = converted(tmp_path, original, weights)
    model.set_attn_implementation("eager")
    assert_equivalent(model, baichuan.logits, original, weights)
    assert model(sample_ids(160), output_attentions=True).attentions[0].shape == (3, 5, 12, 12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_a_thousand_tokens_in_16_bit(tmp_path, attention, dtype, tolerance):
    """Places are exact there; a bias of slope * place rounded to 16 bits would be off by several units.

    In fp32 scores of up to 500 leave their last bits: 2e-4 of a logit. The original of Baichuan 1 has that too.
    """
    original = ORIGINAL | LONG
    weights = random_weights(baichuan.shapes(original))
    ids = sample_ids(160, batch=1, tokens=1200)
    whole = torch.ones_like(ids)
    reference = run_reference(baichuan.logits, original, weights, ids, whole)
    model = converted(tmp_path, original, weights)
    model.set_attn_implementation(attention)
    compare("fp32", run_native(model, ids, whole), reference, 1e-3)
    short = run_native(model.to(dtype), ids, whole).float()
    compare(str(dtype), short[:, -50:], reference[:, -50:], tolerance)


def test_no_other_attention_is_taken(tmp_path):
    """Any other would leave the positions out."""
    model = model_of(tmp_path)
    with pytest.raises(HelpersError, match="no attention 'flash_attention_2'"):
        model.set_attn_implementation("flash_attention_2")
    with pytest.raises(HelpersError, match="no attention 'flex_attention'"):
        AlibiLlamaForCausalLM.from_pretrained(tmp_path / "native", attn_implementation="flex_attention")


@pytest.mark.parametrize("padded", [False, True])
def test_generation_with_a_static_cache_or_in_a_batch_gives_the_same_tokens(tmp_path, padded):
    model = model_of(tmp_path)
    ids = sample_ids(160)
    mask = left_padding(*ids.shape) if padded else torch.ones_like(ids)
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "disable_compile": True}
    together = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    static = model.generate(ids, attention_mask=mask, cache_implementation="static", **options)[:, ids.shape[1] :]
    assert torch.equal(static, together)
    for row, real, answer in zip(ids, mask.bool(), together, strict=True):
        alone = model.generate(row[real][None], **options)[0, int(real.sum()) :]
        assert torch.equal(alone, answer)


def test_decoding_compiles_to_one_graph(tmp_path):
    """Traced as a whole, without a break, and equal; the compiler behind it is left out to save a minute."""
    from transformers import StaticCache

    model = model_of(tmp_path)
    ids = sample_ids(160, batch=1)
    step = torch.compile(model, fullgraph=True, backend="eager")
    results = []
    for run in (model, step):
        cache = StaticCache(model.config, max_cache_len=32)
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache)
            results.append(run(ids[:, -1:], past_key_values=cache).logits)
    compare("compiled", results[1], results[0])


def test_save_and_reload_gives_the_same_logits(tmp_path):
    model, ids = model_of(tmp_path), sample_ids(160)
    model.save_pretrained(tmp_path / "saved")
    assert not any("slopes" in name or "places" in name for name in model.state_dict())
    again = load(tmp_path / "saved")
    assert again.config.model_type == "alibi_llama"
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantised_on_loading_it_stays_close(tmp_path, precision):
    from transformers import AutoModelForCausalLM

    from helpers.checkpoints.load import bitsandbytes_config

    model = model_of(tmp_path, hidden_size=128, intermediate_size=256)
    settings = bitsandbytes_config(precision, torch.float32)
    small = AutoModelForCausalLM.from_pretrained(
        tmp_path / "native", dtype=torch.float32, quantization_config=settings, device_map="cpu"
    )
    kind = {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[precision]
    assert type(small.model.layers[0].self_attn.q_proj).__name__ == kind
    ids = sample_ids(160)
    with torch.no_grad():
        difference = (small(ids).logits - model(ids).logits).std() / model(ids).logits.std()
    assert difference < {"int8": 0.05, "nf4": 0.4}[precision]
    assert torch.equal(small.model.layers[0].self_attn.slopes, model.model.layers[0].self_attn.slopes)


def test_gradients_reach_every_weight_and_are_those_of_eager(tmp_path):
    model, ids = model_of(tmp_path), sample_ids(160)
    gradients = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        compare(name, gradient, gradients[1][name])


def test_what_is_longer_than_the_model_is_refused(tmp_path):
    model = model_of(tmp_path)
    assert model.config.max_position_embeddings == 64
    with pytest.raises(HelpersError, match="65 tokens are too many"):
        native.check_length(model, 65)
    with pytest.raises(HelpersError, match="65 tokens are too many"):
        model(sample_ids(160, tokens=65))


def test_a_model_made_from_a_config_has_its_columns():
    config = AlibiLlamaConfig(**{k: v for k, v in ORIGINAL.items() if k not in ("model_type", "architectures")})
    layer = AlibiLlamaForCausalLM(config).model.layers[0].self_attn
    assert layer.slopes.dtype == torch.float32 and layer.slopes.shape == (1, 4, 1, 8)
    assert layer.slopes[0, :, 0, 1].tolist() == [4 * slope for slope in slopes(4)]  # root of a head's width, 16
    assert layer.places[0, 0, :, :2].mv(torch.tensor([64.0, 1.0])).tolist() == list(range(2048))
