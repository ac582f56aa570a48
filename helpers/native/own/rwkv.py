r"""RWKV 4, 5, 6 and 7: recurrent language models whose memory has one size, however long the text.

A block is time mixing, which is all that looks at earlier tokens, and channel mixing. Both blend each token with the
one before it ("token shift"). Time mixing keeps a memory in fp32:

    version 4     every channel: a running average of values v, weighted by exp(key), fading at a fixed rate
    version 5, 6  every head: a matrix S,  S_t = S_{t-1} diag(w_t) + v_t k_t^T,  read by r_t *before* token t is added
    version 7     S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T,  read by r_t after; a, b erase what a key held

Going through a text token by token would keep a GPU waiting, so ``many_tokens`` and ``many_averages`` take chunks of
``CHUNK`` tokens: within a chunk everything is known at once, and the chunk as a whole changes the memory by one affine
map. Only these maps are applied one after another. One new token takes the short way, ``one_token``.

Padding has to be on the left: its tokens are zeros to every layer, and they leave the empty memory empty.

Sources: RWKV-4 arXiv 2305.13048, RWKV-5 and 6 arXiv 2404.05892, RWKV-7 arXiv 2503.14456, https://github.com/BlinkDL/RWKV-LM.
Chunks: the memory as in arXiv 2312.06635 (gated linear attention), the erasing as in arXiv 2406.06484 (delta rule).
Tensors carry the names of transformers' RwkvForCausalLM, which loads a converted version 4 as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, layer_norm, normalize, pad, silu
from transformers import GenerationMixin, PreTrainedModel, RwkvConfig, initialization
from transformers.modeling_outputs import CausalLMOutputWithPast

CHUNK = 16
"""Tokens handled at once; work and transient memory grow with it, the number of steps shrinks."""

SEGMENT = 256
"""Tokens whose chunks are prepared together: bounds the transient memory of a long prompt."""

EMPTY = -1e30
"""The weight (its logarithm) of an average of nothing, in version 4."""

GROUP_NORM_EPSILON = 64e-5
"""Of the norm over each head, whatever its size. Source: the PyPI package rwkv."""


class RwkvWorldConfig(RwkvConfig):
    """Sizes of an RWKV model of version 5, 6 or 7.

    Attributes:
        version: 5, 6 or 7.
        head_size: width of a head.
        mix_rank, decay_rank, rate_rank, value_rank, gate_rank: inner widths of the low-rank pairs; version 6 has the
            first two, version 7 all but the first.
    """

    model_type = "rwkv_world"

    version: int = 7
    head_size: int = 64
    mix_rank: int = 32
    decay_rank: int = 64
    rate_rank: int = 64
    value_rank: int = 32
    gate_rank: int = 128


class RwkvState:
    """What a model remembers: passed as ``past_key_values``, of fixed size, changed in place.

    Attributes:
        shifts: [layers, 2, batch, hidden], what each time and channel mixing saw of the last token.
        memory: [layers, batch, heads, head_size, head_size] in fp32; of version 4 [layers, batch, 2, hidden], the
            averages and the logarithms of their weights.
        length: tokens so far, padding included; a compiled step does not count.
    """

    def __init__(self, config: RwkvConfig, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Start with an empty memory."""
        layers, inner, head_size = config.num_hidden_layers, config.attention_hidden_size, _head_size(config)
        form = (inner // head_size, head_size, head_size) if head_size else (2, inner)
        self.averages = not head_size
        self.shifts = torch.empty(layers, 2, batch, config.hidden_size, dtype=dtype, device=device)
        self.memory = torch.empty(layers, batch, *form, device=device)
        self.reset()
        if not torch.compiler.is_compiling():
            for tensor in (self.shifts, self.memory):  # they stay where they are, which a CUDA graph has to know
                torch._dynamo.mark_static_address(tensor)

    def reset(self) -> None:
        """Forget everything, in place."""
        self.shifts.zero_()
        self.memory.zero_()
        if self.averages:
            self.memory[:, :, 1] = EMPTY
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens so far."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows that beam search goes on with."""
        self.shifts = self.shifts.index_select(2, beam_idx.to(self.shifts.device))
        self.memory = self.memory.index_select(1, beam_idx.to(self.memory.device))


def one_token(
    memory: Tensor, r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor | None = None, b: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Read and change the memory by one token: the recurrence as it is defined.

    Args:
        memory: S [batch, heads, head_size, head_size], rows of values, columns of keys.
        r, log_w, k, v, a, b: [batch, 1, heads, head_size]; a and b are of version 7.

    Returns:
        What r reads, [batch, 1, heads, head_size], and the new memory.
    """
    new = memory * log_w[:, 0, :, None].exp() + v[:, 0, ..., None] * k[:, 0, :, None]
    if a is not None:
        new = new + (memory @ a[:, 0, ..., None]) * b[:, 0, :, None]
    read = memory if a is None else new
    return (read @ r[:, 0, ..., None]).squeeze(-1)[:, None], new


def many_tokens(
    memory: Tensor, r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor | None = None, b: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Do as ``one_token`` does for [batch, tokens, heads, head_size], in chunks."""
    tokens, size = r.shape[1], r.shape[-1]

    def chunks(x: Tensor) -> Tensor:
        """Fill up with zeros, which change nothing: [batch, heads, chunks, CHUNK, head_size]."""
        return pad(x, (0, 0, 0, 0, 0, -tokens % CHUNK)).unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4)

    r, log_w, k, v = (chunks(x) for x in (r, log_w, k, v))
    after = log_w.cumsum(-2)  # how far the memory of the chunk's start has faded after each token, and before it
    before = after - log_w
    to_end = (after[..., -1:, :] - after).exp()

    def meet(x: Tensor, y: Tensor) -> Tensor:
        """Let token t's x meet token j's y, faded by the tokens between them; 0 unless j < t. [..., t, j]."""
        if a is None:  # exp(before_t - after_j) is at most 1, its two factors may lie beyond any number
            earlier = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).tril(-1)[..., None]
            fading = (before[..., :, None, :] - after[..., None, :, :]).masked_fill(~earlier, -torch.inf).exp()
            return (x[..., :, None, :] * y[..., None, :, :] * fading).sum(-1)
        middle = after[..., CHUNK // 2, None, :]  # version 7 fades by at most exp(-0.61) a token: factors are near 1
        return ((x * (before - middle).exp()) @ (y * (middle - after).exp()).mT).tril(-1)

    query = r if a is None else r * log_w.exp()
    out = meet(query, k) @ v
    reads = query * before.exp()
    kept, added = after[..., -1, :].exp(), v.mT @ (k * to_end)
    if a is not None:
        a, b = chunks(a), chunks(b)
        # a_t reads a memory that earlier tokens of its chunk have changed: erased = from_start @ S^T + own
        given = torch.cat([a * before.exp(), meet(a, k) @ v], -1)
        solved = torch.linalg.solve_triangular(-meet(a, b), given, upper=False, unitriangular=True)
        from_start, own = solved.split(size, -1)
        through = meet(query, b) + (r * b).sum(-1).diag_embed()
        out = out + through @ own + (r * k).sum(-1, keepdim=True) * v
        reads = reads + through @ from_start
        kept, added = kept.diag_embed() + from_start.mT @ (b * to_end), added + own.mT @ (b * to_end)

    starts = []
    for n in range(r.shape[2]):
        starts.append(memory)
        memory = (memory * kept[:, :, n, None] if a is None else memory @ kept[:, :, n]) + added[:, :, n]
    out = out + reads @ torch.stack(starts, 2).mT
    return out.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens], memory


def join(mean: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Join two weighted averages; weights are logarithms."""
    return torch.lerp(mean, other, (other_weight - weight).sigmoid()), torch.logaddexp(weight, other_weight)


def one_average(memory: Tensor, k: Tensor, v: Tensor, fade: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor]:
    """Read and change version 4's memory by one token.

    Args:
        memory: [batch, 2, channels], averages and log weights.
        k, v: [batch, 1, channels]; k is the value's log weight.
        fade: [channels], by how much log weights fall with each token.
        bonus: [channels], what the newest token counts more, when it is read.
    """
    mean, weight = memory.unbind(1)
    out, _ = join(mean, weight, v[:, 0], k[:, 0] + bonus)
    return out[:, None], torch.stack(join(mean, weight - fade, v[:, 0], k[:, 0]), 1)


def many_averages(memory: Tensor, k: Tensor, v: Tensor, fade: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor]:
    """Do as ``one_average`` does for [batch, tokens, channels], in chunks."""
    tokens = k.shape[1]
    empty = -tokens % CHUNK  # filled up in front, with tokens of no weight through which the memory does not fade
    k, v = (pad(x, (0, 0, empty, 0), value=fill).unflatten(1, (-1, CHUNK)) for x, fill in ((k, EMPTY), (v, 0)))
    mean, weight = memory[:, 0], memory[:, 1] + empty * fade
    time = torch.arange(CHUNK, device=k.device)[:, None]
    lag = (time - time.T)[..., None]  # of token t behind token j
    weights = k[:, :, None] - (lag - 1) * fade + (lag == 0) * (bonus - fade)
    weights = weights.masked_fill(lag < 0, -torch.inf)  # [batch, chunks, t, j, channels]
    own = (weights.softmax(3) * v[:, :, None]).sum(3), weights.logsumexp(3)
    at_end = k - (CHUNK - 1 - time) * fade
    added = (at_end.softmax(2) * v).sum(2), at_end.logsumexp(2)
    starts = []
    for n in range(k.shape[1]):
        starts.append((mean, weight))
        mean, weight = join(mean, weight - CHUNK * fade, added[0][:, n], added[1][:, n])
    start, start_weight = (torch.stack(part, 1)[:, :, None] for part in zip(*starts, strict=True))
    out, _ = join(*own, start.expand_as(own[0]), start_weight - time * fade)
    return out.flatten(1, 2)[:, empty:], torch.stack([mean, weight], 1)


def walk(one: Callable, many: Callable, memory: Tensor, *sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Go through sequences [batch, tokens, ...] in fp32: one token directly, more of them segment by segment."""
    with torch.autocast(memory.device.type, enabled=False):
        sequences = [x.float() for x in sequences]
        if sequences[0].shape[1] == 1:
            return one(memory, *sequences)
        parts = []
        for part in zip(*(x.split(SEGMENT, 1) for x in sequences), strict=True):
            out, memory = many(memory, *part)
            parts.append(out)
        return torch.cat(parts, 1), memory


class LayerNorm(nn.LayerNorm):
    """Layer norm in fp32 of a residual stream in fp32, which in fp16 could overflow; gives the weights' type."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., hidden]."""
        weight, bias = self.weight.float(), self.bias.float()
        return layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


def vector(width: int) -> nn.Parameter:
    """Make a vector in the shape that RWKV stores its vectors in."""
    return nn.Parameter(torch.empty(1, 1, width))


def ramp(layer: int, layers: int, like: Tensor) -> Tensor:
    """Return how much of the new token each channel starts with: from none to all, sooner in later layers."""
    return torch.linspace(0, 1, like.shape[-1], device=like.device).view(1, 1, -1) ** (1 - layer / layers)


class TimeMix4(nn.Module):
    """Time mixing of version 4."""

    matrices = ("receptance", "key", "value")

    def __init__(self, config: RwkvConfig, layer: int) -> None:
        """Make the matrices that all versions have, and the vectors."""
        super().__init__()
        self.layer, self.layers, self.head_size = layer, config.num_hidden_layers, _head_size(config)
        width, inner = config.hidden_size, config.attention_hidden_size
        for name in self.matrices:
            setattr(self, name, nn.Linear(width, inner, bias=False))
        self.output = nn.Linear(inner, width, bias=False)
        self.add_vectors(config, width, inner)

    def add_vectors(self, config: RwkvConfig, width: int, inner: int) -> None:
        """Make what only this version has."""
        for name in self.matrices:
            setattr(self, f"time_mix_{name}", vector(width))
        self.time_decay, self.time_first = nn.Parameter(torch.empty(inner)), nn.Parameter(torch.empty(inner))

    def initial(self) -> dict[str, Tensor | float]:
        """Return what training starts with, for all but the matrices."""
        rising = torch.linspace(0, 1, self.time_decay.numel(), device=self.time_decay.device)
        mixes = {f"time_mix_{name}": ramp(self.layer, self.layers, self.time_mix_key) for name in self.matrices}
        return mixes | {"time_decay": -5 + 8 * rising**1.3, "time_first": -1.0}

    def forward(self, x: Tensor, before: Tensor, mask: Tensor | None, memory: Tensor, first: Tensor | None):
        """Mix tokens.

        Args:
            x: [batch, tokens, hidden]; ``before`` is the same, one token earlier.
            before: see ``x``.
            mask: [batch, tokens, 1], True for tokens and False for padding.
            memory: as in ``RwkvState``, of this layer.
            first: the first layer's values, in version 7.

        Returns:
            [batch, tokens, hidden], the new memory, and the first layer's values.
        """
        k = self.key(torch.lerp(before, x, self.time_mix_key)).float()
        v = self.value(torch.lerp(before, x, self.time_mix_value))
        r = self.receptance(torch.lerp(before, x, self.time_mix_receptance))
        if mask is not None:  # a key of zero is a weight of one
            k = k.masked_fill(~mask, EMPTY)
        fade, bonus = self.time_decay.float().exp(), self.time_first.float()
        one, many = (lambda *inputs, way=way: way(*inputs, fade, bonus) for way in (one_average, many_averages))
        out, memory = walk(one, many, memory, k, v)
        return self.output(r.sigmoid() * out.to(r.dtype)), memory, None


class TimeMix5(TimeMix4):
    """Time mixing of version 5 (5.2 of its code): heads with a matrix each, a gate, a decay for each channel."""

    matrices = ("receptance", "key", "value", "gate")

    def add_vectors(self, config: RwkvConfig, width: int, inner: int) -> None:
        """Make what only this version has."""
        heads = inner // self.head_size
        for name in self.matrices:
            setattr(self, f"time_mix_{name}", vector(width))
        self.time_decay = nn.Parameter(torch.empty(heads, self.head_size))
        self.time_faaaa = nn.Parameter(torch.empty(heads, self.head_size))
        self.ln_x = nn.GroupNorm(heads, inner, eps=GROUP_NORM_EPSILON)

    def initial(self) -> dict[str, Tensor | float]:
        """Return what training starts with, for all but the matrices."""
        rising = torch.linspace(0, 1, self.time_decay.numel(), device=self.time_decay.device)
        mixes = {f"time_mix_{name}": ramp(self.layer, self.layers, self.time_mix_key) for name in self.matrices}
        return mixes | {"time_decay": (-6 + 5 * rising**1.3).view_as(self.time_decay), "time_faaaa": 0.5}

    def inputs(self, x: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        """Return r, log w, k, v and the gate, [batch, tokens, inner]."""
        r, k, v, gate = (
            getattr(self, name)(torch.lerp(before, x, getattr(self, f"time_mix_{name}"))) for name in self.matrices
        )
        return r, -self.time_decay.float().exp().flatten().expand_as(r), k, v, gate

    def heads(self, x: Tensor) -> Tensor:
        """Cut [batch, tokens, inner] into [batch, tokens, heads, head_size], in fp32."""
        return x.float().unflatten(-1, (-1, self.head_size))

    def norm(self, x: Tensor) -> Tensor:
        """Normalise each head of [batch, tokens, heads, head_size], in fp32; gives [batch, tokens, inner]."""
        weight, bias = self.ln_x.weight.float(), self.ln_x.bias.float()
        return group_norm(x.flatten(0, 1).flatten(1), x.shape[2], weight, bias, self.ln_x.eps).view(*x.shape[:2], -1)

    def forward(self, x: Tensor, before: Tensor, mask: Tensor | None, memory: Tensor, first: Tensor | None):
        """Mix tokens; arguments and results as in version 4."""
        *rest, gate = self.inputs(x, before)
        r, log_w, k, v = (self.heads(part) for part in rest)
        out, memory = walk(one_token, many_tokens, memory, r, log_w, k, v)
        out = out + (r * k * self.time_faaaa.float()).sum(-1, keepdim=True) * v
        return self.output(self.norm(out).to(gate.dtype) * silu(gate)), memory, None


class TimeMix6(TimeMix5):
    """Time mixing of version 6: how tokens are blended and how fast memory fades depends on the tokens."""

    inputs_mixed = "wkvrg"

    def add_vectors(self, config: RwkvConfig, width: int, inner: int) -> None:
        """Make what only this version has."""
        super().add_vectors(config, width, inner)
        for name in self.matrices:
            delattr(self, f"time_mix_{name}")
        for letter in "x" + self.inputs_mixed:
            setattr(self, f"time_maa_{letter}", vector(width))
        self.time_maa_w1 = nn.Parameter(torch.empty(width, 5 * config.mix_rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, config.mix_rank, width))
        self.time_decay = vector(inner)
        self.time_decay_w1 = nn.Parameter(torch.empty(width, config.decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(config.decay_rank, inner))

    def initial(self) -> dict[str, Tensor | float]:
        """Return what training starts with: low-rank pairs that add nothing yet."""
        rising = torch.linspace(0, 1, self.time_decay.numel(), device=self.time_decay.device)
        mixes = dict.fromkeys(
            (f"time_maa_{letter}" for letter in "x" + self.inputs_mixed),
            1 - ramp(self.layer, self.layers, self.time_maa_x),
        )
        pairs = {"time_maa_w1": 0.0, "time_decay_w1": 0.0}
        pairs |= {name: 0.05 * torch.randn_like(getattr(self, name)) for name in ("time_maa_w2", "time_decay_w2")}
        return mixes | pairs | {"time_decay": (-6 + 5 * rising**1.3).view(1, 1, -1), "time_faaaa": 0.5}

    def inputs(self, x: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        """Return r, log w, k, v and the gate, [batch, tokens, inner]."""
        low = torch.tanh(torch.lerp(x, before, self.time_maa_x) @ self.time_maa_w1).unflatten(-1, (5, -1))
        low = torch.einsum("btnr,nrh->nbth", low, self.time_maa_w2)
        mixes = (getattr(self, f"time_maa_{letter}") for letter in self.inputs_mixed)
        mixed = [x + (before - x) * (mix + more) for mix, more in zip(mixes, low, strict=True)]
        slow = self.time_decay.float() + torch.tanh(mixed[0] @ self.time_decay_w1) @ self.time_decay_w2
        # Below exp(-50) nothing is left of a memory; larger sums would cost the others their last digits.
        log_w = -slow.float().exp().clamp(max=50)
        return self.receptance(mixed[3]), log_w, self.key(mixed[1]), self.value(mixed[2]), self.gate(mixed[4])


class TimeMix7(TimeMix5):
    """Time mixing of version 7: a token can also erase what the memory held under its key."""

    matrices = ("receptance", "key", "value")
    inputs_mixed = "rwkvag"

    def add_vectors(self, config: RwkvConfig, width: int, inner: int) -> None:
        """Make what only this version has; the first layer has no values of an earlier one to blend in."""
        heads = inner // self.head_size
        for letter in self.inputs_mixed:
            setattr(self, f"x_{letter}", vector(width))
        ranks = {"w": config.decay_rank, "a": config.rate_rank, "v": config.value_rank, "g": config.gate_rank}
        for letter, rank in ranks.items():
            if letter == "v" and self.layer == 0:
                continue
            if letter != "g":
                setattr(self, f"{letter}0", vector(inner))
            setattr(self, f"{letter}1", nn.Parameter(torch.empty(width, rank)))
            setattr(self, f"{letter}2", nn.Parameter(torch.empty(rank, inner)))
        self.k_k, self.k_a = vector(inner), vector(inner)
        self.r_k = nn.Parameter(torch.empty(heads, self.head_size))
        self.ln_x = nn.GroupNorm(heads, inner, eps=GROUP_NORM_EPSILON)

    def initial(self) -> dict[str, Tensor | float]:
        """Return what training starts with: low-rank pairs that add nothing yet."""
        names = {name for name, _ in self.named_parameters(recurse=False)}
        rising = torch.linspace(0, 1, self.w0.shape[-1], device=self.w0.device).view(1, 1, -1)
        values = {f"x_{letter}": 1 - ramp(self.layer, self.layers, self.x_r) for letter in self.inputs_mixed}
        values |= {"w0": -6.5 + 5 * rising, "a0": 0.0, "v0": 1.0, "k_k": 0.85, "k_a": 1.0, "r_k": 0.0}
        values |= {name: 0.0 for name in ("w1", "a1", "v1")}
        values |= {
            name: 0.05 * torch.randn_like(getattr(self, name)) for name in names & {"w2", "a2", "v2", "g1", "g2"}
        }
        return {name: value for name, value in values.items() if name in names}

    def forward(self, x: Tensor, before: Tensor, mask: Tensor | None, memory: Tensor, first: Tensor | None):
        """Mix tokens; arguments and results as in version 4."""
        change = before - x
        xr, xw, xk, xv, xa, xg = (x + change * getattr(self, f"x_{letter}") for letter in self.inputs_mixed)
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        slow = self.w0.float() + torch.tanh(xw @ self.w1) @ self.w2
        rate = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2)
        gate = torch.sigmoid(xg @ self.g1) @ self.g2
        if self.layer == 0:
            first = v
        else:
            v = v + (first - v) * torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2)
        erase = normalize(self.heads(k * self.k_k), dim=-1)
        k = k * (1 + (rate - 1) * self.k_a)
        log_w = -0.606531 * torch.sigmoid(slow.float())  # exp(-0.5), as the published code rounds it
        r, log_w, k, v, rate = (self.heads(part) for part in (r, log_w, k, v, rate))
        out, memory = walk(one_token, many_tokens, memory, r, log_w, k, v, -erase, erase * rate)
        bonus = (r * k * self.r_k.float()).sum(-1, keepdim=True) * v
        return self.output((self.norm(out) + bonus.flatten(2)).to(gate.dtype) * gate), memory, first


class ChannelMix(nn.Module):
    """Channel mixing: squared ReLU, gated except in version 7."""

    def __init__(self, config: RwkvConfig, layer: int) -> None:
        """Name the vectors as each version does."""
        super().__init__()
        self.layer, self.layers, self.version = layer, config.num_hidden_layers, getattr(config, "version", 4)
        width, inner = config.hidden_size, config.intermediate_size
        self.key, self.value = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
        if self.version < 7:
            self.receptance = nn.Linear(width, width, bias=False)
        self.mixes = {4: ("time_mix_key", "time_mix_receptance"), 6: ("time_maa_k", "time_maa_r"), 7: ("x_k",)}[
            4 if self.version == 5 else self.version
        ]
        for name in self.mixes:
            setattr(self, name, vector(width))

    def initial(self) -> dict[str, Tensor | float]:
        """Return what training starts with, for all but the matrices."""
        new = ramp(self.layer, self.layers, getattr(self, self.mixes[0]))
        return dict.fromkeys(self.mixes, new if self.version < 6 else 1 - new)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Mix channels of [batch, tokens, hidden]."""
        if self.version < 6:
            mixed = [torch.lerp(before, x, getattr(self, name)) for name in self.mixes]
        else:
            mixed = [torch.lerp(x, before, getattr(self, name)) for name in self.mixes]
        out = self.value(self.key(mixed[0]).relu().square())
        return out * self.receptance(mixed[1]).sigmoid() if self.version < 7 else out


class RwkvBlock(nn.Module):
    """One layer."""

    def __init__(self, config: RwkvConfig, layer: int) -> None:
        """Make time mixing and channel mixing, each behind a norm."""
        super().__init__()
        epsilon = config.layer_norm_epsilon
        if layer == 0:
            self.pre_ln = LayerNorm(config.hidden_size, eps=epsilon)
        self.ln1, self.ln2 = (LayerNorm(config.hidden_size, eps=epsilon) for _ in range(2))
        time_mix = {4: TimeMix4, 5: TimeMix5, 6: TimeMix6, 7: TimeMix7}[getattr(config, "version", 4)]
        self.attention, self.feed_forward = time_mix(config, layer), ChannelMix(config, layer)


class RwkvTrunk(nn.Module):
    """Embeddings, blocks and the last norm."""

    def __init__(self, config: RwkvConfig) -> None:
        """Make the layers."""
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(RwkvBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.ln_out = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, hidden: Tensor, mask: Tensor | None, state: RwkvState, keep: bool) -> Tensor:
        """Run [batch, tokens, hidden] through the layers; ``keep`` writes what they remember into the state."""

        def shifted(x: Tensor, layer: int, part: int) -> Tensor:
            """Return each token's predecessor, the first one's from the state."""
            before = torch.cat([state.shifts[layer, part][:, None].to(x.dtype), x[:, :-1]], 1)
            if keep:
                state.shifts[layer, part].copy_(x[:, -1])
            return before

        hidden, first = self.blocks[0].pre_ln(hidden).float(), None
        for layer, block in enumerate(self.blocks):
            x = block.ln1(hidden)
            x = x if mask is None else x * mask
            mixed, memory, first = block.attention(x, shifted(x, layer, 0), mask, state.memory[layer], first)
            if keep:
                state.memory[layer].copy_(memory)
            hidden = hidden + mixed
            x = block.ln2(hidden)
            x = x if mask is None else x * mask
            hidden = hidden + block.feed_forward(x, shifted(x, layer, 1))
        return self.ln_out(hidden)


class RwkvWorldForCausalLM(PreTrainedModel, GenerationMixin):
    """RWKV with a head that predicts the next token."""

    config_class = RwkvWorldConfig
    base_model_prefix = "rwkv"
    _no_split_modules = ("RwkvBlock",)
    _is_stateful = True  # its past cannot be cut back, which assisted generation would want
    _can_compile_fullgraph = True

    def __init__(self, config: RwkvConfig) -> None:
        """Make the model with the sizes of ``config``."""
        super().__init__(config)
        self.rwkv = RwkvTrunk(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (TimeMix4, ChannelMix)):
            for name, value in module.initial().items():
                parameter = getattr(module, name)
                initialization.copy_(parameter, torch.as_tensor(value, device=parameter.device).expand_as(parameter))

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding."""
        return self.rwkv.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        self.rwkv.embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head."""
        return self.head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.head = value

    def make_state(self, batch: int = 1) -> RwkvState:
        """Return the empty state of ``batch`` sequences, to be passed as ``past_key_values``."""
        return RwkvState(self.config, batch, self.dtype, self.device)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *, attention_mask: Tensor | None = None, **kwargs):
        """Drop the mask once the prompt is read: a token that was just written is none of padding."""
        past = kwargs.get("past_key_values")
        mask = attention_mask if past is None or past.length == 0 else None
        return super().prepare_inputs_for_generation(input_ids, attention_mask=mask, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RwkvState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Predict the next token after each one.

        Args:
            input_ids: [batch, tokens]; or ``inputs_embeds`` [batch, tokens, hidden].
            attention_mask: [batch, tokens so far], 0 for padding, which has to be on the left.
            past_key_values: the state after the tokens before; it is changed.
            inputs_embeds: see ``input_ids``.
            labels: [batch, tokens], shifted here; -100 counts for nothing.
            use_cache: whether to return a state; by default outside of training.
            logits_to_keep: of how many last tokens to return logits, or of which; 0 is all.
            kwargs: passed to the loss.
        """
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        hidden = self.rwkv.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        batch, tokens, _ = hidden.shape
        mask = None if attention_mask is None else attention_mask[:, -tokens:, None].bool()
        keep = bool(use_cache) or past_key_values is not None
        state = past_key_values or RwkvState(self.config, batch, hidden.dtype, hidden.device)
        hidden = self.rwkv(hidden, mask, state, keep)
        if not torch.compiler.is_compiling():  # a number that grows would be compiled anew each time
            state.length += tokens
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(hidden[:, last])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=state if keep else None)


class Rwkv4Config(RwkvConfig):
    """transformers' config under a name of our own, which ``register`` puts in its place."""


class Rwkv4ForCausalLM(RwkvWorldForCausalLM):
    """Version 4. A converted folder is one of transformers' own RwkvForCausalLM, which reads it as well.

    That class mixes the texts of a batch from the second token on, takes padding for text, and walks token by token.
    """

    config_class = Rwkv4Config


def _head_size(config: RwkvConfig) -> int:
    """Return the width of a head; version 4 has none."""
    return getattr(config, "head_size", 0)
