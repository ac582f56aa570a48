"""What was measured: one JSON object a line in measured/*.jsonl, each with everything needed to measure it again."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, ValidationError, ValidationInfo, field_validator

from ..errors import unknown
from .models import model as get_model
from .models import models
from .read import Day, Fact, fault, reason

if TYPE_CHECKING:
    from pandas import DataFrame

FOLDER = Path(__file__).with_name("measured")

Text = Annotated[str, Field(min_length=1)]

COUNTS = {"recited", "goodput", "out_of_memory"}
"""Figures that may be 0; a speed or a size of 0 was not measured."""

Precision = Literal[
    "fp32", "bf16", "fp16", "fp8", "w8a8", "int8", "nf4", "nf4-double", "fp4",
    "gptq-int8", "gptq-int4", "gptq-int3", "rtn-int4", "rtn-int3", "awq-int4", "fp8-kv",
]  # fmt: skip
"""int8, nf4 and fp4 are bitsandbytes'; ``nf4-double`` quantises the scales too; ``rtn`` is rounding to nearest;
``fp8-kv`` is the KV cache alone in 8-bit floats."""


class MeasuredRow(Fact):
    """One figure and the whole of its circumstances. What does not apply is null, and but for the last two is given so.

    Attributes:
        name: what was measured, e.g. ``decode_speed``, ``allocated_peak``, ``load_time``, ``bandwidth``.
        unit: GiB is 2**30 bytes, GB/s is 10**9 bytes a second; TFLOPS is dense.
        definition: in a few words what is counted: which memory, which part of the run, over how many repeats.
        model: id in the catalogue; null for a figure of the device alone, as are the fields up to ``new_tokens``.
        decoding: how transformers wrote the answer: ``"default"`` is ``generate`` with its growing KV cache,
            ``"static"`` and ``"compiled"`` are ``helpers.FastDecoder``; null where nothing was written, and for other
            engines.
        batch: sequences at a time. ``prompt_tokens`` and ``new_tokens`` are per sequence.
        device: as NVML names it, or the processor's name. ``driver``: its version; null for a processor.
        versions: of the libraries that matter, at least one, e.g. ``{"torch": "2.13.0"}``.
        notebook: the notebook or command that measures it again.
        requests_per_s: how many requests a second a server was sent; null, or left out, for anything else.
        parallel: how a model was spread over several such devices: ``"tp2"`` tensor, ``"pp2"`` pipeline, ``"dp2"`` data
            parallel; null, or left out, on one device.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    value: NonNegativeFloat
    unit: Literal[
        "GiB", "tokens/s", "s", "GB/s", "TFLOPS", "percent", "perplexity", "poems", "bytes", "tokens", "requests/s"
    ]  # fmt: skip
    definition: Text
    model: Text | None
    weights: Literal["tiny", "random", "hub"] | None
    precision: Precision | None
    engine: Literal["transformers", "vllm", "torch"]
    decoding: Literal["default", "static", "compiled"] | None
    batch: PositiveInt | None
    prompt_tokens: PositiveInt | None
    new_tokens: PositiveInt | None
    device: Text
    driver: Text | None
    versions: Annotated[dict[str, Text], Field(min_length=1)]
    date: Day
    notebook: Text
    requests_per_s: Annotated[float, Field(gt=0)] | None = None
    parallel: Annotated[str, Field(pattern=r"^(tp|pp|dp)[2-9]$")] | None = None

    @field_validator("value")
    @classmethod
    def _zero_only_of_counts(cls, value: float, info: ValidationInfo) -> float:
        if value == 0 and info.data.get("name") not in COUNTS:
            raise ValueError("Input should be greater than 0")
        return value

    def setting(self) -> str:
        """Everything but value and date, as one text: two rows with the same setting measure the same thing."""
        return json.dumps(self.model_dump(mode="json", exclude={"value", "date"}), sort_keys=True)


def measured(**filters: Any) -> list[MeasuredRow]:
    """Return the measured rows that agree with every filter; of a figure measured again, the newest.

    What several devices did together is given only where ``parallel`` is named: beside one device's it would mislead.

    Args:
        filters: fields of a row and the wanted value, or a list of wanted values:
            ``measured(model="chatglm3-6b", precision=["bf16", "nf4"])``, ``measured(parallel=[None, "tp2"])``.

    Raises:
        HelpersError: no such field, or a bad line, naming file and line.
    """
    for field in filters:
        if field not in MeasuredRow.model_fields:
            raise unknown("field of a measured row", field, list(MeasuredRow.model_fields))
    filters.setdefault("parallel", None)
    return [row for row in _catalogue() if all(_agrees(getattr(row, key), want) for key, want in filters.items())]


def recorded(model: str) -> DataFrame:
    """Lay out what was measured of a model at full size: a line for each setting, a column for each figure.

    Args:
        model: catalogue id.

    Returns:
        Peak memory of prefill and decode in GiB, speeds in tokens/s, rounded to two places; a gap is not measured.

    Raises:
        HelpersError: no such model.
    """
    import pandas as pd

    get_model(model)
    setting = ["precision", "engine", "decoding", "batch", "prompt_tokens", "new_tokens", "device", "date"]
    figures = {
        "allocated_peak": "peak (GiB)",
        "prefill_speed": "prefill (tokens/s)",
        "decode_speed": "decode (tokens/s)",
    }
    rows = measured(model=model, weights=["random", "hub"], name=list(figures))
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(getattr(row, field) for field in setting)
        lines.setdefault(key, dict(zip(setting, key, strict=True)))[figures[row.name]] = round(row.value, 2)
    return pd.DataFrame(list(lines.values()), columns=[*setting[:6], *figures.values(), *setting[6:]])


def read_measured(folder: Path = FOLDER) -> list[MeasuredRow]:
    """Read every ``*.jsonl`` of a folder; of a figure measured again, only the newest is returned.

    Raises:
        HelpersError: a line does not hold, or measures the same as another one of that day; names file and line.
    """
    newest: dict[str, tuple[MeasuredRow, str]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            row, here = _row(path, number, line), f"{path.name} line {number}"
            before, there = newest.get(row.setting(), (None, ""))
            if before is not None and before.date == row.date:
                raise fault(path, f"line {number}", f"measures the same on the same day as {there}")
            if before is None or before.date < row.date:
                newest[row.setting()] = row, here
    return [row for row, _ in newest.values()]


@cache
def _catalogue() -> list[MeasuredRow]:
    return read_measured()


def _row(path: Path, number: int, line: str) -> MeasuredRow:
    try:
        row = MeasuredRow.model_validate(json.loads(line))
    except ValidationError as error:
        field, why = reason(error)
        raise fault(path, f"line {number}.{field}" if field else f"line {number}", why) from None
    except ValueError as error:
        raise fault(path, f"line {number}", f"not JSON ({error})") from None
    if row.model is not None and row.model not in models():
        raise fault(path, f"line {number}.model", f"there is no model {row.model!r} in models.yaml")
    return row


def _agrees(value: object, want: object) -> bool:
    return value in want if isinstance(want, (list, tuple, set)) else value == want
