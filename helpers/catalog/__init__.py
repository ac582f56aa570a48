"""The only place where facts live: models, GPUs, machines, frameworks, and what was measured. Imports no torch."""

from .frameworks import framework, frameworks
from .gpus import gpu, gpus
from .machines import machine
from .measured import MeasuredRow, measured, recorded
from .models import Model, model, models

__all__ = [
    "MeasuredRow",
    "Model",
    "framework",
    "frameworks",
    "gpu",
    "gpus",
    "machine",
    "measured",
    "model",
    "models",
    "recorded",
]
