"""Original checkpoints to native transformers folders, without remote code. One file a family."""

from .convert import convert, families, has_family, merge_lora, native_config, read_original, to_original
from .family import check_length
from .own import model_class, register

__all__ = [
    "check_length",
    "convert",
    "families",
    "has_family",
    "merge_lora",
    "model_class",
    "native_config",
    "read_original",
    "register",
    "to_original",
]
