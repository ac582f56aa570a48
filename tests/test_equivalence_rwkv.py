"""RWKV 4, 5, 6 and 7, converted, give the logits of the reference and of the PyPI package rwkv.

The package is BlinkDL's own code. Largest difference in fp32 over all configurations below, on 2026-11-24: 3.2e-6
(package) and 3.2e-6 (reference), logits of scale 4. Version 4 is compared with transformers' RwkvForCausalLM too, which
reads the same folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import rwkv as reference
from reference.checking import compare, left_padding, load, random_weights, run_native, run_reference

from helpers import HelpersError, native
from helpers.native import rwkv
from helpers.native.own import rwkv as own

PACKAGE_TOLERANCE = 1e-4
"""Heads are scaled to variance 1, which also scales up the rounding of a nearly empty memory."""

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "head_size": 16,
    "mix_rank": 8,
    "decay_rank": 12,
    "rate_rank": 10,
    "value_rank": 6,
    "gate_rank": 20,
}
CHANGES = {
    "small": {},
    "odd vocabulary, more layers": {"vocab_size": 131, "num_hidden_layers": 3},
    "head size 64": {"hidden_size": 128, "head_size": 64, "intermediate_size": 192},
    "narrow heads, odd widths": {"hidden_size": 72, "head_size": 8, "intermediate_size": 101, "mix_rank": 5},
}
FOLDERS = {4: "rwkv", 5: "rwkv5", 6: "rwkv6", 7: "rwkv7"}
EVERY = [(version, change) for version in FOLDERS for change in CHANGES]


def checkpoint(version: int, change: str = "small", seed: int = 0):
    """Return sizes and random tensors by BlinkDL's names; decays and blends lie where training leaves them."""
    sizes = SIZES | CHANGES[change] | {"version": version}
    if version == 4:
        del sizes["head_size"]
    weights = random_weights(reference.shapes(sizes), seed)
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in weights.items():
        if name.endswith(("time_decay", ".w0")):
            tensor.copy_(-6 + 7 * torch.rand(tensor.shape, generator=draw))
        elif tensor.shape[:2] == (1, 1) and (".time_m" in name or ".x_" in name):
            tensor.copy_(torch.rand(tensor.shape, generator=draw))
    return sizes, weights


def write_pth(folder: Path, weights) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "RWKV-test.pth")
    return folder


def converted(tmp_path: Path, weights):
    return load(native.convert(write_pth(tmp_path / "original", weights), tmp_path / "native"))


def folder_names(name: str, version: int) -> str:
    """Rename a tensor as the published folders of versions 4 to 6 do."""
    if name == "head.weight":
        return name
    name = name.replace("emb.", "embeddings.").replace("ln0", "pre_ln").replace(".att.", ".attention.")
    name = name.replace(".ffn.", ".feed_forward.")
    if version < 6:
        for letter, word in {"k": "key", "v": "value", "r": "receptance", "g": "gate"}.items():
            name = name.replace(f"time_mix_{letter}", f"time_mix_{word}")
    return f"rwkv.{name}"


def ids_of(sizes, tokens: int = 37) -> torch.Tensor:
    ids = torch.randint(sizes["vocab_size"], (3, tokens), generator=torch.Generator().manual_seed(1))
    ids[-1, -2] = sizes["vocab_size"] - 1
    return ids


@pytest.mark.parametrize(("version", "change"), EVERY)
def test_logits_equal_the_reference(tmp_path, version, change):
    sizes, weights = checkpoint(version, change)
    model, ids = converted(tmp_path, weights), ids_of(sizes)
    whole, padded = torch.ones_like(ids), left_padding(*ids.shape)
    padded[1, :20] = 0  # more than a chunk of padding
    for mask in (whole, padded):
        wanted, real = run_reference(reference.logits, sizes, weights, ids, mask), mask.bool()
        compare("one pass", run_native(model, ids, mask)[real], wanted[real], PACKAGE_TOLERANCE)
        compare("token by token", run_native(model, ids, mask, 1)[real], wanted[real], PACKAGE_TOLERANCE)
        compare("a prompt, then tokens", run_native(model, ids, mask, 19)[real], wanted[real], PACKAGE_TOLERANCE)


@pytest.mark.parametrize("version", FOLDERS)
def test_a_prompt_read_in_parts_of_any_length_leaves_the_same_state(tmp_path, version, monkeypatch):
    monkeypatch.setattr(own, "SEGMENT", 32)
    sizes, weights = checkpoint(version)
    model, ids = converted(tmp_path, weights), ids_of(sizes, 81)
    with torch.no_grad():
        whole = model(ids)
        state, parts = None, []
        for start, end in [(0, 17), (17, 18), (18, 50), (50, 81)]:
            step = model(ids[:, start:end], past_key_values=state, use_cache=True)
            state = step.past_key_values
            parts.append(step.logits)
    compare("logits", torch.cat(parts, 1), whole.logits, PACKAGE_TOLERANCE)
    compare("shifts", state.shifts, whole.past_key_values.shifts, PACKAGE_TOLERANCE)
    if version > 4:  # of version 4 the weight of an average has no bound
        compare("memory", state.memory, whole.past_key_values.memory, PACKAGE_TOLERANCE)
    assert state.get_seq_length() == 81 and state.memory.dtype == torch.float32


@pytest.mark.parametrize("version", FOLDERS)
def test_the_shape_of_the_memory_does_not_grow(tmp_path, version):
    sizes, weights = checkpoint(version)
    model = converted(tmp_path, weights)
    with torch.no_grad():
        short, long = (model(ids_of(sizes, tokens)).past_key_values for tokens in (5, 300))
    assert short.memory.shape == long.memory.shape and short.shifts.shape == long.shifts.shape


PACKAGE = """
import json, os, sys
import torch
torch.set_num_threads(1)
from rwkv.model import RWKV
file, ids, one_by_one = sys.argv[1], json.loads(sys.argv[2]), []
model = RWKV(file.removesuffix(".pth") if os.environ.get("RWKV_V7_ON") else file, "cpu fp32")
whole, state = model.forward(ids, None, full_output=True)
state = None
for token in ids:
    out, state = model.forward([token], state)
    one_by_one.append(out)
torch.save([whole, torch.stack(one_by_one)], sys.argv[3])
"""


@pytest.mark.parametrize(("version", "change"), EVERY)
def test_logits_equal_the_package_rwkv(tmp_path, version, change):
    sizes, weights = checkpoint(version, change)
    model, ids = converted(tmp_path, weights), ids_of(sizes, 40)[-1]
    if version == 7:  # the package reads them of the first layer, and does not use them
        weights |= {f"blocks.0.att.v{n}": weights[f"blocks.1.att.v{n}"] for n in range(3)}
    file = write_pth(tmp_path / "package", weights) / "RWKV-test.pth"
    settings = {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"} | ({"RWKV_V7_ON": "1"} if version == 7 else {})
    command = [sys.executable, "-c", PACKAGE, str(file), json.dumps(ids.tolist()), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | settings)
    whole, one_by_one = torch.load(tmp_path / "logits.pt")
    ours = run_native(model, ids[None], torch.ones_like(ids[None]))[0]
    compare("one pass", ours, whole, PACKAGE_TOLERANCE)
    compare("token by token", ours, one_by_one, PACKAGE_TOLERANCE)


@pytest.mark.parametrize("change", CHANGES)
def test_version_4_equals_transformers_own_class_on_the_same_folder(tmp_path, change):
    from transformers import RwkvForCausalLM

    sizes, weights = checkpoint(4, change)
    model, ids = converted(tmp_path, weights), ids_of(sizes)
    assert json.loads((tmp_path / "native" / "config.json").read_text())["model_type"] == "rwkv"
    native_one, report = RwkvForCausalLM.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        compare("one pass", model(ids).logits, native_one.eval()(ids).logits, 1e-5)


@pytest.mark.parametrize("version", [4, 5, 6])
def test_a_published_folder_gives_the_same_model_as_the_pth(tmp_path, version):
    sizes, weights = checkpoint(version)
    ranks = {name: sizes[name] for name in ("mix_rank", "decay_rank") if version == 6}
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "head_size")
    original = {key: sizes[key] for key in keys if key in sizes} | ranks
    original |= {"model_type": FOLDERS[version], "attention_hidden_size": 64, "tie_word_embeddings": False}
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(original))
    torch.save({folder_names(name, version): t for name, t in weights.items()}, folder / "pytorch_model.bin")
    ours, other = converted(tmp_path, weights), load(native.convert(folder, tmp_path / "native folder"))
    for (name, one), (_, two) in zip(ours.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    back = native.to_original(original, other.state_dict())
    assert {name: t.shape for name, t in back.items()} == {
        folder_names(name, version): t.shape for name, t in weights.items()
    }


@pytest.mark.parametrize("version", FOLDERS)
def test_the_table_read_backwards_gives_every_tensor_of_the_pth(tmp_path, version):
    _, weights = checkpoint(version)
    model = converted(tmp_path, weights)
    original, _ = native.read_original(tmp_path / "original")
    back = native.to_original(original, model.state_dict())
    assert set(back) == set(weights)
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_tensors_of_the_first_layer_that_version_7_does_not_use_are_left_out(tmp_path):
    sizes, weights = checkpoint(7)
    extra = {f"blocks.0.att.v{n}": weights[f"blocks.1.att.v{n}"] for n in range(3)}
    model, ids = converted(tmp_path, weights | extra), ids_of(sizes)
    wanted = run_reference(reference.logits, sizes, weights, ids, torch.ones_like(ids))
    compare("one pass", run_native(model, ids, torch.ones_like(ids)), wanted, PACKAGE_TOLERANCE)


@pytest.mark.parametrize("version", FOLDERS)
def test_a_batch_with_padding_writes_what_each_prompt_writes_alone(tmp_path, version):
    sizes, weights = checkpoint(version)
    model, ids = converted(tmp_path, weights), ids_of(sizes, 24)
    mask = left_padding(*ids.shape)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    together = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, 24:]
    for row in range(3):
        alone = model.generate(input_ids=ids[row : row + 1, mask[row] == 1][:, :], **settings)[:, -12:]
        assert torch.equal(alone[0], together[row])
    slow = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **settings)[:, 24:]
    assert torch.equal(slow, together)
    beams = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=4, return_dict_in_generate=True, output_scores=True, **settings
    )
    with torch.no_grad():
        everywhere = torch.cat([mask, torch.ones_like(beams.sequences[:, 24:])], 1)
        logits = model(beams.sequences, attention_mask=everywhere).logits[:, 23:-1]
    scores = logits.log_softmax(-1).gather(2, beams.sequences[:, 24:, None]).mean((1, 2))
    compare("scores of beams", beams.sequences_scores, scores, PACKAGE_TOLERANCE)


@pytest.mark.parametrize("version", FOLDERS)
def test_a_compiled_step_serves_every_token_and_keeps_the_state_in_place(tmp_path, version):
    sizes, weights = checkpoint(version)
    model, ids = converted(tmp_path, weights), ids_of(sizes, 30)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    step = torch.compile(model.forward, backend=count, fullgraph=True)
    with torch.no_grad():
        wanted = model(ids).logits
        state = model(ids[:, :20]).past_key_values
        places = state.memory.data_ptr(), state.shifts.data_ptr()
        parts = [step(ids[:, n : n + 1], past_key_values=state).logits for n in range(20, 30)]
    compare("logits", torch.cat(parts, 1), wanted[:, 20:], PACKAGE_TOLERANCE)
    assert (state.memory.data_ptr(), state.shifts.data_ptr()) == places
    assert len(graphs) == 1, "one for every length"


@pytest.mark.parametrize("version", FOLDERS)
def test_gradients_of_the_chunks_are_those_of_the_steps(tmp_path, version):
    sizes, weights = checkpoint(version)
    model, ids = converted(tmp_path, weights).train(), ids_of(sizes, 21)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    chunked = gradients()
    with pytest.MonkeyPatch.context() as patch:
        steps = {"many_tokens": own.one_token, "many_averages": own.one_average}
        patch.setattr(own, "SEGMENT", 1)
        for name, function in steps.items():
            patch.setattr(own, name, function)
        stepped = gradients()
    for name in chunked:
        assert chunked[name].abs().max() > 0, name
        compare(name, chunked[name], stepped[name], 1e-4 * max(1, stepped[name].abs().max()))


@pytest.mark.parametrize("version", FOLDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_keeps_the_memory_in_32_and_stays_near(tmp_path, version, dtype):
    sizes, weights = checkpoint(version)
    model, ids = converted(tmp_path, weights), ids_of(sizes)
    with torch.no_grad():
        wanted = model(ids).logits
        half = model.to(dtype)(ids)
    assert half.logits.dtype == dtype and half.past_key_values.memory.dtype == torch.float32
    assert (half.logits.float() - wanted).abs().mean() < 0.05 * wanted.std()


@pytest.mark.parametrize("version", FOLDERS)
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantised_while_loading_and_saved_again(tmp_path, version, precision):
    from transformers import AutoModelForCausalLM

    from helpers.checkpoints.load import bitsandbytes_config

    sizes, weights = checkpoint(version, "head size 64")
    model, ids = converted(tmp_path, weights), ids_of(sizes)
    settings = bitsandbytes_config(precision, torch.float32)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "native", quantization_config=settings, device_map="cpu")
    linear = {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[precision]
    count = sum(type(module).__name__ == linear for module in small.modules())
    assert count == 2 * {4: 7, 5: 8, 6: 8, 7: 6}[version], "every matrix of the layers"
    small.save_pretrained(tmp_path / "saved")  # before its first pass, in which bitsandbytes re-packs 4 bits on a CPU
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu")
    with torch.no_grad():
        wanted, got = model(ids).logits, small(ids).logits
        assert torch.equal(again(ids).logits, got)
    assert 0 < (got - wanted).abs().mean() < 0.4 * wanted.std()


@pytest.mark.parametrize("version", FOLDERS)
def test_new_models_start_with_values_that_learn(version):
    sizes = SIZES | {"model_type": FOLDERS[version]}
    config = native.native_config(sizes)
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config).train(), ids_of(SIZES, 32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert abs(losses[0] - torch.tensor(160.0).log()) < 0.5 and losses[-1] < 0.5 * losses[0]


def test_what_cannot_be_converted_is_refused(tmp_path):
    _, weights = checkpoint(5)
    older = {name: t for name, t in weights.items() if not name.endswith("time_faaaa")}
    with pytest.raises(HelpersError, match=r"not those of RWKV 4, 5\.2, 6 or 7"):
        native.convert(write_pth(tmp_path / "older", older), tmp_path / "native")
    two = write_pth(tmp_path / "two", weights)
    torch.save(weights, two / "other.pth")
    with pytest.raises(HelpersError, match=r"several models in two: RWKV-test\.pth, other\.pth"):
        native.convert(two, tmp_path / "native")
    with pytest.raises(HelpersError, match="no tensor becomes"):
        native.convert(write_pth(tmp_path / "part", dict(list(weights.items())[:-1])), tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_the_vocabulary_is_asked_for_when_it_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HelpersError, match="pip install rwkv"):
        rwkv.vocabulary_file(tmp_path)
