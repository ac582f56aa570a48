"""How much memory and time a step took (measure), and whether a run will fit (preflight)."""

from .measure import Used, measure
from .preflight import Preflight, preflight

__all__ = ["Preflight", "Used", "measure", "preflight"]
