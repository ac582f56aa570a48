"""The model catalogue: complete, true to its arithmetic and to transformers, and not to be broken without a word."""

from __future__ import annotations

import copy
import re
from typing import get_args

import pytest
import yaml

from helpers.catalog.models import FILE, Shipped, model, models, read_models
from helpers.errors import HelpersError

STAND_INS = ["chatglm2-6b", "chatglm3-6b", "baichuan-7b", "baichuan2-7b", "qwen-7b", "internlm2-7b", "atom-7b"]
STAND_INS += ["llama2-chinese-7b", "chinese-alpaca-7b"]
ROWS = yaml.safe_load(FILE.read_text(encoding="utf-8"))


def test_stand_ins_come_first_and_in_reading_order():
    assert list(models())[: len(STAND_INS)] == STAND_INS
    later = [row.id for row in list(models().values())[len(STAND_INS) :] if row.stand_in == row.id]
    assert {"chatglm-6b", "baichuan-13b", "glm-4-9b", "qwen3-8b", "internlm3-8b"} <= set(later)
    assert all(model(id).stand_in == id for id in STAND_INS)


def test_a_shared_stand_in_becomes_the_class_of_both():
    for row in models().values():
        if row.stand_in is not None:
            assert row.native_class == model(row.stand_in).native_class, row.id
    assert model("chinese-llama-7b").stand_in == "chinese-alpaca-7b"


def test_every_model_of_the_survey_is_there():
    surveyed = {*STAND_INS, "chatglm-6b", "baichuan-13b", "baichuan2-13b", "chinese-llama-7b", "chinese-alpaca-plus-7b"}
    assert surveyed | {"rwkv-4-7b", "rwkv-5-7b", "rwkv-6-7b", "rwkv-7-2.9b"} <= set(models())
    assert {row.family for row in models().values()} == {"glm", "llama", "rwkv"}


@pytest.mark.parametrize("row", models().values(), ids=models())
def test_the_shape_gives_exactly_the_stated_parameters(row):
    """The file allows 0.1 % for tables that old checkpoints store; of the parameters themselves none is missing."""
    assert sum(row.count_parameters().values()) == row.parameters


@pytest.mark.parametrize(
    ("id", "kib"), [("chatglm3-6b", 28), ("qwen-7b", 512), ("internlm2-7b", 128), ("baichuan-13b", 800)]
)
def test_kv_cache_of_a_token_in_16_bit(id, kib):
    assert model(id).kv_bytes_per_token() == kib * 1024
    assert model(id).kv_bytes_per_token(bytes_per_value=1) == kib * 512


def test_an_rnn_keeps_a_state_and_no_cache():
    for id in ("rwkv-4-7b", "rwkv-6-7b", "rwkv-7-2.9b"):
        assert model(id).kv_bytes_per_token() == 0
        assert model(id).state_bytes() > 0
    assert model("rwkv-4-7b").state_bytes() == 4 * 5 * 32 * 4096  # five vectors a layer in fp32
    assert model("qwen-7b").state_bytes() == 0


def test_the_chat_formats_are_those_that_are_shipped():
    from helpers.native.chat_templates import CHAT_TEMPLATES

    assert set(get_args(Shipped)) - {"none"} == set(CHAT_TEMPLATES) - {"none"}


def test_an_unknown_id_names_the_near_ones():
    with pytest.raises(HelpersError, match=r"unknown model 'chatglm3-6'.*Did you mean .*chatglm3-6b"):
        model("chatglm3-6")


def broken(tmp_path, change):
    """Write models.yaml with one change and return what reading it raises, as text."""
    rows = copy.deepcopy(ROWS)
    change(rows)
    path = tmp_path / "models.yaml"
    path.write_text(yaml.safe_dump(rows, sort_keys=False, allow_unicode=True), encoding="utf-8")
    with pytest.raises(HelpersError) as raised:
        read_models(path)
    return str(raised.value)


def test_an_unbroken_copy_is_read(tmp_path):
    path = tmp_path / "models.yaml"
    path.write_text(yaml.safe_dump(ROWS, sort_keys=False), encoding="utf-8")
    assert read_models(path) == models()


def put(id, *keys, value):
    """Return a change that sets one field of one row."""

    def change(rows):
        place = rows[id]
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


def drop(id, key):
    return lambda rows: rows[id].pop(key)


@pytest.mark.parametrize(
    ("change", "place", "why"),
    [
        (put("qwen-7b", "colour", value="red"), "qwen-7b.colour", "not permitted"),
        (put("qwen-7b", "shape", "depth", value=3), "qwen-7b.shape.transformer.depth", "not permitted"),
        (drop("qwen-7b", "sources"), "qwen-7b.sources", "required"),
        (put("qwen-7b", "sources", value=[]), "qwen-7b.sources", "at least 1"),
        (put("qwen-7b", "sources", 0, "url", value="QwenLM/Qwen"), "qwen-7b.sources.0.url", "pattern"),
        (put("qwen-7b", "sources", 0, "checked", value="2999-01-01"), "qwen-7b.sources.0.checked", "future"),
        (put("qwen-7b", "parameters", value=7_736_767_193), "qwen-7b.parameters", r"\+0.20%"),
        (put("qwen-7b", "shape", "layers", value=31), "qwen-7b.parameters", "the shape gives"),
        (put("qwen-7b", "weight_bytes", value=7_721_324_544), "qwen-7b.weight_bytes", "-50.00%"),
        (put("atom-7b", "stored_parameters", value=7_100_000_000), "atom-7b.weight_bytes", "two bytes"),
        (put("qwen-7b", "shape", "layers", value=0), "qwen-7b.shape.transformer.layers", "greater than 0"),
        (put("qwen-7b", "shape", "kv_heads", value=5), "qwen-7b.shape.transformer.kv_heads", "evenly"),
        (put("qwen-7b", "shape", "rope_theta", value=None), "qwen-7b.shape.transformer.rope_theta", "missing"),
        (put("baichuan-13b", "shape", "rope_theta", value=1e4), "baichuan-13b.shape.transformer.rope_theta", "given"),
        (put("rwkv-7-2.9b", "shape", "ranks", value={}), "rwkv-7-2.9b.shape.rwkv.ranks", "version 7 has the ranks"),
        (
            put("qwen-7b", "original_config", value={"seq_length": 1}),
            "qwen-7b.original_config",
            "model_type is missing",
        ),
        (put("qwen-7b", "context", value=0), "qwen-7b.context", "greater than 0"),
        (put("qwen-7b", "chat_format", value="qwen"), "qwen-7b.chat_format", "Input should be"),
        (put("qwen-7b", "revision", value="main"), "qwen-7b.revision", "pattern"),
        (drop("qwen-7b", "revision_note"), "qwen-7b.revision_note", "required"),
        (put("qwen-7b", "largest_file", value=16_000_000_000), "qwen-7b.largest_file", "all files"),
        (put("qwen-7b", "published", 0, "value", value=-1), "qwen-7b.published.0.value", "greater than 0"),
        (put("qwen-7b", "published", 0, "source", value="https://example.org"), "qwen-7b.published", "not among"),
        (put("qwen-7b", "successor", value="qwen9"), "qwen-7b.successor", "no row 'qwen9'"),
        (put("qwen-7b", "stand_in", value="qwen9"), "qwen-7b.stand_in", "no stand-in of 'qwen9'"),
        (put("qwen-7b", "stand_in", value="chinese-llama-7b"), "qwen-7b.stand_in", "no stand-in of 'chinese-llama-7b'"),
        (put("qwen3-8b", "successor", value="qwen-7b"), "qwen3-8b.successor", "given, with status 'current'"),
        (drop("qwen-7b", "original_config"), "qwen-7b.original_config", "missing, with conversion 'qwen'"),
        (drop("qwen3-8b", "native_config"), "qwen3-8b.native_config", "missing, with conversion 'none'"),
    ],
)
def test_a_broken_row_is_refused_by_file_row_and_field(tmp_path, change, place, why):
    message = broken(tmp_path, change)
    assert message.startswith(f"models.yaml: {place}: "), message
    assert re.search(why, message), message


def test_a_row_given_twice_is_refused(tmp_path):
    path = tmp_path / "models.yaml"
    text = FILE.read_text(encoding="utf-8")
    path.write_text(text + text[text.index("\nqwen3-0.6b:") : text.index("\ninternlm3-8b:")], encoding="utf-8")
    with pytest.raises(HelpersError, match=r"models\.yaml: qwen3-0\.6b: given twice, in lines \d+ and \d+"):
        read_models(path)


BUILDABLE = [row.id for row in models().values() if row.original_config or row.native_config]


def expected(row):
    """What the row's shape says, under the names of transformers' configs."""
    shape = row.shape
    if shape.kind == "rwkv":
        return {"hidden_size": shape.hidden_size, "num_hidden_layers": shape.layers, "vocab_size": shape.vocab_size}
    return {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.ffn_size,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": row.context,
    }


@pytest.mark.parametrize("id", BUILDABLE)
def test_transformers_builds_the_model_that_the_row_describes(id):
    """The full-size model, empty, has the row's class and exactly its parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    from helpers.checkpoints.random import full_config

    row = model(id)
    config = full_config(row)
    for name, value in expected(row).items():
        assert getattr(config, name) == value, name
    if row.shape.kind == "transformer":
        head_dim = getattr(
            config, "head_dim", config.hidden_size // config.num_attention_heads
        )  # Qwen2 has no such key
        assert head_dim == row.shape.head_dim
        if row.shape.positions != "alibi":
            assert config.rope_parameters["rope_theta"] == row.shape.rope_theta
            assert config.rope_parameters.get("partial_rotary_factor", 1) == row.shape.rotary_fraction
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert type(empty).__name__ == row.native_class
    assert sum(parameter.numel() for parameter in empty.parameters()) == row.parameters
