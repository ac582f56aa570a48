"""ChatGLM-6B, the first one: a prefix language model with positions in two dimensions.

A text is a context that ends in ``[gMASK]``, then ``<sop>`` and the answer. Two things follow the place of ``<sop>``:

* Mask: the context sees itself both ways, the answer sees the context and what it has said so far.
* Positions: a context token is at (its index, 0), the n-th token from ``<sop>`` on at (index of ``[gMASK]``, n).
  The first number turns one half of every head, the second number the other half.

Every residual connection adds to the normalised input, scaled by the square root of 56. Tensors keep the names and
layout of the published checkpoint.

Sources: GLM, arXiv 2103.10360; modeling_chatglm.py of THUDM/chatglm-6b at 8b7d335.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

RESIDUAL_SCALE = (2 * 28) ** 0.5
"""Of 28 layers, whatever the model's depth: the original never passes its number of layers on to a layer."""

NEVER = torch.iinfo(torch.int64).max
"""Place of a token that has not come yet."""


@strict
class ChatGLM1Config(PreTrainedConfig):
    """Sizes and special tokens; the defaults are those of the published model with 130,528 tokens."""

    model_type = "chatglm1"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    attribute_map: ClassVar = {"num_key_value_heads": "num_attention_heads"}

    vocab_size: int = 130_528
    hidden_size: int = 4096
    intermediate_size: int = 16_384
    num_hidden_layers: int = 28
    num_attention_heads: int = 32
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rope_parameters: dict | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = True
    mask_token_id: int = 130_000
    gmask_token_id: int = 130_001
    bos_token_id: int | None = 130_004
    eos_token_id: int | list[int] | None = 130_005
    pad_token_id: int | None = 3


class ChatGLM1Attention(nn.Module):
    """Attention of as many key-value heads as query heads; the rows of a head's q, k and v lie together."""

    def __init__(self, config: ChatGLM1Config, layer: int) -> None:
        """Make the two matrices; ``layer`` is the entry of the cache."""
        super().__init__()
        self.layer, self.heads = layer, config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor, angles: tuple[Tensor, Tensor], cache: Cache | None) -> Tensor:
        """Mix ``[batch, new, hidden]`` by a mask ``[batch, 1, new, past + new]``."""
        fused = self.query_key_value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, key, value = fused.chunk(3, dim=-1)
        query, key = rotate(query, *angles), rotate(key, *angles)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.dense(mixed.transpose(1, 2).flatten(2))


class ChatGLM1MLP(nn.Module):
    """Feed-forward of two matrices, not gated."""

    def __init__(self, config: ChatGLM1Config) -> None:
        """Make the two matrices."""
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, new, hidden]`` to itself."""
        return self.dense_4h_to_h(gelu(self.dense_h_to_4h(x), approximate="tanh"))


class ChatGLM1Block(GradientCheckpointingLayer):
    """One layer."""

    def __init__(self, config: ChatGLM1Config, layer: int) -> None:
        """Make layer number ``layer``."""
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ChatGLM1Attention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ChatGLM1MLP(config)

    def forward(self, x: Tensor, mask: Tensor, angles: tuple[Tensor, Tensor], past_key_values: Cache | None) -> Tensor:
        """Map ``[batch, new, hidden]`` to itself; arguments as ``ChatGLM1Attention``."""
        normed = self.input_layernorm(x)
        x = normed * RESIDUAL_SCALE + self.attention(normed, mask, angles, past_key_values)
        normed = self.post_attention_layernorm(x)
        return normed * RESIDUAL_SCALE + self.mlp(normed)


class ChatGLM1Model(nn.Module):
    """Embeddings, layers and the last norm, under the original's names."""

    _tp_plan: ClassVar = None  # asked for by PreTrainedModel's properties, which optimum goes through
    _pp_plan: ClassVar = None

    def __init__(self, config: ChatGLM1Config) -> None:
        """Make the modules."""
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ChatGLM1Block(config, layer) for layer in range(config.num_hidden_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class ChatGLM1ForCausalLM(PreTrainedModel, GenerationMixin):
    """The whole model.

    Where ``<sop>`` and ``[gMASK]`` stand is looked up in the prompt and kept on the cache (``cache.context``), for
    the tokens that come after: they have to be in the first call, or in a later one of more than one token. A text
    without ``<sop>`` is all context; after ``<sop>`` in a text without ``[gMASK]`` (or ``[MASK]``, which stands in
    for it) the first position goes on counting. Padding is on the left.
    """

    config_class = ChatGLM1Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["ChatGLM1Block"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _tied_weights_keys: ClassVar = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLM1Config) -> None:
        """Make the modules."""
        super().__init__(config)
        self.transformer = ChatGLM1Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the table of embeddings, ``[vocabulary, hidden]``."""
        return self.transformer.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another table in its place."""
        self.transformer.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits ``[batch, new, vocabulary]``, and the loss where there are ``labels`` ``[batch, new]``.

        Args:
            input_ids: ``[batch, new]``.
            attention_mask: ``[batch, past + new]``, 0 for padding; or who sees whom, ``[batch, 1, new, past + new]``.
            position_ids: index of each token in its text, ``[batch, new]``; or both of its positions,
                ``[batch, 2, new]``, which together with such a mask makes several texts in a row possible.
            past_key_values: filled in place.
            labels: the ids, -100 where no loss is wanted; compared with the logits one place earlier.
            use_cache: whether to make a cache where none is given.
            logits_to_keep: how many of the last places need logits, or which; 0 for all.
            kwargs: passed to the loss.
        """
        cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        x = self.transformer.word_embeddings(input_ids)
        if position_ids is None or position_ids.ndim == 2:
            made = attention_mask is not None and attention_mask.ndim == 4  # by `prepare_inputs_for_generation`
            context = cache.context if made else self.find_context(input_ids, attention_mask, cache)
            attention_mask = self.create_masks_for_generate(x, attention_mask, cache, context)
            position_ids = self.positions(input_ids, position_ids, cache, context)
        angles = rotary(position_ids, self.config, x.dtype)
        for block in self.transformer.layers:
            x = block(x, mask=attention_mask, angles=angles, past_key_values=cache)
        x = self.transformer.final_layernorm(x)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def find_context(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Return the places of ``[MASK]``, ``[gMASK]``, ``<sop>`` and of the first token, ``[4, batch]``.

        A place is an index into the cache, padding counted. Only a call of several tokens is searched, as reading
        one at a time would hold up a compiled decoding loop.
        """
        known = getattr(cache, "context", None)
        if known is not None and input_ids.shape[1] == 1:
            return known
        past = int(cache.get_seq_length()) if cache is not None else 0
        places = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]

        def first(token: int) -> Tensor:
            return torch.where((input_ids == token) & (real != 0), places, NEVER).amin(1)

        marks = self.config.mask_token_id, self.config.gmask_token_id, self.config.bos_token_id
        padding = 0 * real[:, 0] if attention_mask is None else (attention_mask.cumsum(1) == 0).sum(1)
        context = torch.stack([*map(first, marks), padding])
        if known is not None and past:  # a cache that was reset, or given to another text, starts anew
            context = torch.minimum(known, context)
        if cache is not None:
            cache.context = context
        return context

    def positions(self, input_ids: Tensor, position_ids: Tensor | None, cache: Cache | None, context: Tensor) -> Tensor:
        """Return both positions of every token, ``[batch, 2, new]``."""
        mask, gmask, sop, padding = context[:, :, None]
        mask = torch.where(gmask == NEVER, mask, gmask)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device) + past - padding
        answer = position_ids - (sop - padding)  # 0 for <sop>
        blank = torch.where(mask == NEVER, position_ids, mask - padding)
        first = torch.where(answer < 0, position_ids, blank)
        return torch.stack([first.clamp(min=0), (answer + 1).clamp(min=0)], dim=1)

    def create_masks_for_generate(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        context: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return who sees whom, ``[batch, 1, new, keys]``; also called by ``generate``, before ``forward``."""
        sop = (past_key_values.context if context is None else context)[2]
        return create_causal_mask(
            self.config,
            inputs_embeds,
            attention_mask,
            past_key_values,
            or_mask_function=lambda batch, head, query, key: key < sop[batch],
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Note the context first: with a static cache, ``generate`` makes the mask before ``forward`` is called."""
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if cache is not None and mask is not None and mask.ndim == 2:
            self.find_context(input_ids[:, -(next_sequence_length or 0) :], mask, cache)
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)


def rotary(positions: Tensor, config: ChatGLM1Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, ``[batch, 1, new, 2, head_dim / 2]`` each, of positions ``[batch, 2, new]``.

    The original's frequencies are stored in fp16, and so rounded here too; the angles stay in fp32. (In fp16 the
    original rounds the angles as well, and at position 1,000 by up to a quarter.)
    """
    width = config.hidden_size // config.num_attention_heads // 2
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    frequencies = (1.0 / config.rope_parameters["rope_theta"] ** exponents).half().float()
    angles = positions.transpose(1, 2)[:, None, :, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of every head ``[batch, heads, new, head_dim]``, each by angles of its own."""
    halves = x.unflatten(-1, (2, -1))
    first, second = halves.chunk(2, dim=-1)
    return (halves * cos + torch.cat([-second, first], dim=-1) * sin).flatten(-2)
