"""vLLM as a service, from a cell: ``serve`` starts it and always stops it; ``offline_engine`` runs it without HTTP.

``engine_device`` tells beforehand whether there is a vLLM to run.

Names are looked up when they are first used: vLLM's processes import this package too, for ``launch`` alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .command import engine_device
    from .offline import offline_engine
    from .server import Server, serve

_MODULES = {"engine_device": ".command", "offline_engine": ".offline", "Server": ".server", "serve": ".server"}

__all__ = ["Server", "engine_device", "offline_engine", "serve"]


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)
