"""Where weights come from: stand-ins shipped here, random ones of full size, or a hub."""

from .hub import cache_folder, fetch
from .load import load, native_folder

__all__ = ["cache_folder", "fetch", "load", "native_folder"]
