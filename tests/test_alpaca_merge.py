"""A LoRA merged while its base is converted gives the logits of peft's own merge."""

from __future__ import annotations

import json

import pytest
import torch
from reference import llama
from reference.checking import compare, load, random_weights, sample_ids, write_original

from helpers import native
from helpers.checkpoints.make.vocabularies import sentencepiece
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


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("safetensors", [True, False], ids=["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": None, "vocabulary": 160},
        {"rank": 1, "lora_alpha": 2},
        {"target_modules": [*EVERY_MATRIX, "embed_tokens", "lm_head"], "modules_to_save": None, "vocabulary": 160},
        {"target_modules": [*EVERY_MATRIX, "embed_tokens", "lm_head"], "modules_to_save": None},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    ],
    ids=[
        "all and embeddings",
        "two matrices",
        "rank 1",
        "low-rank embeddings",
        "low-rank embeddings of a larger vocabulary",
        "low-rank embeddings, whole head",
    ],
)
def test_one_lora(tmp_path, base, more, safetensors):
    merged = tuned(plain(base), tmp_path / "lora", safetensors=safetensors, **more)
    assert_same(native.merge_lora(base, tmp_path / "lora", tmp_path / "native"), merged)
    known = sample_ids(BASE["vocab_size"])
    with torch.no_grad():
        change = merged(known).logits[..., : BASE["vocab_size"]] - plain(base)(known).logits
    assert change.abs().max() > 0.1, "the LoRA changes nothing here: this test sees nothing"


PLUS, ALPACA = 300, 301
"""Vocabularies of the adapters in small: Chinese-Alpaca's has one token more than Chinese-LLaMA's, ``[PAD]``."""


def write_tokenizer(folder, pieces, pad=None):
    """Write tokenizer.model, and with ``pad`` the file that names one token more."""
    characters = [chr(0x4E00 + i) for i in range(300)]
    (folder / "tokenizer.model").write_bytes(sentencepiece(pieces, characters, "", dummy_prefix=True))
    if pad:
        (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}))


@pytest.fixture
def plus(tmp_path, base):
    """Chinese-Alpaca-Plus in small, with a tokenizer in each folder; returns the folders and peft's merged model."""
    middle = tuned(plain(base), tmp_path / "llama-plus", vocabulary=PLUS, seed=1, safetensors=False)
    merged = tuned(middle, tmp_path / "alpaca-plus", vocabulary=ALPACA, rank=8, seed=2, safetensors=False)
    write_tokenizer(base, 270)  # LLaMA's own, without the new pieces: of no use to the merged model
    write_tokenizer(tmp_path / "llama-plus", PLUS)
    write_tokenizer(tmp_path / "alpaca-plus", PLUS, pad="[PAD]")
    return [tmp_path / "llama-plus", tmp_path / "alpaca-plus"], merged


def test_two_loras_in_sequence(tmp_path, base, plus):
    """Chinese-Alpaca-Plus and -Pro: the second LoRA belongs to what the first makes of LLaMA."""
    from transformers import AutoTokenizer

    adapters, merged = plus
    folder = native.convert(base, tmp_path / "native", adapters=adapters, chat_format="alpaca")
    assert_same(folder, merged)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (len(tokenizer), tokenizer.pad_token_id) == (ALPACA, PLUS), "the last adapter's tokenizer"
    assert tokenizer("一").input_ids[-1] < PLUS


def test_the_second_of_two_without_the_first_is_another_model(tmp_path, base, plus):
    """Shapes and vocabularies fit, so it cannot be refused: what a reader gets who forgets the first."""
    adapters, merged = plus
    with pytest.raises(AssertionError, match="largest difference"):
        assert_same(native.merge_lora(base, adapters[1], tmp_path / "native"), merged)


def test_two_loras_in_the_wrong_order_are_refused(tmp_path, base, plus):
    adapters, _ = plus
    with pytest.raises(HelpersError, match=f"{PLUS} tokens, .* has {ALPACA}; .*order of the adapters"):
        native.convert(base, tmp_path / "native", adapters=adapters[::-1])
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize(("folder", "tokens"), [("base", 270), ("llama-plus", PLUS)])
def test_a_tokenizer_from_before_the_vocabulary_grew_is_refused(tmp_path, base, plus, folder, tokens):
    for adapter in plus[0]:
        if adapter.name != folder:
            (adapter / "tokenizer.model").unlink()
    with pytest.raises(HelpersError, match=rf"tokenizer in {folder}: it has {tokens} tokens, .* embeddings for 301"):
        native.convert(base, tmp_path / "native", adapters=plus[0])
    assert not (tmp_path / "native").exists()


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path, base):
    tuned(plain(base), tmp_path / "lora", vocabulary=160, modules_to_save=None)
    write_tokenizer(tmp_path / "lora", 270)
    assert_refused(tmp_path, base, "tokenizer in lora: it has 270 tokens, and the model has embeddings for 160")


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_embeddings_that_grow_on_one_side_are_refused(tmp_path, base, saved):
    from safetensors.torch import load_file, save_file

    tuned(plain(base), tmp_path / "lora", modules_to_save=[saved])
    file = tmp_path / "lora" / "adapter_model.safetensors"  # where peft notices, it saves the other side as well
    tensors = {name: tensor for name, tensor in load_file(file).items() if "lora_" in name or saved in name}
    save_file(tensors, file)
    assert_refused(tmp_path, base, "a row for each token, and .* would have 171 rows, .* 160 rows")


@pytest.mark.parametrize("stored", [True, False], ids=["head stored as well", "head not stored"])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_embeddings_of_a_tied_base_are_refused(tmp_path, saved, stored):
    """The base has one tensor for both; peft trains copies, and its own merge unties them without saying so."""
    weights = random_weights(llama.shapes(BASE | {"tie_word_embeddings": not stored}))
    untied = write_original(tmp_path / "untied", BASE, random_weights(llama.shapes(BASE)))
    base = write_original(tmp_path / "base", BASE | {"tie_word_embeddings": True}, weights)
    tuned(plain(untied), tmp_path / "lora", vocabulary=160, modules_to_save=saved)
    assert_refused(tmp_path, base, "tie_word_embeddings")


def test_a_tied_base_stays_tied_under_a_lora_of_its_layers(tmp_path):
    tied = BASE | {"tie_word_embeddings": True}
    base = write_original(tmp_path / "base", tied, random_weights(llama.shapes(tied)))
    merged = tuned(plain(base), tmp_path / "lora", vocabulary=160, modules_to_save=None)
    assert_same(native.merge_lora(base, tmp_path / "lora", tmp_path / "native"), merged)


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_one_side_replaced_without_growing(tmp_path, base, saved):
    merged = tuned(plain(base), tmp_path / "lora", vocabulary=160, modules_to_save=[saved])
    assert_same(native.merge_lora(base, tmp_path / "lora", tmp_path / "native"), merged)


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
    "base of fewer words": ({"vocab_size": 150}, r"it has 151 tokens, and what it is merged into has 160"),
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
