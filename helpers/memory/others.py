"""What other estimators say of the same run, to stand beside ``estimate`` and what was measured.

Each counts something else, so each is told with what it means to count. Their formulas are facts, restated here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .. import catalog
from ..catalog.gpus import find_gpu
from .estimate import estimate
from .parts import GIB
from .shapes import Sized, sized


def gpu_poor(about: Sized, precision: str, context: int) -> float:
    """Return bytes as gpu_poor counts them ("Inference (Huggingface)"): model, KV cache, activations, 650 MB.

    Every layer is taken for Llama's (no biases, every head its own key and value), the KV cache twice over, all
    attention scores of a layer at once, and 6 % more for the scales of bitsandbytes. The batch has no part in it.

    Source: https://github.com/RahulSChand/gpu_poor, src/App.js at 0c49be4141d3dc603cefa8adc13e6f2ab5ea78d7:
    computeModelSize, convertToMBModelSize, computeInferenceOnlyActivationMemory and getAllComputedData.
    """
    shape = about.shape
    hidden = shape.hidden_size
    parameters = 2 * shape.vocab_size * hidden + shape.layers * hidden * (4 * hidden + 3 * shape.ffn_size)
    half = 2 * parameters
    model = {"int8": half / 2 + 0.06 * half, "nf4": half / 4 + 0.06 * half}.get(precision, half)
    cache = 2 * 2 * 2 * context * hidden * shape.layers
    activations = 2 * 5 * context * hidden + 2 * context**2 * getattr(shape, "heads", 0)
    return model + cache + activations + 650 * 2**20


def hf_mem(about: Sized, precision: str, batch: int, context: int) -> float | None:
    """Return bytes as hf-mem counts them: tensors in the published files, and (``--experimental``) the KV cache.

    None for what is quantised while loading: it reads the files' headers, and these are of 16 bit.

    Source: https://github.com/alvarobartt/hf-mem, 0.5.6: src/hf_mem/safetensors/metadata.py and kv_cache.py.
    """
    if precision not in ("fp16", "bf16"):
        return None
    return 2 * (sum(about.shape.count_parameters().values()) + batch * context * about.shape.kv_values_per_token())


def accelerate_memory(model: str, precision: str) -> float:
    """Return bytes as ``accelerate estimate-memory`` counts them ("Total Size"): parameters, all in that precision.

    Its own library function counts an empty model in fp32; the rest are halves of that. It knows no KV cache.

    Source: https://github.com/huggingface/accelerate, src/accelerate/commands/estimate.py: gather_data.
    """
    return _in_fp32(model) / {"fp16": 2, "bf16": 2, "int8": 4, "nf4": 8, "gptq-int4": 8}[precision]


@cache
def _in_fp32(model: str) -> int:
    import torch
    from accelerate.utils import calculate_maximum_sizes

    from ..checkpoints.random import full_config
    from ..native import model_class, register

    register()
    row = catalog.model(model)
    with torch.device("meta"):
        empty = model_class(row.native_class)._from_config(full_config(row), dtype=torch.float32)
    return calculate_maximum_sizes(empty)[0]


def side_by_side(figure: str = "allocated_peak") -> list[dict[str, Any]]:
    """Compare every estimator with the recorded rows of one figure, of transformers' default path.

    Args:
        figure: ``"allocated_peak"`` is what live tensors took, ``"nvml_process"`` all that the card gave the process.

    Returns:
        For each row ``model``, ``precision``, ``batch``, ``prompt_tokens``, ``device``, ``recorded`` in GiB, and the
        relative error of ``estimate``, ``gpu_poor``, ``hf_mem`` and ``accelerate``: -0.1 is a tenth too little, None is
        no figure.
    """
    table = []
    rows = catalog.measured(name=figure, engine="transformers", decoding="default", weights="random")
    for row in rows:
        context = row.prompt_tokens + row.new_tokens
        card = find_gpu(row.device)
        run = {"batch": row.batch, "context": context, "prompt_tokens": row.prompt_tokens}
        ours = estimate(row.model, row.precision, gpu=card and card.id, **run)
        about = sized(row.model)
        said = {
            "estimate": max(ours.moments["prefill"], ours.moments["decode"])
            if figure == "allocated_peak"
            else ours.total,
            "gpu_poor": gpu_poor(about, row.precision, context),
            "hf_mem": hf_mem(about, row.precision, row.batch, context),
            "accelerate": accelerate_memory(row.model, row.precision),
        }
        errors = {name: None if size is None else size / GIB / row.value - 1 for name, size in said.items()}
        about = {name: getattr(row, name) for name in ("model", "precision", "batch", "prompt_tokens", "device")}
        table.append(about | {"recorded": row.value} | errors)
    return table
