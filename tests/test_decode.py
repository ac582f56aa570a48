"""FastDecoder gives the tokens of generate, and its step never waits for the device."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from helpers import FastDecoder, load
from helpers.checkpoints.load import stand_ins
from helpers.decode import CHECK_EVERY, grouped_attention
from helpers.errors import HelpersError

PROMPTS = ["春眠不觉晓，", "床前明月光，疑是地上霜。举头望"]
"""Of different lengths, so that one is padded on the left."""


@pytest.fixture(params=stand_ins())
def stand_in(request):
    model, tokenizer = load(request.param, "tiny", "fp32", "cpu")
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer(PROMPTS, return_tensors="pt", padding=True)


def small_model(**more):
    torch.manual_seed(0)
    settings = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    settings |= dict(num_key_value_heads=2, max_position_embeddings=256, eos_token_id=None, pad_token_id=0)
    return LlamaForCausalLM(LlamaConfig(**(settings | more))).eval()


def by_generate(model, ids, mask=None, new=60, **more):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **more)


def test_a_padded_batch_of_every_stand_in_ends_as_with_generate(stand_in):
    model, batch = stand_in
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert not mask.all()
    decoder = FastDecoder(model, length=ids.shape[1] + 60, batch=2)
    for _ in range(2):  # the second time, nothing of the first is left
        assert torch.equal(decoder.generate(ids, mask, max_new_tokens=60), by_generate(model, ids, mask))
    alone = FastDecoder(model, length=ids.shape[1] + 90)  # a longer cache changes nothing
    assert torch.equal(alone.generate(ids[1:], max_new_tokens=60), by_generate(model, ids[1:]))


def test_the_step_of_every_stand_in_reads_nothing_back(stand_in):
    model, batch = stand_in
    decoder = FastDecoder(model, length=64, batch=2)
    decoder.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=2)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():  # its tensors have no values to read
        decoder._step()


def test_reading_back_would_be_noticed():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = small_model(rope_parameters=rope)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException):
        model(torch.zeros(1, 1, dtype=torch.long), position_ids=torch.zeros(1, 1, dtype=torch.long))
    FastDecoder(model, length=8).generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=4)
    assert model.model.rotary_emb.rope_type == "dynamic"  # as it was


def test_one_decoder_serves_prompt_after_prompt():
    model = small_model()
    decoder = FastDecoder(model, length=96)
    for length, padding in [(30, 20), (5, 0), (36, 3)]:  # the second sees nothing of the first one's cache and mask
        ids = torch.randint(64, (1, length), generator=torch.Generator().manual_seed(length))
        mask = (torch.arange(length) >= padding).long()[None]
        assert torch.equal(decoder.generate(ids, mask, max_new_tokens=60), by_generate(model, ids, mask))


@pytest.mark.parametrize("place", [0, 1, CHECK_EVERY - 1, CHECK_EVERY, 40])
def test_a_stop_token_ends_the_answer_wherever_it_comes(place):
    model, ids = small_model(), torch.arange(1, 9)[None]
    whole = FastDecoder(model, length=68).generate(ids, max_new_tokens=60)[0, 8:].tolist()
    stop = whole[place]
    got = FastDecoder(model, length=68).generate(ids, max_new_tokens=60, stop=[stop])[0, 8:].tolist()
    assert got == whole[: whole.index(stop) + 1]
    assert torch.equal(by_generate(model, ids, eos_token_id=stop)[0, 8:], torch.tensor(got))


def test_compiled_gives_the_same_tokens():
    model, ids = small_model(), torch.arange(1, 9)[None]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):  # one shape, one compilation
        forward = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        decoder = FastDecoder(model, length=40)
        decoder._forward = forward
        assert torch.equal(decoder.generate(ids, max_new_tokens=32), by_generate(model, ids, new=32))


def test_what_a_model_keeps_on_the_cache_stays_in_its_place():
    class Keeper(LlamaForCausalLM):
        """Counts its prompt and hangs the number on the cache, as ChatGLM-6B does with the places of its marks."""

        def forward(self, input_ids, past_key_values=None, **kwargs):
            if input_ids.shape[1] > 1:
                past_key_values.context = torch.tensor(input_ids.shape[1])
            return super().forward(input_ids, past_key_values=past_key_values, **kwargs)

    decoder = FastDecoder(Keeper(small_model().config).eval(), length=32)
    decoder.generate(torch.ones(1, 8, dtype=torch.long), max_new_tokens=2)
    place = decoder._cache.context
    decoder.generate(torch.ones(1, 5, dtype=torch.long), max_new_tokens=2)
    assert decoder._cache.context is place and place == 5


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_grouped_attention_is_attention(groups):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 8, 1, 4), torch.randn(2, groups, 6, 4), torch.randn(2, groups, 6, 4)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0]], dtype=torch.bool)[:, None, None]
    got, _ = grouped_attention(None, query, key, value, mask, scaling=0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(got, expected.transpose(1, 2))


def test_the_model_is_left_as_it_was():
    model, seen = small_model(), []
    forward = model.forward
    model.forward = lambda **inputs: seen.append(model.config._attn_implementation) or forward(**inputs)
    FastDecoder(model, length=8).generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3)
    assert seen == ["sdpa", "grouped", "grouped"] and model.config._attn_implementation == "sdpa"


def test_what_does_not_fit_the_decoder_is_refused():
    model = small_model()
    decoder = FastDecoder(model, length=32)
    with pytest.raises(HelpersError, match=r"1 sequences of 32 tokens, these are 1 sequences of 8 \+ 25 tokens"):
        decoder.generate(torch.ones(1, 8, dtype=torch.long), max_new_tokens=25)
    with pytest.raises(HelpersError, match="these are 2 sequences"):
        decoder.generate(torch.ones(2, 8, dtype=torch.long), max_new_tokens=2)
    with pytest.raises(HelpersError, match="257 tokens are too many"):
        FastDecoder(model, length=257)


def test_models_that_cannot_be_recorded_are_refused(monkeypatch):
    class OwnKind(GPT2LMHeadModel):
        _can_compile_fullgraph = False

    config = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=8)
    with pytest.raises(HelpersError, match=r"cannot record a step of OwnKind: .*no cache that stays in its place"):
        FastDecoder(OwnKind(config), length=8)
    model = small_model()
    model.is_loaded_in_8bit = True
    FastDecoder(model, length=8)  # on a CPU nothing is recorded
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with pytest.raises(HelpersError, match="in int8: bitsandbytes int8 looks for outliers"):
        FastDecoder(model, length=8)
