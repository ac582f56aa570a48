"""vLLM's engine in this very process, without HTTP: for many prompts at once, and for comparing tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HelpersError
from .command import prepare
from .launch import pass_for_vllm

if TYPE_CHECKING:
    from vllm import LLM


@contextmanager
def offline_engine(
    model: str,
    weights: str | Path = "tiny",
    precision: str = "auto",
    device: str = "auto",
    apart: bool = False,
    **options: Any,
) -> Iterator[LLM]:
    """Give a ``vllm.LLM`` while the block runs, and free it afterwards.

        with offline_engine("qwen-7b") as engine:
            answers = engine.generate(prompts, SamplingParams(temperature=0))

    The engine runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), so a notebook needs no ``__main__`` guard.
    Small steps are then slower: the caller's Python and the engine's take turns, where two processes overlap.
    What stays until the kernel ends is what vLLM's import brings: some hundred MB of RAM, on a GPU the CUDA context.

    Args:
        model, weights, precision, device, options: as ``serve``; no ``lora``, ``host`` or ``port``.
        apart: run the engine in a process of its own, as the server does; on GPUs, and not from a script without
            a ``__main__`` guard.

    Raises:
        HelpersError: the model cannot be served, or another card than the first is asked for without ``apart``. What
            vLLM itself raises is passed on as it is.
    """
    import torch

    job = prepare(model, weights, precision, device, options)
    if job.device not in ("cpu", "cuda:0") and not apart:
        # `prepare` has asked CUDA for its cards, which reads CUDA_VISIBLE_DEVICES then and never again
        visible = job.environment()["CUDA_VISIBLE_DEVICES"]
        fix = f"pass apart=True, or set CUDA_VISIBLE_DEVICES={visible} before Python starts"
        why = "in a process that has counted its cards, vLLM would take the first one all the same"
        raise HelpersError(f"cannot run this engine on {job.device}", why, fix)
    settings = job.environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(apart)), "VLLM_LOGGING_LEVEL": "WARNING"}
    before, set_threads = dict(os.environ), torch.set_num_threads
    os.environ.update(settings)
    pass_for_vllm()
    engine = None
    try:
        from vllm import LLM

        engine = LLM(str(job.folder), **job.options)
        yield engine
    finally:
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
        del engine
        _release()
        torch.set_num_threads = set_threads  # vLLM's worker for CPUs puts one there that does nothing
        os.environ.clear()
        os.environ.update(before)


def _release() -> None:
    """Give back the memory, and end the group of processes (of one) that vLLM made for talking among its workers."""
    import gc

    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    gc.collect()
