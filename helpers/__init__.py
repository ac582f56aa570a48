"""Helpers of the series: what a notebook cell imports.

    from helpers import catalog, load, preflight, measure, record

Each name is looked up in its module when it is first used, so that ``import helpers`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers read
    from . import catalog
    from .checkpoints import load
    from .decode import FastDecoder
    from .errors import HelpersError
    from .generate import chat, complete, stream
    from .memory import estimate, free, generation_speed, measure, memory_parts, preflight
    from .report import common, describe_parts, memory_bar, record, show, style, versions
    from .serving import engine_device, offline_engine, serve
    from .serving.bench import bench, bench_rates

_MODULES = {
    "load": ".checkpoints",
    "FastDecoder": ".decode",
    "HelpersError": ".errors",
    **dict.fromkeys(["chat", "complete", "stream"], ".generate"),
    **dict.fromkeys(["estimate", "free", "generation_speed", "measure", "memory_parts", "preflight"], ".memory"),
    **dict.fromkeys(["common", "describe_parts", "memory_bar", "record", "show", "style", "versions"], ".report"),
    **dict.fromkeys(["engine_device", "offline_engine", "serve"], ".serving"),
    **dict.fromkeys(["bench", "bench_rates"], ".serving.bench"),  # there, ``bench`` is the module
}

__all__ = [
    "FastDecoder",
    "HelpersError",
    "bench",
    "bench_rates",
    "catalog",
    "chat",
    "common",
    "complete",
    "describe_parts",
    "engine_device",
    "estimate",
    "free",
    "generation_speed",
    "load",
    "measure",
    "memory_bar",
    "memory_parts",
    "offline_engine",
    "preflight",
    "record",
    "serve",
    "show",
    "stream",
    "style",
    "versions",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    if name == "catalog":
        return import_module(".catalog", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
