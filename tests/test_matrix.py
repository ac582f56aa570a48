"""The measured matrix: one load for all points, rows as the catalogue wants them, and going on where it stopped."""

import json
import os

import pytest
import torch

from helpers import common
from helpers.catalog import MeasuredRow
from helpers.errors import HelpersError
from helpers.memory import matrix
from helpers.memory.matrix import measure_matrix
from helpers.memory.speed import Speed
from helpers.native import check_length

TINY = dict(weights="tiny", device="cpu", new_tokens=4, prompt_tokens=[8, 16], decodings=["default", "static"])


@pytest.fixture(autouse=True)
def nothing_in_common():
    yield
    common()


IN_OWN_PROCESS = matrix.in_own_process


@pytest.fixture(autouse=True)
def here_and_without_a_clock(monkeypatch):
    """In this process, and not timed: on a busy machine four tokens can take no time at all."""

    def speed(lm, **point):
        check_length(lm, point["prompt_tokens"] + point["new_tokens"])
        return Speed(**point, prefill_seconds=0.1, ttft_s=0.1, tpot_s=0.01, bytes_per_step=1)

    monkeypatch.setattr(matrix, "generation_speed", speed)
    monkeypatch.setattr(matrix, "in_own_process", lambda function, *task: function(*task))


@pytest.fixture
def loads(monkeypatch):
    """Count what is loaded."""
    seen, load = [], matrix.load

    def counted(*args):
        seen.append(args[:3])
        return load(*args)

    monkeypatch.setattr(matrix, "load", counted)
    return seen


def rows(path):
    return [MeasuredRow.model_validate(json.loads(line)) for line in path.read_text().splitlines()]


def test_one_load_measures_all_lengths_and_decodings(tmp_path, loads):
    out = tmp_path / "rows.jsonl"
    measure_matrix(["qwen-7b"], ["fp32"], out, **TINY)
    assert loads == [("qwen-7b", "tiny", "fp32")]
    found = rows(out)
    points = [(row.prompt_tokens, row.decoding) for row in found if row.name == "tpot"]
    assert points == [(8, "default"), (16, "default"), (8, "static"), (16, "static")]
    assert [row.decoding for row in found if row.name in ("weights", "load_seconds")] == [None, None]
    assert found[-1].name == "request" and found[-1].value < min(row.value for row in found if row.name == "tpot")
    assert {row.batch for row in found if row.name == "decode_speed"} == {1}
    assert all(row.prompt_tokens for row in found if row.name == "rss_peak")
    assert len({row.setting() for row in found}) == len(found)  # the catalogue refuses a figure twice a day


def test_each_model_is_measured_in_a_process_of_its_own(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(matrix, "in_own_process", IN_OWN_PROCESS)
    out = tmp_path / "rows.jsonl"
    measure_matrix(["qwen-7b"], ["fp32"], out, **TINY | {"prompt_tokens": [600]})  # loaded; nothing that is timed fits
    assert {row.name for row in rows(out)} == {"weights", "load_seconds", "request"}
    assert "600 + 4 tokens, static: left out" in capfd.readouterr().out
    monkeypatch.setattr(matrix, "_measure_model", die)
    measure_matrix(["qwen-7b"], ["bf16"], out, **TINY)
    assert "left out: the process died" in capfd.readouterr().out and {row.precision for row in rows(out)} == {"fp32"}


def die(*_):
    os._exit(1)


def test_a_stopped_run_goes_on_with_what_is_missing(tmp_path, loads, capsys):
    out = tmp_path / "rows.jsonl"
    measure_matrix(["qwen-7b"], ["fp32"], out, **TINY | {"prompt_tokens": [8]})
    before = out.read_text()
    measure_matrix(["qwen-7b"], ["fp32"], out, **TINY)
    assert out.read_text().startswith(before) and len(loads) == 2
    assert [row.prompt_tokens for row in rows(out) if row.name == "tpot"] == [8, 8, 16, 16]
    assert [row.name for row in rows(out)].count("weights") == 1
    capsys.readouterr()
    measure_matrix(["qwen-7b"], ["fp32"], out, **TINY)
    assert len(loads) == 2 and "measured already" in capsys.readouterr().out


@pytest.mark.parametrize("step", ["generation_speed", "load"])
def test_a_card_that_is_too_small_is_a_row_and_is_not_tried_again(tmp_path, monkeypatch, capsys, step):
    def too_large(*_, prompt_tokens=16, **__):
        tried.append(prompt_tokens)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    tried, out, fitting = [], tmp_path / "rows.jsonl", matrix.generation_speed
    point = TINY | {"decodings": ["default"]}
    measure_matrix(["qwen-7b"], ["fp32"], out, **point | {"prompt_tokens": [8]})
    monkeypatch.setattr(matrix, step, too_large)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    for _ in range(2):
        measure_matrix(["qwen-7b"], ["fp32"], out, **point)
    assert tried == [16] and "out of memory" in capsys.readouterr().out
    (row,) = (row for row in rows(out) if row.name == "out_of_memory")
    assert (row.value, row.unit, row.prompt_tokens) == (3, "GiB", 16 if step == "generation_speed" else None)
    if step == "generation_speed":  # of this length, not of others
        monkeypatch.setattr(matrix, step, fitting)
        measure_matrix(["qwen-7b"], ["fp32"], out, **point | {"prompt_tokens": [16, 24]})
        assert [row.prompt_tokens for row in rows(out) if row.name == "tpot"] == [8, 24]


def test_what_is_past_the_context_is_left_out_and_the_rest_measured(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    measure_matrix(["qwen-7b"], ["fp32"], out, **TINY | {"prompt_tokens": [600, 8]})
    assert [row.prompt_tokens for row in rows(out) if row.name == "tpot"] == [8, 8]
    assert "600 + 4 tokens, default: left out: 604 tokens are too many" in capsys.readouterr().out


def test_a_published_context_is_known_before_loading(tmp_path, loads, capsys):
    sizes = dict(weights="random", prompt_tokens=[8192], new_tokens=64)
    measure_matrix(["qwen-7b"], ["bf16"], tmp_path / "rows.jsonl", **sizes)
    assert loads == [] and "8192 + 64 tokens: left out, its context ends at 8192" in capsys.readouterr().out


def test_a_point_without_memory_is_left_out_and_the_next_one_measured(tmp_path, monkeypatch, capsys):
    measured = matrix.generation_speed

    def tight(lm, **point):
        if point["prompt_tokens"] == 8:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
        return measured(lm, **point)

    monkeypatch.setattr(matrix, "generation_speed", tight)
    measure_matrix(["qwen-7b"], ["fp32"], tmp_path / "rows.jsonl", **TINY)
    assert {row.prompt_tokens for row in rows(tmp_path / "rows.jsonl") if row.name == "tpot"} == {16}
    assert "8 + 4 tokens, default: left out: CUDA out of memory.\n" in capsys.readouterr().out


def test_a_point_that_is_no_row_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    broken = Speed(1, 8, 4, prefill_seconds=0.1, ttft_s=0.1, tpot_s=-0.01, bytes_per_step=1)
    monkeypatch.setattr(matrix, "generation_speed", lambda lm, **point: broken)
    measure_matrix(["qwen-7b"], ["fp32"], tmp_path / "rows.jsonl", **TINY)
    assert {row.decoding for row in rows(tmp_path / "rows.jsonl")} == {None}  # the load's alone
    assert "left out: 'decode_speed' in python -m helpers measure is no row" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ["qwen-7b", "qwen-9b"]}, "unknown model 'qwen-9b'"),
        ({"precisions": ["fp32", "int3"]}, "unknown precision 'int3'"),
        ({"decodings": ["default", "fast"]}, "unknown decoding 'fast'"),
        ({"weights": "full"}, "unknown weights 'full'"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_measured(tmp_path, loads, change, message):
    with pytest.raises(HelpersError, match=message):
        settings = TINY | {"models": ["qwen-7b"], "precisions": ["fp32"]} | change
        measure_matrix(output=tmp_path / "rows.jsonl", **settings)
    assert loads == [] and not (tmp_path / "rows.jsonl").exists()
