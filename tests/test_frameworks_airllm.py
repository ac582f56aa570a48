"""Asking engines in processes of their own (helpers/frameworks/compare.py), and AirLLM as one of them."""

import json
import sys
from pathlib import Path

import pytest

from helpers.checkpoints.load import native_folder
from helpers.errors import HelpersError
from helpers.frameworks import compare

PROMPTS = [[5, 6, 7, 8], [9, 10]]

with_airllm = pytest.mark.skipif(compare.why_not("airllm") is not None, reason="make frameworks")


@pytest.fixture(scope="module")
def reference():
    return compare.answer("transformers", "fp32", native_folder("qwen-7b"), PROMPTS, 4)


def test_the_reference_is_what_generate_writes(reference):
    import torch

    from helpers import load

    lm, _ = load("qwen-7b", "tiny", "fp32", "cpu")
    for ids, prompt in zip(reference.ids, PROMPTS, strict=True):
        more = lm.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert ids == more[0, len(prompt) :].tolist()


def test_an_answer_says_what_it_took(reference):
    assert reference.ttft > 0 and reference.tpot > 0 and reference.load_seconds > 0
    assert reference.peak > reference.libraries > 2**20
    assert max(size for _, size in reference.trace) <= reference.peak


def test_an_answer_ends_at_a_stop_and_leaves_it_out(reference):
    stop = reference.ids[0][2]
    (ids,) = compare.answer("transformers", "fp32", native_folder("qwen-7b"), PROMPTS[:1], 4, [stop]).ids
    assert ids == reference.ids[0][: reference.ids[0].index(stop)]


@with_airllm
def test_airllm_writes_the_same_tokens_from_one_file_a_part(reference, tmp_path):
    made = compare.prepare("airllm", "fp32", native_folder("qwen-7b"), tmp_path / "cut")
    names = {file.stem for file in made.rglob("*.safetensors")}
    assert names == {"model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"}
    lean = compare.answer("airllm", "fp32", made, PROMPTS[:1], 2, warm_up=False)
    assert lean.ids[0] == reference.ids[0][:2]


def test_a_cap_on_memory_holds():
    with pytest.raises(
        HelpersError, match=r"transformers failed: .*([Cc]annot allocate memory|can't start new thread)"
    ):
        compare.answer("transformers", "fp32", native_folder("qwen-7b"), PROMPTS, 1, cap=2**20)


def test_a_converter_that_fails_is_told_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "none"}))
    with pytest.raises(HelpersError, match=r"^transformers failed: ") as error:
        compare.answer("transformers", "fp32", tmp_path, PROMPTS, 1)
    assert "\n" not in str(error.value)


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(HelpersError, match="Did you mean vllm"):
        compare.why_not("vlm")
    with pytest.raises(HelpersError, match=r"unknown precision of transformers 'fp16'.*fp32"):
        compare.prepare("transformers", "fp16", "x", "y")


def test_a_missing_environment_says_how_to_make_it(monkeypatch):
    monkeypatch.setattr(compare, "SERIES", Path("nowhere"))
    assert compare.why_not("airllm") == "there is no .venv-frameworks: run make frameworks"
    with pytest.raises(HelpersError, match=r"cannot ask airllm: there is no .venv-frameworks\. Run make frameworks"):
        compare.prepare("airllm", "fp32", "x", "y")


def test_without_an_environment_of_the_series_the_python_that_asks_is_taken(monkeypatch):
    monkeypatch.setattr(compare, "SERIES", Path("nowhere"))  # as in Colab and conda
    assert compare._python("transformers") == compare._python("vllm") == Path(sys.executable)
    assert compare.why_not("transformers") is None


def test_without_proc_the_ram_is_still_measured(monkeypatch):
    seen = compare._memory("VmRSS")
    monkeypatch.setattr(compare, "STATUS", Path("nowhere"))  # as on macOS and Windows
    assert compare._memory("VmHWM") == pytest.approx(seen, rel=0.2)


def test_a_vllm_for_cuda_is_left_out(monkeypatch):
    cuda = lambda engine, expression: "is_cpu_build" not in expression  # noqa: E731
    monkeypatch.setattr(compare, "_is_true", cuda)
    assert compare.why_not("vllm").startswith("its vLLM is built for CUDA: ")
    assert compare.why_not("transformers") is None


def test_what_is_asked_about_vllm_can_be_asked():
    import importlib.util

    from helpers.serving.launch import is_cpu_build

    here = importlib.util.find_spec("vllm") is not None and is_cpu_build()
    assert (compare.why_not("vllm") is None) == here


@pytest.mark.parametrize(
    ("ids", "other", "place"), [([1, 2], [1, 2], None), ([1, 3], [1, 2], 1), ([1], [1, 2], 1), ([], [], None)]
)
def test_first_difference(ids, other, place):
    assert compare.first_difference(ids, other) == place


def test_the_size_is_that_of_the_weights(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "model.safetensors").write_bytes(b"0" * 10)
    (tmp_path / "tokenizer.json").write_bytes(b"0" * 100)
    assert compare.size(tmp_path) == 10
    assert compare.size(tmp_path / "deep" / "model.safetensors") == 10
