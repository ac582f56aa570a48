"""Figures: the line a reader sees, the row a notebook keeps, and what nbval is told to blank."""

import math
import re
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_notebook, new_output

from helpers import catalog, common, memory_bar, record, show
from helpers.errors import HelpersError
from helpers.memory.work import decode_work
from helpers.report import LivePicture, Table, describe_parts, harvest, recorded
from helpers.report.headline import DEVICE, WAYS, recorded_parts, recorded_speeds, speeds
from helpers.report.record import METADATA_KEY, figure, format_value

PATTERNS = re.findall(r"^regex: (.*)$\n^replace: (.*)$", Path("tests/nbval.cfg").read_text(), re.MULTILINE)
"""Read as nbval reads them."""

ROW = dict(
    name="decode_speed", value=12.5, unit="tokens/s", machine=True, definition="median of 3 runs", model=None,
    weights="tiny", precision="fp32", batch=1, prompt_tokens=128, new_tokens=128, device="A processor", driver=None,
    versions={"torch": "2.13.0"}, date="2026-11-24",
)  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_in_common():
    yield
    common()


def sanitised(text):
    for pattern, replacement in PATTERNS:
        text = re.sub(pattern, replacement, text)
    return text


def notebook(tmp_path, *rows):
    outputs = [new_output("stream", text="not a figure\n")]
    outputs += [new_output("display_data", {"text/plain": "x"}, metadata={METADATA_KEY: row}) for row in rows]
    path = tmp_path / "07_speed.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("x", outputs=outputs)]), path)
    return path


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12.3449, "12.34"),
        (0.00123449, "0.001234"),
        (12345.6, "12,346"),
        (-2.5, "-2.500"),
        (0.0, "0"),
        (12345, "12,345"),
        (True, "True"),
        ("nf4", "nf4"),
        (None, "n/a"),
    ],
)
def test_four_digits_and_no_exponent(value, text):
    assert format_value(value) == text


def test_one_line_outside_jupyter(capsys):
    record("weights_on_disk", 12.5, "GiB")
    record("perplexity", torch.tensor(3.25))
    record("decode_speed", 31.4159, "tokens/s", machine=True)
    record("vram", None, "GiB", machine=True)
    assert capsys.readouterr().out.splitlines() == [
        "weights_on_disk = 12.50 GiB",
        "perplexity = 3.250",
        "decode_speed = 31.42 tokens/s  (this machine)",
        "vram = n/a GiB  (this machine)",
    ]


def test_sanitiser_blanks_machine_figures_and_nothing_else(capsys):
    texts = []
    for value in (31.4159, 12345.6, None, 7):
        record("speed", value, "tokens/s", machine=True)
        record("ratio", value, machine=True)
        texts.append(sanitised(capsys.readouterr().out))
    assert len(set(texts)) == 1 and "speed = * tokens/s" in texts[0]
    record("speed", 31.4, "tokens/s")
    assert sanitised(kept := capsys.readouterr().out) == kept


def test_sanitiser_keeps_unit_and_name_apart():
    assert sanitised("a = 1 s  (this machine)") != sanitised("a = 1 GiB  (this machine)")
    assert sanitised("a = 1 s  (this machine)") != sanitised("b = 1 s  (this machine)")


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor(math.nan)])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(HelpersError, match="cannot record 'loss'"):
        record("loss", value)


def test_names_and_fields_are_checked():
    with pytest.raises(HelpersError, match="cannot record 'Decode speed'"):
        record("Decode speed", 1.0)
    with pytest.raises(HelpersError, match=r"unknown field of a figure 'modell': .*Did you mean model"):
        record("speed", 1.0, modell="x")
    with pytest.raises(HelpersError, match="unknown field"):
        common(kind="tiny")


def test_in_a_kernel_the_row_travels_in_the_metadata(monkeypatch):
    published = []
    # by sys.modules: the attribute `helpers.report.record` is the function of that name
    monkeypatch.setattr(sys.modules["helpers.report.record"], "in_notebook", lambda: True)
    monkeypatch.setattr(
        "IPython.display.publish_display_data", lambda *pair, metadata: published.append((*pair, metadata))
    )
    common(model="m", weights="tiny", precision="nf4")
    record("speed", 2.0, "tokens/s", machine=True, precision="int8", definition="d", device="cpu")
    ((data, metadata),) = published
    row = metadata[METADATA_KEY]
    assert data == {"text/plain": "speed = 2.000 tokens/s  (this machine)"}
    assert (row["model"], row["weights"], row["precision"]) == ("m", "tiny", "int8")
    assert row["versions"]["torch"] == torch.__version__ and row["device"] != "cpu" and row["driver"] is None


@pytest.mark.parametrize(("device", "name"), [("cuda:1", "card 1"), ("cuda", "card 0"), ("auto", "card 0")])
def test_a_figure_names_the_card_that_computed_it(device, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_name", lambda card=None: f"card {torch.device(card or 'cuda').index or 0}"
    )
    assert figure("speed", 1.0, device=device)["device"] == name


def test_recorded_reads_figures_in_order(tmp_path):
    path = notebook(tmp_path, ROW, ROW | {"name": "second"})
    assert [figure["name"] for figure in recorded(path)] == ["decode_speed", "second"]


def test_harvest_takes_measured_figures_only_and_fills_the_row(tmp_path):
    path = notebook(tmp_path, ROW, ROW | {"machine": False}, ROW | {"value": None})
    (row,) = harvest(path)
    assert row["notebook"] == "07_speed" and row["engine"] == "transformers" and "machine" not in row
    assert (row["value"], row["unit"], row["date"]) == (12.5, "tokens/s", "2026-11-24")


def test_harvest_refuses_an_incomplete_row(tmp_path):
    without = {key: value for key, value in ROW.items() if key != "definition"}
    with pytest.raises(HelpersError, match=r"'decode_speed' in 07_speed is no row .*definition"):
        harvest(notebook(tmp_path, without))


def test_what_is_no_notebook_is_refused(tmp_path):
    with pytest.raises(HelpersError, match="no such file"):
        recorded(tmp_path / "none.ipynb")
    (tmp_path / "bad.ipynb").write_text("{")
    with pytest.raises(HelpersError, match="not a notebook"):
        recorded(tmp_path / "bad.ipynb")


def test_pictures_carry_their_text(monkeypatch):
    published = []
    monkeypatch.setattr("helpers.report.plots.in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.publish_display_data", published.append)
    for size in ((2, 2), (3, 2)):
        show(Figure(size), alt='a "falling" line < 3')
    first, second = (data["text/html"] for data in published)
    assert 'alt="a &quot;falling&quot; line &lt; 3"' in first and published[0]["text/plain"] == 'a "falling" line < 3'
    assert first != second and sanitised(first) == sanitised(second)  # nbval sees the same, whatever was drawn


def test_a_live_picture_keeps_its_place(monkeypatch):
    published = []
    monkeypatch.setattr("helpers.report.plots.in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.publish_display_data", lambda data, **place: published.append((data, place)))
    one, other = LivePicture(), LivePicture()
    for live, alt in ((one, "half"), (other, "else"), (one, "whole")):
        live.show(Figure((2, 2)), alt=alt)
    places = [place["transient"]["display_id"] for _, place in published]
    assert places[0] == places[2] != places[1]
    assert [place["update"] for _, place in published] == [False, False, True]
    assert [data["text/plain"] for data, _ in published] == ["half", "else", "whole"]


def test_a_picture_without_text_is_refused():
    with pytest.raises(HelpersError, match="alt text is empty"):
        show(Figure(), alt=" ")


def test_memory_bar_stacks_to_the_sum_and_shows_what_was_recorded_below():
    here, elsewhere = {"weights": 1.0, "KV cache": 0.5}, {"weights": 12.0, "KV cache": 2.0}
    fig = memory_bar(here, recorded=elsewhere)
    bars = [[(bar.get_x(), bar.get_width()) for bar in part] for part in fig.axes[0].containers]
    assert bars == [[(0, 1.0), (0, 12.0)], [(1.0, 0.5), (12.0, 2.0)]]
    labels = [text.get_text() for text in fig.axes[0].get_legend().get_texts()]
    assert labels[0] == "weights: 1.000 GiB here, 12.00 GiB recorded"
    show(fig, alt=describe_parts(here, elsewhere))
    assert len(memory_bar(here, recorded={}).axes[0].patches) == 2


def test_describe_parts_says_the_sum():
    text = describe_parts({"weights": 12.0, "KV cache": 0.5}, {"weights": 1.0})
    assert text.startswith("weights 12.00 GiB, KV cache 0.5000 GiB; together 12.50 GiB. Recorded at full size: weights")


def test_recorded_parts_are_the_recorded_peak():
    about = {"model": "qwen-7b", "name": "allocated_peak", "prompt_tokens": 1984, "decoding": "default"}
    (peak,) = catalog.measured(precision="bf16", batch=1, device=DEVICE, **about)
    parts = recorded_parts("qwen-7b")
    assert sum(parts.values()) == pytest.approx(peak.value) and parts["KV cache"] == 1
    assert recorded_parts("chinese-alpaca-plus-7b") == {}, "nothing was recorded of it"


def test_recorded_speeds_give_each_way_its_share_of_the_bandwidth():
    rows = {how: (precision, speed, share) for how, precision, _, speed, share in recorded_speeds("qwen-7b").rows}
    assert list(rows) == list(WAYS) and rows["default, nf4"][0] == "nf4"
    assert {"static", "static, nf4"} <= {line[0] for line in recorded_speeds("qwen3-8b").rows}
    vllm = speeds("qwen-7b")["vLLM"]
    read = decode_work("qwen-7b", "bf16", context=128 + 64).bytes * vllm.value / 3.35e12
    assert rows["vLLM"] == ("bf16", f"{vllm.value:,.0f}", f"{read:.0%}")
    assert recorded_speeds("chinese-alpaca-plus-7b").rows[0][0] == "not recorded"


def test_table_escapes_and_aligns():
    table = Table("sizes", ("part", "GiB"), [("a<b", "1"), ("c", "22")])
    assert '<th scope="row">a&lt;b</th><td>1</td>' in table._repr_html_()
    assert str(table).splitlines() == ["sizes", "part  GiB", "a<b   1", "c     22"]
