"""How much memory and time a step took (measure, speed), what a run will take (estimate), if it fits (preflight)."""

from .bandwidth import copy_bandwidth, matmul_rate, request_seconds
from .context import AtLength, decode_against_length, transformer_twin
from .estimate import Estimate, estimate
from .measure import Used, free, measure, memory_parts
from .preflight import Preflight, preflight
from .speed import Speed, generation_speed

__all__ = [
    "AtLength",
    "Estimate",
    "Preflight",
    "Speed",
    "Used",
    "copy_bandwidth",
    "decode_against_length",
    "estimate",
    "free",
    "generation_speed",
    "matmul_rate",
    "measure",
    "memory_parts",
    "preflight",
    "request_seconds",
    "transformer_twin",
]
