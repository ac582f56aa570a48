"""The few functions of llama.cpp's C interface that ``llama_cpp`` calls, through ctypes.

The library is the one that ``make frameworks`` unpacks into ``.venv-frameworks/lib/npm``: llama.cpp v0.5.0 as built by
node-llama-cpp 3.22.0. Its structures are declared in include/llama.h; of those passed by value only the fields that are
set here have names, the rest is room. What stands there by default is checked before anything else is called, as a
library of another version would read another field.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections import deque
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_int64, c_uint32, c_void_p
from functools import cache
from pathlib import Path

from ..errors import HelpersError

FOLDER = Path(sys.prefix) / "lib" / "npm"
"""Where ``make frameworks`` puts the shared libraries."""

SMALL = 10**8
"""Bytes of a file that one thread reads in a few milliseconds."""


class ModelParams(ctypes.Structure):
    """How a file is loaded (struct llama_model_params), left as the library gives it."""

    _fields_ = [("rest", c_int64 * 10)]


class ContextParams(ctypes.Structure):
    """How a loaded model is run (struct llama_context_params)."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("_1", c_uint32 * 4),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("_2", c_int32 * 4),
        ("flash_attn_type", c_int32),
        ("_3", c_int32 * 12),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("_4", c_int64 * 6),
    ]


class QuantizeParams(ctypes.Structure):
    """How a file is quantised (struct llama_model_quantize_params)."""

    _fields_ = [
        ("nthread", c_int32),
        ("ftype", c_int32),
        ("_1", c_int64),
        ("_2", c_bool * 5),
        ("dry_run", c_bool),
        ("_3", c_int64 * 5),
    ]


class Batch(ctypes.Structure):
    """Tokens to read, with their positions, and whether their logits are wanted (struct llama_batch)."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
FUNCTIONS = {  # name: (what it returns, its arguments)
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LOG, c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_quantize_default_params": (QuantizeParams, []),
    "llama_model_quantize": (c_uint32, [c_char_p, c_char_p, POINTER(QuantizeParams)]),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
}
said: deque[str] = deque(maxlen=2000)
"""The last lines of llama.cpp's log, which would otherwise be written over the notebook's page."""

_listener = LOG(lambda _, text, __: said.append(text.decode(errors="replace")))


@cache
def library() -> ctypes.CDLL:
    """Load llama.cpp, once, with the kernels for this processor that are in the folder; its log is kept in ``said``.

    Raises:
        HelpersError: this environment has no such library, or one of another version.
    """
    fix = "run make frameworks and choose the kernel Other frameworks"
    found = {file.name.partition(".")[0]: file for file in FOLDER.glob("*.so")}
    if "libllama" not in found:
        raise HelpersError("cannot use llama.cpp", "this Python has no libllama", fix)
    try:
        ggml = ctypes.CDLL(str(found["libggml"]))
        lib = ctypes.CDLL(str(found["libllama"]))
    except OSError as error:
        raise HelpersError("cannot load llama.cpp", str(error).rstrip("."), fix) from error
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    run, quantize = lib.llama_context_default_params(), lib.llama_model_quantize_default_params()
    defaults = run.n_ctx, run.n_batch, run.n_ubatch, run.n_threads, run.type_k, quantize.nthread, quantize.ftype
    if defaults != (512, 2048, 512, 4, 1, 0, 7):
        raise HelpersError("cannot use llama.cpp", f"{found['libllama'].name} is of another version", fix)
    lib.llama_log_set(_listener, None)
    ggml.ggml_backend_load_all_from_path.argtypes = [c_char_p]
    ggml.ggml_backend_load_all_from_path(str(FOLDER).encode())
    lib.llama_backend_init()
    return lib


def version() -> str:
    """Return the version of llama.cpp that the library is of, e.g. ``"v0.5.0"``."""
    return next((file.name[9:-3] for file in FOLDER.glob("libllama.v*.so")), "not installed")


def reason() -> str:
    """Return the first line of ``said`` that tells of an error, without the name of the function that says it."""
    told = [line.strip() for line in said if re.search("error|fail|invalid|unknown|disabled|bad_alloc", line)]
    told = [line for line in told if " = " not in line]  # a setting, e.g. "flash_attn = disabled"
    return re.sub(r"^\w+: ", "", told[0]).rstrip(".") if told else "llama.cpp does not say why"


def threads(file: str | Path) -> int:
    """Return the threads to compute with: OMP_NUM_THREADS if it is set, else every core, and one for a small file.

    llama.cpp's threads wait for each other after every operation without letting the core go. On a file of a few
    megabytes that is all they do, and where another program runs beside, they wait for it too.
    """
    cores = os.environ.get("OMP_NUM_THREADS") or (os.cpu_count() if os.path.getsize(file) > SMALL else 1)
    return int(cores or 1)
