"""What a notebook shows: key figures, plots and small tables."""

from .plots import LivePicture, describe_parts, memory_bar, show, style
from .record import common, harvest, record, recorded, versions
from .table import Table

__all__ = [
    "LivePicture",
    "Table",
    "common",
    "describe_parts",
    "harvest",
    "memory_bar",
    "record",
    "recorded",
    "show",
    "style",
    "versions",
]
