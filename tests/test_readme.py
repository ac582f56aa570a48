"""README.md: its figures are the rows', and its list of notebooks is the series."""

from __future__ import annotations

import re
from pathlib import Path

from helpers import catalog
from helpers.report.headline import DEFAULT, DEVICE, MARKS, SIXTEEN, STATIC, headline

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_measured_table_is_drawn_from_the_rows():
    first, last = MARKS
    shown = README.partition(first)[2].partition(last)[0].strip()
    assert shown == headline(), "run: python -m helpers table, and put what it prints between the marks"


def test_speeds_of_generate_and_fastdecoder_are_of_one_day_as_it_says():
    about = {"device": DEVICE, "weights": "random", "precision": SIXTEEN, "prompt_tokens": 1984, "name": "decode_speed"}
    assert len({row.date for way in (DEFAULT, STATIC) for row in catalog.measured(**about, **way)}) == 1


def test_every_notebook_is_listed_in_order():
    listed = re.findall(r"\(notebooks/(\d\d_\w+)\.ipynb\)", README)
    assert listed == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
