"""README.md: its figures are the rows', and its list of notebooks is the series."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers import catalog
from helpers.report.headline import DEFAULT, DEVICE, FEWER_BITS_MARKS, MARKS, SIXTEEN, STATIC, fewer_bits, headline

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("marks", "drawn"), [(MARKS, headline), (FEWER_BITS_MARKS, fewer_bits)])
def test_the_measured_tables_are_drawn_from_the_rows(marks, drawn):
    first, last = marks
    shown = README.partition(first)[2].partition(last)[0].strip()
    assert shown == drawn(), "run: python -m helpers table, and put what it prints between the marks"


def test_speeds_of_generate_and_fastdecoder_are_of_one_day_as_it_says():
    about = {"device": DEVICE, "weights": "random", "precision": SIXTEEN, "prompt_tokens": 1984, "name": "decode_speed"}
    assert len({row.date for way in (DEFAULT, STATIC) for row in catalog.measured(**about, **way)}) == 1


def test_every_notebook_is_listed_in_order():
    listed = re.findall(r"\(notebooks/(\d\d_\w+)\.ipynb\)", README)
    assert listed == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
