"""vLLM's part of the measured table: one real engine, rows as the catalogue wants them, and what cannot be started."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers import common
from helpers.catalog import MeasuredRow
from helpers.checkpoints import random
from helpers.checkpoints.quantized import labels
from helpers.checkpoints.random import FORMATS
from helpers.errors import HelpersError
from helpers.serving import matrix
from helpers.serving.command import int8_folder, prepare

SIZES = {"weights": "tiny", "prompt_tokens": [8], "new_tokens": 4}


@pytest.fixture(autouse=True)
def nothing_in_common():
    yield
    common()


def rows(path):
    return [MeasuredRow.model_validate(json.loads(line)) for line in path.read_text().splitlines()]


def test_an_engine_is_measured_once_in_a_process_of_its_own(tmp_path, capfd):
    out = tmp_path / "rows.jsonl"
    matrix.measure_engines(["qwen-7b"], ["auto"], out, batches=[1, 2], **SIZES)
    found = rows(out)
    assert {"weights", "kv_tokens", "start_seconds"} <= {row.name for row in found if row.batch is None}
    speeds = {(row.name, row.batch) for row in found if row.batch}
    assert speeds == {(name, batch) for name in ("throughput", "decode_speed", "ttft", "tpot") for batch in (1, 2)}
    assert {(row.engine, row.precision, row.decoding, row.parallel) for row in found} == {("vllm", "fp32", None, None)}
    (weights,) = [row for row in found if row.name == "weights"]
    assert "UnquantizedLinearMethod" in weights.definition
    matrix.measure_engines(["qwen-7b"], ["auto"], out, batches=[2], **SIZES)
    assert "measured already" in capfd.readouterr().out and len(rows(out)) == len(found)


def test_what_does_not_start_is_said_and_the_next_is_tried(tmp_path, monkeypatch, capsys):
    @contextmanager
    def broken(**_):
        raise ValueError("No available memory for the cache blocks.\nmore")
        yield

    monkeypatch.setattr(matrix, "in_own_process", lambda function, *task: function(*task))  # where it can be broken
    monkeypatch.setattr(matrix, "offline_engine", broken)
    matrix.measure_engines(["qwen-7b", "chatglm3-6b"], ["auto"], tmp_path / "rows.jsonl", **SIZES)
    said = capsys.readouterr().out
    assert said.count("left out: ValueError: No available memory for the cache blocks.\n") == 2
    assert not (tmp_path / "rows.jsonl").exists()


def die(*_):
    os._exit(1)


def test_a_process_that_dies_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "_measure_engine", die)
    matrix.measure_engines(["qwen-7b"], ["auto"], tmp_path / "rows.jsonl", **SIZES)
    assert "left out: the engine's process died" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["qwen-7b", "qwen3-0.6b"])
def test_random_weights_on_disk_are_a_folder_that_vllm_quantises(model, tmp_path, monkeypatch):
    """One converted, one born native; of full width they would be gigabytes."""
    full_config = random.full_config

    def small(row):
        config = full_config(row)
        config.vocab_size = config.hidden_size = config.intermediate_size = 64
        config.num_attention_heads = config.num_key_value_heads = 4
        return config

    monkeypatch.setattr(random, "full_config", small)
    matrix._write_random(model, tmp_path / "random", "cpu")
    job = prepare(model, tmp_path / "random", "nf4", "auto", {})
    assert job.folder == tmp_path / "random" and job.options["quantization"] == "bitsandbytes"
    assert (job.folder / "tokenizer.json").exists() and list(job.folder.glob("*.safetensors"))


def test_weights_written_for_bitsandbytes_are_removed_with_what_was_made_of_them(tmp_path, monkeypatch):
    written, served = [], []

    def here(function, *task):
        if function is matrix._write_random:
            written.append(task[0])
            return task[1].mkdir(parents=True)
        return function(*task)

    @contextmanager
    def engine(weights, precision, **_):
        assert Path(weights).is_dir()
        served.append(precision)
        int8_folder("qwen-7b", weights).mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt if len(served) == 2 else ValueError("no card")
        yield

    monkeypatch.setenv("LLM_DEPLOY_CACHE", str(tmp_path))
    monkeypatch.setattr(matrix, "in_own_process", here)
    monkeypatch.setattr(matrix, "offline_engine", engine)
    asked = {"prompt_tokens": [8], "weights": "random", "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        matrix.measure_engines(["qwen-7b"], ["nf4", "int8"], tmp_path / "rows.jsonl", **asked)
    assert (written, served) == (["qwen-7b"], ["nf4", "int8"])  # written once, read twice
    assert [folder.exists() for folder in matrix._files("qwen-7b")] == [False] * 3
    assert not list((tmp_path / "native" / "random").iterdir())


@pytest.mark.parametrize("given,said", [({"models": ["qwen"]}, "unknown model"), ({"precisions": ["int5"]}, "int5")])
def test_bad_names_are_refused_before_anything_starts(tmp_path, given, said):
    asked = {"models": ["qwen-7b"], "precisions": ["auto"]} | given
    with pytest.raises(HelpersError, match=said):
        matrix.measure_engines(**asked, output=tmp_path / "rows.jsonl", **SIZES)


@pytest.mark.parametrize("precision", FORMATS)
def test_random_weights_in_a_quantised_form_are_only_a_config(precision):
    job = prepare("chatglm3-6b", "random", precision, "auto", {})
    config = json.loads((job.folder / "config.json").read_text())
    assert job.precision == precision and job.options["load_format"] == "dummy"
    assert config["quantization_config"] == FORMATS[precision]
    assert not list(job.folder.glob("*.safetensors"))
    with pytest.raises(HelpersError, match="unknown precision"):
        prepare("chatglm3-6b", "tiny", precision, "auto", {})


def test_a_quantised_folder_is_labelled_by_its_receipt(tmp_path):
    receipt = {"method": "gptq", "weights": "random", "settings": {"bits": 4}}
    (tmp_path / "quantization.json").write_text(json.dumps(receipt))
    assert labels(str(tmp_path), "auto") == {"weights": "random", "precision": "gptq-int4"}
    assert labels("tiny", "nf4") == {"weights": "tiny", "precision": "nf4"}
