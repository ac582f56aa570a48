"""Decoding without the launch overhead: one token's whole computation, recorded once and replayed for every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from .errors import HelpersError
from .native import check_length

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CHECK_EVERY = 16
"""Tokens between two looks at whether every answer has ended: each look makes the host wait for the GPU."""


class FastDecoder:
    """Greedy answers as ``generate`` gives them, with a static KV cache (or RWKV's state) and, on a GPU, a CUDA graph.

    The default ``generate`` starts over a thousand small kernels for each token from Python, and a GPU is done with one
    before Python starts the next. Here every tensor has a fixed size and place, so the kernels of one token are
    recorded once (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs) and started with one call from
    then on. On a CPU the same step runs without a recording.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, length: int, batch: int = 1, compiled: bool = False) -> None:
        """Record the step, which takes a second; ``generate`` may then be called any number of times.

        Args:
            model: a causal language model on one device, as ``load`` returns it.
            length: tokens the cache has room for, prompt and answer together; every step reads all of it.
            batch: sequences at once, always this number.
            compiled: join the step's small kernels by ``torch.compile`` first, which takes some 20 s for a 7B model.

        Raises:
            HelpersError: ``length`` is past the model's context, or a step of this model cannot be recorded.
        """
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        check_length(model, length)
        _check_recordable(model)
        AttentionInterface.register("grouped", grouped_attention)
        AttentionMaskInterface.register("grouped", sdpa_mask)
        self.model, self.length, self.batch = model, length, batch
        self._forward = model
        if compiled:
            torch.compiler.reset()  # else decoders of other lengths count against the limit of recompilations
            self._forward = torch.compile(model, fullgraph=True, dynamic=False)
        self._cache = fixed_cache(model, length, batch)
        self._mask = torch.ones(batch, length, dtype=torch.long, device=model.device)
        self._token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self._position = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self._next = self._record() if model.device.type == "cuda" else self._step

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 256,
        stop: Sequence[int] | None = None,
    ) -> Tensor:
        """Return prompts and answers, [batch, tokens]; what follows the end of an answer is padding.

        Args:
            input_ids: [batch, tokens], padded on the left.
            attention_mask: [batch, tokens], 0 on padding; all ones when None.
            max_new_tokens: tokens of the longest answer.
            stop: ids that end an answer; the model's own when None, and none with ``[]``.

        Raises:
            HelpersError: another batch than recorded, or more tokens than the cache has room for.
        """
        batch, prompt = input_ids.shape
        if batch != self.batch or prompt + max_new_tokens > self.length:
            what = f"this decoder was made for {self.batch} sequences of {self.length} tokens"
            given = f"{batch} sequences of {prompt} + {max_new_tokens} tokens"
            raise HelpersError("cannot decode", f"{what}, these are {given}", "make a FastDecoder of that size")
        settings = self.model.generation_config
        ends = settings.eos_token_id if stop is None else list(stop)
        ends = torch.tensor([] if ends is None else ends, dtype=torch.long, device=input_ids.device).flatten()
        self.prefill(input_ids, attention_mask)
        answer = [self._token.clone()]
        while len(answer) < max_new_tokens:
            if len(ends) and len(answer) % CHECK_EVERY == 0 and torch.isin(torch.cat(answer, 1), ends).any(1).all():
                break
            self._next()
            answer.append(self._token.clone())
        tokens = torch.cat(answer, dim=1)
        if len(ends):
            ended = torch.isin(tokens, ends).long()
            over = ended.cumsum(1) > ended  # an end came before
            pad = ends[0] if settings.pad_token_id is None else settings.pad_token_id
            tokens = torch.where(over, pad, tokens)[:, : int((~over).any(0).sum())]
        return torch.cat([input_ids, tokens], dim=1)

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Read the prompts into the cache and choose the first token of each answer; arguments as ``generate``."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self._cache.reset()
        self._mask[:, : input_ids.shape[1]] = mask
        self._mask[:, input_ids.shape[1] :] = 1  # what is not written yet is hidden by the causal mask
        beside = {name: value for name, value in vars(self._cache).items() if isinstance(value, torch.Tensor)}
        self._take(self.model, input_ids, mask, positions)
        for name, place in beside.items():  # what a model keeps beside keys and values has to stay in its place as well
            setattr(self._cache, name, place.copy_(getattr(self._cache, name)))
        self._position.copy_(positions[:, -1:] + 1)

    def _step(self) -> None:
        """Read the last token, write the next one over it. Only the device knows its value: nothing is read back."""
        with _one_token(self.model):
            self._take(self._forward, self._token, self._mask, self._position)
        self._position.add_(1)

    def _take(self, forward: Callable, ids: Tensor, mask: Tensor, positions: Tensor) -> None:
        """Run the model and keep the likeliest next token of each sequence."""
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits = forward(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        self._token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    def _record(self) -> Callable[[], None]:
        """Run the step twice, so that every library is set up (and the step compiled), then record it."""
        with torch.cuda.device(self.model.device):
            side = _side_stream(self.model.device.index)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._step()
                self._step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                self._step()
        return graph.replay


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Return the stream that steps of this device are recorded on: PyTorch keeps 32 MiB for cuBLAS on each new one."""
    return torch.cuda.Stream(device)


def fixed_cache(model: PreTrainedModel, length: int, batch: int) -> Any:
    """Return a cache that stays in its place: room for ``length`` tokens; of an RNN its state, which has one size."""
    from transformers import StaticCache

    if hasattr(model, "make_state"):
        return model.make_state(batch)
    return StaticCache(config=model.config, max_cache_len=length)


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention of one new token in which all query heads of a group read the same keys and values.

    With a mask, transformers' own copies keys and values for each query head first: 16 times the cache of ChatGLM3.

    Args:
        module: the layer; not used.
        query: [batch, heads, 1, width].
        key: [batch, groups, tokens, width]; ``value`` likewise.
        value: as ``key``.
        attention_mask: [batch, 1, 1, tokens], true where to look.
        scaling: factor of the scores.

    Returns:
        [batch, 1, heads, width], and no weights.
    """
    batch, groups, _, width = key.shape
    scores = query.reshape(batch, groups, -1, width) @ key.transpose(-1, -2) * scaling
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    output = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype) @ value
    return output.reshape(batch, 1, -1, width), None


def _check_recordable(model: PreTrainedModel) -> None:
    """Refuse a model whose step needs the host: one without a static cache, or bitsandbytes int8 on a GPU."""
    name, fix = type(model).__name__, "use generate, or decoding='default'"
    if not model._can_compile_fullgraph:
        raise HelpersError(f"cannot record a step of {name}", "this class has no cache that stays in its place", fix)
    if model.device.type == "cuda" and getattr(model, "is_loaded_in_8bit", False):
        why = "bitsandbytes int8 looks for outliers in every layer, and the host waits for the answer"
        raise HelpersError(f"cannot record a step of {name} in int8", why, f"{fix}; nf4 can be recorded")


@contextmanager
def _one_token(model: PreTrainedModel) -> Iterator[None]:
    """Set a model up for a recorded step: grouped attention, and dynamic rotary frequencies (InternLM2) as they are.

    Those change past the model's context only, which is never reached; to know that, transformers would read the
    largest position back from the GPU for every token.
    """
    attention = model.config._attn_implementation
    dynamic = [module for module in model.modules() if getattr(module, "rope_type", None) == "dynamic"]
    if attention == "sdpa":  # other functions know more than keys and queries, such as ALiBi's
        model.config._attn_implementation = "grouped"
    for module in dynamic:
        module.rope_type = "default"
    try:
        yield
    finally:
        model.config._attn_implementation = attention
        for module in dynamic:
            module.rope_type = "dynamic"
