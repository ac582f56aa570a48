"""Before anything is downloaded: what a run will take, where it fits, and how fast it will be.

The parts of the memory are counted in parts.py, the speeds in predict.py; here they meet the cards of the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .. import catalog
from ..catalog.gpus import find_gpu
from ..errors import HelpersError, unknown
from ..report.table import Table
from . import predict
from .parts import BYTES, CACHED, FREE, GIB, STEP_TOKENS, UTILISATION, Component, Setting, memory, room
from .shapes import Sized, sized

if TYPE_CHECKING:
    from ..catalog.gpus import Gpu

FP8_CACHE_FROM = 8.0
"""Least compute capability for an FP8 KV cache in vLLM (its attention backends; table of notebook 23)."""


@dataclass(frozen=True)
class Estimate:
    """The result: displays as a table in a notebook and as text elsewhere.

    Attributes:
        title: the run.
        components: parts of the peak; ``peak_at`` is the moment: ``loading``, ``prefill`` or ``decode``.
        moments: bytes in live tensors at each of them.
        fits_on: ids of the catalogue's GPUs that it fits on.
        gpu: id of the card that the next ones are about; they are None without one.
        longest_context: tokens of each sequence that fit at this batch, at most the model's context; 0 is none.
        largest_batch: sequences that fit at this context.
        kv_tokens: tokens that vLLM's KV cache has room for; None for other engines.
        prefill_tokens_per_s: over the whole batch; None where it is not modelled (RWKV).
        decode_tokens_per_s: over the whole batch.
        decode_range: least and most expected, which differ where the host's speed counts.
        bound: what decoding waits for: ``"launches"`` (the host) or ``"memory"``, or ``"compute"``.
        notes: what to know about this run.
    """

    title: str
    components: tuple[Component, ...]
    peak_at: str
    moments: dict[str, float]
    fits_on: tuple[str, ...]
    gpu: str | None
    longest_context: int | None
    largest_batch: int | None
    kv_tokens: int | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    decode_range: tuple[float, float] | None
    bound: str | None
    notes: tuple[str, ...]

    def bytes(self, *where: str) -> float:
        """Sum the components that lie there, e.g. ``bytes("allocated", "cached")``; all when nothing is named."""
        return sum(part.bytes for part in self.components if not where or part.where in where)

    @property
    def total(self) -> float:
        """Bytes that the card gives, as nvidia-smi counts a process."""
        return self.bytes()

    @property
    def needed(self) -> float:
        """Bytes without which it does not run: the total less freed blocks and what vLLM reserves beyond the need.

        Before PyTorch's allocator gives up, it returns whole free blocks to the driver and asks again. Source:
        c10/cuda/CUDACachingAllocator.cpp, release_cached_blocks.
        """
        return sum(part.bytes for part in self.components if part.where not in (CACHED, FREE))

    def table(self) -> Table:
        """Return components, total, limits and speeds."""
        gib = "{:,.2f} GiB".format
        rows = [(part.name, gib(part.bytes / GIB), f"{part.formula} ({part.source})") for part in self.components]
        rows += [("total", gib(self.total / GIB), f"peak at {self.peak_at}")]
        rows += [("needed", gib(self.needed / GIB), "less what can be given back")] if self.needed < self.total else []
        rows += [("fits on", f"{len(self.fits_on)} of {len(catalog.gpus())}", ", ".join(self.fits_on) or "none")]
        if self.gpu:
            rows += [("longest context", f"{self.longest_context:,}", f"tokens at this batch on {self.gpu}")]
            rows += [("largest batch", f"{self.largest_batch:,}", f"sequences of this context on {self.gpu}")]
        if self.kv_tokens is not None:
            rows += [("KV cache of vLLM", f"{self.kv_tokens:,}", "tokens")]
        if self.prefill_tokens_per_s:
            rows += [("prefill", f"{self.prefill_tokens_per_s:,.0f} tokens/s", predict.PREFILL_SOURCE)]
        if self.decode_tokens_per_s:
            low, high = self.decode_range
            span = f"{low:,.0f} to {high:,.0f} by the host, " if low < high else ""
            span += f"bound by {self.bound}"
            rows += [("decode", f"{self.decode_tokens_per_s:,.0f} tokens/s", span)]
        rows += [("note", "", note) for note in self.notes]
        return Table(f"{self.title} (estimated)", ("what", "size", "how"), rows)

    def __str__(self) -> str:
        """Return the table as text."""
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def estimate(
    model: str | Path,
    precision: str = "auto",
    engine: str = "transformers",
    batch: int = 1,
    context: int = 2048,
    gpu: str | None = None,
    *,
    decoding: str = "default",
    prompt_tokens: int | None = None,
    group_size: int = 128,
    kv_dtype: str = "auto",
) -> Estimate:
    """Estimate memory and speed of a run from sizes alone; nothing is downloaded or loaded.

    Args:
        model: catalogue id, the path of a config.json, or ``owner/name`` on Hugging Face (its config.json is fetched).
        precision: a key of ``BYTES``, or ``"auto"``: the published 16-bit type, fp16 on a card without bf16.
        engine: ``"transformers"`` or ``"vllm"``.
        batch: sequences at once.
        context: tokens of one sequence, prompt and answer together.
        gpu: id of a card in the catalogue, for the speeds and what else fits; None for this machine's, if it has one.
        decoding: of transformers: ``"default"``, ``"static"`` or ``"compiled"`` (``FastDecoder``).
        prompt_tokens: how many of the context are read at once; all of them when None, which takes most.
        group_size: weights that share a scale, of GPTQ and AWQ.
        kv_dtype: of vLLM's KV cache: ``"auto"``, the type of what is not quantised, or ``"fp8"``, half of 16 bit.

    Raises:
        HelpersError: an unknown name (the valid ones are listed), or a number that is too small, naming the field.
    """
    about = sized(model)
    card = catalog.gpu(gpu) if gpu else local_gpu()
    if precision == "auto":
        precision = "fp16" if card and "bf16" not in card.formats else about.dtype
    prompt = context if prompt_tokens is None else prompt_tokens
    _check_names(precision=precision, engine=engine, decoding=decoding, kv_dtype=kv_dtype)
    _check_numbers(batch=batch, context=context, prompt_tokens=prompt, group_size=group_size)
    if engine == "vllm" and about.shape.kind == "rwkv":
        raise HelpersError("cannot estimate", "vLLM serves no RWKV", "take engine='transformers'")
    if engine == "transformers" and kv_dtype != "auto":
        why = f"kv_dtype={kv_dtype!r} is vLLM's; transformers quantises with cache classes of its own (notebook 16)"
        raise HelpersError("cannot estimate", why, "take engine='vllm', or kv_dtype='auto'")

    def run(batch: int = batch, context: int = context, card: Gpu | None = card) -> Setting:
        return Setting(
            precision,
            engine,
            decoding,
            batch,
            context if prompt_tokens is None else min(prompt, context),
            context,
            element=4 if precision == "fp32" else 2,
            group_size=group_size,
            hopper=card is None or card.compute_capability == 9.0,
            step=STEP_TOKENS[card is None or (card.memory_gb >= 75 and not card.id.startswith("a100"))],
            kv_dtype=kv_dtype,
        )

    def fits(card: Gpu, batch: int = batch, context: int = context) -> bool:
        parts = memory(about, run(batch, context, card))[0]
        return sum(part.bytes for part in parts if part.where != CACHED) <= room(card, engine)

    parts, moments = memory(about, run())
    free = room(card, engine) - sum(part.bytes for part in parts) if card else 0
    pool = None
    if engine == "vllm" and card and about.shape.kv_values_per_token():
        kv = next(part.bytes for part in parts if part.name == "KV cache") / (batch * context)
        pool = max(0, int((batch * context) + free / kv))
        source = f"{UTILISATION} of the card, less the above"
        rest = Component("rest of vLLM's reservation", free, source, "vLLM", FREE)
        parts = (*parts, *([rest] if free > 0 else []))
    speed = predict.decode_range(about, run(), card) if card else None
    cache = "" if kv_dtype == "auto" else f", KV cache {kv_dtype}"
    return Estimate(
        f"{about.name}, {precision}, {engine}, batch {batch}, {context} tokens{cache}",
        parts,
        max(moments, key=moments.get),
        moments,
        tuple(id for id, one in catalog.gpus().items() if fits(one)),
        card.id if card else None,
        _largest(lambda tokens: fits(card, context=tokens), about.context) if card else None,
        _largest(lambda many: fits(card, many), 2**20) if card else None,
        pool,
        predict.prefill_tokens_per_s(about, run(), card) if card else None,
        *((speed.expected, (speed.least, speed.most), speed.bound) if speed else (None, None, None)),
        tuple(_notes(about, run(), card)),
    )


def _check_names(**given: str) -> None:
    valid = {
        "precision": list(BYTES),
        "engine": ["transformers", "vllm"],
        "decoding": ["default", "static", "compiled"],
        "kv_dtype": ["auto", "fp8"],
    }
    for field, value in given.items():
        if value not in valid[field]:
            raise unknown(field, value, valid[field])


def _check_numbers(**given: int) -> None:
    for field, value in given.items():
        if not isinstance(value, int) or value < 1:
            raise HelpersError("cannot estimate", f"{field} is {value!r}", f"give {field} as a whole number from 1 on")
    if given["prompt_tokens"] > given["context"]:
        why = f"prompt_tokens is {given['prompt_tokens']}, more than the whole context of {given['context']}"
        raise HelpersError("cannot estimate", why, "give prompt and answer together as context")


def _notes(about: Sized, run: Setting, card: Gpu | None) -> Iterator[str]:
    """Say what the figures do not."""
    if card and run.precision == "bf16" and "bf16" not in card.formats:
        yield f"{card.name} has no bf16: load refuses it; take fp16 or auto, which need as much"
    if run.context > about.context:
        yield f"{about.name} was made for {about.context:,} tokens"
    if run.precision in predict.MULTIPLIED_IN and run.engine == "transformers":
        yield f"transformers unpacks {run.precision} to 16 bit at its first use, and takes as much from then on"
    if run.kv_dtype == "fp8" and card and card.compute_capability < FP8_CACHE_FROM:
        yield f"{card.name}: vLLM keeps no FP8 KV cache on cards below compute capability {FP8_CACHE_FROM}"
    if run.precision == "int8" and run.engine == "transformers":
        yield "int8 takes more the more outlier columns its activations have; fitted on random weights"
    if run.precision == "int8" and run.engine == "vllm":
        yield "vLLM runs bitsandbytes' int8 without a CUDA graph, far slower than 16 bit: take w8a8, fp8 or gptq-int8"
    if about.shape.kind == "rwkv":
        yield "prefill speed of RWKV is not modelled; catalog.recorded(model) has what was measured"
    if getattr(about.shape, "version", None) == 5:
        yield "no RWKV-5 is recorded: its activations are taken as those of version 6, its speed is not checked"
    if not card and (name := local_gpu_name()):
        yield f"this machine's {name} is not in the catalogue: pass gpu=..., a card like it, for speeds and limits"
    way = {"engine": run.engine, "decoding": None if run.engine == "vllm" else run.decoding}
    if not catalog.measured(name="decode_speed", **way):
        name = run.engine if run.engine == "vllm" else f"decoding {run.decoding!r}"
        yield f"no speed of {name} is recorded yet: its share of the bandwidth is assumed"


def local_gpu() -> Gpu | None:
    """Return the catalogue's row of this machine's first card, or None."""
    return find_gpu(local_gpu_name() or "")


@cache
def local_gpu_name() -> str | None:
    """Return how NVML names this machine's first card, or None; PyTorch is not imported for it."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
    except pynvml.NVMLError:
        return None


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number from 0 to ``limit`` that fits, given that every smaller one does."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
