"""What measure() reports, and the speed of a small random model."""

import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import FastDecoder
from helpers.errors import HelpersError
from helpers.memory.bandwidth import copy_bandwidth, matmul_rate, request_seconds
from helpers.memory.measure import FIGURES, GIB, SAMPLE_SECONDS, Used, _nvml, measure
from helpers.memory.speed import Speed, generation_speed, kv_bytes_per_token, weight_bytes_read

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what a machine without a GPU reports")


def small_model(**more):
    settings = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    settings |= dict(num_key_value_heads=2, max_position_embeddings=64, eos_token_id=list(range(1, 64)), pad_token_id=0)
    return LlamaForCausalLM(LlamaConfig(**(settings | more))).eval()


def test_ram_peak_holds_what_was_freed_again():
    big = 512 * 2**20
    with measure("fill") as used:
        buffer = bytearray(b"x") * big
        del buffer
    assert used.rss_peak >= used.rss + 0.9 * big / GIB
    assert used.seconds > 0


def test_ram_peak_below_an_earlier_one_is_sampled():
    size = 256 * 2**20
    buffer = bytearray(b"x") * (4 * size)
    del buffer
    with measure("less") as used:
        buffer = bytearray(b"x") * size
        time.sleep(10 * SAMPLE_SECONDS)
        del buffer
    assert used.rss + 0.9 * size / GIB <= used.rss_peak < used.rss + 2 * size / GIB


@no_gpu
def test_no_gpu_is_none_and_not_zero():
    with measure("nothing") as used:
        pass
    assert [used.allocated, used.allocated_peak, used.reserved_peak, used.nvml_process, used.nvml_device] == [None] * 5
    assert used.peak == used.rss_peak > 0
    rows = {row[0]: row[1] for row in used.table().rows}
    assert rows["allocated_peak"] == "n/a GiB" and rows["rss"].endswith(" GiB")


def test_figures_are_there_when_the_block_raises():
    with pytest.raises(ZeroDivisionError), measure("fails") as used:
        1 / 0  # noqa: B018
    assert used.rss_peak >= used.rss > 0 and used.seconds is not None


def test_peak_is_vram_where_there_is_some():
    assert Used("x", allocated_peak=2.0, rss_peak=5.0).peak == 2.0


def test_every_figure_has_a_definition_and_known_ones_are_recorded(capsys):
    used = Used("x", rss=1.5, seconds=2.0)
    assert set(FIGURES) == set(Used.__dataclass_fields__) - {"label"}
    used.record("load", model="m")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["load_rss = 1.500 GiB  (this machine)", "load_seconds = 2.000 s  (this machine)"]


class FakeNvml:
    """Two cards; this process on the second, another one on both. What containers hide is None."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, own):
        self.own = own

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetComputeRunningProcesses(self, card):
        others = [SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=7 * GIB)]
        return others + ([SimpleNamespace(pid=os.getpid(), usedGpuMemory=self.own)] if card == 1 else [])


@pytest.mark.parametrize(("own", "expected"), [(3 * GIB, 3.0), (None, None)])
def test_nvml_counts_this_process_only(monkeypatch, own, expected):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(own))
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda card: (card + 1) * GIB)
    assert _nvml(range(2)) == (expected, 3.0)


def test_nvml_out_of_reach_is_none(monkeypatch):
    fake = FakeNvml(0)

    def fail(card):
        raise fake.NVMLError

    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "device_memory_used", fail)
    assert _nvml(range(1)) == (None, None)


def test_generation_runs_to_full_length_although_all_tokens_but_one_are_stops():
    model, lengths = small_model(), []
    forward = model.forward

    def watched(*args, **kwargs):
        lengths.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    model.forward = watched
    speed = generation_speed(model, prompt_tokens=8, new_tokens=6, batch=3)
    assert (3, 8) in lengths and (3, 1) in lengths
    assert lengths.count((3, 1)) == 4 * 5  # a warm-up and three runs of 6 tokens, the first from the prompt
    assert speed.decode_tokens_per_s == pytest.approx(3 / speed.tpot_s)
    assert speed.prefill_tokens_per_s == pytest.approx(24 / speed.prefill_seconds)
    assert speed.bytes_per_step == weight_bytes_read(model) + 3 * (8 + 3) * kv_bytes_per_token(model)


def test_static_decoding_runs_the_decoder_to_full_length(monkeypatch):
    model, made = small_model(), []

    class Watched(FastDecoder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)
            self.steps = 0

        def _step(self):
            self.steps += 1
            super()._step()

    monkeypatch.setattr("helpers.decode.FastDecoder", Watched)
    speed = generation_speed(model, prompt_tokens=8, new_tokens=6, batch=3, decoding="static")
    (decoder,) = made
    assert (decoder.length, decoder.batch, decoder.steps) == (14, 3, 4 * 5)  # a warm-up and three runs
    assert {one["decoding"] for one in speed.figures()} == {"static"}
    assert speed.bytes_per_step == weight_bytes_read(model) + 3 * (8 + 3) * kv_bytes_per_token(model)
    assert {one["decoding"] for one in generation_speed(model, 8, 6).figures()} == {"default"}


def test_speed_refuses_what_it_cannot_time():
    with pytest.raises(HelpersError, match="new_tokens=1"):
        generation_speed(small_model(), new_tokens=1)
    with pytest.raises(HelpersError, match="65 tokens are too many"):
        generation_speed(small_model(), prompt_tokens=60, new_tokens=5)
    with pytest.raises(HelpersError, match=r"unknown decoding 'fast'.*Valid: default, static, compiled"):
        generation_speed(small_model(), 8, 6, decoding="fast")


def test_mbu_follows_its_definition():
    speed = Speed(1, 128, 128, prefill_seconds=0.1, ttft_s=0.1, tpot_s=0.01, bytes_per_step=10**10)
    assert speed.mbu(2000) == pytest.approx(0.5)


def test_bytes_read_leave_out_a_separate_embedding_only():
    separate, tied = small_model(), small_model(tie_word_embeddings=True)
    table = 64 * 32 * 4
    assert weight_bytes_read(separate) == sum(w.nbytes for w in separate.parameters()) - table
    assert weight_bytes_read(tied) == weight_bytes_read(separate)
    assert kv_bytes_per_token(separate) == 2 * 2 * 2 * 8 * 4  # K and V, layers, heads, width, fp32


def test_device_rates_are_positive_and_names_are_checked():
    assert copy_bandwidth("cpu", repeats=1) > 0
    assert matmul_rate("fp32", size=64, device="cpu", repeats=1) > 0
    assert request_seconds("cpu", repeats=1) > 0
    with pytest.raises(HelpersError, match="unknown dtype 'int4'"):
        matmul_rate("int4", device="cpu")
