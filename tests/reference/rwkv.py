"""RWKV 4, 5, 6 and 7 token by token, from BlinkDL's tensor names.

Sources: RWKV-4 arXiv 2305.13048; RWKV-5 and 6 arXiv 2404.05892; RWKV-7 arXiv 2503.14456, appendix.

The memory of head h is a matrix S with a row for each value channel and a column for each key channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, silu

from .layers import Weights

Sizes = dict[str, Any]
"""version, vocab_size, hidden_size, num_hidden_layers, intermediate_size; head_size from version 5 on; the ranks."""


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name every tensor of a .pth checkpoint with its shape."""
    version, width, inner = sizes["version"], sizes["hidden_size"], sizes["intermediate_size"]
    head = sizes.get("head_size", 1)
    vector, per_head = (1, 1, width), (width // head, head)
    named: dict[str, tuple[int, ...]] = {"emb.weight": (sizes["vocab_size"], width)}
    for i in range(sizes["num_hidden_layers"]):
        norms = ["ln0", "ln1", "ln2"] if i == 0 else ["ln1", "ln2"]
        norms += ["att.ln_x"] if version > 4 else []
        att: dict[str, tuple[int, ...]] = dict.fromkeys(
            [f"{name}.weight" for name in ("receptance", "key", "value", "output")], (width, width)
        )
        if version in (5, 6):
            att |= {"gate.weight": (width, width), "time_faaaa": per_head}
        if version == 4:
            att |= {"time_decay": (width,), "time_first": (width,)}
            att |= dict.fromkeys(["time_mix_k", "time_mix_v", "time_mix_r"], vector)
        if version == 5:
            att |= {"time_decay": per_head}
            att |= dict.fromkeys(["time_mix_k", "time_mix_v", "time_mix_r", "time_mix_g"], vector)
        if version == 6:
            att |= dict.fromkeys([f"time_maa_{letter}" for letter in "xwkvrg"], vector) | {"time_decay": vector}
            att |= {"time_maa_w1": (width, 5 * sizes["mix_rank"]), "time_maa_w2": (5, sizes["mix_rank"], width)}
            att |= {"time_decay_w1": (width, sizes["decay_rank"]), "time_decay_w2": (sizes["decay_rank"], width)}
        if version == 7:
            att |= dict.fromkeys([f"x_{letter}" for letter in "rwkvag"] + ["w0", "a0", "k_k", "k_a"], vector)
            ranks = {"w": "decay_rank", "a": "rate_rank", "g": "gate_rank"} | ({"v": "value_rank"} if i else {})
            for letter, rank in ranks.items():
                att |= {f"{letter}1": (width, sizes[rank]), f"{letter}2": (sizes[rank], width)}
            att |= {"r_k": per_head} | ({"v0": vector} if i else {})
        ffn = {"key.weight": (inner, width), "value.weight": (width, inner)}
        if version < 7:
            ffn |= {"receptance.weight": (width, width)}
        mixes = {4: ["time_mix_k", "time_mix_r"], 6: ["time_maa_k", "time_maa_r"], 7: ["x_k"]}
        ffn |= dict.fromkeys(mixes[4 if version == 5 else version], vector)
        named |= {f"blocks.{i}.{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}
        named |= {f"blocks.{i}.att.{name}": shape for name, shape in att.items()}
        named |= {f"blocks.{i}.ffn.{name}": shape for name, shape in ffn.items()}
    return named | {"ln_out.weight": (width,), "ln_out.bias": (width,), "head.weight": (sizes["vocab_size"], width)}


def logits(sizes: Sizes, weights: Weights, input_ids: Tensor, attention_mask: Tensor, cache: dict | None = None):
    """Run the model: ids [batch, new], mask [batch, past + new] -> [batch, new, vocab_size]; zeros at padding."""
    states = cache.setdefault("states", [{} for _ in input_ids]) if cache is not None else [{} for _ in input_ids]
    mask = attention_mask[:, -input_ids.shape[1] :].bool()
    out = torch.zeros(*input_ids.shape, sizes["vocab_size"])
    for row, state in enumerate(states):
        for place in range(input_ids.shape[1]):
            if mask[row, place]:
                out[row, place] = one_token(sizes, weights, int(input_ids[row, place]), state)
    return out


def one_token(sizes: Sizes, weights: Weights, token: int, state: dict) -> Tensor:
    """Return the logits [vocab_size] after one more token; the state is changed."""
    width = sizes["hidden_size"]
    mix = {4: attention_4, 5: attention_5, 6: attention_6, 7: attention_7}[sizes["version"]]

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, (width,), weights[name + ".weight"], weights[name + ".bias"])

    x = norm(weights["emb.weight"][token], "blocks.0.ln0")
    state["layer"] = -1
    for i in range(sizes["num_hidden_layers"]):
        block = f"blocks.{i}."
        state["layer"] = i
        for part, name in (("att.", "ln1"), ("ffn.", "ln2")):
            w = {key.removeprefix(block + part): t for key, t in weights.items() if key.startswith(block + part)}
            new = norm(x, block + name)
            old = state.get((i, part), torch.zeros(width))
            x = x + (mix(sizes, w, new, old, state) if part == "att." else channels(sizes, w, new, old))
            state[i, part] = new
    return weights["head.weight"] @ norm(x, "ln_out")


def blend(new: Tensor, old: Tensor, share_of_new: Tensor) -> Tensor:
    """Blend a token with the one before it."""
    return new * share_of_new.flatten() + old * (1 - share_of_new.flatten())


def channels(sizes: Sizes, w: Weights, new: Tensor, old: Tensor) -> Tensor:
    """Channel mixing."""
    if sizes["version"] == 7:
        return w["value.weight"] @ (w["key.weight"] @ blend(new, old, 1 - w["x_k"])).relu() ** 2
    if sizes["version"] == 6:
        key, receptance = blend(new, old, 1 - w["time_maa_k"]), blend(new, old, 1 - w["time_maa_r"])
    else:
        key, receptance = blend(new, old, w["time_mix_k"]), blend(new, old, w["time_mix_r"])
    value = w["value.weight"] @ (w["key.weight"] @ key).relu() ** 2
    return torch.sigmoid(w["receptance.weight"] @ receptance) * value


def attention_4(sizes: Sizes, w: Weights, new: Tensor, old: Tensor, state: dict) -> Tensor:
    """Time mixing of version 4: an average of all values, by definition, in fp64."""
    key = (w["key.weight"] @ blend(new, old, w["time_mix_k"])).double()
    value = (w["value.weight"] @ blend(new, old, w["time_mix_v"])).double()
    receptance = torch.sigmoid(w["receptance.weight"] @ blend(new, old, w["time_mix_r"]))
    past = state.setdefault((state["layer"], "past"), [])
    fade = w["time_decay"].double().exp()
    powers = [k - (len(past) - 1 - j) * fade for j, (k, _) in enumerate(past)] + [w["time_first"] + key]
    values = [v for _, v in past] + [value]
    average = (torch.stack(powers).softmax(0) * torch.stack(values)).sum(0)
    past.append((key, value))
    return w["output.weight"] @ (receptance * average.float())


def read_and_write(sizes: Sizes, w: Weights, state: dict, r, decay, k, v) -> Tensor:
    """Versions 5 and 6: every head reads S and the newest pair, then fades and writes; normalised heads [width]."""
    size, u = sizes["head_size"], w["time_faaaa"]
    out = []
    for h in range(len(r) // size):
        part = slice(h * size, (h + 1) * size)
        memory = state.get((state["layer"], h), torch.zeros(size, size))
        out.append(memory @ r[part] + v[part] * (r[part] * u[h] * k[part]).sum())
        state[state["layer"], h] = memory * decay[part] + torch.outer(v[part], k[part])
    return torch.cat([unit(part) for part in out]) * w["ln_x.weight"] + w["ln_x.bias"]


def unit(x: Tensor) -> Tensor:
    """Give a head mean 0 and variance 1."""
    return (x - x.mean()) / (x.var(unbiased=False) + 64e-5).sqrt()


def attention_5(sizes: Sizes, w: Weights, new: Tensor, old: Tensor, state: dict) -> Tensor:
    """Time mixing of version 5."""
    names = {"receptance": "r", "key": "k", "value": "v", "gate": "g"}
    r, k, v, g = (w[f"{name}.weight"] @ blend(new, old, w[f"time_mix_{key}"]) for name, key in names.items())
    out = read_and_write(sizes, w, state, r, torch.exp(-torch.exp(w["time_decay"].flatten())), k, v)
    return w["output.weight"] @ (out * silu(g))


def attention_6(sizes: Sizes, w: Weights, new: Tensor, old: Tensor, state: dict) -> Tensor:
    """Time mixing of version 6: blends and decay depend on the tokens."""
    low = torch.tanh(blend(new, old, 1 - w["time_maa_x"]) @ w["time_maa_w1"]).view(5, -1)
    mixed = {}
    for n, letter in enumerate("wkvrg"):
        share = w[f"time_maa_{letter}"].flatten() + low[n] @ w["time_maa_w2"][n]
        mixed[letter] = blend(new, old, 1 - share)
    r, k, v, g = (
        w[f"{name}.weight"] @ mixed[letter]
        for name, letter in (("receptance", "r"), ("key", "k"), ("value", "v"), ("gate", "g"))
    )
    slow = w["time_decay"].flatten() + torch.tanh(mixed["w"] @ w["time_decay_w1"]) @ w["time_decay_w2"]
    out = read_and_write(sizes, w, state, r, torch.exp(-torch.exp(slow)), k, v)
    return w["output.weight"] @ (out * silu(g))


def attention_7(sizes: Sizes, w: Weights, new: Tensor, old: Tensor, state: dict) -> Tensor:
    """Time mixing of version 7: what the memory held under a key is erased at a learned rate."""
    size = sizes["head_size"]
    mixed = {letter: blend(new, old, 1 - w[f"x_{letter}"]) for letter in "rwkvag"}
    r, k, v = (
        w[f"{name}.weight"] @ mixed[letter] for name, letter in (("receptance", "r"), ("key", "k"), ("value", "v"))
    )
    slow = torch.sigmoid(w["w0"].flatten() + torch.tanh(mixed["w"] @ w["w1"]) @ w["w2"])
    decay = torch.exp(-0.606531 * slow)
    rate = torch.sigmoid(w["a0"].flatten() + mixed["a"] @ w["a1"] @ w["a2"])
    gate = torch.sigmoid(mixed["g"] @ w["g1"]) @ w["g2"]
    if state["layer"] == 0:
        state["first"] = v
    else:
        v = v + (state["first"] - v) * torch.sigmoid(w["v0"].flatten() + mixed["v"] @ w["v1"] @ w["v2"])
    erase = k * w["k_k"].flatten()
    k = k * (1 + (rate - 1) * w["k_a"].flatten())
    out = []
    for h in range(len(r) // size):
        part = slice(h * size, (h + 1) * size)
        memory = state.get((state["layer"], h), torch.zeros(size, size))
        place = erase[part] / erase[part].norm()
        held = memory @ place
        memory = memory * decay[part] - torch.outer(held, place * rate[part]) + torch.outer(v[part], k[part])
        state[state["layer"], h] = memory
        normed = unit(memory @ r[part]) * w["ln_x.weight"][part] + w["ln_x.bias"][part]
        out.append(normed + v[part] * (r[part] * k[part] * w["r_k"][h]).sum())
    return w["output.weight"] @ (torch.cat(out) * gate)
