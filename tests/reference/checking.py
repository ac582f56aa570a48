"""Hold a converted checkpoint against the reference model: write it, convert it, load it, compare logits.

weights = random_weights(chatglm2.shapes(original))
model = converted(tmp_path, original, weights)
assert_equivalent(model, chatglm2.logits, original, weights)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from helpers import native

from .layers import Original, Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-5
"""Largest difference allowed between two logits in fp32; the logits themselves are of scale 1 to 4."""

Logits = Callable[..., Tensor]
"""``logits(original, weights, input_ids, attention_mask, cache=None)``, as every reference module offers it."""


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    """Draw every tensor: matrices that keep a vector's length, norms near 1, biases near 0 - none of them trivial."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            return values / shape[-1] ** 0.5
        return 0.2 * values + (0 if name.endswith("bias") else 1)

    return {name: draw(name, shape).to(dtype) for name, shape in shapes.items()}


def write_original(
    folder: Path, original: Original, weights: Weights, shards: int = 1, suffix: str = "safetensors"
) -> Path:
    """Write a checkpoint as its authors would: config.json, and one weight file or ``shards`` of them with an index.

    Args:
        folder: made when it is not there.
        original: the original config.json.
        weights: tensors by their original names.
        shards: number of weight files; tensors are dealt out in turn, so a layer lies in several.
        suffix: ``"safetensors"`` or ``"bin"``.

    Returns:
        ``folder``.
    """
    from safetensors.torch import save_file

    def save(part: Weights, name: str) -> None:
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(part, folder / name)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(original))
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    if shards == 1:
        save(weights, f"{stem}.{suffix}")
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        part = dict(list(weights.items())[number::shards])
        save(part, name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def converted(folder: Path, original: Original, weights: Weights, **layout: Any) -> PreTrainedModel:
    """Write an original checkpoint below ``folder`` (``layout``: see ``write_original``), convert and load it."""
    source = write_original(folder / "original", original, weights, **layout)
    return load(native.convert(source, folder / "native"))


def load(folder: Path) -> PreTrainedModel:
    """Load a converted folder as a reader would, in fp32, and make sure that no tensor was left over or made up."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), f"from_pretrained complains: {report}"
    return model.eval()


def compare(name: str, ours: Tensor, reference: Tensor, tolerance: float = TOLERANCE) -> None:
    """Assert that two tensors are equal to within ``tolerance``, and say by how much they are not."""
    assert ours.shape == reference.shape, f"{name}: shape {list(ours.shape)}, reference {list(reference.shape)}"
    difference = (ours - reference).abs().max().item()
    assert difference <= tolerance, (
        f"{name}: largest difference {difference:.2e} is above {tolerance:.0e}; "
        f"reference values are of scale {reference.abs().max().item():.2f}"
    )


def sample_ids(vocabulary: int, batch: int = 3, tokens: int = 12, seed: int = 1) -> Tensor:
    """Draw token ids [batch, tokens] from the whole vocabulary; the last id is always among them."""
    ids = torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    ids[-1, -2] = vocabulary - 1
    return ids


def left_padding(batch: int, tokens: int) -> Tensor:
    """Build an attention mask [batch, tokens] in which row r starts with 2 r places of padding."""
    return (torch.arange(tokens) >= 2 * torch.arange(batch)[:, None]).long()


@torch.no_grad()
def run_native(model: PreTrainedModel, ids: Tensor, mask: Tensor, prefill: int | None = None) -> Tensor:
    """Return logits [batch, tokens, vocabulary]: in one pass, or ``prefill`` tokens first and then one at a time."""
    cache, done, parts = None, 0, []
    for end in [ids.shape[1]] if prefill is None else range(prefill, ids.shape[1] + 1):
        step = model(ids[:, done:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache, done = step.past_key_values, end
        parts.append(step.logits)
    return torch.cat(parts, dim=1)


@torch.no_grad()
def run_reference(
    logits: Logits, original: Original, weights: Weights, ids: Tensor, mask: Tensor, prefill: int | None = None
) -> Tensor:
    """Do as ``run_native`` does, with a reference model."""
    cache, done, parts = {}, 0, []
    for end in [ids.shape[1]] if prefill is None else range(prefill, ids.shape[1] + 1):
        parts.append(logits(original, weights, ids[:, done:end], mask[:, :end], cache))
        done = end
    return torch.cat(parts, dim=1)


def assert_equivalent(
    model: PreTrainedModel, logits: Logits, original: Original, weights: Weights, ids: Tensor | None = None
) -> None:
    """Assert equal logits in one pass, with a KV cache on both sides or one, and with padding on the left.

    Places of padding are left out of the comparison: what a model says there has no meaning.
    """
    ids = sample_ids(model.config.vocab_size) if ids is None else ids
    whole, padded = torch.ones_like(ids), left_padding(*ids.shape)
    prefill = ids.shape[1] // 2
    reference = run_reference(logits, original, weights, ids, whole)
    compare(
        "reference with and without cache", run_reference(logits, original, weights, ids, whole, prefill), reference
    )
    compare("one pass", run_native(model, ids, whole), reference)
    compare("KV cache", run_native(model, ids, whole, prefill), reference)

    real = padded.bool()
    reference = run_reference(logits, original, weights, ids, padded)[real]
    compare("left padding", run_native(model, ids, padded)[real], reference)
    compare("left padding, KV cache", run_native(model, ids, padded, prefill)[real], reference)


def assert_inverts(model: PreTrainedModel, original: Original, weights: Weights) -> None:
    """Assert that ``to_original`` gives back every original tensor, bit for bit, and no other."""
    back = native.to_original(original, model.state_dict())
    assert set(back) == set(weights), f"names differ: {sorted(set(back) ^ set(weights))}"
    changed = [name for name in weights if not torch.equal(back[name], weights[name])]
    assert not changed, f"values or shapes differ: {changed}"
