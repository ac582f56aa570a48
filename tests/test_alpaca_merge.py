"""A LoRA merged while its base is converted gives the logits of peft's own merge."""

from __future__ import annotations

import json

import pytest
import torch
from reference import llama
from reference.checking import compare, load, random_weights, sample_ids, write_original

from helpers import native
from helpers.errors import HelpersError

BASE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""LLaMA-7B in every switch, and small in every size."""

EVERY_MATRIX = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""What Chinese-LLaMA-Alpaca tunes besides the embeddings."""


@pytest.fixture
def base(tmp_path):
    return write_original(tmp_path / "base", BASE, random_weights(llama.shapes(BASE)), shards=2, suffix="bin")


def tuned(model, folder, vocabulary=171, rank=4, seed=0, safetensors=True, **more):
    """Tune ``model`` with peft and random values, save the adapter to ``folder``, return the merged model.

    The values are small enough for logits to be exact to 1e-5: a rank of 1 with ``lora_alpha`` 32 is not, where one
    rounding of the weights moves peft's own logits by 2e-4.
    """
    from peft import LoraConfig, get_peft_model

    model.resize_token_embeddings(vocabulary)
    settings = {"r": rank, "lora_alpha": 32, "target_modules": EVERY_MATRIX} | more
    settings.setdefault("modules_to_save", ["embed_tokens", "lm_head"])
    with_lora = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in with_lora.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / max(tensor.shape) ** 0.5)
    with_lora.save_pretrained(folder)
    if not safetensors:  # as the adapters of 2023 were published; peft writes this form no more
        from safetensors.torch import load_file

        file = folder / "adapter_model.safetensors"
        torch.save(load_file(file), folder / "adapter_model.bin")
        file.unlink()
    return with_lora.merge_and_unload()


def plain(folder):
    """Load the base as it is: an original Llama checkpoint is one that transformers reads."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def assert_same(folder, merged):
    ids = sample_ids(merged.config.vocab_size)
    compare("merged", load(folder)(ids).logits, merged(ids).logits)


@pytest.mark.parametrize("safetensors", [True, False], ids=["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": None, "vocabulary": 160},
        {"rank": 1, "lora_alpha": 2},
    ],
    ids=["all and embeddings", "two matrices", "rank 1"],
)
def test_one_lora(tmp_path, base, more, safetensors):
    merged = tuned(plain(base), tmp_path / "lora", safetensors=safetensors, **more)
    assert_same(native.merge_lora(base, tmp_path / "lora", tmp_path / "native"), merged)
    known = sample_ids(BASE["vocab_size"])
    with torch.no_grad():
        change = merged(known).logits[..., : BASE["vocab_size"]] - plain(base)(known).logits
    assert change.abs().max() > 0.1, "the LoRA changes nothing here: this test sees nothing"


def test_two_loras_in_sequence(tmp_path, base):
    """Chinese-Alpaca-Plus is Llama, a Chinese-LLaMA-Plus LoRA, and an Alpaca LoRA whose vocabulary has one more."""
    middle = tuned(plain(base), tmp_path / "llama-plus", vocabulary=170, seed=1)
    merged = tuned(middle, tmp_path / "alpaca-plus", vocabulary=171, rank=8, seed=2)
    adapters = [tmp_path / "llama-plus", tmp_path / "alpaca-plus"]
    assert_same(native.convert(base, tmp_path / "native", adapters=adapters), merged)


def test_two_loras_of_which_one_brings_embeddings(tmp_path, base):
    middle = tuned(plain(base), tmp_path / "first", seed=1)
    merged = tuned(middle, tmp_path / "second", seed=2, modules_to_save=None)
    assert_same(native.convert(base, tmp_path / "native", adapters=[tmp_path / "first", tmp_path / "second"]), merged)


def test_a_half_precision_base_is_merged_in_fp32(tmp_path):
    """What is added is not rounded before it is added: the result is the exact sum, rounded once."""
    weights = random_weights(llama.shapes(BASE), dtype=torch.float16)
    base = write_original(tmp_path / "base", BASE, weights)
    merged = tuned(plain(base), tmp_path / "lora")
    model = load(native.merge_lora(base, tmp_path / "lora", tmp_path / "native"))
    for name, tensor in merged.state_dict().items():
        step = tensor.abs().max().item() * 2**-11
        compare(name, model.state_dict()[name], tensor, step)


OTHERS = {
    "wider base": ({"hidden_size": 96}, r"is \[160, 64\] in the base"),
    "deeper base": ({"num_hidden_layers": 3}, "which the base does not have"),
    "base of fewer words": ({"vocab_size": 150}, r"is \[160, 64\] in the base and \[151, 64\]"),
    "few key-value heads": ({"num_key_value_heads": 1}, r"is \[64, 64\] in the base and \[16, 64\]"),
}


@pytest.mark.parametrize(("change", "why"), OTHERS.values(), ids=OTHERS.keys())
def test_a_lora_made_for_another_base_is_refused(tmp_path, base, change, why):
    other = BASE | change
    foreign = write_original(tmp_path / "other", other, random_weights(llama.shapes(other)))
    tuned(plain(foreign), tmp_path / "lora", vocabulary=other["vocab_size"] + 1)
    assert_refused(tmp_path, base, why)


SETTINGS = {
    "other method": {"peft_type": "IA3"},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "transposed": {"fan_in_fan_out": True},
    "rank of its own": {"rank_pattern": {"q_proj": 2}},
    "scale of its own": {"alpha_pattern": {"q_proj": 2}},
}


@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS.keys())
def test_another_kind_of_lora_is_refused(tmp_path, base, change):
    tuned(plain(base), tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert_refused(tmp_path, base, f"{next(iter(change))}=")


def test_a_folder_without_an_adapter_is_refused(tmp_path, base):
    (tmp_path / "lora").mkdir()
    assert_refused(tmp_path, base, "adapter_config.json")


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_an_adapter_is_refused(tmp_path, base, missing):
    tuned(plain(base), tmp_path / "lora")
    (tmp_path / "lora" / missing).unlink()
    assert_refused(tmp_path, base, missing)


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_a_pair_is_refused(tmp_path, base, half):
    from safetensors.torch import load_file, save_file

    tuned(plain(base), tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if half in name)]
    save_file(tensors, file)
    assert_refused(tmp_path, base, "only one of lora_A and lora_B")


def assert_refused(tmp_path, base, why):
    """Assert that merging fails with one line that says ``why``, and that nothing is written beside the inputs."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(HelpersError, match=why) as raised:
        native.merge_lora(base, tmp_path / "lora", tmp_path / "native")
    assert "\n" not in str(raised.value)
    left = {path.name for path in tmp_path.iterdir()} - set(before)
    assert left <= {"native.lock"}, f"left behind: {left}"
