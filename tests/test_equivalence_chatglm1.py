"""ChatGLM-6B, converted to the class of our own, gives the logits of the original."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import chatglm1
from reference.checking import (
    assert_equivalent,
    assert_inverts,
    compare,
    converted,
    load,
    random_weights,
    run_native,
    run_reference,
    write_original,
)
from transformers import AutoModelForCausalLM, StaticCache

from helpers import native
from helpers.checkpoints.load import bitsandbytes_config
from helpers.errors import HelpersError

ORIGINAL = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "vocab_size": 160,
    "hidden_size": 64,
    "inner_hidden_size": 128,
    "num_layers": 3,
    "num_attention_heads": 4,
    "max_sequence_length": 64,
    "layernorm_epsilon": 1e-5,
    "position_encoding_2d": True,
    "mask_token_id": 130,
    "gmask_token_id": 131,
    "bos_token_id": 134,
    "eos_token_id": 135,
    "pad_token_id": 3,
}
"""The published configuration in every switch, and small in every size."""

EARLY = {key: value for key, value in ORIGINAL.items() if key not in ("mask_token_id", "gmask_token_id")}
MASK, GMASK, SOP = 130, 131, 134

CHANGES = {
    "as published": {},
    "odd vocabulary": {"vocab_size": 137},
    "five heads of 12": {"hidden_size": 60, "num_attention_heads": 5},
    "one wide head": {"num_attention_heads": 1},
    "odd feed-forward": {"inner_hidden_size": 107},
    "other epsilon": {"layernorm_epsilon": 1e-2},
    "another depth": {"num_layers": 5},
}


def tied(original, **options):
    """Draw weights; the output head is stored once more, as in the published files."""
    weights = random_weights(chatglm1.shapes(original), **options)
    return weights | {"lm_head.weight": weights["transformer.word_embeddings.weight"].clone()}


def prompts(*marks, batch=3, tokens=14, at=5):
    """Draw texts [batch, tokens] of ordinary tokens with ``marks`` from place ``at`` on, in row r from ``at + r``."""
    ids = torch.randint(4, 130, (batch, tokens), generator=torch.Generator().manual_seed(2))
    for row in range(batch):
        ids[row, at + row : at + row + len(marks)] = torch.tensor(marks, dtype=torch.long)
    return ids


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a converted model in fp32, its folder, and the weights it was made of."""
    weights, folder = tied(ORIGINAL), tmp_path_factory.mktemp("chatglm1")
    return converted(folder, ORIGINAL, weights), folder / "native", weights


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_logits_equal_the_reference(tmp_path, change):
    original = ORIGINAL | change
    weights = tied(original)
    model = converted(tmp_path, original, weights, shards=3, suffix="bin")
    assert_equivalent(model, chatglm1.logits, original, weights, prompts(GMASK, SOP, tokens=20))
    assert_inverts(model, original, weights)


MARKS = {
    "[gMASK] <sop>": [GMASK, SOP],
    "[MASK] <sop>": [MASK, SOP],
    "a blank within the context": [MASK, 7, 8, SOP],
    "both masks: [gMASK] counts": [MASK, 9, GMASK, SOP],
    "two <sop>: the first counts": [GMASK, SOP, 9, SOP],
    "no mask": [SOP],
    "no <sop>": [GMASK],
    "neither": [],
}


@pytest.mark.parametrize("marks", MARKS.values(), ids=MARKS.keys())
def test_every_order_of_the_marks(made, marks):
    model, _, weights = made
    ids = prompts(*marks, at=5)
    for mask in (torch.ones_like(ids), (torch.arange(14) >= torch.tensor([[0], [2], [4]])).long()):
        for prefill in (None, 12):
            ours = run_native(model, ids, mask, prefill)
            reference = run_reference(chatglm1.logits, ORIGINAL, weights, ids, mask, prefill)
            compare(f"prefill {prefill}", ours[mask.bool()], reference[mask.bool()])


def test_marks_in_the_padding_do_not_count(made):
    model, _, weights = made
    ids, mask = prompts(GMASK, SOP), (torch.arange(14) >= 3).long().expand(3, 14)
    ids[:, 0], ids[:, 1] = GMASK, SOP
    reference = run_reference(chatglm1.logits, ORIGINAL, weights, ids, mask)
    compare("padding", run_native(model, ids, mask)[mask.bool()], reference[mask.bool()])


def test_early_copies_with_images_in_the_vocabulary(tmp_path):
    """Their config.json does not name the masks, whose ids follow from <sop>'s."""
    weights = tied(EARLY)
    model = converted(tmp_path, EARLY, weights)
    assert_equivalent(model, chatglm1.logits, ORIGINAL, weights, prompts(GMASK, SOP, tokens=20))


def test_a_context_read_in_parts_keeps_its_places(made):
    """<sop> may come in a later call of several tokens; what was read before cannot look ahead."""
    model, _, _ = made
    ids = prompts(GMASK, SOP, batch=1, at=8)
    cache = model(ids[:, :4]).past_key_values
    model(ids[:, 4:12], past_key_values=cache)
    assert cache.context[:, 0].tolist() == [torch.iinfo(torch.int64).max, 8, 9, 0]


def padded_batch():
    """Three prompts of different lengths, by themselves and as a batch padded on the left."""
    texts = [[5, 6, 7, GMASK, SOP], [8, 9, GMASK, SOP], [10, 11, 12, 13, 14, 15, GMASK, SOP]]
    longest = max(map(len, texts))
    ids = torch.tensor([[3] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    return texts, ids, mask


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_batch_writes_what_each_prompt_writes_alone(made, cache, attention):
    _, folder, weights = made
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    texts, ids, mask = padded_batch()
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, attention_mask=mask, cache_implementation=cache, **options)[:, ids.shape[1] :]
    for text, written in zip(texts, together, strict=True):
        alone = model.generate(torch.tensor([text]), **options)[0, len(text) :]
        assert written.tolist() == alone.tolist() == greedy(weights, text)
    without = model.generate(ids, attention_mask=mask, use_cache=False, **options)[:, ids.shape[1] :]
    assert together.tolist() == without.tolist()
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **options)
    assert beams.shape == (3, ids.shape[1] + 10)


def greedy(weights, text, tokens=10):
    """Write with the reference, reading the whole text anew for every token."""
    ids = list(text)
    for _ in range(tokens):
        out = chatglm1.logits(ORIGINAL, weights, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
        ids.append(out[0, -1].argmax().item())
    return ids[len(text) :]


def test_a_static_cache_can_be_used_again(made):
    model, _, _ = made
    cache = StaticCache(model.config, max_cache_len=32)
    for at in (3, 6):
        ids = prompts(GMASK, SOP, batch=2, at=at)
        cache.reset()
        with torch.no_grad():
            compare("static", model(ids, past_key_values=cache).logits, model(ids).logits)
            step = model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 15).long()).logits
            compare("static step", step[:, 0], model(torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1])


def test_decoding_compiles_to_one_graph(made):
    model = copy.deepcopy(made[0])
    ids = prompts(GMASK, SOP, batch=2)
    cache = StaticCache(model.config, max_cache_len=24)
    with torch.no_grad():
        first = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        wanted = model(torch.cat([ids, first], dim=1)).logits[:, -1]
        mask = model.create_masks_for_generate(torch.empty(2, 1, 0), torch.ones(2, 15).long(), cache)
        step = torch.compile(model.forward, fullgraph=True, backend="eager")
        places = torch.full((2, 1), 14)
        got = step(first, attention_mask=mask, position_ids=places, past_key_values=cache).logits
    compare("compiled", got[:, 0], wanted)


def test_several_texts_in_a_row_are_those_texts_alone(made):
    """With both positions and the mask given, as the stand-in is trained."""
    model, _, _ = made
    texts = [[5, 6, GMASK, SOP, 7, 8, 135], [9, GMASK, SOP, 10, 135]]
    row = torch.tensor([[*texts[0], *texts[1]]])
    layouts = [chatglm1.layout(ORIGINAL, text) for text in texts]
    positions = torch.cat([places for places, _ in layouts], dim=1)[None]
    visible = torch.block_diag(*(seen.int() for _, seen in layouts)).bool()[None, None]
    with torch.no_grad():
        together = model(row, attention_mask=visible, position_ids=positions).logits[0]
        alone = torch.cat([model(torch.tensor([text])).logits[0] for text in texts])
    compare("packed", together, alone)


def test_it_learns_with_and_without_checkpointing(made):
    model = copy.deepcopy(made[0]).train()
    ids = prompts(GMASK, SOP)
    labels = ids.masked_fill(torch.arange(14) < 9, -100)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=labels).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        compare(name, gradients[1][name], gradient)


def test_loss_is_that_of_the_answer(made):
    model, _, weights = made
    ids = prompts(GMASK, SOP, batch=1)
    labels = ids.masked_fill(torch.arange(14) < 7, -100)
    logits = chatglm1.logits(ORIGINAL, weights, ids, torch.ones_like(ids))
    wanted = torch.nn.functional.cross_entropy(logits[0, 6:-1], ids[0, 7:])
    compare("loss", model(ids, labels=labels).loss.detach(), wanted)


def test_saved_and_loaded_it_is_the_same(made, tmp_path):
    model, _, _ = made
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    ids = prompts(GMASK, SOP)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.lm_head.weight is again.transformer.word_embeddings.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_close(made, dtype):
    model, folder, _ = made
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = prompts(GMASK, SOP)
    with torch.no_grad():
        ours, exact = half(ids).logits, model(ids).logits
    assert ours.dtype == dtype
    assert torch.corrcoef(torch.stack([ours.float().flatten(), exact.flatten()]))[0, 1] > 0.999


@pytest.mark.parametrize(("precision", "least"), [("int8", 0.999), ("nf4", 0.98)])
def test_quantised_by_bitsandbytes_it_stays_close(made, precision, least):
    model, folder, _ = made
    config = bitsandbytes_config(precision, torch.float32)
    small = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", quantization_config=config
    )
    kinds = {type(module).__name__ for name, module in small.named_modules() if "mlp.dense" in name}
    assert kinds == {"int8": {"Linear8bitLt"}, "nf4": {"Linear4bit"}}[precision]
    ids = prompts(GMASK, SOP)
    with torch.no_grad():
        ours, exact = small(ids).logits.float(), model(ids).logits
    assert torch.corrcoef(torch.stack([ours.flatten(), exact.flatten()]))[0, 1] > least
    assert (ours.argmax(-1) == exact.argmax(-1)).float().mean() > 0.8


def test_inverse_frequencies_of_the_published_files_are_left_out(tmp_path):
    weights = tied(ORIGINAL, dtype=torch.float16)
    buffers = {f"transformer.layers.{i}.attention.rotary_emb.inv_freq": torch.full((4,), 7.0) for i in range(3)}
    model = converted(tmp_path, ORIGINAL, weights | buffers, suffix="bin")
    assert_inverts(model.half(), ORIGINAL, weights)


@pytest.mark.parametrize(
    ("field", "value", "fix"),
    [
        ("quantization_bit", 4, "precision='nf4'"),
        ("position_encoding_2d", False, "published architecture"),
        ("pre_seq_len", 128, "published architecture"),
    ],
)
def test_variants_are_refused_by_field_and_value(tmp_path, field, value, fix):
    folder = write_original(tmp_path / "original", ORIGINAL | {field: value}, tied(ORIGINAL))
    with pytest.raises(HelpersError, match=f"{field}={value}.*{fix}") as raised:
        native.convert(folder, tmp_path / "native")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "native").exists()


def test_the_three_chatglms_are_told_apart():
    from helpers.native.convert import family_of

    assert family_of(ORIGINAL).native_class == "ChatGLM1ForCausalLM"
    assert family_of({"model_type": "chatglm", "ffn_hidden_size": 1}).native_class == "GlmForCausalLM"
