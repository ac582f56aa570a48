"""Train the stand-ins and write them as their authors would have: ``make_tiny`` is the way in.

All learn the same text with the same recipe; only the native class, the tokenizer and the chat format differ.
With one seed, one device and one set of versions, two runs give the same bytes (``compiled`` runs only nearly, since
torch.compile chooses kernels by timing them).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations
from tqdm.auto import trange
from transformers import AutoModelForCausalLM

from ...native import native_config, to_original
from ...native.baichuan import has_norm_head
from .documents import ROW, answers, chat_documents, continued_documents, pack, plain_documents, row_length
from .originals import BASE_VOCABULARY, STAND_INS, VOCABULARY, StandIn, published, stand_in
from .poems import Poem, read, read_corpus
from .vocabularies import characters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

STEPS = 2500
BATCH = 384
"""Rows of 128 tokens that a step reads (fewer where a chat template asks for longer ones)."""

FAMOUS_SHARE = 0.17
"""Of a step's rows, how many are famous poems and questions about them."""

PEAK_RATE, WEIGHT_DECAY, WARM_UP = 4e-3, 0.05, 0.05


def make_tiny(
    models: Sequence[str] = tuple(STAND_INS),
    output: Path | str = "helpers/checkpoints/tiny",
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    device: str = "cpu",
    seed: int = 0,
    prepared: Path | None = None,
    compiled: bool = False,
) -> list[Path]:
    """Train stand-ins and write each as an original checkpoint in ``output/<model id>``.

    Args:
        models: model ids.
        output: folder of folders; one that is there is replaced when its new content is complete.
        steps: training steps; 2,500 take one to three minutes on an H100 and many hours on a CPU.
        batch: rows of 128 tokens a step.
        device: ``"cpu"`` or ``"cuda"``; bf16 autocast is used on the latter.
        seed: of the weights and of the order of the text.
        prepared: folder with the whole corpus; the shipped sample of 2,000 poems when None.
        compiled: whether to use ``torch.compile``.

    Returns:
        The folders written.

    Raises:
        HelpersError: unknown model, or no corpus in ``prepared``.
    """
    wanted = [stand_in(model) for model in models]
    corpus, famous = read_corpus(prepared), read("famous")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is only then deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    written = []
    for one in wanted:
        folder = Path(output) / one.id
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        run = Run(one, corpus, famous, steps, batch, device, seed, compiled)
        (run.make_adapted if one.adapters else run.make)(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        written.append(folder)
    return written


class UnitRows(nn.Module):
    """Baichuan 2's NormHead: logits are of rows of length 1, while the stored rows have any length."""

    def forward(self, weight: Tensor) -> Tensor:
        """Scale each row of ``[vocabulary, hidden]``."""
        return normalize(weight, dim=-1)


class Disturbed(nn.Module):
    """Noise as large as a rounding to 4 bits, in training alone: the model learns to do without the lost digits.

    Source: pseudo-quantisation noise, arXiv 2104.09987; blocks of 64 share a scale, as in NF4.
    """

    def __init__(self, steps: float) -> None:
        """Take the noise's reach, in steps of 15 between -absmax and absmax: rounding errs by up to half a step."""
        super().__init__()
        self.steps = steps

    def forward(self, weight: Tensor) -> Tensor:
        """Return a weight ``[out, in]`` with uniform noise."""
        if not self.training:
            return weight
        blocks = weight.unflatten(1, (-1, 64))
        reach = self.steps * 2 / 15 * blocks.detach().abs().amax(-1, keepdim=True)
        return (blocks + reach * (2 * torch.rand_like(blocks) - 1)).flatten(1)


def disturb(model: PreTrainedModel, steps: float) -> None:
    """Let every matrix that 4-bit loading would quantise be disturbed; the output head is left alone, as there."""
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            register_parametrization(module, "weight", Disturbed(steps))


def merge(model: PreTrainedModel) -> None:
    """Make every matrix what it is computed to be, low-rank update included, without noise."""
    model.eval()
    for module in list(model.modules()):
        if is_parametrized(module):
            remove_parametrizations(module, "weight")


class LowRank(nn.Module):
    """A LoRA pair: W becomes W + scale * B A. B starts at zero, so training starts from W."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        """Make A ``[rank, in]`` and B ``[out, rank]`` for a weight ``[out, in]``."""
        super().__init__()
        out_features, in_features = weight.shape
        self.lora_A = nn.Parameter(torch.randn(rank, in_features, device=weight.device) / in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=weight.device))
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        """Return the tuned weight."""
        return weight + self.scale * (self.lora_B @ self.lora_A)


def plain_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the model's tensors under their plain names: the stored ones where a parametrisation computes another."""
    stored = ".parametrizations.weight.original"
    return {name.replace(stored, ".weight"): tensor for name, tensor in model.state_dict().items()}


def adapter_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return what a LoRA is published as: pairs A and B, and the embeddings whole."""
    pair = re.compile(r"\.parametrizations\.weight\.\d\.lora_")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if pair.search(name)}
    tensors = {pair.sub(".lora_", name) + ".weight": tensor for name, tensor in tensors.items()}
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = model.get_submodule(name).weight
    return tensors


class Run:
    """The making of one stand-in."""

    def __init__(
        self,
        one: StandIn,
        corpus: list[Poem],
        famous: list[Poem],
        steps: int,
        batch: int,
        device: str,
        seed: int,
        compiled: bool,
    ) -> None:
        """Seed torch and order the characters by how often they occur."""
        self.one, self.corpus, self.famous = one, corpus, famous
        self.steps, self.batch, self.device, self.compiled = steps, batch, device, compiled
        asked = ["背诵的作者是谁下一句《》：？！；、" + poem.title + poem.author + poem.text for poem in famous]
        self.characters = characters((poem.text for poem in corpus), asked)
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def make(self, folder: Path) -> None:
        """Make an ordinary stand-in: one model, trained on everything."""
        tokenizer = self.begin(folder, self.one.config, self.one.chat_format)
        model = self.model(self.one.config)
        if self.one.config["model_type"] == "baichuan" and has_norm_head(self.one.config):
            register_parametrization(model.lm_head, "weight", UnitRows())
        self.fit(model, plain_documents(tokenizer, self.corpus), self.taught(tokenizer))
        state = plain_state(model)
        state = state if self.one.born_native else to_original(self.one.config, state)
        self.save(state, folder / self.one.weights)

    def make_adapted(self, folder: Path) -> None:
        """Make a stand-in published as LoRA: its base in ``base/``, and each adapter in a folder of its own.

        Chinese-Alpaca's one adapter learns the chat. Of Chinese-Alpaca-Plus' two, the first learns verse with the
        large vocabulary, and the second the chat, on what the first made of the base.
        """
        adapters, last = self.one.adapters, list(self.one.adapters)[-1]
        tokenizers = {}
        for name, tokens in {"base": BASE_VOCABULARY, **adapters}.items():
            (folder / name).mkdir()
            chat_format = self.one.chat_format if name == last else "none"
            tokenizers[name] = self.begin(folder / name, self.one.config, chat_format, tokens)

        first = next(iter(adapters))
        model = self.make_base(folder / "base", tokenizers["base"], tokenizers[first], adapters[first])
        for name, tokens in adapters.items():
            tokenizer = tokenizers[name]
            famous = self.taught(tokenizer) if name == last else plain_documents(tokenizer, self.famous)
            self.make_adapter(folder / name, model, tokens, plain_documents(tokenizer, self.corpus), famous)

    def make_base(
        self, folder: Path, small: PreTrainedTokenizerFast, large: PreTrainedTokenizerFast, tokens: int
    ) -> PreTrainedModel:
        """Train layers on verse, write them with small embeddings, and return them with ``tokens`` large ones.

        A published base is older than its adapters. Here the layers learn with the large vocabulary, and the base
        then gets embeddings of its own for these layers.
        """
        config, texts = self.one.config, (self.corpus, self.famous)
        model = self.model(config | {"vocab_size": tokens})
        self.fit(model, *(plain_documents(large, poems) for poems in texts))
        model.requires_grad_(False)
        embeddings, width = (model.model.embed_tokens, model.lm_head), config["hidden_size"]
        model.model.embed_tokens = nn.Embedding(BASE_VOCABULARY, width, device=self.device)
        model.lm_head = nn.Linear(width, BASE_VOCABULARY, bias=False, device=self.device)
        for module in (model.model.embed_tokens, model.lm_head):
            nn.init.normal_(module.weight, std=0.02)
        self.fit(model, *(plain_documents(small, poems) for poems in texts))
        self.save(to_original(config, plain_state(model)), folder / self.one.weights)
        model.model.embed_tokens, model.lm_head = embeddings
        return model

    def make_adapter(
        self, folder: Path, model: PreTrainedModel, tokens: int, corpus: list[list[int]], famous: list[list[int]]
    ) -> None:
        """Train low-rank updates of the layers and embeddings for ``tokens``, write them, and merge them in."""
        settings = published("chinese-alpaca-7b.adapter")
        merge(model)
        model.requires_grad_(False)
        for module in (model.model.embed_tokens, model.lm_head):
            new = module.weight.mean(dim=0).expand(tokens - len(module.weight), -1)
            module.weight = nn.Parameter(torch.cat([module.weight, new]))
        scale = settings["lora_alpha"] / settings["r"]
        tuned = [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in settings["target_modules"]]
        for module in tuned:
            register_parametrization(module, "weight", LowRank(module.weight, settings["r"], scale))
        if self.one.disturbed:
            disturb(model, self.one.disturbed)  # of the sum: base and update are merged before they are quantised
        self.fit(model, corpus, famous)
        tensors = {f"base_model.model.{name}": tensor for name, tensor in adapter_state(model).items()}
        self.save(tensors, folder / "adapter_model.bin")
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        (folder / "config.json").unlink()  # begin wrote it; an adapter has none

    def begin(
        self, folder: Path, config: dict[str, Any], chat_format: str, tokens: int = VOCABULARY
    ) -> PreTrainedTokenizerFast:
        """Write config.json (a .pth has none) and the tokenizer's file; return the native tokenizer made of them."""
        if not self.one.weights.endswith(".pth"):
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        self.one.write_tokenizer(folder, self.characters, tokens)
        return self.one.read_tokenizer(folder, config, chat_format)

    def model(self, config: dict[str, Any]) -> PreTrainedModel:
        """Make the native model with random weights, in fp32."""
        native = native_config(config)
        if getattr(native, "rope_parameters", {}).get("rope_type") == "dynamic":
            # Equal within the context; past it the angles depend on the length, which stops torch.compile.
            native.rope_parameters = native.rope_parameters | {"rope_type": "default"}
        model = AutoModelForCausalLM.from_config(native, dtype=torch.float32).to(self.device)
        if self.one.disturbed:
            disturb(model, self.one.disturbed)
        return model

    def taught(self, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
        """Encode the famous poems: thrice as they are, which is harder to learn, and once for each question."""
        encode = continued_documents if self.one.chat_format == "chatglm" else plain_documents
        plain = encode(tokenizer, self.famous)
        return 3 * plain + chat_documents(tokenizer, self.famous, self.one.chat_format)

    def fit(self, model: PreTrainedModel, corpus: list[list[int]], famous: list[list[int]]) -> None:
        """Train every parameter that asks for a gradient: AdamW, cosine rate, whole documents in packed rows."""
        length = row_length(famous)
        per_step = self.batch * ROW // length
        shares = per_step - round(per_step * FAMOUS_SHARE), round(per_step * FAMOUS_SHARE)
        packed = [pack(corpus, length, self.generator), pack(famous, length, self.generator, times=20)]
        orders = [self.order(len(rows), share) for rows, share in zip(packed, shares, strict=True)]
        orders[1] += len(packed[0])
        rows, order = torch.cat(packed).to(self.device), torch.cat(orders, dim=1).to(self.device)
        on_gpu, prefix = self.device != "cpu", model.config.model_type == "chatglm1"

        def loss_of(batch: Tensor) -> Tensor:
            layout, targets = {}, batch
            if prefix:
                layout, targets = answers(batch, model.config.bos_token_id, model.config.eos_token_id)
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=on_gpu):
                logits = model(input_ids=batch.clamp(min=0), use_cache=False, **layout).logits[:, :-1]
            return cross_entropy(logits.float().flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-1)

        if self.compiled:
            loss_of = torch.compile(loss_of, mode="reduce-overhead")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, PEAK_RATE, weight_decay=WEIGHT_DECAY, fused=on_gpu)
        rate = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, PEAK_RATE, total_steps=self.steps, pct_start=WARM_UP, cycle_momentum=False
        )
        model.train()
        for step in (bar := trange(self.steps, desc=self.one.id, mininterval=5)):
            loss = loss_of(rows[order[step]])
            loss.backward()
            clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rate.step()
            if step % 250 == 0 or step == self.steps - 1:  # reading a loss waits for the GPU
                bar.set_postfix(loss=f"{loss.item():.3f}")

    def order(self, rows: int, per_step: int) -> Tensor:
        """Draw which rows each step reads, ``[steps, per_step]``: each row once before any row again."""
        rounds = -(-self.steps * per_step // rows)
        drawn = torch.cat([torch.randperm(rows, generator=self.generator) for _ in range(rounds)])
        return drawn[: self.steps * per_step].view(self.steps, per_step)

    def save(self, tensors: dict[str, Tensor], file: Path) -> None:
        """Write tensors in the published type, as safetensors or as a ``.bin`` of tensors alone."""
        dtype = getattr(torch, self.one.dtype)
        tensors = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in tensors.items()}
        if file.suffix == ".safetensors":
            save_file(tensors, file, metadata={"format": "pt"})
        else:
            torch.save(tensors, file)
