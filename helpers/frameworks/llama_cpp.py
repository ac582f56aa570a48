"""llama.cpp from a cell: a native folder becomes a GGUF file, is quantised, asked for logits, and served.

    to_gguf(folder, file)  ->  quantize(file, target, "Q4_K_M")  ->  Gguf(target).greedy(ids, 20), served(target)

It needs what ``make frameworks`` installs: llama.cpp's own converter (``to_gguf`` beside this file calls it), its
library with the quantiser (``libllama`` calls that) and its server (``xllamacpp``).
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import secrets
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ..errors import HelpersError, unknown
from .libllama import library, reason, said, threads
from .to_gguf import SUPER_BLOCK, to_gguf, widen

__all__ = [
    "KINDS", "SUPER_BLOCK", "Gguf", "Running", "Tensor",
    "bits_per_weight", "full_size", "quantize", "served", "tensors", "to_gguf", "widen",
]  # fmt: skip

if TYPE_CHECKING:
    import numpy as np
    from openai import OpenAI

KINDS = {"Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q4_K_M": 15, "Q3_K_M": 12, "Q2_K": 10, "Q5_0": 8, "Q4_0": 2}
"""The kinds of file ``quantize`` writes, with their numbers in llama.h (enum llama_ftype)."""


# --- quantising


def quantize(file: str | Path, target: str | Path, kind: str) -> Path:
    """Quantise a GGUF file with llama.cpp's quantiser, without an importance matrix.

    Args:
        file: f32, f16 or bf16.
        target: the file to write.
        kind: a name of ``KINDS``.

    Raises:
        HelpersError: an unknown kind, or llama.cpp refuses.
    """
    target = Path(target)
    writing = target.with_name(target.name + ".writing")
    _quantize(file, writing, kind)
    os.replace(writing, target)
    return target


def full_size(model: str, kind: str) -> int:
    """Return the bytes that a model's full-size GGUF file of a kind has for its weights.

    llama.cpp's quantiser itself says so: it is run dry on a file that has the model's sizes and no content.

    Args:
        model: catalogue id of a model that becomes a Llama, a Qwen2 or a GLM.
        kind: a name of ``KINDS``.

    Raises:
        HelpersError: the model is of another class.
    """
    from .to_gguf import write_empty

    with tempfile.TemporaryDirectory() as folder:
        file = write_empty(model, Path(folder) / "empty.gguf")
        _quantize(file, Path(folder) / "none.gguf", kind, dry_run=True)
    found = re.search(r"quant size\s*=\s*([\d.]+) MiB", "".join(said))
    return round(float(found.group(1)) * 2**20)


def _quantize(file: str | Path, target: Path, kind: str, dry_run: bool = False) -> None:
    """Call llama.cpp's quantiser.

    Raises:
        HelpersError: an unknown kind, or the quantiser's own error.
    """
    if kind not in KINDS:
        raise unknown("kind of quantisation", kind, list(KINDS))
    lib = library()
    settings = lib.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.dry_run = KINDS[kind], threads(file), dry_run
    said.clear()
    if lib.llama_model_quantize(str(file).encode(), str(target).encode(), settings):
        target.unlink(missing_ok=True)
        raise HelpersError(f"cannot quantise {file} to {kind}", reason(), "take a whole file of f32, f16 or bf16")


@dataclass(frozen=True)
class Tensor:
    """A matrix of a GGUF file: its name there, rows and columns, type, and bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int


def tensors(file: str | Path) -> list[Tensor]:
    """List the matrices of a GGUF file; norms and biases, which stay in fp32, are left out."""
    from gguf import GGUFReader

    found = [one for one in GGUFReader(file).tensors if len(one.shape) > 1]
    return [Tensor(one.name, tuple(map(int, one.shape[::-1])), one.tensor_type.name, int(one.n_bytes)) for one in found]


def bits_per_weight(file: str | Path) -> float:
    """Return the bits that a weight takes, on average over the matrices of a GGUF file."""
    every = tensors(file)
    return 8 * sum(one.bytes for one in every) / sum(math.prod(one.shape) for one in every)


# --- asking a file


class Gguf:
    """A GGUF file, loaded by llama.cpp on the CPU.

        with Gguf("qwen.gguf") as lm:
            lm.greedy(ids, 20)

    Args:
        file: the file; it is mapped, not copied.
        context: tokens it can hold.

    Raises:
        HelpersError: llama.cpp cannot read it, or has no room for the context.
    """

    def __init__(self, file: str | Path, context: int = 512) -> None:
        self._lib, self.context = library(), context
        said.clear()
        self._model = self._lib.llama_model_load_from_file(str(file).encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise HelpersError(f"cannot load {file}", reason(), "convert it again with to_gguf")
        settings = self._lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = threads(file)
        settings.type_k = settings.type_v = 0  # the KV cache in fp32; llama.cpp's default is fp16
        settings.flash_attn_type = 0  # its flash attention computes in fp16 on a CPU, and the logits are to be compared
        said.clear()
        self._context = self._lib.llama_init_from_model(self._model, settings)
        if not self._context:
            self._lib.llama_model_free(self._model)
            raise HelpersError(f"no room for a context of {context:,} tokens", reason(), "take a smaller one")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.vocab_size = self._lib.llama_vocab_n_tokens(self._vocab)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Cut a text into ids as the file says, the tokens that precede every text included.

        Args:
            text: any.
            special: read ``<|im_start|>`` and such as the tokens they name.
        """
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 8))()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), room, len(room), True, special)
        return room[:count]

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the logits after each of ``ids``, read from an empty cache, as fp32 of [len(ids), vocab_size]."""
        self._forget()
        return self._read(ids, 0, every=True)

    def stream(self, ids: Sequence[int], new_tokens: int) -> Iterator[int]:
        """Yield the ids that greedy decoding adds, as soon as each is known, up to a stop or ``new_tokens`` of them."""
        self._forget()
        step, place = list(ids), 0
        for _ in range(new_tokens):
            token = int(self._read(step, place)[-1].argmax())
            yield token
            if self._lib.llama_vocab_is_eog(self._vocab, token):
                return
            place, step = place + len(step), [token]

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Return what ``stream`` yields."""
        return list(self.stream(ids, new_tokens))

    def close(self) -> None:
        """Free the model; a second call does nothing."""
        if self._model is not None:
            self._lib.llama_free(self._context)
            self._lib.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Self:
        """Return the model itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _forget(self) -> None:
        """Empty the KV cache."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _read(self, ids: Sequence[int], place: int, every: bool = False) -> np.ndarray:
        """Run ids through the model, the first at position ``place``; return logits of all of them, or of the last."""
        import numpy as np

        if not 0 < len(ids) <= self.context - place:  # llama.cpp would end the process
            why = f"{place + len(ids)} tokens, and its context is 1 to {self.context}"
            raise HelpersError("llama.cpp cannot read this", why, "give it a text, or Gguf a larger context")
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for row, id in enumerate(ids):
            batch.token[row], batch.pos[row] = id, place + row
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
            batch.logits[row] = every or row == len(ids) - 1
        status = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if status:
            raise HelpersError("llama.cpp cannot read this", reason(), "convert the model again with to_gguf")
        rows = len(ids) if every else 1
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (rows, self.vocab_size)).copy()


# --- the server


@dataclass(frozen=True)
class Running:
    """A running server: its address, e.g. ``http://127.0.0.1:43211``, and its key."""

    url: str
    key: str
    pid: int

    def client(self) -> OpenAI:
        """Return an ``openai.OpenAI`` client that has the address and the key, and passes by a proxy."""
        from openai import DefaultHttpxClient, OpenAI

        client = DefaultHttpxClient(trust_env=False)
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, http_client=client)


@contextmanager
def served(file: str | Path, context: int = 512, timeout: float = 60) -> Iterator[Running]:
    """Serve a GGUF file with llama.cpp's OpenAI-compatible server, on the loopback, with a new key, while a block runs.

    It runs in a process of its own, which ends with the block, or with this process whatever ends that.

    Raises:
        HelpersError: it ended, or did not answer within ``timeout`` seconds; the end of its log is told.
    """
    key = secrets.token_urlsafe(24)
    command = [sys.executable, "-m", __spec__.name, str(Path(file).resolve()), str(context), str(threads(file))]
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"LLAMA_API_KEY": key, "PYTHONPATH": paths}
    with tempfile.TemporaryFile("w+") as log:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        process = subprocess.Popen(command, env=env, text=True, start_new_session=True, **pipes)
        try:
            # it says its address once the model is loaded, and an empty line when it ends before
            said_something, _, _ = select.select([process.stdout], [], [], timeout)
            url = process.stdout.readline().strip() if said_something else ""
            if not url:
                log.seek(0)
                why = _first_error(log.read()) or f"it did not answer within {timeout:.0f} s"
                raise HelpersError(f"llama.cpp does not serve {file}", why, "see whether Gguf can load the file")
            yield Running(url, key, process.pid)
        finally:
            process.stdin.close()  # what the child waits for
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def _first_error(log: str) -> str:
    """Return the first line that the server marks as an error, without its time and the names of functions."""
    found = re.search(r"^[\d.]+ E .*?: +(?:init: )?(.+)$", log, re.MULTILINE)
    return found.group(1).rstrip(".: ") if found else ""


def _serve(file: str, context: str, threads: str) -> None:
    """Serve until the other end of standard input is closed; the key comes by the environment."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.model_alias = {Path(file).stem}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [os.environ.pop("LLAMA_API_KEY")]
    params.n_ctx = int(context)
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.endpoint_slots = params.ui = False  # the one shows what others ask, the other is a web page
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # at once, whatever connections are still open


if __name__ == "__main__":
    _serve(*sys.argv[1:])
