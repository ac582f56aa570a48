"""Original checkpoints to native transformers folders, without remote code. One file a family."""

from .convert import convert, families, merge_lora, native_config, read_original, to_original
from .family import check_length

__all__ = ["check_length", "convert", "families", "merge_lora", "native_config", "read_original", "to_original"]
