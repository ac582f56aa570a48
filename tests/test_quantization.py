"""Every stand-in, quantised: reads back bit for bit, still recites, and costs what its bits let expect."""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import catalog, complete, load
from helpers.checkpoints.load import native_folder, stand_ins
from helpers.quantization import (
    awq,
    bitsandbytes,
    fp8,
    gptq,
    perplexity,
    poems,
    quantized_layers,
    recited,
    rtn,
    w8a8,
)
from helpers.quantization.legacy import KINDS

MODELS = list({catalog.model(id).stand_in: id for id in reversed(stand_ins())}.values())
"""One id for each stand-in: some models share one."""

GPTQ = [id for id in MODELS if not id.startswith("rwkv")]
FORMS = ["qwen-7b", "chatglm3-6b", "chatglm-6b", "baichuan-13b", "qwen3-8b"]
"""One id for each native class."""

HELD_OUT = [poem.text for poem in poems("held_out")[:40]]
FAMOUS = poems("famous")[:40]


@pytest.fixture(scope="module")
def held():
    """Keep what GPTQModel holds of the quantised layers when it saves: folder's name -> tensors."""
    from gptqmodel.models.base import BaseQModel

    seen, save = {}, BaseQModel.save

    def watched(self, folder, *args, **more):
        tensors = self.model.state_dict()
        kept = {name: tensors[name].clone() for name in tensors if name.endswith(KINDS)}
        seen[Path(folder).name.removesuffix(".partial")] = kept
        save(self, folder, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseQModel, "save", watched)
        yield seen


@pytest.fixture(scope="module")
def made(tmp_path_factory, held):
    """Quantise once what several tests look at: made(model, kind) is a folder."""
    base = tmp_path_factory.mktemp("quantized")
    ways = {
        "int8": lambda *names: bitsandbytes(*names, precision="int8"),
        "nf4": bitsandbytes,
        "gptq4": gptq,
        "gptq3": lambda *names: gptq(*names, bits=3),
        "gptq8": lambda *names: gptq(*names, bits=8),
        "rtn3": lambda *names: rtn(*names, bits=3),
        "rtn4": rtn,
        "awq": awq,
        "w8a8": w8a8,
        "fp8": fp8,
    }

    def make(model, kind):
        target = base / f"{model}-{kind}"
        return target if target.exists() else ways[kind](model, target)

    return make


def loaded(model, folder="tiny", precision="auto"):
    return load(model, folder, precision, device="cpu")


def logits(model, tokenizer):
    ids = tokenizer(HELD_OUT[0], return_tensors="pt").input_ids
    with torch.inference_mode():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_bitsandbytes_saved_equals_bitsandbytes_at_loading(made, model, kind):
    saved, at_loading = loaded(model, made(model, kind)), loaded(model, precision=kind)
    assert torch.equal(logits(*saved), logits(*at_loading))
    assert saved[0].generation_config.to_dict() == at_loading[0].generation_config.to_dict()
    assert saved[1].get_vocab() == at_loading[1].get_vocab()


@pytest.mark.parametrize("model", GPTQ)
def test_gptq_is_saved_as_it_was_made(made, held, model):
    folder = made(model, "gptq4")
    stored, in_memory = load_file(folder / "model.safetensors"), held[folder.name]
    assert len(in_memory) >= 4 * 8 and in_memory.keys() == {name for name in stored if name.endswith(KINDS)}
    for name, tensor in in_memory.items():
        assert torch.equal(stored[name], tensor), name
    receipt = json.loads((folder / "quantization.json").read_text())
    assert receipt["settings"] == {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "damp": 0.05}
    assert receipt["calibration"]["texts"] == 256 and receipt["calibration"]["tokens"] > 10_000
    assert str(Path.home()) not in json.dumps(receipt) and "/tmp" not in (folder / "config.json").read_text()


@pytest.mark.parametrize("model", MODELS)
def test_four_bits_still_recite_in_a_left_padded_batch(made, model):
    """Prompts of a batch have different lengths, so those that are shorter are padded."""
    plain = recited(*loaded(model), FAMOUS)
    for kind in ["nf4", "gptq4"] if model in GPTQ else ["nf4"]:
        assert recited(*loaded(model, made(model, kind)), FAMOUS) >= 0.8 * plain, kind


@pytest.mark.parametrize("model", MODELS)
def test_perplexity_grows_as_bits_shrink(made, model):
    four = "gptq4" if model in GPTQ else "nf4"
    found = {kind: perplexity(*loaded(model, made(model, kind)), HELD_OUT) for kind in ("int8", four)}
    plain = perplexity(*loaded(model), HELD_OUT)
    assert abs(found["int8"] / plain - 1) < 0.01
    assert 1.005 * found["int8"] < found[four] < 1.15 * plain


JUDGED = ["plain", "gptq8", "gptq4", "rtn4", "gptq3", "rtn3"]


@pytest.fixture(scope="module")
def surprise(made):
    """Look once at what several tests compare: surprise(model) is the perplexity of each of JUDGED."""

    @functools.cache
    def of(model):
        folders = {kind: "tiny" if kind == "plain" else made(model, kind) for kind in JUDGED}
        return {kind: perplexity(*loaded(model, folder), HELD_OUT) for kind, folder in folders.items()}

    return of


@pytest.mark.parametrize("model", FORMS)
def test_gptq_beats_rounding_and_three_bits_cost_more_than_four(surprise, model):
    plain, *found = (surprise(model)[kind] for kind in JUDGED)
    assert found == sorted(found), surprise(model)
    if model != "chatglm-6b":  # trained to suffer little: there a tenth of the damage is the processor's to decide
        assert found[4] - plain > 1.1 * (found[3] - plain), surprise(model)


def test_rounding_does_far_more_damage_than_gptq(surprise):
    """Of all forms together, 1.9 times with 3 bits and 1.7 with 4; of chatglm-6b, which suffers little, hardly more.

    What GPTQ saves of a single stand-in depends on the processor, whose kernels sum the Hessian in another order.
    """
    damage = {kind: sum(surprise(model)[kind] / surprise(model)["plain"] - 1 for model in FORMS) for kind in JUDGED}
    assert damage["rtn3"] > 1.5 * damage["gptq3"] and damage["rtn4"] > 1.3 * damage["gptq4"], damage


@pytest.mark.parametrize("model", ["qwen-7b", "chatglm3-6b", "baichuan-13b"])
def test_awq_beats_rounding(made, model):
    assert perplexity(*loaded(model, made(model, "awq")), HELD_OUT) < perplexity(
        *loaded(model, made(model, "rtn4")), HELD_OUT
    )


@pytest.mark.parametrize("model", [*FORMS, "rwkv-6-7b"])
@pytest.mark.parametrize("kind", ["w8a8", "fp8"])
def test_eight_bit_activations_cost_little(made, model, kind, capfd):
    plain = perplexity(*loaded(model), HELD_OUT)
    folder = made(model, kind)
    model_, tokenizer = loaded(model, folder)
    assert all(layer.bits < 8.6 for layer in quantized_layers(model_) if layer.quantized)
    assert abs(perplexity(model_, tokenizer, HELD_OUT) / plain - 1) < 0.03
    assert capfd.readouterr() == ("", "")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors" and settings["quantization_status"] == "compressed"
    smoothed = json.loads((folder / "quantization.json").read_text()).get("smoothed")
    assert smoothed == ({"chatglm-6b": 0, "rwkv-6-7b": 0}.get(model, 4) if kind == "w8a8" else None)


def test_smoothing_changes_nothing_but_rounding():
    from helpers.quantization.calibration import batches
    from helpers.quantization.with_compressed_tensors import _norms_and_matrices, _smooth

    model, tokenizer = loaded("chatglm3-6b")
    before = logits(model, tokenizer)
    weight = model.model.layers[0].mlp.gate_up_proj.weight.clone()
    _smooth(model, _norms_and_matrices(model), batches(tokenizer(HELD_OUT).input_ids, 8, "cpu"), 0.5)
    assert not torch.allclose(model.model.layers[0].mlp.gate_up_proj.weight, weight)
    torch.testing.assert_close(logits(model, tokenizer), before, atol=1e-4, rtol=1e-4)


def test_gptqmodel_reads_the_folder_too(made):
    from gptqmodel import BACKEND, GPTQModel

    folder = made("qwen-7b", "gptq4")
    ours, tokenizer = loaded("qwen-7b", folder)
    theirs = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    found, wanted = logits(theirs.model, tokenizer).float(), logits(ours, tokenizer)
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.95
    assert (found - wanted).abs().mean() < 0.05 * wanted.abs().mean()


@pytest.mark.parametrize(
    "kind,bits", [("int8", (8, 8.6)), ("nf4", (4.4, 4.9)), ("gptq4", (4.6, 5)), ("gptq3", (3.5, 4))]
)
def test_layers_tell_what_is_quantised(made, kind, bits):
    rows = quantized_layers(loaded("qwen-7b", made("qwen-7b", kind))[0])
    quantised = [row for row in rows if row.quantized]
    assert len(quantised) == 2 * 7
    assert all(bits[0] <= row.bits <= bits[1] for row in quantised)
    assert {row.name: row.bits for row in rows if not row.quantized}["lm_head"] == 32  # on a CPU the rest is fp32


def test_what_is_not_quantised_keeps_its_published_type(made):
    from safetensors import safe_open

    for kind in ("nf4", "gptq4", "w8a8"):
        with safe_open(made("atom-7b", kind) / "model.safetensors", framework="pt") as file:
            assert file.get_tensor("lm_head.weight").dtype == torch.float16  # as Atom-7B is published


def test_double_quantisation_saves_bytes(tmp_path):
    once, twice = (bitsandbytes("qwen-7b", tmp_path / str(dq), double_quant=dq) for dq in (False, True))
    first, second = (quantized_layers(loaded("qwen-7b", folder)[0]) for folder in (once, twice))
    big = "model.layers.0.mlp.up_proj"
    assert {row.name: row.bytes for row in second}[big] < 1.1 * {row.name: row.bytes for row in first}[big]
    assert sum(file.stat().st_size for file in twice.iterdir()) < sum(file.stat().st_size for file in once.iterdir())


def test_a_native_folder_is_quantised_and_loaded_by_its_path(tmp_path, capfd):
    folder = gptq(str(native_folder("qwen-7b")), tmp_path / "out", desc_act=True, sym=False, samples=64)
    model, tokenizer = loaded("qwen-7b", str(folder))
    assert complete(model, tokenizer, FAMOUS[0].verses[0], max_new_tokens=4)
    assert capfd.readouterr() == ("", "")  # GPTQModel prints hundreds of lines
    assert json.loads((folder / "quantization.json").read_text())["weights"] == "folder"
