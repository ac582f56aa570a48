"""vLLM's part of the measured table: models x precisions x batches, each engine in a process of its own."""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import catalog
from ..checkpoints.hub import cache_folder
from ..checkpoints.load import check_names, pick_device
from ..checkpoints.quantized import labels
from ..checkpoints.random import FORMATS, save_random
from ..memory.matrix import append_rows, in_own_process, is_done
from ..memory.measure import GIB
from ..native.convert import RECEIPT
from ..report.record import common, figure, format_value
from .command import int8_folder, parallel, random_folder
from .launch import is_cpu_build
from .offline import offline_engine

if TYPE_CHECKING:
    from vllm import LLM

REPEATS = 3
"""Runs of which a time is the median."""

EXTENSION = f"{__name__}.EngineFigures"


def measure_engines(
    models: Sequence[str],
    precisions: Sequence[str],
    output: Path,
    *,
    weights: str = "random",
    device: str = "auto",
    batches: Sequence[int] = (1,),
    prompt_tokens: Sequence[int] = (128,),
    new_tokens: int = 128,
    prefix: str = "",
    **options: Any,
) -> None:
    """Measure every point that ``output`` does not hold yet, and append its rows.

    An engine is started once for each model and precision, in a process of its own, since a process gives a GPU back
    only when it ends. What it took is written down, then the speed at each batch. What cannot be is said and left out.

    Args:
        models: catalogue ids.
        precisions: as ``serve``; with random weights also ``helpers.checkpoints.random.FORMATS``, made up by vLLM.
        output: file of JSON lines in the form of ``helpers.catalog.MeasuredRow``.
        weights, device: as ``serve``. Random weights in ``int8`` and ``nf4`` are written to disk first (vLLM quantises
            only what it reads from files), once for both, and removed after the model's last engine.
        batches, prompt_tokens: prompts at once, and tokens of each; one or several.
        new_tokens: of each answer.
        prefix: put before the name of every figure, ``<prefix>_``: for a variant that no field of a row tells, such as
            another kernel (``marlin``, with VLLM_DISABLED_KERNELS=MacheteLinearKernel in the environment). ``VARIANTS``
            of recorded.py has those that are laid out.
        options: vLLM's engine arguments.

    Raises:
        HelpersError: an unknown name, before anything is measured.
    """
    for model in models:
        catalog.model(model)
    for precision in precisions:
        if weights != "random" or precision not in FORMATS:
            check_names(weights, precision)
    sizes = itertools.product(batches, prompt_tokens)
    points = [{"batch": batch, "prompt_tokens": length, "new_tokens": new_tokens} for batch, length in sizes]
    for model in models:
        try:
            for precision in precisions:
                print(f"{model} {precision}", flush=True)
                about = {"model": model, "weights": weights, "precision": precision, "device": device}
                _try_engine(about, points, output, f"{prefix}_" if prefix else "", options)
        finally:
            for folder in _files(model):
                shutil.rmtree(folder, ignore_errors=True)


def _try_engine(*task: Any) -> None:
    """Measure one engine in a process of its own; what goes wrong is said, and the next one is tried."""
    try:
        in_own_process(_measure_engine, *task)
    except BrokenProcessPool:
        print("  left out: the engine's process died; it may have run out of memory", flush=True)
    except Exception as error:  # an engine that does not start says so in errors of any kind
        print(f"  left out: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", flush=True)


def _measure_engine(
    about: dict[str, Any], points: list[dict[str, Any]], output: Path, prefix: str, options: dict[str, Any]
) -> None:
    """Start one engine, write down what that took unless the file says so already, and measure its points."""
    common(**(about | labels(about["weights"], about["precision"])), engine="vllm", parallel=parallel(options))
    todo = [point for point in points if not is_done(output, f"{prefix}tpot", point)]
    if not todo:
        print("  measured already", flush=True)
        return
    asked = about | {"weights": _readable(**about)}
    settings = {"skip_tokenizer_init": True, "worker_extension_cls": EXTENSION}
    settings["max_num_seqs"] = max(256, *(point["batch"] for point in points))
    settings["apart"] = not is_cpu_build()  # as the server runs it; the build for CPUs is slow to start so
    started = time.perf_counter()
    with offline_engine(**asked, **(settings | options)) as engine:
        seconds = time.perf_counter() - started
        if not is_done(output, f"{prefix}start_seconds", {}):
            figures = engine_memory(engine)
            start = ("start_seconds", seconds, "s", "from the call to an engine that answers, imports included")
            append_rows(output, [_row(prefix, *one) for one in (*figures, start)])
            print("  " + ", ".join(f"{name} {format_value(value)} {unit}" for name, value, unit, _ in figures))
        for point in todo:
            figures = engine_speed(engine, **point)
            append_rows(output, [_row(prefix, *one, **point) for one in figures])
            shown = ", ".join(f"{name} {format_value(value)} {unit}" for name, value, unit, _ in figures)
            sizes = f"{point['batch']} x {point['prompt_tokens']} + {point['new_tokens']} tokens"
            print(f"  {sizes}: {shown}", flush=True)


class EngineFigures:
    """Methods that vLLM adds to its worker (``worker_extension_cls``), asked by ``collective_rpc``: they run there."""

    def memory_figures(self) -> dict[str, float]:
        """Return bytes: what the model takes, and what vLLM's profile run found where it made one (on a GPU)."""
        names = ["available_kv_cache_memory_bytes", "peak_activation_memory", "non_torch_memory"]
        found = {name: getattr(self, name, 0) for name in [*names, "cudagraph_memory_estimate"]}
        weights = getattr(self.model_runner, "model_memory_usage", 0)
        return found | {"weights": weights or sum(one.nbytes for one in self.get_model().parameters())}

    def kernel_names(self) -> str:
        """Name what multiplies the matrices of the loaded model: vLLM's method, and its kernel where it tells one."""
        for module in self.get_model().modules():
            method = getattr(module, "quant_method", None)
            if method is not None and hasattr(module, "input_size"):
                held = [
                    one
                    for owner in (method, getattr(module, "scheme", None))
                    for one in getattr(owner, "__dict__", {}).values()
                ]
                named = [name for name in (type(one).__name__ for one in held) if name.endswith("Kernel")]
                return " with ".join([type(method).__name__, *named[:1]])
        return "no linear layer"


def engine_memory(engine: LLM) -> list[tuple[str, float, str, str]]:
    """Return what an engine made of its memory: name, value, unit and definition of each figure, of its first card.

    The engine has to be started with ``worker_extension_cls=EXTENSION``.
    """
    cache = engine.llm_engine.vllm_config.cache_config
    said, kernel = (engine.collective_rpc(name)[0] for name in ("memory_figures", "kernel_names"))
    share = f"of {cache.gpu_memory_utilization:g} of the card"
    parts = {
        "weights": ("weights", f"vLLM's model_memory_usage; {kernel}"),
        "kv_cache": ("available_kv_cache_memory_bytes", f"what vLLM leaves to the KV cache; {share}"),
        "activation_peak": ("peak_activation_memory", "rise of PyTorch's peak in vLLM's profile run"),
        "outside_torch": ("non_torch_memory", "not PyTorch's: CUDA context, libraries (vLLM's profile run)"),
        "cuda_graphs": ("cudagraph_memory_estimate", "vLLM's own estimate for its CUDA graphs, set aside"),
    }
    found = [(name, said[key] / GIB, "GiB", what) for name, (key, what) in parts.items() if said[key]]
    tokens = cache.num_gpu_blocks * cache.block_size
    return [*found, ("kv_tokens", tokens, "tokens", f"room in the KV cache, all requests together; {share}")]


def engine_speed(engine: LLM, batch: int, prompt_tokens: int, new_tokens: int) -> list[tuple[str, float, str, str]]:
    """Answer ``batch`` prompts of arbitrary tokens in one call and return the figures, medians after a warm-up."""
    from vllm import SamplingParams

    words = engine.llm_engine.vllm_config.model_config.get_vocab_size()

    def seconds(tokens: int, turn: int) -> float:
        lists = [
            [(7919 * turn + 31 * one + 17 * place) % words for place in range(prompt_tokens)] for one in range(batch)
        ]
        engine.reset_prefix_cache()  # no prompt may profit from an earlier one
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        engine.generate([{"prompt_token_ids": ids} for ids in lists], params, use_tqdm=False)
        return time.perf_counter() - begin

    seconds(min(8, new_tokens), 0)
    first = statistics.median(seconds(1, turn) for turn in range(1, 1 + REPEATS))
    whole = statistics.median(seconds(new_tokens, turn) for turn in range(11, 11 + REPEATS))
    tpot = (whole - first) / (new_tokens - 1)
    median = f"median of {REPEATS} runs after a warm-up"
    return [
        (
            "throughput",
            batch * new_tokens / whole,
            "tokens/s",
            f"new tokens by the whole call, prefill included; {median}",
        ),
        (
            "decode_speed",
            batch / tpot,
            "tokens/s",
            f"new tokens after the first, all answers together, greedy; {median}",
        ),
        ("ttft", first, "s", f"a call for one token of each answer; {median}"),
        ("tpot", tpot, "s", "time per output token after the first: rest of the call by new tokens less one"),
    ]


def _files(model: str) -> tuple[Path, Path, Path]:
    """Return where random weights are written for bitsandbytes: in 16 bit, until they are whole, and in int8."""
    folder = cache_folder() / "native" / "random" / f"{model}-files"
    return folder, folder.with_name(f"{folder.name}.part"), int8_folder(model, str(folder))


def _readable(model: str, weights: str, precision: str, device: str) -> str:
    """Return what ``offline_engine`` is to take as weights: random ones for bitsandbytes as a folder."""
    if weights != "random" or precision not in ("int8", "nf4"):
        return weights
    folder, beside, _ = _files(model)
    if not folder.exists():
        shutil.rmtree(beside, ignore_errors=True)
        in_own_process(_write_random, model, beside, pick_device(device))  # the card's memory it takes goes with it
        beside.rename(folder)
    return str(folder)


def _write_random(model: str, folder: Path, device: str) -> None:
    """Write a native folder: weights, the stand-in's tokenizer, and the receipt by which it needs no conversion."""
    row = catalog.model(model)
    save_random(row, folder, device)
    for file in random_folder(row).iterdir():
        if file.name != "config.json":
            shutil.copy(file, folder)
    (folder / RECEIPT).write_text(json.dumps({"weights": "random"}), encoding="utf-8")


def _row(prefix: str, name: str, value: float, unit: str, definition: str, **point: Any) -> dict[str, Any]:
    return figure(prefix + name, value, unit, True, definition=definition, **point)
