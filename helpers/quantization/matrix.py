"""What each precision costs each model: quantise, judge, write down; one point after another."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import catalog
from ..checkpoints.load import check_names, load, native_folder
from ..errors import HelpersError, unknown
from ..memory.matrix import TOO_MUCH, append_rows, is_done
from ..memory.measure import free
from ..report.record import common, figure
from . import bitsandbytes, fp8, gptq, poems, w8a8
from .folder import scratch_folder
from .layers import quantized_layers
from .quality import fp8_cache, perplexity, recited
from .with_gptqmodel import awq, rtn

SOURCE = "python -m helpers quality"
PLAIN = ["fp32", "bf16", "fp16"]
KV_CACHE = "fp8-kv"
"""Weights as they are, keys and values rounded to 8 bits."""

GROUP = 32
"""Weights that share a scale: what divides every row of every stand-in, and the default of each method that has one."""

WAYS: dict[str, tuple[Callable[..., Path], dict[str, Any], str]] = {
    "int8": (bitsandbytes, {"precision": "int8"}, "bitsandbytes, threshold 6"),
    "nf4": (bitsandbytes, {"precision": "nf4"}, "bitsandbytes, blocks of 64"),
    "nf4-double": (bitsandbytes, {"precision": "nf4", "double_quant": True}, "bitsandbytes, scales quantised too"),
    "fp4": (bitsandbytes, {"precision": "fp4"}, "bitsandbytes, blocks of 64"),
    "gptq-int8": (gptq, {"bits": 8, "group_size": GROUP}, f"groups of {GROUP}"),
    "gptq-int4": (gptq, {"bits": 4, "group_size": GROUP}, f"groups of {GROUP}"),
    "gptq-int3": (gptq, {"bits": 3, "group_size": GROUP}, f"groups of {GROUP}"),
    "rtn-int4": (rtn, {"bits": 4, "group_size": GROUP}, f"groups of {GROUP}"),
    "rtn-int3": (rtn, {"bits": 3, "group_size": GROUP}, f"groups of {GROUP}"),
    "awq-int4": (awq, {"group_size": GROUP}, f"groups of {GROUP}"),
    "w8a8": (w8a8, {}, "SmoothQuant 0.5, a scale a row and a token"),
    "fp8": (fp8, {}, "e4m3, a scale a row and a token"),
}
"""Precision as the measured tables name it -> the function that makes it, its settings, and they in words."""


def quality_matrix(
    models: Sequence[str],
    precisions: Sequence[str],
    output: Path,
    *,
    weights: str = "tiny",
    device: str = "auto",
    unseen: int = 100,
    learnt: int = 50,
) -> None:
    """Judge every model in every precision that ``output`` does not hold yet, and append four rows a point.

    The rows are ``held_out_perplexity``, ``disk_bytes`` (the folder's files), ``linear_bytes`` (the quantised layers as
    loaded, scales and zero points included) and ``recited``. What cannot be done is said and left out; an interrupted
    point leaves nothing.

    Args:
        models: catalogue ids.
        precisions: of ``WAYS`` or ``PLAIN``, or ``KV_CACHE``.
        output: file of JSON lines in the form of ``helpers.catalog.MeasuredRow``.
        weights: ``"tiny"``, ``"hub"`` or a folder; what a model of random weights says is not worth judging.
        device: as ``load``.
        unseen: held-out poems whose perplexity is taken.
        learnt: famous poems that are to be recited.

    Raises:
        HelpersError: an unknown name, before anything is judged.
    """
    for model in models:
        catalog.model(model)
    for precision in precisions:
        if precision not in [*PLAIN, *WAYS, KV_CACHE]:
            raise unknown("precision", precision, [*PLAIN, *WAYS, KV_CACHE])
    check_names(weights, "auto")
    if weights == "random":
        why = "random weights know no verse, whatever their precision"
        raise HelpersError("cannot judge random weights", why, "take tiny, hub or a folder")
    for model, precision in itertools.product(models, precisions):
        common(model=model, weights=weights, precision=precision, engine="transformers", device=device)
        print(f"{model} {precision}: ", end="", flush=True)
        if is_done(output, "recited", {}):
            print("measured already", flush=True)
            continue
        started = time.monotonic()
        try:
            figures = judge(model, precision, weights, device, unseen, learnt)
        except TOO_MUCH as error:
            print(f"left out: {str(error).splitlines()[0]}", flush=True)
            continue
        finally:
            free()
        # measured_row lets a figure name its own source
        append_rows(output, figures, SOURCE)
        said = ", ".join(f"{one['name']} {one['value']:,.4g}" for one in figures)
        print(f"{said} ({time.monotonic() - started:.0f} s)", flush=True)


def judge(
    model: str, precision: str, weights: str = "tiny", device: str = "auto", unseen: int = 100, learnt: int = 50
) -> list[dict[str, Any]]:
    """Quantise a model into a folder that is gone afterwards, and return the four figures of ``quality_matrix``.

    Arguments as ``quality_matrix``; raises what the method and ``load`` raise.
    """
    cache = fp8_cache if precision == KV_CACHE else None
    if cache and catalog.model(model).family == "rwkv":
        what = f"cannot round the KV cache of {model}"
        raise HelpersError(what, "it has none, but a state of fixed size", "judge another model, or another precision")
    with scratch_folder() as home:
        if precision in PLAIN or cache:
            settings = "keys and values e4m3, scale 1.0" if cache else f"computed in {precision}"
            how = f"weights as published, {settings}"
            folder = native_folder(model, weights)
            lm, tokenizer = load(model, weights, "auto" if cache else precision, device)
        else:
            make, settings, how = WAYS[precision]
            folder = make(model, Path(home) / precision, weights=weights, device=device, **settings)
            lm, tokenizer = load(model, folder, device=device)
        disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        linear = linear_bytes(lm)  # before the first forward, which unpacks w8a8 and fp8
        ppl = perplexity(lm, tokenizer, [poem.text for poem in poems("held_out")[:unseen]], cache=cache)
        kept = recited(lm, tokenizer, poems("famous")[:learnt], cache)
    about = {
        "held_out_perplexity": (ppl, "perplexity", f"a token, over {unseen} poems it never saw"),
        "disk_bytes": (disk, "bytes", "all files of the folder, tokenizer included"),
        "linear_bytes": (linear, "bytes", "linear layers but the output layer, as loaded, scales included"),
        "recited": (kept, "poems", f"of {learnt} famous ones, from the first verse, to the letter"),
    }
    return [
        figure(name, float(value), unit, True, definition=f"{what}; {how}")
        for name, (value, unit, what) in about.items()
    ]


def linear_bytes(model: Any) -> int:
    """Return the bytes of a loaded model's matrices but the output layer's, whether quantised or not."""
    head = model.get_output_embeddings()
    rows = [row for row in quantized_layers(model) if model.get_submodule(row.name) is not head]
    return sum(row.bytes for row in rows if _is_matrix(model.get_submodule(row.name)))


def _is_matrix(module: Any) -> bool:
    """Tell a linear layer of any method from an embedding or a norm: GPTQ's are no torch.nn.Linear."""
    return bool(getattr(module, "in_features", 0) and getattr(module, "out_features", 0))
