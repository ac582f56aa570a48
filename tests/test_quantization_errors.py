"""What goes wrong while quantising is told in one line, and leaves nothing behind."""

import errno
import json
import shutil

import pytest
import torch

from helpers import HelpersError, load
from helpers.checkpoints.load import native_folder
from helpers.quantization import awq, bitsandbytes, folder, fp8, gptq, poems, rtn, w8a8, with_gptqmodel

WAYS = {"bitsandbytes": bitsandbytes, "gptq": gptq, "w8a8": w8a8, "fp8": fp8}


@pytest.fixture(scope="module")
def nf4(tmp_path_factory):
    return bitsandbytes("chatglm3-6b", tmp_path_factory.mktemp("made") / "nf4")


def refused(call, *words):
    with pytest.raises(HelpersError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda target: bitsandbytes("qwen-7b", target, precision="nf5"), ["nf5", "int8, nf4, fp4"]),
        (lambda target: gptq("qwen-7b", target, bits=5), ["unknown bits 5", "2, 3, 4, 8"]),
        (lambda target: rtn("qwen-7b", target, bits=1), ["unknown bits 1"]),
        (lambda target: awq("qwen-7b", target, bits=8), ["unknown bits 8"]),
        (lambda target: gptq("qwen-7b", target, group_size=48), ["unknown group_size 48"]),
        (lambda target: gptq("rwkv-6-7b", target), ["rwkv-6-7b", "bitsandbytes"]),
        (lambda target: awq("chatglm-6b", target), ["ChatGLM-6B", "gptq"]),
        (lambda target: gptq("qwen-8b", target), ["qwen-8b", "valid"]),
        (lambda target: gptq("qwen-7b", target, weights="large"), ["unknown weights 'large'"]),
        (lambda target: gptq("qwen-7b", target, calibration=[]), ["0 tokens", "512"]),
        (lambda target: gptq("qwen-7b", target, calibration=["床前明月光，疑是地上霜。"]), ["tokens", "512"]),
        (lambda target: awq("qwen-7b", target, calibration="no such file.txt"), ["no such file.txt", "text file"]),
        (lambda target: w8a8("qwen-7b", target, smoothing=1.5), ["1.5"]),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(tmp_path, call, words):
    refused(lambda: call(tmp_path / "out"), *words)
    assert list(tmp_path.iterdir()) == []


def test_a_group_size_that_does_not_divide_a_row_is_refused(tmp_path):
    """No stand-in has such rows; a folder of a reader's own may, here a Qwen2 that is 64 wide."""
    from transformers import AutoConfig, AutoModelForCausalLM

    own = shutil.copytree(native_folder("qwen-7b"), tmp_path / "own")
    config = AutoConfig.from_pretrained(own, hidden_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(own)
    refused(lambda: gptq(str(own), tmp_path / "out", group_size=128), "rows of 64", "Take -1 or 16 or 32 or 64.")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize("group_size", [-1, 16])
def test_group_sizes_that_the_fast_cpu_kernel_lacks(tmp_path, monkeypatch, group_size):
    monkeypatch.chdir(tmp_path)
    out = gptq("qwen-7b", tmp_path / "out", group_size=group_size, samples=32)
    model, tokenizer = load("qwen-7b", out, device="cpu")
    with torch.inference_mode():
        assert model(**tokenizer("床前", return_tensors="pt")).logits.isfinite().all()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no logs beside it
    assert not (out / "logs").exists()


def test_calibration_from_a_text_file(tmp_path):
    text = tmp_path / "poems.txt"
    text.write_text("\n".join(poem.text for poem in poems("train_sample")[:100]), encoding="utf-8")
    out = gptq("qwen-7b", tmp_path / "out", calibration=text, samples=50)
    found = json.loads((out / "quantization.json").read_text())["calibration"]
    assert found["text"] == "poems.txt" and found["texts"] == 50


@pytest.mark.parametrize("way", WAYS)
def test_what_is_quantised_is_not_quantised_again(nf4, tmp_path, way):
    refused(lambda: WAYS[way](str(nf4), tmp_path / "out"), "quantised already", "bitsandbytes")
    refused(lambda: WAYS[way]("chatglm3-6b", tmp_path / "out", weights=nf4), "quantised already")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp32", "int8", "nf4"])
def test_a_quantised_folder_has_its_own_precision(nf4, precision):
    refused(lambda: load("chatglm3-6b", nf4, precision), "already quantised", "auto")


def test_a_quantised_folder_of_another_model_is_refused(nf4):
    refused(lambda: load("qwen-7b", nf4), "model_type 'glm'", "qwen2")


def test_an_existing_target_stays(nf4, tmp_path):
    before = sorted((file.name, file.stat().st_mtime_ns) for file in nf4.iterdir())
    refused(lambda: gptq("chatglm3-6b", nf4), "exists", "replace=True")
    assert sorted((file.name, file.stat().st_mtime_ns) for file in nf4.iterdir()) == before
    (tmp_path / "notes.txt").write_text("mine")
    refused(lambda: fp8("chatglm3-6b", tmp_path, replace=True), "quantization.json")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_replace_takes_the_place_of_an_earlier_result(nf4, tmp_path):
    target = tmp_path / "out"
    shutil.copytree(nf4, target)
    fp8("chatglm3-6b", target, replace=True)
    assert json.loads((target / "quantization.json").read_text())["method"] == "fp8"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("error", "seen"),
    [(OSError(errno.ENOSPC, "No space left on device"), HelpersError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_full_disk_or_an_interruption_leaves_nothing(tmp_path, monkeypatch, way, error, seen):
    def writer(*arguments, **options):
        raise error

    monkeypatch.setattr(folder, "_copy_rest", writer)  # after the weights are written
    with pytest.raises(seen) as caught:
        WAYS[way]("qwen-7b", tmp_path / "out")
    if seen is HelpersError:
        assert "disk is full" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_gptqmodel_is_an_error_and_not_the_end_of_the_process(tmp_path, monkeypatch):
    """Its worker threads call os._exit on any error, which would take a notebook's kernel with it."""
    from gptqmodel.looper.gptq_processor import GPTQProcessor

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    from helpers.quantization.with_gptqmodel import _library

    _library()
    monkeypatch.setattr(GPTQProcessor, "submodule_finalize", full)
    refused(lambda: gptq("qwen-7b", tmp_path / "out"), "disk is full")
    assert list(tmp_path.iterdir()) == []


def test_random_weights_are_written_by_shards_and_quantised(tmp_path, monkeypatch):
    """At the size of the stand-in, as the published one would not fit here."""
    from transformers import AutoConfig

    from helpers.checkpoints import random

    small = AutoConfig.from_pretrained(native_folder("qwen-7b"))
    monkeypatch.setattr(random, "full_config", lambda row: small)
    for module in (folder, random, with_gptqmodel):
        monkeypatch.setattr(module, "SHARD", 500_000)
    out = gptq("qwen-7b", tmp_path / "out", weights="random", samples=4)
    assert len(list(out.glob("*.safetensors"))) > 1
    model, tokenizer = load("qwen-7b", out)
    with torch.inference_mode():
        assert model(**tokenizer("床前", return_tensors="pt")).logits.isfinite().all()
    receipt = json.loads((out / "quantization.json").read_text())
    assert receipt["weights"] == "random" and receipt["calibration"]["text"] == "random ids"
    assert not (out / "random").exists()
