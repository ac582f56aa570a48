"""What a run takes, part by part: weights, KV cache, activations, working space, and what is not PyTorch's.

Weights and KV cache follow from the model's shape. What does not is in ``FITTED`` and ``ASSUMED``, nowhere else:
constants taken from recorded rows (catalog/measured), and those that nothing recorded has confirmed yet.
tests/test_estimate.py holds every recorded row against this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .shapes import Sized

if TYPE_CHECKING:
    from ..catalog.gpus import Gpu

GIB, MIB = 2**30, 2**20

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "nf4": 0.5, "nf4-double": 0.5}
BYTES |= {"w8a8": 1.0, "gptq-int8": 1.0, "gptq-int4": 0.5, "awq-int4": 0.5}
"""Precisions, and the bytes of one weight of a large matrix in each; embeddings, output layer and norms stay 16 bit."""

FITTED = {
    # weights "random", default generate, 128 + 64 tokens, H100 80GB HBM3, 2026-11-24; held out: see tests/test_estimate
    "CUDA context": 0.69 * GIB,  # nvml_process - reserved_peak: 0.676 to 0.691
    "CUDA context, int8": 0.74 * GIB,  # with bitsandbytes' kernels: 0.725 to 0.744
    "CUDA context, recorded": 0.75 * GIB,  # with a CUDA graph: 0.736 to 0.775
    "driver": 0.477 * GIB,  # nvml_device - nvml_process: what the card holds before any process
    "rest of a step": 1 * MIB,  # positions, token ids, rotary angles: allocated - weights - cuBLAS workspace
    "int8 outlier columns": 3.1,  # bytes a weight of an MLP matrix in one int8 product; qwen-7b, chatglm3-6b 3.2
    "repacking gptq-int4": 1.15,  # bytes a weight of the largest matrix while it becomes Marlin's; GLM's fused one 0.72
    # what PyTorch's allocator keeps of freed blocks, see freed_blocks; reserved_peak - allocated_peak
    "left by loading int8": 8.9,  # bytes a weight of the largest matrix; median of the fitted rows, 4.3 to 15
    "left by loading nf4": 2.9,  # the same; 3.3 of Llama's shape, 2.5 of GLM's fused matrix: the middle
    "left by loading gptq-int4": 1.4,  # repacking for Marlin; 2.3 of Llama's shape, 0.5 of GLM's: the middle
    "left by a prompt's activations": 0.35,  # of them; 0.5 of Llama's shape, 0.2 of GLM's, both static: the middle
    "left by a prompt's cache": 0.33,  # of the cache, where it grows: at 1,984 + 64 tokens and 8,128 + 64
}
ASSUMED = {
    "vLLM outside its budget": 0.31 * GIB,  # from one Llama-2-7B run of vLLM 0.26; outside_torch of the rows is less
}
STEP_TOKENS = {True: 16384, False: 8192}
"""Tokens of vLLM's largest step, of LLM(...): on cards of 70 GiB or more that are no A100, and on others
(vllm/engine/arg_utils.py, get_batch_defaults). It is for the server half and a quarter of that."""

CUBLAS = {True: 32 * MIB, False: 8.125 * MIB}
"""PyTorch's cuBLAS workspace, on Hopper and on others (aten/src/ATen/cuda/CublasHandlePool.cpp)."""

QUANTISED_WHILE_LOADING = ("int8", "nf4", "nf4-double")
"""By bitsandbytes: one matrix after the other is there both as it was and packed."""

RWKV_STATES = {4: (14, 100), 5: (18, 145), 6: (18, 145), 7: (34, 101)}
"""Hidden states of 16 bit alive while RWKV reads a prompt: of each token, and more of each of ``RWKV_SEGMENT`` tokens,
whose chunks helpers/native/own/rwkv.py prepares together. From allocated_peak at 128 and 1,984 tokens; version 5, which
is not recorded, as 6."""

RWKV_SEGMENT = 256

FORMULA, ROWS = "from the shape", "fitted on recorded rows"
UTILISATION = 0.92
"""Share of a card that vLLM reserves unless told otherwise (gpu_memory_utilization)."""

ALLOCATED, CACHED, OUTSIDE, FREE = "allocated", "cached", "outside", "reserved"


@dataclass(frozen=True)
class Component:
    """One part of the memory at the moment of the peak.

    Attributes:
        name: what it is.
        bytes: its size.
        formula: how it is counted, in words.
        source: ``FORMULA``, ``ROWS``, or whose code or file says so.
        where: ``ALLOCATED`` is in live tensors, ``CACHED`` is kept by PyTorch's allocator, ``OUTSIDE`` is not
            PyTorch's, ``FREE`` is what vLLM reserves beyond the need.
    """

    name: str
    bytes: float
    formula: str
    source: str = FORMULA
    where: str = ALLOCATED


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        element: bytes of a value that is not quantised.
        step: vLLM's largest one, tokens.
        kv_dtype: of the KV cache: ``"auto"`` is as wide as ``element``, ``"fp8"`` takes 1 byte a value (vLLM's).
        cuda: False for a CPU, whose RAM holds no cuBLAS workspace, no freed blocks and no CUDA context.
    """

    precision: str
    engine: str
    decoding: str
    batch: int
    prompt: int
    context: int
    element: int = 2
    group_size: int = 128
    hopper: bool = True
    step: int = STEP_TOKENS[True]
    kv_dtype: str = "auto"
    cuda: bool = True

    @property
    def kv_element(self) -> int:
        """Bytes of a value in the KV cache."""
        return 1 if self.kv_dtype == "fp8" else self.element


def memory(about: Sized, run: Setting) -> tuple[tuple[Component, ...], dict[str, float]]:
    """Return the parts at the moment that takes most, and the bytes in live tensors at every moment."""
    shape, always = about.shape, list(weights(about, run))
    state = run.batch * 4 * shape.state_values()
    kv_values = run.batch * shape.kv_values_per_token() * run.kv_element
    if run.engine == "vllm":
        always += _beside_weights_in_vllm(about, run, kv_values)
        return tuple(always), {"a full step": sum(part.bytes for part in always if part.where == ALLOCATED)}
    streams = 1 if run.decoding == "default" else 2  # FastDecoder records on a stream of its own
    workspace = run.cuda * streams * CUBLAS[run.hopper]
    step = [Component("cuBLAS workspace", workspace, "by card and stream", "PyTorch")]
    step.append(Component("positions, token ids", FITTED["rest of a step"], "a constant", ROWS))
    if state:
        step.append(Component("RWKV's state", state, "fp32, one for each sequence, whatever the length"))
    growing = run.decoding == "default"
    whole = Component("KV cache", kv_values * run.context, "keys and values of prompt and answer")
    read = Component("KV cache", kv_values * (run.prompt if growing else run.context), "as long as the prompt")
    logits = run.batch * shape.vocab_size * 6
    moments = {
        "loading": [matrix_being_loaded(about, run)],
        "prefill": [*step, read, *prefill_parts(about, run)],
        "decode": [*step, whole, Component("logits", logits, "of one token, 16 bit and fp32")],
    }
    if growing:
        layer = kv_values * run.context / shape.layers / 2
        moments["decode"].append(Component("one layer's new keys", layer, "copied to grow", "transformers"))
    sizes = {name: sum(part.bytes for part in (*always, *parts)) for name, parts in moments.items()}
    moment = max(sizes, key=sizes.get)
    kind = "recorded" if not growing else run.precision
    outside = FITTED.get(f"CUDA context, {kind}", FITTED["CUDA context"])
    beside = [
        max(freed_blocks(about, run, kv_values), key=lambda part: part.bytes),
        Component("CUDA context and libraries", outside, "NVML less PyTorch, on an H100", ROWS, OUTSIDE),
    ]
    parts = (*always, *moments[moment], *(beside if run.cuda else []))
    return tuple(part for part in parts if part.bytes), sizes


def matrix_being_loaded(about: Sized, run: Setting) -> Component:
    """Return what the largest matrix takes while it is quantised or repacked."""
    if run.precision in QUANTISED_WHILE_LOADING:
        size = (run.element + BYTES[run.precision]) * about.largest_matrix()
        return Component("matrix being quantised", size, "largest one, as it was and packed")
    size = FITTED.get(f"repacking {run.precision}", 0) * about.largest_matrix() * run.cuda
    return Component("matrix being repacked", size, "largest one", ROWS)


def freed_blocks(about: Sized, run: Setting, kv_values: float) -> list[Component]:
    """Return what PyTorch's allocator may keep of freed blocks: of loading, of a prompt, and of a growing cache.

    Each uses the blocks of the others again, so that the largest is what is there.

    Args:
        about, run: as ``memory``.
        kv_values: bytes that one more token of every sequence adds to the cache.
    """
    each = FITTED.get(f"left by loading {run.precision.removesuffix('-double')}", 0)
    loaded, how = each * about.largest_matrix(), f"{each:g} bytes a weight of the largest matrix"
    read = FITTED["left by a prompt's activations"] * activations(about, run, run.batch * run.prompt)
    left = [
        Component("freed blocks of loading", loaded, how, ROWS, CACHED),
        Component("freed blocks of the prompt", read, "a third of its activations", ROWS, CACHED),
    ]
    if run.decoding == "default":
        tokens = FITTED["left by a prompt's cache"] * run.context + 2 * (run.context - run.prompt)
        how = "a third, and twice what was grown"
        size = kv_values * min(run.context, tokens)
        left.append(Component("freed blocks of the growing cache", size, how, ROWS, CACHED))
    return left


def weights(about: Sized, run: Setting) -> list[Component]:
    """Return the parts of the weights: 16-bit ones, quantised matrices as packed, and what belongs to them."""
    shape, precision, per = about.shape, run.precision, BYTES[run.precision]
    parameters, linear = sum(shape.count_parameters().values()), shape.matrices()
    if per >= 2:
        return [Component("weights", parameters * per, "every parameter")]
    rows, columns = about.rows_and_columns()
    scales, how = {
        "int8": (4 * rows, "absmax of each row, fp32 (bitsandbytes)"),
        "fp8": (4 * rows, "scale of each row, fp32 (compressed-tensors)"),
        "w8a8": (4 * rows, "scale of each row, fp32 (compressed-tensors)"),
        "nf4": (4 * linear / 64, "absmax of 64 weights, fp32 (bitsandbytes)"),
        "nf4-double": (linear / 64 + 4 * linear / 64 / 256, "absmax of 64 weights, 8 bit (bitsandbytes double quant)"),
    }.get(precision, ((2 + per) * linear / run.group_size, f"scale and zero of {run.group_size} weights"))
    if precision.startswith("gptq") and run.engine == "transformers" and run.cuda:
        scales, how = 2 * linear / run.group_size, f"scale of {run.group_size} weights; Marlin drops zeros and g_idx"
    elif precision.startswith("gptq"):
        scales, how = scales + 4 * columns, f"{how}, g_idx of each input"
    return [
        Component("weights, 16 bit", (parameters - linear) * run.element, "embeddings, output layer, norms, biases"),
        Component("weights, quantised", linear * per, f"matrices of the layers, {per:g} bytes a weight"),
        Component("scales", scales, how),
    ]


def weight_bytes(about: Sized, precision: str, group_size: int = 128, element: int = 2) -> float:
    """Return the bytes of all weights, scales included."""
    run = Setting(precision, "transformers", "default", 1, 1, 1, element, group_size=group_size)
    return sum(part.bytes for part in weights(about, run))


def activations(about: Sized, run: Setting, tokens: int, hidden_states: int = 4) -> float:
    """Return the bytes alive in the MLP, where a forward pass holds most.

    Of hidden states there are the embeddings, the layer's input, the residual and the MLP's input; vLLM keeps three.
    Beside them lie gate (GLM: gate and up), its activation and their product. Attention holds less with kernels that
    write no scores: ten hidden states, ALiBi's columns included, against twelve. RWKV holds most in its time mixing.
    """
    if about.shape.kind == "rwkv":
        each, chunked = RWKV_STATES[about.shape.version]
        together = min(tokens, run.batch * RWKV_SEGMENT)
        return run.element * about.shape.hidden_size * (tokens * each + together * chunked)
    inner = 4 if about.fused else 3
    inner = 2 if getattr(about.shape, "mlp", "") == "plain" else inner
    return tokens * run.element * (hidden_states * about.shape.hidden_size + inner * about.shape.ffn_size)


def prefill_parts(about: Sized, run: Setting) -> list[Component]:
    """Return what reading the prompt takes beside weights and KV cache.

    A mask has no part in it: transformers leaves the causal one of prompts without padding to the kernel, with a static
    cache as well (masking_utils.py, _ignore_causal_mask_sdpa).
    """
    shape, tokens, element = about.shape, run.batch * run.prompt, run.element
    how = {"transformer": ("4 hidden states, the MLP's intermediates", FORMULA)}
    how["rwkv"] = (f"hidden states of each token, more of {RWKV_SEGMENT}", ROWS)
    parts = [Component("activations", activations(about, run, tokens), *how[shape.kind])]
    dequantised = {"nf4": element, "int8": FITTED["int8 outlier columns"]}.get(run.precision.removesuffix("-double"), 0)
    # int8 takes columns of the down projection out, nf4 unpacks the largest matrix; an intermediate is not there then
    matrix = shape.hidden_size * shape.ffn_size if run.precision == "int8" else about.largest_matrix()
    less = (2 if about.fused else 1) * tokens * element * shape.ffn_size
    if (workspace := dequantised * matrix - less) > 0:
        how = "int8's outlier columns in fp32" if run.precision == "int8" else "a matrix unpacked, less an intermediate"
        parts.append(
            Component("dequantisation workspace", workspace, how, ROWS if run.precision == "int8" else FORMULA)
        )
    return parts


def room(card: Gpu, engine: str) -> float:
    """Return the bytes a process can have of an idle card; for vLLM its reservation."""
    total = card.usable_gib * GIB if card.usable_gib else card.memory_gb * 1e9  # the smaller reading of its GB
    free = total - FITTED["driver"]
    return free * UTILISATION if engine == "vllm" else free


def _beside_weights_in_vllm(about: Sized, run: Setting, kv_values: float) -> list[Component]:
    size, how = activations(about, run, run.step, hidden_states=3), f"MLP of a full step of {run.step:,} tokens"
    outside = ASSUMED["vLLM outside its budget"]
    return [
        Component("KV cache", kv_values * run.context, "keys and values of every token"),
        Component("activations", size, how, "vLLM's profile run"),
        Component("CUDA context and libraries", outside, "a constant", "assumed: one run", OUTSIDE),
    ]
