"""The measured figures: each with its circumstances, none twice, and found by filter."""

from __future__ import annotations

import json
import sys

import pytest

from helpers.catalog import measured, recorded
from helpers.catalog.measured import FOLDER, MeasuredRow, read_measured
from helpers.errors import HelpersError

ROW = {
    "name": "decode_speed",
    "value": 12.4,
    "unit": "tokens/s",
    "definition": "new tokens over the time after the first; median of 3",
    "model": "qwen-7b",
    "weights": "random",
    "precision": "bf16",
    "engine": "transformers",
    "decoding": "default",
    "batch": 1,
    "prompt_tokens": 128,
    "new_tokens": 128,
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "580.0",
    "versions": {"torch": "2.11.0"},
    "date": "2026-11-01",
    "notebook": "04_speed",
}
DEVICE_ROW = (
    ROW
    | dict.fromkeys(["model", "weights", "precision", "decoding", "batch", "prompt_tokens", "new_tokens"])
    | {
        "name": "bandwidth",
        "unit": "GB/s",
        "engine": "torch",
    }
)


def write(folder, *rows, name="h100.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


OPTIONAL = ("requests_per_s", "parallel")
"""Fields that came later, and that few rows need."""


def test_the_folder_of_the_series_is_read():
    rows = read_measured(FOLDER)
    assert measured() == [row for row in rows if row.parallel is None] and len(measured()) < len(rows)


def test_rows_come_back_as_written(tmp_path):
    rows = read_measured(write(tmp_path, ROW, DEVICE_ROW))
    assert [row.model_dump(mode="json") for row in rows] == [
        ROW | dict.fromkeys(OPTIONAL),
        DEVICE_ROW | dict.fromkeys(OPTIONAL),
    ]


def test_filters_take_a_value_or_several(tmp_path, monkeypatch):
    rows = read_measured(write(tmp_path, ROW, ROW | {"precision": "nf4"}, ROW | {"precision": "int8"}, DEVICE_ROW))
    monkeypatch.setitem(measured.__globals__, "_catalogue", lambda: rows)
    assert len(measured()) == 4
    assert [row.precision for row in measured(model="qwen-7b", precision=["bf16", "nf4"])] == ["bf16", "nf4"]
    assert measured(model=None) == [rows[3]]
    rows.append(rows[0].model_copy(update={"parallel": "tp2"}))
    assert len(measured()) == 4 and measured(parallel="tp2") == rows[4:] and measured(parallel=[None, "tp2"]) == rows
    with pytest.raises(HelpersError, match=r"unknown field of a measured row 'precison'.*Did you mean precision"):
        measured(precison="bf16")


def test_a_figure_measured_again_replaces_the_older_one(tmp_path):
    write(tmp_path, ROW | {"value": 30.0, "date": "2026-11-20"}, name="a.jsonl")
    rows = read_measured(write(tmp_path, ROW, name="b.jsonl"))
    assert [row.value for row in rows] == [30.0]


def test_the_same_figure_twice_on_one_day_is_refused(tmp_path):
    write(tmp_path, ROW, name="a.jsonl")
    write(tmp_path, DEVICE_ROW, ROW | {"value": 13.0}, name="b.jsonl")
    with pytest.raises(HelpersError, match=r"b\.jsonl: line 2: measures the same on the same day as a\.jsonl line 1"):
        read_measured(tmp_path)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"colour": "red"}, "line 2.colour: .*not permitted"),
        ({"value": 0}, "line 2.value: .*greater than 0"),
        ({"unit": "GB"}, "line 2.unit: .*GiB"),
        ({"definition": ""}, "line 2.definition: .*at least 1"),
        ({"model": "qwen-8b"}, "line 2.model: there is no model 'qwen-8b'"),
        ({"versions": {}}, "line 2.versions: .*at least 1"),
        ({"batch": 0}, "line 2.batch: .*greater than 0"),
        ({"date": "2999-01-01"}, "line 2.date: .*future"),
        ({"engine": "llama.cpp"}, "line 2.engine: .*vllm"),
        ({"decoding": "eager"}, "line 2.decoding: .*static"),
    ],
)
def test_a_bad_line_is_refused_by_file_line_and_field(tmp_path, change, place):
    with pytest.raises(HelpersError, match=rf"h100\.jsonl: {place}"):
        read_measured(write(tmp_path, DEVICE_ROW, ROW | change))


@pytest.mark.parametrize("field", [field for field in MeasuredRow.model_fields if field not in OPTIONAL])
def test_no_field_may_be_left_out(tmp_path, field):
    with pytest.raises(HelpersError, match=rf"h100\.jsonl: line 1\.{field}: Field required"):
        read_measured(write(tmp_path, {key: value for key, value in ROW.items() if key != field}))


@pytest.mark.parametrize("line", ["{", "[1]", "NaN"])
def test_a_line_that_is_no_object_is_refused(tmp_path, line):
    (tmp_path / "h100.jsonl").write_text(line)
    with pytest.raises(HelpersError, match=r"h100\.jsonl: line 1: "):
        read_measured(tmp_path)


def test_recorded_lays_the_figures_of_one_setting_side_by_side(tmp_path, monkeypatch):
    speed = ROW | {"name": "decode_speed", "unit": "tokens/s", "value": 12.348}
    rows = read_measured(write(tmp_path, ROW | {"name": "allocated_peak"}, speed, speed | {"precision": "nf4"}))
    monkeypatch.setattr(sys.modules["helpers.catalog.measured"], "_catalogue", lambda: rows)
    frame = recorded(ROW["model"])
    assert frame["precision"].tolist() == ["bf16", "nf4"]
    assert frame["decode (tokens/s)"].tolist() == [12.35, 12.35]
    assert frame["peak (GiB)"].tolist()[0] == ROW["value"] and frame["peak (GiB)"].isna().tolist() == [False, True]
    with pytest.raises(HelpersError, match="unknown model 'qwen7b'"):
        recorded("qwen7b")
