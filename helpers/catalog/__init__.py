"""The only place where facts live: models, GPUs, frameworks, and what was measured. Imports no torch."""

from .frameworks import framework, frameworks
from .gpus import gpu, gpus
from .measured import MeasuredRow, measured, recorded
from .models import Model, model, models

__all__ = [
    "MeasuredRow",
    "Model",
    "framework",
    "frameworks",
    "gpu",
    "gpus",
    "measured",
    "model",
    "models",
    "recorded",
]
