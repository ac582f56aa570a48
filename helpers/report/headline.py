"""The measured table in one page of Markdown: what README.md shows, drawn from the rows and never typed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .. import catalog

if TYPE_CHECKING:
    from ..catalog import MeasuredRow

DEVICE = "NVIDIA H100 80GB HBM3"
MARKS = "<!-- measured: python -m helpers table -->", "<!-- end of measured -->"
"""Between these README.md holds what ``headline`` returns."""

PEAKS = {192: (128, 64), 2048: (1984, 64), 8192: (8128, 64)}
"""Tokens of prompt and answer together, and how they were split."""


def headline(device: str = DEVICE) -> str:
    """Return a Markdown table of every model that was measured in 16 bit at full size, in the catalogue's order.

    Columns are weights, peak memory of default ``generate`` in GiB at each of ``PEAKS``, and tokens/s at batch 1 of
    default ``generate``, of ``FastDecoder`` as it is and compiled, and of vLLM, and of vLLM at 256 prompts at once. A
    dash is "not measured".

    Args:
        device: as rows name it.
    """
    rows = catalog.measured(device=device, weights="random", precision=["fp16", "bf16"])
    lines = [
        "| model | weights | peak at 192 | 2,048 | 8,192 tokens "
        "| generate | FastDecoder | compiled | vLLM | vLLM, 256 at once |",
        "| --- " + "| ---: " * 9 + "|",
    ]
    for id, model in catalog.models().items():
        own = [row for row in rows if row.model == id]
        weights = _newest(own, "weights", engine="transformers")
        if weights is None:
            continue
        peaks = [_peak(own, *split) for split in PEAKS.values()]
        first = {"batch": 1, "prompt_tokens": 128}
        speeds = [
            _newest(own, "decode_speed", decoding="default", new_tokens=64, **first),
            _newest(own, "decode_speed", decoding="static", new_tokens=64, **first),
            _newest(own, "decode_speed", decoding="compiled", new_tokens=64, **first),
            _newest(own, "decode_speed", engine="vllm", new_tokens=128, **first),
            _newest(own, "decode_speed", engine="vllm", new_tokens=128, batch=256, prompt_tokens=128),
        ]
        cells = [f"{weights:.2f}", *(_cell(one, ".2f") for one in peaks), *(_cell(one, ",.0f") for one in speeds)]
        lines.append(f"| {model.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _peak(rows: Iterable[MeasuredRow], prompt: int, new: int) -> float | None:
    sizes = {"batch": 1, "prompt_tokens": prompt, "new_tokens": new, "decoding": "default"}
    return _newest(rows, "allocated_peak", **sizes)


def _newest(rows: Iterable[MeasuredRow], name: str, **about: object) -> float | None:
    """Return the value of the newest row of that name and setting; None where there is none."""
    found = [row for row in rows if row.name == name and all(getattr(row, key) == want for key, want in about.items())]
    return max(found, key=lambda row: row.date).value if found else None


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
