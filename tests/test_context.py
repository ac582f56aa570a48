"""Decoding against the length of the text: what is timed is one token, and what is counted is all that is kept."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.checkpoints.make.originals import stand_in
from helpers.memory import context
from helpers.memory.context import decode_against_length, transformer_twin
from helpers.native import native_config


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(native_config(stand_in("rwkv-7-2.9b").config)).eval()


def twin_of(model):
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return AutoModelForCausalLM.from_config(transformer_twin(model.config, parameters)).eval()


def test_a_cache_grows_with_the_text_and_a_state_does_not(model, monkeypatch):
    monkeypatch.setattr(context, "READ_AT_ONCE", 7)
    lengths = (20, 40, 61)
    rwkv, llama = (decode_against_length(one, lengths, steps=3) for one in (model, twin_of(model)))
    assert [one.tokens for one in rwkv] == list(lengths)
    heads, layers, width = 2, 2, 128
    assert {one.cache_bytes for one in rwkv} == {4 * layers * (heads * 64 * 64 + 2 * width)}
    assert [one.cache_bytes for one in llama] == [4 * 2 * layers * width * length for length in lengths]
    assert all(one.seconds > 0 for one in rwkv + llama)


def test_the_twin_has_the_same_size(model):
    twin = twin_of(model)
    counts = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, twin)]
    assert abs(counts[0] - counts[1]) <= 3 * 128 * 2 * 64 / 2
    assert twin.config.intermediate_size % 64 == 0, "else bitsandbytes cannot multiply nf4 on a CPU"


def test_a_passed_text_is_read_once_in_order(model):
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    decode_against_length(model, (5, 12), steps=2)
    hook.remove()
    drawn = torch.randint(2304, (1, 15), generator=torch.Generator().manual_seed(0))
    assert [ids.shape[1] for ids in seen] == [5, 1, 1, 1, 4, 1, 1, 1]
    assert torch.equal(torch.cat(seen, 1), drawn)


def test_the_fastest_token_counts_and_the_first_one_is_not_timed(model, monkeypatch):
    clock = iter([0, 9, 0, 1, 0, 5, 0, 3, 0, 4])  # start and end of the prompt, of the first token, of three more
    monkeypatch.setattr(context, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    (point,) = decode_against_length(model, (5,), steps=3)
    assert point.seconds == 3
