"""What vLLM's log says about a start that failed, in one line: what happened, why, what to do.

Each cause quotes the file of vLLM (0.27.1) that writes its message; a test compares the words with the installed one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from .. import catalog
from ..errors import HelpersError
from .command import Job

Answer = tuple[str, str]
"""Why, and what to do."""

LAST_ERROR = re.compile(r"^.*?\b([A-Z]\w*(?:Error|Exception|Exit)): (.+)$", re.MULTILINE)
FOLLOWS = re.compile(r"Engine core initialization failed|Worker (proc|failed)|WorkerProc initialization failed")
"""Errors that only say that another one came before."""


@dataclass(frozen=True)
class Cause:
    """A message of vLLM: where it stands, how it is found, and what it means for a job."""

    file: str
    pattern: str
    answer: Callable[[re.Match[str], Job], Answer]


def explain(log: str, job: Job, ended: str) -> HelpersError:
    """Turn the log of a start that failed into an error; its notes carry the log's tail.

    Args:
        log: what the engine wrote.
        job: what it was asked to do.
        ended: how it ended, e.g. ``"it ended with exit status 1"``; said where the log has no cause.
    """
    text = flat(log)
    for cause in CAUSES:
        if found := re.search(cause.pattern, text):
            why, fix = cause.answer(found, job)
            break
    else:
        why, fix = f"{ended}; {last_words(log)}", "read the tail of its log below"
        if "signal 9" in ended:
            why, fix = f"{ended}, as Linux does when RAM runs out; {_need(job)}", f"take {_smaller(job)}, or more RAM"
    error = HelpersError(f"cannot serve {job.title}", why, fix)
    error.add_note("\n".join(log.splitlines()[-20:]))
    return error


def is_known(log: str) -> bool:
    """Tell whether a log says why the engine ended, in vLLM's words or Python's."""
    return any(re.search(cause.pattern, flat(log)) for cause in CAUSES) or bool(LAST_ERROR.search(log))


def flat(log: str) -> str:
    """Put a log on one line, without what vLLM's processes write before each of theirs."""
    lines = [re.sub(r"^\(\w+ pid=\d+\) ?|\x1b\[[0-9;]*m", "", line) for line in log.splitlines()]
    return re.sub(r"\s+", " ", " ".join(re.sub(r"^[A-Z]+ [\d-]+ [\d:]+ \[[\w.]+:\d+\] ?", "", each) for each in lines))


def last_words(log: str) -> str:
    """Return the last error that is not the echo of another, or the last line."""
    # some warnings quote an error that may come, to explain it
    said = "\n".join(line for line in log.splitlines() if not re.search(r"\bWARNING\b", line))
    errors = [f"{name}: {text}" for name, text in LAST_ERROR.findall(said) if not FOLLOWS.search(text)]
    lines = [line for line in log.splitlines() if line.strip()]
    return (errors or lines or ["it wrote nothing"])[-1][:300]


def sizes(job: Job) -> tuple[float, float]:
    """Return GiB of the weights and KiB that a token adds to the KV cache, counted from shapes (or files)."""
    from ..memory.parts import GIB, weight_bytes
    from ..memory.preflight import file_sizes, sized_weights

    row, element = catalog.model(job.model), 4 if job.options.get("dtype") == "float32" else 2
    about = sized_weights(row, job.weights)
    quantised = job.precision == "as saved"
    weights = file_sizes(row, job.weights)[0] if quantised else weight_bytes(about, job.precision, element=element)
    kept = 1 if str(job.options.get("kv_cache_dtype", "auto")).startswith("fp8") else element
    return weights / GIB, about.shape.kv_values_per_token() * kept / 1024


def _need(job: Job) -> str:
    weights, token = sizes(job)
    return f"the weights take {weights:.2f} GiB and every token {token:.0f} KiB of KV cache"


def _smaller(job: Job) -> str:
    """Name the smaller precision that is left."""
    return "a smaller model" if job.precision in ("nf4", "as saved", "int8") else "precision nf4"


def _more_cache(job: Job) -> str:
    from ..memory.parts import UTILISATION

    if job.device == "cpu":
        return "kv_cache_memory_bytes= more (or VLLM_CPU_KVCACHE_SPACE in GiB)"
    return f"gpu_memory_utilization= more ({UTILISATION} if left out)"


def _cache_too_small(found: re.Match[str], job: Job) -> Answer:
    length, need, have, fits = found.groups()
    why = f"one sequence of {int(length):,} tokens needs {need} GiB of KV cache, and there are {have}"
    shorter = f"max_model_len={fits}, the most that fits" if fits else "a smaller max_model_len"
    return why, f"pass {shorter}, or {_more_cache(job)}"


def _no_room(_: re.Match[str], job: Job) -> Answer:
    return f"{_need(job)}, which leaves no room for a cache", f"pass {_more_cache(job)}, or take {_smaller(job)}"


def _card_in_use(found: re.Match[str], job: Job) -> Answer:
    free, whole, share = (float(each) for each in found.groups())
    lower = math.floor(95 * free / whole) / 100
    fix = f"free what other notebooks and processes hold, or pass gpu_memory_utilization={lower:.2f}"
    return f"{free} of {whole} GiB are free and vLLM takes {share:.0%} of the whole; {_need(job)}", fix


def _ram_in_use(found: re.Match[str], job: Job) -> Answer:
    free, asked = found.groups()
    fix = "pass a smaller kv_cache_memory_bytes (or VLLM_CPU_KVCACHE_SPACE in GiB), or close other programs"
    return f"its KV cache was to take {asked} GiB of RAM, and {free} are free; {_need(job)}", fix


def _out_of_memory(_: re.Match[str], job: Job) -> Answer:
    fix = f"take {_smaller(job)}, pass a smaller max_model_len or max_num_seqs, or free what other processes hold"
    return f"memory ran out; {_need(job)}", fix


def _longer_than_context(found: re.Match[str], job: Job) -> Answer:
    asked, made_for = (int(each) for each in found.groups())
    return f"max_model_len={asked} is longer than the {made_for:,} tokens it was made for", "lower max_model_len"


def _old_card(found: re.Match[str], job: Job) -> Answer:
    method, wanted, have = found.groups()
    why = f"{method} kernels need compute capability {_capability(wanted)} and the card has {_capability(have)}"
    return why, "take precision fp16, or weights quantised another way (bitsandbytes and GPTQ run on a T4)"


def _capability(digits: str) -> str:
    return f"{digits[:-1]}.{digits[-1]}"


def _method_not_here(found: re.Match[str], job: Job) -> Answer:
    return f"vLLM has no {found[1]} for {found[2]}", "take precision auto, or serve it on a CUDA GPU"


def _no_cpu_kernel(found: re.Match[str], job: Job) -> Answer:
    why = f"vLLM has no kernel {found[1]} for this CPU (GPTQ, AWQ and an FP8 KV cache need AVX-512 there)"
    return why, "take precision nf4 or auto, or serve it on a GPU"


def _no_bf16(found: re.Match[str], job: Job) -> Answer:
    return f"{found[1]} is older than Ampere and has no bf16", "take precision fp16 or auto"


def _other_dtype(found: re.Match[str], job: Job) -> Answer:
    return f"{found[2]} computes in {found[3]} only, not in {found[1]}", "leave precision at auto"


def _unknown_class(found: re.Match[str], job: Job) -> Answer:
    if "Alibi" in found[1]:
        why = "vLLM does not see this package's model class (the entry point vllm.general_plugins)"
        return why, "install the package itself: pip install --no-deps -e ."
    return f"vLLM has no model class {found[1]}", "convert it (python -m helpers convert), or use load and chat"


def _dropped_class(found: re.Match[str], job: Job) -> Answer:
    fix = "serve the converted folder, not the original one: python -m helpers convert"
    return f"vLLM dropped {found[1]} after {found[2]}", fix


def _port_taken(_: re.Match[str], job: Job) -> Answer:
    return "the port is taken", "leave port out, and a free one is found"


def _no_weights(found: re.Match[str], job: Job) -> Answer:
    return f"{job.folder} holds no weights", "fetch or convert it again; delete the folder first"


def _no_model(found: re.Match[str], job: Job) -> Answer:
    return f"{job.folder} is no checkpoint (no config.json)", "fetch or convert it again; delete the folder first"


def _remote_code(_: re.Match[str], job: Job) -> Answer:
    why = "the folder asks to run code that came with it, which is never done here"
    return why, "serve the converted folder: python -m helpers convert"


def _whole_layers(_: re.Match[str], job: Job) -> Answer:
    why = "vLLM takes no adapter that brings whole layers (modules_to_save)"
    return why, "merge it first: python -m helpers convert --adapter"


def _wrong_flag(found: re.Match[str], job: Job) -> Answer:
    return f"vllm serve says: {found[1][:200]}", "look the option up: python -m helpers.serving.launch serve --help=all"


CAUSES = [
    Cause(
        "v1/core/kv_cache_utils.py",
        r"To serve at least one request with the model's max seq len \((\d+)\), \(([\d.]+) GiB KV cache is needed, "
        r"which is larger than the available KV cache memory \(([\d.]+) GiB\)\. "
        r"(?:Based on the available memory, the estimated maximum model length is (\d+))?",
        _cache_too_small,
    ),
    Cause("v1/core/kv_cache_utils.py", r"No available memory for the cache blocks\.", _no_room),
    Cause(
        "v1/worker/utils.py",
        r"Free memory on device \S+ \(([\d.]+)/([\d.]+) GiB\) on startup is less than desired GPU memory utilization "
        r"\(([\d.]+),",
        _card_in_use,
    ),
    Cause(
        "v1/worker/cpu_worker.py",
        r"Available memory on node \d+ \(([\d.]+)/[\d.]+ GiB\) on kv cache allocation is less than requested memory "
        r"for kv \(([\d.]+)",
        _ram_in_use,
    ),
    Cause("", r"CUDA out of memory|torch\.OutOfMemoryError|DefaultCPUAllocator: can't allocate memory", _out_of_memory),
    Cause(
        "config/model.py",
        r"User-specified max_model_len \((\d+)\) is greater than the derived max_model_len \(\w+=(\d+)",
        _longer_than_context,
    ),
    Cause(
        "config/vllm.py",
        r"The quantization method (\S+) is not supported for the current GPU\. Minimum capability: (\d+)\. "
        r"Current capability: (\d+)",
        _old_card,
    ),
    Cause(
        "config/vllm.py",
        r"(\S+) is not supported for quantization method (\S+)\. Supported dtypes: (\[.*?\])",
        _other_dtype,
    ),
    Cause("platforms/interface.py", r"(\S+) quantization is currently not supported in (\S+)\.", _method_not_here),
    Cause(
        "v1/attention/backends/cpu_attn.py",
        r"(FP8 KV cache) on CPU requires x86 with AVX-512 or AMX",
        _no_cpu_kernel,
    ),
    Cause("", r"'_OpNamespace' '_C' object has no attribute '(\w+)'", _no_cpu_kernel),
    Cause(
        "platforms/cuda.py",
        r"Bfloat16 is only supported on GPUs with compute capability of at least 8\.0\. Your (.+?) GPU",
        _no_bf16,
    ),
    Cause(
        "model_executor/models/registry.py",
        r"Model architecture (\S+) was supported in vLLM until (\S+), and is not supported anymore",
        _dropped_class,
    ),
    Cause(
        "model_executor/models/registry.py", r"Model architectures (\[.*?\]) are not supported for now", _unknown_class
    ),
    Cause("", r"\[Errno \d+\] Address already in use", _port_taken),
    Cause("model_executor/model_loader/default_loader.py", r"Cannot find any model weights with", _no_weights),
    Cause("model_executor/model_loader/bitsandbytes_loader.py", r"No model weights found in", _no_weights),
    Cause("transformers_utils/config.py", r"Invalid repository ID or local directory specified:", _no_model),
    Cause("transformers_utils/config.py", r"`--trust-remote-code` flag in the CLI", _remote_code),
    Cause("lora/peft_helper.py", r"vLLM only supports modules_to_save being None", _whole_layers),
    Cause("", r"error: ((?:unrecognized arguments|argument --?\S+): .+)", _wrong_flag),
]
"""In the order they are looked for; an empty file is PyTorch's or Python's own message."""
