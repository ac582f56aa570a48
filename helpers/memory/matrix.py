"""The measured table: models x precisions x lengths, one point after another, each written down as soon as known."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from .. import catalog
from ..checkpoints.load import check_names, load
from ..checkpoints.quantized import labels
from ..errors import HelpersError, unknown
from ..report.record import common, figure, format_value, measured_row
from .bandwidth import request_seconds
from .measure import GIB, free, measure
from .speed import DECODING, generation_speed

SOURCE = "python -m helpers measure"
TOO_MUCH = (HelpersError, MemoryError, RuntimeError)  # torch's out-of-memory error is a RuntimeError
LOADING = {"batch": None, "prompt_tokens": None, "new_tokens": None, "decoding": None}
"""The point of a figure that belongs to a model and not to one of its runs."""

PEAK = {
    "allocated_peak": {
        "definition": "most VRAM in live tensors while the prompt was read and the answer written, weights included "
        "(torch.cuda.max_memory_allocated)"
    }
}
"""What ``FIGURES`` calls a block is said here, as this is the figure that tables of memory over length are made of."""


def measure_matrix(
    models: Sequence[str],
    precisions: Sequence[str],
    output: Path,
    *,
    weights: str = "random",
    device: str = "auto",
    batches: Sequence[int] = (1,),
    prompt_tokens: Sequence[int] = (128,),
    new_tokens: int = 64,
    decodings: Sequence[str] = ("default",),
) -> None:
    """Measure every point that ``output`` does not hold yet, and append its rows.

    A model is loaded once in each precision, in a process of its own; a point is one prompt length and one way of
    decoding, at which speed and peak memory are measured. A point for which the card is too small is a row as well,
    ``out_of_memory``: what lay in live tensors then. Any other error is reported and left out, and so is what is past
    the model's context.

    Args:
        models: catalogue ids.
        precisions: as ``load``.
        output: file of JSON lines in the form of ``helpers.catalog.MeasuredRow``.
        weights, device: as ``load``; rows of a quantised folder say what weights it was made of.
        new_tokens: as ``generation_speed``.
        batches, prompt_tokens, decodings: one or several, as ``generation_speed``.

    Raises:
        HelpersError: an unknown name, before anything is measured.
    """
    for model in models:
        catalog.model(model)
    for precision in precisions:
        check_names(weights, precision)
    for decoding in decodings:
        if decoding not in DECODING:
            raise unknown("decoding", decoding, list(DECODING))
    sizes = itertools.product(decodings, batches, prompt_tokens)  # what a recorded step keeps is in no default row
    points = [
        {"batch": batch, "new_tokens": new_tokens, "prompt_tokens": length, "decoding": how}
        for how, batch, length in sizes
    ]
    for model, precision in itertools.product(models, precisions):
        common(model=model, **labels(weights, precision), engine="transformers", device=device)
        print(f"{model} {precision}", flush=True)
        missing = [point for point in points if not _is_finished(output, point)]
        if not missing:
            print("  measured already")
        todo = [point for point in missing if _fits_context(model, weights, point)]
        try:
            if todo:
                in_own_process(_measure_model, model, weights, precision, device, todo, output)
        except BrokenProcessPool:
            print("  left out: the process died; it may have run out of memory", flush=True)


def in_own_process(function: Callable[..., None], *task: Any) -> None:
    """Call a function in a process of its own: a process gives a GPU back, all of it, only when it ends.

    Raises:
        BrokenProcessPool: the process died.
        Exception: what the function raised.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(function, *task).result()


def _measure_model(
    model: str, weights: str, precision: str, device: str, points: list[dict[str, Any]], output: Path
) -> None:
    """Measure one model in one precision, or say why not."""
    import transformers  # noqa: F401 - before the clock starts: its import belongs to no point

    common(model=model, **labels(weights, precision), engine="transformers", device=device)
    try:
        _measure_points(model, weights, precision, device, points, output)
    except TOO_MUCH as error:
        _say_what_failed("  not loaded", error, output, LOADING)


def _measure_points(
    model: str, weights: str, precision: str, device: str, points: list[dict[str, Any]], output: Path
) -> None:
    """Load one model, write down what that took unless the file says so already, and measure its points."""
    with measure("load") as loading:
        lm, _ = load(model, weights, precision, device)
    if not is_done(output, "weights", {}):
        size, what = (
            lm.get_memory_footprint() / GIB,
            "bytes of all parameters and buffers as loaded, quantised ones packed",
        )
        taken = [one for one in loading.figures("load") if one["name"] in ("load_seconds", "load_allocated_peak")]
        append_rows(output, [figure("weights", size, "GiB", True, definition=what), *(figure(**one) for one in taken)])
    for point in points:
        sizes = f"{point['prompt_tokens']} + {point['new_tokens']} tokens"
        print(f"  {point['batch']} x {sizes}, {point['decoding']}: ", end="", flush=True)
        try:
            with measure("generate") as generating:
                speed = generation_speed(lm, **point)
            used = [one for one in generating.figures() if one["name"] != "seconds"]
            figures = [figure(**(one | point | PEAK.get(one["name"], {}))) for one in used]
            figures += [figure(**one) for one in speed.figures()]
            append_rows(output, figures)
            shown = [one for one in figures if one["name"] in ("allocated_peak", "decode_speed")]
            print(", ".join(f"{one['name']} {format_value(one['value'])} {one['unit']}" for one in shown))
        except TOO_MUCH as error:
            _say_what_failed("left out", error, output, point)
        free()
    if not is_done(output, "request", LOADING):  # last, as it takes memory that is no model's
        what = "time of the host to ask for one small operation: 200 in a row, median of the repeats (request_seconds)"
        append_rows(output, [figure("request", request_seconds(device), "s", True, definition=what)])


def _say_what_failed(outcome: str, error: BaseException, output: Path, point: dict[str, Any]) -> None:
    """Print an error's first line; where the card was too small, write that down, so that it is not tried again."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        held, what = torch.cuda.max_memory_allocated() / GIB, "most VRAM in live tensors when PyTorch found no more"
        append_rows(output, [figure("out_of_memory", held, "GiB", True, definition=what, **point)])
    print(f"{outcome}: {str(error).splitlines()[0]}")


def _is_finished(output: Path, point: dict[str, Any]) -> bool:
    """Tell whether a point was measured, or found too large for the card, itself or in loading."""
    too_large = any(is_done(output, "out_of_memory", one) for one in (point, LOADING))
    return too_large or is_done(output, "tpot", point)


def append_rows(output: Path, figures: list[dict[str, Any]], source: str = SOURCE) -> None:
    """Add a point's rows at once: all of them or, when one does not hold, none."""
    lines = "".join(json.dumps(measured_row(one, source), ensure_ascii=False) + "\n" for one in figures)
    with output.open("a", encoding="utf-8") as file:
        file.write(lines)


def is_done(output: Path, name: str, point: dict[str, Any]) -> bool:
    """Tell whether the file holds this figure of this point; ``tpot`` is the last that is written."""
    wanted = figure(name, 0, **point)
    about = {
        key: wanted.get(key)
        for key in ("name", "model", "weights", "precision", "engine", "device", "parallel", *point)
    }
    lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
    rows = (json.loads(line) for line in lines if f'"{name}"' in line)
    return any(all(row.get(key) == value for key, value in about.items()) for row in rows)


def _fits_context(model: str, weights: str, point: dict[str, Any]) -> bool:
    """Tell whether the model was made for that many tokens, and say so if not; a stand-in's context is its own."""
    tokens, context = point["prompt_tokens"] + point["new_tokens"], catalog.model(model).context
    if weights == "tiny" or tokens <= context:
        return True
    print(f"  {point['prompt_tokens']} + {point['new_tokens']} tokens: left out, its context ends at {context}")
    return False
