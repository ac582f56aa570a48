"""What a quantised model consists of: bytes and bits of each layer, and what stayed in 16 bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layer:
    """One module that holds weights; a list of them makes a pandas.DataFrame.

    Attributes:
        name: where it stands in the model, e.g. ``"model.layers.0.mlp.down_proj"``.
        kernel: the class that computes it, e.g. ``"Linear4bit"``.
        weights: how many numbers it stands for.
        bytes: what it takes, scales and zero points included.
        bits: bytes * 8 / weights.
        quantized: False for what stayed in floating point.
    """

    name: str
    kernel: str
    weights: int
    bytes: int
    bits: float
    quantized: bool


def quantized_layers(model: PreTrainedModel) -> list[Layer]:
    """List a model's modules that hold weights, in order; a tied output layer counts once, with the embedding.

    Of compressed-tensors folders (w8a8, fp8), which transformers unpacks at their first use, call it before.
    """
    seen: set[int] = set()
    rows = []
    for name, module in model.named_modules():
        tensors = [*module.parameters(recurse=False), *_buffers(module)]
        tensors = [one for one in tensors if id(one) not in seen]
        seen |= {id(one) for one in tensors}
        if not tensors:
            continue
        size = sum(_bytes(one) for one in tensors)
        weights = _weights(module, tensors)
        bits = 8 * size / weights
        rows.append(Layer(name, type(module).__name__, weights, size, round(bits, 2), _is_quantized(module, tensors)))
    return rows


def _buffers(module: Any) -> list[Any]:
    """Return a module's stored buffers; what is computed anew at loading, e.g. rotary angles, is not of the weights."""
    passing = module._non_persistent_buffers_set
    return [one for name, one in module._buffers.items() if one is not None and name not in passing]


def _bytes(tensor: Any) -> int:
    """Return a tensor's bytes with what bitsandbytes hangs on it: scales, and for double quantisation theirs."""
    size, state = tensor.numel() * tensor.element_size(), getattr(tensor, "quant_state", None)
    extras = [getattr(tensor, "SCB", None)]
    if state is not None:
        nested = getattr(state, "state2", None)
        extras += [state.absmax, state.code, state.offset, nested and nested.absmax, nested and nested.code]
    return size + sum(extra.numel() * extra.element_size() for extra in extras if extra is not None)


def _weights(module: Any, tensors: list[Any]) -> int:
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if inputs and outputs:
        bias = getattr(module, "bias", None)
        return inputs * outputs + (0 if bias is None else bias.numel())
    return sum(tensor.numel() for tensor in tensors)


def _is_quantized(module: Any, tensors: list[Any]) -> bool:
    return any(not one.is_floating_point() or one.element_size() == 1 for one in tensors)
