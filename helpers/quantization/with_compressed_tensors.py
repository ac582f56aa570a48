"""8-bit weights and 8-bit activations in the compressed-tensors format, for engines that multiply in 8 bit.

    w8a8   integers; SmoothQuant first moves the activations' outliers into the weights
    fp8    e4m3 floating point, whose range needs no smoothing and no calibration

Weights have a scale for each output channel; activations one for each token, found while the model runs. vLLM computes
so; transformers unpacks the weights at the first use and rounds the activations as an engine would.

Sources: SmoothQuant arXiv 2211.10438, https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.quantized import quiet
from ..errors import HelpersError
from .calibration import Text, batches, calibrate
from .folder import Job, quantizing

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def w8a8(
    model: str,
    target: Path | str,
    *,
    weights: str | Path = "tiny",
    smoothing: float = 0.5,
    calibration: Text = None,
    samples: int = 256,
    device: str = "auto",
    replace: bool = False,
) -> Path:
    """Quantise weights and activations of a model to int8.

    Args:
        model: catalogue id, or the path of a native folder.
        target: folder to make.
        weights: ``"tiny"``, ``"hub"``, ``"random"``, or the path of a published or native folder.
        smoothing: how much of the activations' range moves into the weights, 0 to 1; 0 leaves both as they are, and
            nothing is calibrated. It needs a norm that feeds matrices only: ChatGLM-6B and RWKV are not smoothed.
        calibration: texts, the path of a text file, or None for the shipped poems.
        samples: texts used at most.
        device: as ``load``.
        replace: overwrite the result of an earlier run.

    Returns:
        ``target``, which ``load(model, weights=target)`` and vLLM read.

    Raises:
        HelpersError: ``smoothing`` is no part of one, too little calibration text, or as ``quantizing``.
    """
    if not 0 <= smoothing <= 1:
        raise HelpersError(f"cannot take smoothing {smoothing}", "it is a part of one", "take 0.5, or 0 for none")
    with quantizing("w8a8", model, target, weights, device, replace, {"smoothing": smoothing}) as job:
        loaded = _load(job)
        pairs = _norms_and_matrices(loaded) if smoothing else []
        job.receipt["smoothed"] = len(pairs)
        if pairs:
            _smooth(loaded, pairs, batches(calibrate(job, calibration, samples), 8, job.device), smoothing)
        _compress(job, loaded, "W8A8")
    return Path(target)


def fp8(
    model: str,
    target: Path | str,
    *,
    weights: str | Path = "tiny",
    device: str = "auto",
    replace: bool = False,
) -> Path:
    """Quantise weights and activations of a model to fp8 (e4m3). Arguments as ``w8a8``; nothing is calibrated."""
    with quantizing("fp8", model, target, weights, device, replace, {}) as job:
        _compress(job, _load(job), "FP8_DYNAMIC")
    return Path(target)


def _load(job: Job) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    options = {"local_files_only": True, "dtype": job.compute_dtype, "device_map": job.device}
    return AutoModelForCausalLM.from_pretrained(job.source, **options).eval()


def _norms_and_matrices(model: PreTrainedModel) -> list[tuple[Any, list[Any]]]:
    """Return each norm with the matrices it feeds, in blocks of Llama's form, where nothing else reads its output."""
    pairs = []
    for block in model.modules():
        attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
        if attention is None or mlp is None:
            continue
        first = [getattr(mlp, name) for name in ("gate_proj", "up_proj", "gate_up_proj") if hasattr(mlp, name)]
        pairs.append((block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        pairs.append((block.post_attention_layernorm, first))
    return pairs


def _smooth(model: PreTrainedModel, pairs: list[tuple[Any, list[Any]]], rows: list[Any], strength: float) -> None:
    """Divide what a norm gives by s and multiply the matrices' columns by s: the same product, with a flatter input.

    s = max|x|^strength / max|w|^(1 - strength) for each input channel.
    """
    import torch
    from tqdm.auto import tqdm

    largest: dict[int, Tensor] = {}
    mask: list[Tensor] = []

    def look(norm: Any, _: Any, output: Tensor) -> None:
        peak = output[mask[0]].abs().amax(0).float()
        largest[id(norm)] = torch.maximum(largest.get(id(norm), peak), peak)

    hooks = [norm.register_forward_hook(look) for norm, _ in pairs]
    with torch.inference_mode():
        for row in tqdm(rows, "calibrating", delay=5):
            mask[:] = [row["attention_mask"].bool()]
            model(**row, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for norm, matrices in pairs:
            weight = torch.stack([matrix.weight.abs().amax(0).float() for matrix in matrices]).amax(0)
            x = largest[id(norm)].clone()
            scale = (x.clamp(min=1e-5) ** strength / weight.clamp(min=1e-5) ** (1 - strength)).clamp(min=1e-5)
            norm.weight.data = (norm.weight.float() / scale).to(norm.weight.dtype)
            for matrix in matrices:
                matrix.weight.data = (matrix.weight.float() * scale).to(matrix.weight.dtype)


def _compress(job: Job, model: PreTrainedModel, scheme: str) -> None:
    """Find the scales, round, and write it all in the format's own way."""
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    ignored = [name for name in names if model.get_submodule(name) is head]
    groups = {"group_0": preset_name_to_scheme(scheme, ["Linear"])}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=ignored))
    with torch.no_grad():
        for name in set(names) - set(ignored):
            module = model.get_submodule(name)
            low, high = module.weight.float().aminmax(dim=1, keepdim=True)
            scale, _ = calculate_qparams(low, high, module.quantization_scheme.weights)
            module.weight_scale.data = scale.to(module.weight_scale.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    with quiet():  # it has a bar of its own
        compressor.compress_model(model)
    job.save(model)
    compressor.update_config(job.folder)
