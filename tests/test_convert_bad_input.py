"""What ``convert`` says about checkpoints it cannot convert, and what it leaves on the disk: nothing by halves."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors.torch
import torch
from reference import chatglm2
from reference.checking import random_weights, write_original
from safetensors import SafetensorError

from helpers.errors import HelpersError
from helpers.native import convert
from helpers.native.convert import _first_line

ORIGINAL = {
    "model_type": "chatglm",
    "padded_vocab_size": 40,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_layers": 2,
    "num_attention_heads": 4,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "kv_channels": 4,
    "seq_length": 32,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True,
}
WEIGHTS = random_weights(chatglm2.shapes(ORIGINAL))
LAYER = "transformer.encoder.layers.0."


def without(mapping, key):
    return {name: value for name, value in mapping.items() if name != key}


def wide(key):
    return {key: torch.zeros(3, 3)}


BROKEN_MODELS = {
    "a config key is missing": (
        without(ORIGINAL, "kv_channels"),
        WEIGHTS,
        r"config.json has no 'kv_channels'\. Take the original config.json from the model's own repository\.",
    ),
    "the family is unknown": (
        ORIGINAL | {"model_type": "chatgml"},
        WEIGHTS,
        r"unknown model_type in config.json 'chatgml': .* Did you mean chatglm\? .*valid: baichuan, chatglm",
    ),
    "a setting has no native form": (
        ORIGINAL | {"apply_residual_connection_post_layernorm": True},
        WEIGHTS,
        r"apply_residual_connection_post_layernorm=True, and only False .*\. Use a checkpoint of the published",
    ),
    "rope_ratio means something else": (
        ORIGINAL | {"rope_ratio": 16, "_name_or_path": "THUDM/chatglm2-6b-32k"},
        WEIGHTS,
        r"rope_ratio=16, and only 1 can be converted exactly\. Use",
    ),
    "heads and tensor disagree": (
        ORIGINAL | {"num_attention_heads": 8},
        WEIGHTS,
        r"query_key_value.*', \[32.*\], cannot be cut as config.json says\. Check that config.json and weights",
    ),
    "sizes and tensor disagree": (
        ORIGINAL | {"ffn_hidden_size": 32},
        WEIGHTS,
        r"mlp.down_proj.weight' would have shape \[16, 24\], config.json asks for \[16, 32\]\. Check",
    ),
    "a tensor is missing": (
        ORIGINAL,
        without(WEIGHTS, LAYER + "self_attention.dense.weight"),
        r"no tensor becomes 'model.layers.0.self_attn.o_proj.weight': the checkpoint is incomplete\. Check",
    ),
    "a tensor is unknown": (
        ORIGINAL,
        WEIGHTS | wide(LAYER + "self_attention.extra.weight"),
        r"holds 'transformer.encoder.layers.0.self_attention.extra.weight', which is no tensor of chatglm\. Check",
    ),
    "there is a layer too many": (
        ORIGINAL | {"num_layers": 1},
        WEIGHTS,
        r"'model.layers.1.\S+' has no place in a model of 1 layers\. Check",
    ),
}


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def delete(name):
    return lambda folder: (folder / name).unlink()


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0123456789abcdef' * 4}\nsize 13476839488\n"
LFS = r"cannot read {}: it is a Git LFS pointer, .*\. Run git lfs install and git lfs pull in original, or download"
DAMAGED = r"cannot read {}: the file is truncated or damaged \(.+\)\. Download this shard again\."
BROKEN_FILES = {
    "truncated safetensors": ({}, cut("model.safetensors"), DAMAGED.format("model.safetensors")),
    "corrupt header": ({}, text("model.safetensors", "{" * 500), DAMAGED.format("model.safetensors")),
    "empty safetensors": ({}, text("model.safetensors", ""), DAMAGED.format("model.safetensors")),
    "truncated bin": ({"suffix": "bin"}, cut("pytorch_model.bin"), DAMAGED.format("pytorch_model.bin")),
    "pointer for safetensors": ({}, text("model.safetensors", POINTER), LFS.format("model.safetensors")),
    "pointer for bin": ({"suffix": "bin"}, text("pytorch_model.bin", POINTER), LFS.format("pytorch_model.bin")),
    "missing shard": (
        {"shards": 3},
        delete("model-00002-of-00003.safetensors"),
        r"is incomplete: shard model-00002-of-00003.safetensors is missing\. Download it again\.",
    ),
    "index not JSON": (
        {"shards": 2},
        text("model.safetensors.index.json", "<html>"),
        r"cannot read model.safetensors.index.json: it is not an index of shards\. Download it again\.",
    ),
    "config not JSON": ({}, text("config.json", "<html>"), r"config.json: it is not JSON \(.+\)\. Download it again\."),
    "config no object": ({}, text("config.json", "[]"), r"config.json: it holds no settings by name\. Download"),
    "no config": (
        {},
        delete("config.json"),
        r"no checkpoint in .*: there is no config.json\. Check the folder's name\.",
    ),
    "no weights": (
        {},
        delete("model.safetensors"),
        r"no weights in .*: there is neither model.safetensors nor pytorch_model.bin, .*\. Download the whole",
    ),
}


def listing(folder: Path) -> dict[str, int]:
    """Everything below a folder, with the time of its last change."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def assert_refused(folder: Path, message: str, left: tuple[str, ...] = ()) -> None:
    """Convert ``folder/original``; assert the one-line error, and that only the files ``left`` are new."""
    before = listing(folder)
    with pytest.raises(HelpersError, match=message) as caught:
        convert(folder / "original", folder / "native")
    assert "\n" not in str(caught.value)
    after = listing(folder)
    assert set(after) - set(before) == set(left)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(("original", "weights", "message"), BROKEN_MODELS.values(), ids=BROKEN_MODELS.keys())
def test_a_model_that_does_not_fit_is_refused(tmp_path, original, weights, message):
    write_original(tmp_path / "original", original, weights)
    assert_refused(tmp_path, message)


@pytest.mark.parametrize(("layout", "damage", "message"), BROKEN_FILES.values(), ids=BROKEN_FILES.keys())
def test_a_damaged_file_is_refused(tmp_path, layout, damage, message):
    damage(write_original(tmp_path / "original", ORIGINAL, WEIGHTS, **layout))
    assert_refused(tmp_path, message)


@pytest.mark.parametrize("message", ["one two " * 30, "three\nlines\nlong", ""])
def test_a_quoted_message_is_one_short_line_of_whole_words(message):
    quoted = _first_line(RuntimeError(message)).removesuffix(" ...")
    assert 0 < len(quoted) <= 100
    assert set(quoted.split()) <= {*message.split(), "RuntimeError"}


def test_a_pickle_with_code_is_refused_and_the_code_does_not_run(tmp_path):
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return Path.touch, (marker,)

    write_original(tmp_path / "original", ORIGINAL, WEIGHTS | {"extra": Payload()}, suffix="bin")
    assert_refused(tmp_path, r"refused to load pytorch_model.bin: .* could run code .*\. Take the safetensors file")
    assert not marker.exists()
    torch.load(tmp_path / "original" / "pytorch_model.bin", weights_only=False)
    assert marker.exists(), "the payload is a dud, so the refusal above proves nothing"


def test_a_training_checkpoint_is_refused(tmp_path):
    write_original(tmp_path / "original", ORIGINAL, {"state_dict": WEIGHTS, "step": 7}, suffix="bin")
    assert_refused(tmp_path, r"cannot read pytorch_model.bin: it holds something else than tensors by name\. Take")


@pytest.mark.parametrize("place", ["original", ".", "kept"])
def test_a_folder_of_something_else_is_not_replaced(tmp_path, place):
    write_original(tmp_path / "original", ORIGINAL, WEIGHTS)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("years of work")
    before = listing(tmp_path)
    with pytest.raises(HelpersError, match=r"will not replace .*\. Name a folder that does not exist yet\."):
        convert(tmp_path / "original", tmp_path / place)
    assert listing(tmp_path) == before


FULL = r"cannot write native: the disk is full: \d+\.\d\d GB are needed, .* GB are free\. Free some space"


def test_a_disk_too_small_is_noticed_before_writing(tmp_path, monkeypatch):
    write_original(tmp_path / "original", ORIGINAL, WEIGHTS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1000))
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *args, **more: pytest.fail("it began to write"))
    assert_refused(tmp_path, FULL, left=("native.lock",))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["OSError", "SafetensorError"],
)
def test_a_disk_that_fills_up_leaves_the_earlier_result(tmp_path, monkeypatch, error):
    write_original(tmp_path / "original", ORIGINAL, WEIGHTS, shards=2)
    convert(tmp_path / "original", tmp_path / "native")
    write_original(tmp_path / "original", ORIGINAL, random_weights(chatglm2.shapes(ORIGINAL), seed=2), shards=2)
    break_after(1, error, monkeypatch)
    (tmp_path / "native.lock").unlink()
    assert_refused(tmp_path, FULL, left=("native.lock",))


def break_after(shards: int, error: BaseException, monkeypatch) -> list[Path]:
    """Let ``save_file`` fail half-way through the shard after ``shards`` good ones; returns what it wrote, live."""
    written = []

    def save(tensors, file, metadata=None):
        if len(written) == shards:
            for name in (file, Path(file).with_name(".tmpX1y2Z3")):  # safetensors writes beside, then renames
                Path(name).write_bytes(b"half a shard")
            raise error
        written.append(file)
        original_save(tensors, file, metadata=metadata)

    original_save = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", save)
    return written


@pytest.mark.parametrize("changed", [False, True], ids=["same source", "changed source"])
def test_an_interrupted_run_goes_on_at_the_next_shard_of_the_same_source(tmp_path, monkeypatch, changed):
    weights = WEIGHTS
    source = write_original(tmp_path / "original", ORIGINAL, weights, shards=3)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        break_after(1, KeyboardInterrupt(), patched)
        convert(source, tmp_path / "native")
    assert not (tmp_path / "native").exists()
    first = "model-00001-of-00003.safetensors"
    kept = (tmp_path / "native.partial" / first).stat().st_mtime_ns

    if changed:
        weights = random_weights(chatglm2.shapes(ORIGINAL), seed=2)
        write_original(source, ORIGINAL, weights, shards=3)
    target = convert(source, tmp_path / "native")
    assert ((target / first).stat().st_mtime_ns == kept) is not changed
    assert not (tmp_path / "native.partial").exists()

    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    others = {"config.json", "generation_config.json", "conversion.json", "model.safetensors.index.json"}
    assert {file.name for file in target.iterdir()} == {*index.values(), *others}
    found = {}
    for file in set(index.values()):
        found |= safetensors.torch.load_file(target / file)
    assert set(found) == set(index)
    assert torch.equal(found["lm_head.weight"], weights["transformer.output_layer.weight"])
    assert torch.equal(found["model.embed_tokens.weight"], weights["transformer.embedding.word_embeddings.weight"])


def test_two_conversions_at_once_do_the_work_once(tmp_path, monkeypatch):
    source = write_original(tmp_path / "original", ORIGINAL, WEIGHTS, shards=2)
    writing, go_on, saves, results = threading.Event(), threading.Event(), [], []
    save = safetensors.torch.save_file

    def slow_save(tensors, file, metadata=None):
        saves.append(file)
        writing.set()
        assert go_on.wait(60)
        save(tensors, file, metadata=metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", slow_save)
    threads = [threading.Thread(target=lambda: results.append(convert(source, tmp_path / "native"))) for _ in range(2)]
    threads[0].start()
    assert writing.wait(60)
    threads[1].start()
    threads[1].join(0.5)
    assert threads[1].is_alive(), "the second did not wait for the first"
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert results == [tmp_path / "native"] * 2
    assert len(saves) == 2
