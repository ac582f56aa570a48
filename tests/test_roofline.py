"""The roofline: work by hand and against PyTorch's own count, the roof, the balance point, recorded rows under it."""

from __future__ import annotations

import pytest

from helpers import catalog, estimate
from helpers.errors import HelpersError
from helpers.memory import predict
from helpers.memory.parts import Setting
from helpers.memory.roofline import (
    Roof,
    balance_batch,
    matrix_under_the_roof,
    point_of,
    roof_of,
    work_of_loaded,
)
from helpers.memory.shapes import CLASSES, Sized, shape_of, sized
from helpers.memory.speed import Speed
from helpers.memory.work import Work, attention_operations, decode_work, prefill_work

H100 = catalog.gpu("h100-sxm")


def row(**change):
    """Return a recorded row's form with other values."""
    base = next(one for one in catalog.measured(name="decode_speed", model="qwen-7b", precision="bf16"))
    return base.model_copy(update={"batch": 1, "prompt_tokens": 128, "new_tokens": 64, "weights": "random"} | change)


def test_decode_by_hand():
    """Llama-2-7B: 32 layers of 4 matrices 4096 x 4096 and 3 of 4096 x 11008, a head of 32,000 rows."""
    layers, head = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000 * 4096
    norms = 65 * 4096
    work = decode_work("llama2-chinese-7b", "fp16", batch=3, context=100)
    assert work.tokens == 3
    assert work.operations == 3 * (2 * (layers + head) + 100 * 4 * 4096 * 32)
    assert work.weights == 2 * (layers + head + norms)
    assert work.cache == 3 * 100 * 2 * 32 * 4096 * 2
    assert decode_work("llama2-chinese-7b", "fp16").intensity == pytest.approx(1, rel=1e-3)
    assert decode_work("llama2-chinese-7b", "fp32").bytes == 2 * decode_work("llama2-chinese-7b", "fp16").bytes


def test_prefill_by_hand():
    layers, head = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000 * 4096
    work = prefill_work("llama2-chinese-7b", "fp16", batch=2, prompt=50)
    assert work.tokens == 100
    assert work.operations == 2 * (100 * layers + 2 * head) + 2 * 4 * 4096 * 32 * 50 * 50 / 2
    assert work.cache == 2 * 100 * 2 * 32 * 4096 * 2


def test_shared_heads_read_less_and_compute_as_much():
    """ChatGLM3: 2 key-value heads for 32 query heads."""
    none, some = (decode_work("chatglm3-6b", context=context) for context in (0, 1000))
    assert some.operations - none.operations == 1000 * 4 * 32 * 128 * 28
    assert some.cache == 1000 * 2 * 28 * 2 * 128 * 2


def test_rwkv_reads_its_state_and_no_past():
    near, far = (decode_work("rwkv-6-7b", context=context) for context in (1, 10_000))
    assert near == far and near.cache == 2 * catalog.model("rwkv-6-7b").state_bytes()
    assert attention_operations(catalog.model("rwkv-6-7b").shape) == 0


def test_tied_embeddings_are_read():
    shape = catalog.model("qwen3-0.6b").shape
    assert shape.tied
    assert decode_work("qwen3-0.6b").weights == pytest.approx(2 * catalog.model("qwen3-0.6b").parameters)


@pytest.mark.parametrize("model", ["qwen-7b", "chatglm3-6b", "internlm2-7b", "baichuan2-13b"])
def test_operations_as_pytorch_counts_them(model):
    """FlopCounterMode counts matrix products as they run, and in prefill the scores of masked places too."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from helpers import load

    lm, _ = load(model, "tiny", "fp32", "cpu")
    if model != "baichuan2-13b":  # ALiBi has an attention function of its own
        lm.set_attn_implementation("eager")
    about = Sized("stand-in", shape_of(lm.config), CLASSES[lm.config.model_type], "fp16", 512)
    prompt, batch = 40, 2
    ids = torch.ones(batch, prompt, dtype=torch.long)
    with torch.inference_mode():
        with FlopCounterMode(display=False) as reading:
            past = lm(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        with FlopCounterMode(display=False) as writing:
            lm(input_ids=ids[:, :1], past_key_values=past, use_cache=True)
    masked = batch * prompt**2 / 2 * attention_operations(about.shape)
    read, step = prefill_work(about, "fp32", batch, prompt), decode_work(about, "fp32", batch, prompt + 1)
    assert read.operations + masked == pytest.approx(reading.get_total_flops(), rel=0.01)
    assert step.operations == pytest.approx(writing.get_total_flops(), rel=0.01)
    speed = Speed(batch, prompt, 2, 1.0, 1.0, 1.0, 0)
    assert [one.operations for one in work_of_loaded(lm, speed)] == [read.operations, step.operations]
    assert [one.bytes for one in work_of_loaded(lm, speed)] == pytest.approx([read.bytes, step.bytes])


@pytest.mark.parametrize("precision", ["fp16", "int8", "nf4", "gptq-int4"])
@pytest.mark.parametrize("model", ["qwen-7b", "chatglm3-6b", "qwen3-0.6b", "rwkv-6-7b"])
@pytest.mark.parametrize("batch", [1, 8])
def test_bytes_are_those_that_the_estimate_counts(model, precision, batch):
    run = estimate(model, precision, "transformers", batch, 192, "h100-sxm", decoding="compiled", prompt_tokens=128)
    if run.bound != "memory":
        pytest.skip("not bound by memory")
    work = decode_work(model, precision, batch, 160, unpacks=True)
    about, setting = sized(model), Setting(precision, "transformers", "compiled", batch, 128, 192)
    packed = predict.slowed(about, setting)
    assert (packed > 0) == (precision == "nf4" and batch == 1)
    reading = (work.bytes + packed) / (predict.bandwidth(H100) * 1e9 * predict.FITTED["share"])
    kernels = predict.kernel_seconds(about, setting)
    assert batch / run.decode_tokens_per_s == pytest.approx(reading + kernels)


def test_nf4_is_unpacked_from_five_tokens_on_by_bitsandbytes_alone():
    few, many = (decode_work("qwen-7b", "nf4", batch, unpacks=True) for batch in (4, 5))
    assert few.unpacking == 0 and many.unpacking == 4 * catalog.model("qwen-7b").shape.matrices()
    assert decode_work("qwen-7b", "nf4", 5).unpacking == 0
    assert prefill_work("qwen-7b", "int8", unpacks=True).unpacking == 0


def test_roof():
    roof = Roof(bandwidth=100.0, rate=2000.0)
    assert roof.balance == 20
    assert [roof.operations_per_s(intensity) for intensity in (1, 20, 50)] == [100, 2000, 2000]
    assert roof.seconds(Work(1, operations=10, weights=150, cache=50)) == 2
    assert roof.tokens_per_s(Work(8, operations=4000, weights=150, unpacking=50)) == 4


def test_eight_bit_roof_only_where_the_card_multiplies_it():
    plain = roof_of(H100)
    assert roof_of(H100, "fp8").rate == pytest.approx(2 * plain.rate)
    assert roof_of(H100, "gptq-int4") == roof_of(H100, "int8") == plain
    a100 = catalog.gpu("a100-pcie-80gb")
    assert roof_of(a100, "fp8") == roof_of(a100) and roof_of(a100, "w8a8").rate == pytest.approx(2 * roof_of(a100).rate)


@pytest.mark.parametrize("model", ["chatglm3-6b", "internlm2-7b", "rwkv-4-7b"])
@pytest.mark.parametrize("precision", ["fp16", "nf4"])
def test_balance_is_where_both_take_as_long(model, precision):
    roof = roof_of(H100)
    batch = balance_batch(model, precision, roof, context=200)
    below, there = (decode_work(model, precision, many, 200) for many in (batch - 1, batch))
    assert there.operations / roof.rate >= there.bytes / roof.bandwidth
    assert below.operations / roof.rate < below.bytes / roof.bandwidth


def test_balance_may_be_out_of_reach():
    """Each of Qwen-7B's sequences reads keys and values of its own, one operation a byte: more than it computes."""
    assert balance_batch("qwen-7b", "fp16", roof_of(H100), context=2048) is None
    work = decode_work("qwen-7b", "fp16", 10**6, 2048)
    assert work.intensity < roof_of(H100).balance
    assert balance_batch("qwen-7b", "fp16", roof_of(H100)) > 100
    assert balance_batch("rwkv-6-7b", "fp16", roof_of(H100)) is None  # nor does a state of this size, whatever the text


def test_point_by_hand():
    one = point_of(row(value=50.0, batch=2, engine="vllm", decoding=None))
    work = decode_work("qwen-7b", "bf16", 2, 160)
    assert (one.phase, one.how, one.seconds) == ("decode", "vllm", 2 / 50)
    assert one.mbu == pytest.approx(work.bytes * 25 / 3350e9)
    assert one.mfu == pytest.approx(work.operations * 25 / 989.5e12)
    assert one.share == pytest.approx(work.bytes * 25 / (predict.bandwidth(H100) * 1e9))
    read = point_of(row(name="prefill_speed", value=1280.0, batch=1))
    assert (read.phase, read.seconds, read.how) == ("prefill", 0.1, "transformers, default")


@pytest.mark.parametrize(
    "change",
    [
        {"parallel": "tp2"},
        {"requests_per_s": 4.0},
        {"weights": "tiny"},
        {"device": "AMD EPYC"},
        {"precision": "gptq-int3"},
        {"prompt_tokens": None},
        {"name": "tpot"},
    ],
    ids=str,
)
def test_other_rows_are_no_points(change):
    assert point_of(row()) is not None
    assert point_of(row(**change)) is None


def test_no_recorded_speed_is_above_the_datasheet():
    """A point above it would mean that work is counted which is not done, or a time that was not taken."""
    points = [point_of(one) for one in catalog.measured(name=["decode_speed", "prefill_speed"])]
    points = [one for one in points if one]
    assert len(points) > 40
    assert [(one.row.model, one.how, one.mbu) for one in points if one.mbu > 1] == []
    plain = [one for one in points if one.row.precision not in ("fp8", "w8a8")]
    assert [(one.row.model, one.how, one.mfu) for one in plain if one.mfu > 1] == []


def test_one_matrix_on_this_machine():
    found = matrix_under_the_roof([1, 4], "fp32", size=256, device="cpu")
    work, seconds = found[4]
    assert list(found) == [1, 4] and seconds > 0
    assert (work.operations, work.weights, work.cache) == (2 * 4 * 256**2, 4 * 256**2, 2 * 4 * 4 * 256)


def test_unknown_model():
    with pytest.raises(HelpersError, match="unknown model 'qwen7b'"):
        decode_work("qwen7b")
