"""The measured table: models x precisions, one point after another, each written down as soon as it is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.load import check_names, load
from ..errors import HelpersError
from ..report.record import common, figure, format_value, measured_row
from .measure import GIB, free, measure
from .speed import generation_speed

SOURCE = "python -m helpers measure"


def measure_matrix(
    models: Sequence[str],
    precisions: Sequence[str],
    output: Path,
    *,
    weights: str = "random",
    device: str = "auto",
    batch: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
) -> None:
    """Measure every point that ``output`` does not hold yet, and append its rows.

    A point is one model in one precision: it is loaded, and prefill and decode are timed at the given batch and
    lengths. One that does not fit on the device is reported and left out; the others go on.

    Args:
        models: catalogue ids.
        precisions: as ``load``.
        output: file of JSON lines in the form of ``helpers.catalog.MeasuredRow``.
        weights, device: as ``load``.
        batch, prompt_tokens, new_tokens: as ``generation_speed``.

    Raises:
        HelpersError: an unknown name, before anything is measured.
    """
    import transformers  # noqa: F401 - before the clock starts: its import belongs to no point

    for precision in precisions:
        check_names(weights, precision)
    points = [(model, precision) for model in models for precision in precisions]
    for number, (model, precision) in enumerate(points, start=1):
        about = {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        common(model=model, weights=weights, precision=precision, engine="transformers")
        print(f"[{number}/{len(points)}] {model} {precision}: ", end="", flush=True)
        if _done(output, about):
            print("measured already")
            continue
        try:
            figures = _measure_point(model, weights, precision, device, about)
        except (HelpersError, MemoryError, RuntimeError) as error:  # torch's out-of-memory error is a RuntimeError
            print(f"left out: {str(error).splitlines()[0]}")
            free()
            continue
        with output.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(measured_row(one, SOURCE), ensure_ascii=False) + "\n" for one in figures)
        shown = [one for one in figures if one["name"] in ("weights", "allocated_peak", "decode_speed")]
        print(", ".join(f"{one['name']} {format_value(one['value'])} {one['unit']}" for one in shown))


def _measure_point(
    model: str, weights: str, precision: str, device: str, about: dict[str, int]
) -> list[dict[str, Any]]:
    """Load one model, time it, and free it again; return the figures."""
    with measure("load") as loading:
        lm, _ = load(model, weights, precision, device)
    with measure("generate") as generating:
        speed = generation_speed(lm, **about)
    size = lm.get_memory_footprint() / GIB
    what = "bytes of all parameters and buffers as loaded, quantised ones packed"
    figures = [
        figure("weights", size, "GiB", machine=True, definition=what),
        *(figure(**one) for one in loading.figures("load") if one["name"] in ("load_seconds", "load_allocated_peak")),
        *(figure(**(one | about)) for one in generating.figures() if one["name"] != "seconds"),
        *(figure(**one) for one in speed.figures()),
    ]
    del lm
    free()
    return figures


def _done(output: Path, about: dict[str, int]) -> bool:
    """Tell whether the file holds this point's time per output token, the last figure that is written."""
    wanted = figure("tpot", 0, **about)
    point = {key: wanted[key] for key in ("name", "model", "weights", "precision", "device", *about)}
    lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
    return any(point.items() <= json.loads(line).items() for line in lines if '"tpot"' in line)
