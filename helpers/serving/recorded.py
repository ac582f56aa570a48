"""What vLLM's part of the measured table says of one model, laid out to compare formats and kernels."""

from __future__ import annotations

import re

from .. import catalog

PLAIN = "16 bit"
ORDER = [PLAIN, "fp8", "w8a8", "int8", "gptq-int8", "gptq-int4", "awq-int4", "nf4"]

VARIANTS = {
    "": "",
    "marlin_": "Marlin",
    "marlin_head_": "Marlin, output layer too",
    "exllama_": "ExLlama",
    "fp8_kv_": "KV cache in FP8",
}
"""Prefix of recorded figures (``measure_engines``) -> what was not left to vLLM's own choice, in words."""

FIGURE = re.compile(rf"({'|'.join(VARIANTS)})(weights|kv_tokens|decode_speed)")


def recorded_engines(model: str) -> dict[str, dict[str, dict[str | int, float | str]]]:
    """Lay out what was recorded of a model in vLLM at full size, on one card, with 128 + 128 tokens.

    Args:
        model: catalogue id.

    Returns:
        Device -> kind -> figure -> value. A kind is ``PLAIN``, a precision, or a precision and one of ``VARIANTS``
        (``"gptq-int4, Marlin"``). Figures: ``"weights"`` in GiB, ``"kv_tokens"``, ``"kernel"`` as vLLM names it, and
        for each batch, a number, the decode speed of all answers together in tokens/s. A gap is not measured.
    """
    about = {"engine": "vllm", "weights": ["random", "hub"], "parallel": None, "requests_per_s": None}
    found: dict[str, dict[str, dict[str | int, float | str]]] = {}
    for row in sorted(catalog.measured(model=model, **about), key=lambda row: row.date):
        match = FIGURE.fullmatch(row.name)
        precision = PLAIN if row.precision in ("bf16", "fp16") else row.precision
        if not match or precision not in ORDER:
            continue
        kind, figures = ", ".join(filter(None, [precision, VARIANTS[match[1]]])), {}
        if match[2] == "decode_speed" and (row.prompt_tokens, row.new_tokens) == (128, 128):
            figures[row.batch] = row.value
        elif match[2] != "decode_speed" and row.batch is None:
            figures[match[2]] = row.value
            if match[2] == "weights" and "; " in row.definition:
                figures["kernel"] = row.definition.partition("; ")[2]
        if figures:
            found.setdefault(row.device, {}).setdefault(kind, {}).update(figures)
    return {device: {kind: kinds[kind] for kind in sorted(kinds, key=_place)} for device, kinds in found.items()}


def recorded_gains(model: str) -> dict[tuple[str, str], dict[int, float]]:
    """Return how many times as fast as in 16 bit each kind decoded: device and kind -> batch -> ratio.

    Args:
        model: catalogue id.

    Returns:
        Kinds of ``recorded_engines`` but 16 bit itself, at the batches that were measured in both.
    """
    return {
        (device, kind): {batch: speed / kinds[PLAIN][batch] for batch, speed in figures.items() if _both(batch, kinds)}
        for device, kinds in recorded_engines(model).items()
        for kind, figures in kinds.items()
        if kind != PLAIN
    }


def _both(figure: str | int, kinds: dict[str, dict[str | int, float | str]]) -> bool:
    return isinstance(figure, int) and figure in kinds.get(PLAIN, {})


def _place(kind: str) -> tuple[int, int]:
    precision, _, variant = kind.partition(", ")
    return ORDER.index(precision), list(VARIANTS.values()).index(variant)
