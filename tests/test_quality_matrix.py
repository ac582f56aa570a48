"""The quality matrix: four rows a point, resumed where it stopped, and what the recorded rows have to say."""

from __future__ import annotations

import json
import re
from inspect import signature
from pathlib import Path
from typing import get_args

import pytest
import torch
from typer.testing import CliRunner

from helpers import catalog, common, load
from helpers.__main__ import app
from helpers.catalog.measured import FOLDER, MeasuredRow, Precision, read_measured
from helpers.checkpoints.load import stand_ins
from helpers.errors import HelpersError
from helpers.quantization import matrix
from helpers.quantization.matrix import KV_CACHE, PLAIN, WAYS, judge, linear_bytes, quality_matrix
from helpers.quantization.quality import fp8_cache

FEW = dict(device="cpu", unseen=2, learnt=2)
NAMES = ["held_out_perplexity", "disk_bytes", "linear_bytes", "recited"]


@pytest.fixture(autouse=True)
def nothing_in_common():
    yield
    common()


@pytest.fixture
def judged(monkeypatch):
    """Count the points that are judged."""
    seen = []

    def counted(model, precision, *args):
        seen.append((model, precision))
        return judge(model, precision, *args)

    monkeypatch.setattr(matrix, "judge", counted)
    return seen


def rows(path):
    return [MeasuredRow.model_validate(json.loads(line)) for line in path.read_text().splitlines()]


def test_a_point_is_four_rows_that_the_catalogue_takes(tmp_path):
    (tmp_path / "rows").mkdir()
    out = tmp_path / "rows" / "cpu.jsonl"
    quality_matrix(["qwen-7b"], ["fp32", "nf4"], out, **FEW)
    found = read_measured(out.parent)
    assert [row.name for row in found] == NAMES * 2
    assert {row.notebook for row in found} == {"python -m helpers quality"}
    assert {row.driver for row in found} == {None}
    value = {(row.precision, row.name): row.value for row in found}
    assert value["nf4", "linear_bytes"] < value["fp32", "linear_bytes"] / 6
    assert value["nf4", "disk_bytes"] < value["fp32", "disk_bytes"]
    assert value["fp32", "recited"] == 2
    assert value["fp32", "held_out_perplexity"] != value["nf4", "held_out_perplexity"]


def test_a_stopped_run_goes_on_with_what_is_missing(tmp_path, judged, capsys):
    out = tmp_path / "rows.jsonl"
    quality_matrix(["qwen-7b"], ["fp32"], out, **FEW)
    before = out.read_text()
    quality_matrix(["qwen-7b"], ["fp32", "int8"], out, **FEW)
    assert judged == [("qwen-7b", "fp32"), ("qwen-7b", "int8")]
    assert "qwen-7b fp32: measured already" in capsys.readouterr().out
    assert out.read_text().startswith(before) and len(rows(out)) == 8


@pytest.mark.parametrize(
    ("model", "precision", "why"),
    [
        ("rwkv-6-7b", "gptq-int4", "cannot quantise rwkv-6-7b by GPTQModel"),
        ("chatglm-6b", "awq-int4", "cannot quantise chatglm-6b by AWQ"),
        ("rwkv-6-7b", "fp8-kv", "cannot round the KV cache of rwkv-6-7b: it has none"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_rest_judged(tmp_path, model, precision, why, capsys):
    out = tmp_path / "rows.jsonl"
    quality_matrix([model], [precision, "fp32"], out, **FEW)
    assert {row.precision for row in rows(out)} == {"fp32"}
    assert f"{model} {precision}: left out: {why}" in capsys.readouterr().out


def test_an_interrupted_point_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    folders = []
    make = matrix.scratch_folder
    monkeypatch.setenv("LLM_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(matrix, "recited", interrupted)
    monkeypatch.setattr(matrix, "scratch_folder", lambda: folders.append(make()) or folders[-1])
    with pytest.raises(KeyboardInterrupt):
        quality_matrix(["qwen-7b"], ["nf4"], tmp_path / "rows.jsonl", **FEW)
    assert Path(folders[0].name).parent == tmp_path / "cache"  # the system's folder may be RAM
    assert not Path(folders[0].name).exists()
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ["qwen-7b", "qwen-9b"]}, "unknown model 'qwen-9b'"),
        ({"precisions": ["fp32", "int5"]}, "unknown precision 'int5'"),
        ({"weights": "full"}, "unknown weights 'full'"),
        ({"weights": "random"}, "cannot judge random weights"),
    ],
)
def test_bad_names_are_refused_before_anything_is_judged(tmp_path, judged, change, message):
    with pytest.raises(HelpersError, match=message):
        settings = {"models": ["qwen-7b"], "precisions": ["fp32"], "output": tmp_path / "rows.jsonl"} | FEW | change
        quality_matrix(**settings)
    assert judged == []


def test_an_fp8_cache_holds_e4m3_values_and_every_token():
    lm, _ = load("qwen-7b", "tiny", "fp32", "cpu")
    cache, ids = fp8_cache(lm), torch.arange(300, 340)[None]
    with torch.inference_mode():
        whole = lm(input_ids=ids, past_key_values=cache).logits
        parts = fp8_cache(lm)
        lm(input_ids=ids[:, :30], past_key_values=parts)
        rest = lm(input_ids=ids[:, 30:], past_key_values=parts).logits
        plain = lm(input_ids=ids).logits
    torch.testing.assert_close(rest, whole[:, 30:], atol=1e-4, rtol=1e-4)
    assert 0.01 < (whole - plain).abs().max() < 0.5 * plain.std()
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            assert states.shape[2] == 40
            assert torch.equal(states.to(torch.float8_e4m3fn).float(), states)
    keys = torch.full((1, 1, 1, 2), 1e4)
    assert fp8_cache(lm).update(keys, -keys, 0)[0].max() == 448  # the largest number, not NaN


def test_linear_bytes_counts_the_matrices_but_the_head():
    lm, _ = load("qwen-7b", "tiny", "fp32", "cpu")
    shape = lm.config
    width = shape.hidden_size
    matrices = shape.num_hidden_layers * (4 * width * width + 3 * width * shape.intermediate_size)
    biases = shape.num_hidden_layers * 3 * width
    assert linear_bytes(lm) == 4 * (matrices + biases)


def test_every_way_is_a_precision_of_the_tables_and_takes_its_settings():
    assert {*PLAIN, *WAYS, KV_CACHE} == set(get_args(Precision))
    for make, settings, _ in WAYS.values():
        assert set(settings) <= set(signature(make).parameters)


def test_only_a_count_may_be_zero(tmp_path):
    out = tmp_path / "rows.jsonl"
    quality_matrix(["qwen-7b"], ["fp32"], out, **FEW)
    row = {one.name: one.model_dump(mode="json") for one in rows(out)}
    assert MeasuredRow.model_validate(row["recited"] | {"value": 0}).value == 0
    with pytest.raises(ValueError, match="greater than 0"):
        MeasuredRow.model_validate(row["disk_bytes"] | {"value": 0})
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        MeasuredRow.model_validate(row["recited"] | {"value": -1})


def test_the_command_takes_every_precision_unless_told(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(matrix, "quality_matrix", lambda *args, **more: calls.append((*args, more)))
    out = tmp_path / "new" / "rows.jsonl"
    for given in ([], ["--precision", "nf4", "--precision", "fp8"]):
        outcome = CliRunner().invoke(app, ["quality", "qwen-7b", "atom-7b", "--output", str(out), *given])
        assert outcome.exit_code == 0, outcome.output
    settings = {"weights": "tiny", "device": "auto"}
    assert calls[0] == (["qwen-7b", "atom-7b"], ["fp32", *WAYS, KV_CACHE], out, settings)
    assert calls[1][1] == ["nf4", "fp8"] and out.parent.is_dir()


# The rows that are shipped.


@pytest.fixture(scope="module")
def shipped():
    """Return (model, precision) -> name -> value of cpu-quality.jsonl."""
    table: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows(FOLDER / "cpu-quality.jsonl"):
        table.setdefault((row.model, row.precision), {})[row.name] = row.value
    return table


def test_shipped_points_are_whole_and_each_model_has_its_reference(shipped):
    assert all(sorted(point) == sorted(NAMES) for point in shipped.values())
    own = {name for name in stand_ins() if catalog.model(name).stand_in == name}
    judged = {model for model, _ in shipped}
    assert judged <= own and all((model, "fp32") in shipped for model in judged)


def test_shipped_losses_are_in_their_broad_order(shipped):
    eight, four = ["int8", "gptq-int8", "w8a8", "fp8", "fp8-kv"], ["gptq-int4", "rtn-int4", "awq-int4", "nf4", "fp4"]
    pairs = [(large, small) for small in eight for large in four]
    pairs += [(large, small) for small in four for large in ("gptq-int3", "rtn-int3")]
    pairs += [("rtn-int4", "gptq-int4"), ("rtn-int3", "gptq-int3"), ("fp4", "nf4")]
    lost = {point: figures["held_out_perplexity"] for point, figures in shipped.items()}
    compared = [
        (model, large, small)
        for model in {model for model, _ in shipped}
        for large, small in pairs
        if {(model, large), (model, small)} <= set(lost)
    ]
    assert len({model for model, *_ in compared}) >= 10
    assert [one for one in compared if lost[one[0], one[1]] <= lost[one[0], one[2]]] == []


def test_shipped_bytes_follow_the_bits(shipped):
    for (model, precision), point in shipped.items():
        bits = 32 * point["linear_bytes"] / shipped[model, "fp32"]["linear_bytes"]
        stated = 32 if precision == KV_CACHE else int(re.search(r"\d+", precision)[0])
        assert stated <= bits < stated + 1.5, (model, precision, bits)
