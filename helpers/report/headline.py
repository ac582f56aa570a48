"""The measured rows in short: README's table, and one model's speeds and memory for its notebook; nothing is typed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .. import catalog
from .table import Table

if TYPE_CHECKING:
    from ..catalog import MeasuredRow

DEVICE = "NVIDIA H100 80GB HBM3"
MARKS = "<!-- measured: python -m helpers table -->", "<!-- end of measured -->"
"""Between these README.md holds what ``headline`` returns."""

FEWER_BITS_MARKS = "<!-- measured in 8 and 4 bits: python -m helpers table -->", "<!-- end of 8 and 4 bits -->"
"""Between these README.md holds what ``fewer_bits`` returns."""

PEAKS = {192: (128, 64), 2048: (1984, 64), 8192: (8128, 64)}
"""Tokens of prompt and answer together, and how they were split."""

SIXTEEN = ["fp16", "bf16"]
DEFAULT, STATIC, COMPILED = (
    {"engine": "transformers", "decoding": way, "batch": 1, "new_tokens": 64}
    for way in ("default", "static", "compiled")
)
VLLM = {"engine": "vllm", "batch": 1, "new_tokens": 128}
WAYS = {
    "default": DEFAULT | {"precision": SIXTEEN},
    "default, nf4": DEFAULT | {"precision": "nf4"},
    "static": STATIC | {"precision": SIXTEEN},
    "static, nf4": STATIC | {"precision": "nf4"},
    "compiled": COMPILED | {"precision": SIXTEEN},
    "vLLM": VLLM | {"precision": SIXTEEN},
    "vLLM, 256 at once": VLLM | {"precision": SIXTEEN, "batch": 256},
}
"""How a model wrote -> the rows that say so."""


def headline(device: str = DEVICE) -> str:
    """Return a Markdown table of every model that was measured in 16 bit at full size, in the catalogue's order.

    Columns are weights, peak memory of default ``generate`` in GiB at each of ``PEAKS``, and tokens/s at batch 1 of
    default ``generate`` and ``FastDecoder`` after 1,984 tokens (all of one day), of ``FastDecoder`` compiled
    and vLLM after 128, and of vLLM at 256 prompts at once. A dash is "not measured".

    Args:
        device: as rows name it.
    """
    rows = catalog.measured(device=device, weights="random", precision=SIXTEEN)
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
        peaks = [_newest(own, "allocated_peak", prompt_tokens=split[0], **DEFAULT) for split in PEAKS.values()]
        speeds = [_newest(own, "decode_speed", prompt_tokens=1984, **way) for way in (DEFAULT, STATIC)]
        speeds += [_newest(own, "decode_speed", prompt_tokens=128, **way) for way in (COMPILED, VLLM)]
        speeds += [_newest(own, "decode_speed", prompt_tokens=128, **VLLM | {"batch": 256})]
        cells = [_cell(one, ".2f") for one in (weights, *peaks)] + [_cell(one, ",.0f") for one in speeds]
        lines.append(f"| {model.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fewer_bits(device: str = DEVICE) -> str:
    """Return a Markdown table of every model that was measured in 8 or 4 bits at full size, in the catalogue's order.

    Columns are the weights in GiB as transformers holds them, and tokens/s at batch 1 after 128 tokens of prompt: of
    default ``generate`` in int8, whose step cannot be recorded, of ``FastDecoder`` and of vLLM in 16 bit to compare
    with, in nf4 and in GPTQ-4. A dash is "not measured".

    Args:
        device: as rows name it.
    """
    columns = ["weights: int8 | nf4 | GPTQ-4", "generate: int8"]
    columns += [f"{how}: 16 bit | nf4 | GPTQ-4" for how in ("FastDecoder", "vLLM")]
    lines = [f"| model | {' | '.join(columns)} |", "| --- " + "| ---: " * 10 + "|"]
    for id, model in catalog.models().items():
        own = catalog.measured(device=device, weights="random", model=id)
        plain, int8, nf4, gptq = (
            [row for row in own if row.precision in kinds] for kinds in (SIXTEEN, ["int8"], ["nf4"], ["gptq-int4"])
        )
        weights = [_newest(rows, "weights", engine="transformers") for rows in (int8, nf4, gptq)]
        speeds = [_newest(int8, "decode_speed", prompt_tokens=128, **DEFAULT)]
        for way in (STATIC, VLLM):
            speeds += [_newest(rows, "decode_speed", prompt_tokens=128, **way) for rows in (plain, nf4, gptq)]
        if any(weights):
            cells = [_cell(one, ".2f") for one in weights] + [_cell(one, ",.0f") for one in speeds]
            lines.append(f"| {model.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speeds(model: str, device: str = DEVICE) -> dict[str, MeasuredRow]:
    """Return the newest recorded ``decode_speed`` of each of ``WAYS`` at full size, after a prompt of 128 tokens.

    Args:
        model: catalogue id.
        device: as rows name it.

    Raises:
        HelpersError: no such model.
    """
    about = {"model": catalog.model(model).id, "device": device, "weights": "random", "prompt_tokens": 128}
    found = {how: _newest(catalog.measured(**about, **way), "decode_speed") for how, way in WAYS.items()}
    return {how: row for how, row in found.items() if row}


def recorded_speeds(model: str, device: str = DEVICE) -> Table:
    """Lay out ``speeds`` with the share of the card's bandwidth (datasheet) that each step's reading accounts for.

    The speed of several prompts at once is that of all answers together. Arguments and errors as ``speeds``.
    """
    from ..memory.roofline import point_of

    lines = []
    for how, row in speeds(model, device).items():
        share = f"{point_of(row).mbu:.0%}"
        lines.append((how, row.precision, f"{row.batch}", f"{row.value:,.0f}", share))
    columns = ("how", "precision", "sequences", "tokens/s, all together", "share of the bandwidth")
    caption = f"{catalog.model(model).name}, full size, {device}, 128 tokens of prompt"
    return Table(caption, columns, lines or [("not recorded", *"-" * 4)])


def recorded_parts(model: str, device: str = DEVICE) -> dict[str, float]:
    """Split the recorded peak at 2,048 tokens as ``memory_parts`` does, in GiB: 16-bit weights, default ``generate``.

    Arguments and errors as ``speeds``. Empty where nothing is recorded.
    """
    row, (prompt, new) = catalog.model(model), PEAKS[2048]
    rows = catalog.measured(model=model, device=device, weights="random", precision=SIXTEEN)
    weights = _newest(rows, "weights", engine="transformers")
    peak = _newest(rows, "allocated_peak", prompt_tokens=prompt, **DEFAULT)
    if not weights or not peak:
        return {}
    cache = (prompt + new) * row.kv_bytes_per_token(2) / 2**30
    return {"weights": weights.value, "KV cache": cache, "rest of the peak": peak.value - weights.value - cache}


def _newest(rows: Iterable[MeasuredRow], name: str, **about: object) -> MeasuredRow | None:
    """Return the newest row of that name and setting; None where there is none."""
    found = [row for row in rows if row.name == name and all(getattr(row, key) == want for key, want in about.items())]
    return max(found, key=lambda row: row.date, default=None)


def _cell(row: MeasuredRow | None, form: str) -> str:
    return "-" if row is None else format(row.value, form)
