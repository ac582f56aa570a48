"""Old AutoGPTQ folders: upgraded without loss, in the native names, and never half; its environment and its kernel."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_markdown_cell, new_notebook
from safetensors.torch import load_file, save_file

from helpers import HelpersError, load
from helpers import run as series
from helpers.checkpoints.load import TINY, native_folder
from helpers.native import convert
from helpers.native.convert import open_shard, read_config, read_original, weight_files
from helpers.quantization import legacy, perplexity, poems
from helpers.quantization.legacy import older_config, pack_columns, run_in_venv, unpack_columns, upgrade
from helpers.quantization.with_autogptq import autogptq as quantise_by_autogptq

ROOT = Path(__file__).parents[1]
AUTOGPTQ = ROOT / ".venv-autogptq" / "bin" / "python"
SETTINGS = {"bits": 4, "group_size": 32, "desc_act": False, "is_marlin_format": False, "model_name_or_path": "/of/them"}


def rounded(weight, bits=4, group=32):
    """Round a matrix [out, in] to nearest; return AutoGPTQ's four tensors, and the matrix they stand for."""
    out, inputs = weight.shape
    groups = weight.float().reshape(out, -1, group)
    scales = (groups.abs().amax(-1) / (2 ** (bits - 1) - 1)).half()  # [out, groups]
    zero = torch.randint(1, 2**bits, scales.shape, generator=torch.Generator().manual_seed(0))
    numbers = (groups / scales[..., None].float() + zero[..., None]).round().clamp(0, 2**bits - 1)
    dense = ((numbers - zero[..., None]) * scales[..., None].float()).reshape(out, inputs)
    return {
        "qweight": pack_columns(numbers.reshape(out, inputs).int(), bits).T.contiguous(),
        "qzeros": pack_columns((zero.T - 1).int(), bits),
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // group,
    }, dense


def published(model, folder, bits=4):
    """Write a stand-in as AutoGPTQ would in its original names, and in ``folder/dense`` what its numbers stand for."""
    _, family = read_original(TINY / model)
    matrices = [rule for rule in family.rules(read_config(TINY / model)) if re.search(r"\{i\}.*\.weight", rule.source)]
    packed, dense = {}, {}
    for name, tensor in open_shard(weight_files(TINY / model)[0]).items():
        dense[name] = tensor.float()
        if tensor.ndim == 2 and any(rule.match(name) for rule in matrices):
            four, dense[name] = rounded(tensor, bits)
            packed |= {name.removesuffix("weight") + kind: part for kind, part in four.items()}
            packed.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(tensor), dtype=torch.half))
        else:
            packed[name] = tensor.clone()
    for part, tensors, stem in ((folder, packed, f"gptq_model-{bits}bit-32g"), (folder / "dense", dense, "model")):
        shutil.copytree(TINY / model, part, ignore=shutil.ignore_patterns("*.bin", "*.safetensors"), dirs_exist_ok=True)
        save_file(tensors, part / f"{stem}.safetensors", metadata={"format": "pt"})
    write_json(folder / "quantize_config.json", SETTINGS | {"bits": bits})


def write_json(file, content):
    file.write_text(json.dumps(content))


def read_json(file):
    return json.loads(file.read_text())


@pytest.fixture
def old(tmp_path):
    """A Llama of one layer as AutoGPTQ names it."""
    folder = tmp_path / "old"
    folder.mkdir()
    four, _ = rounded(torch.randn(64, 64))
    tensors = {f"model.layers.0.mlp.up_proj.{kind}": part for kind, part in four.items()}
    save_file(tensors, folder / "gptq_model-4bit-32g.safetensors")
    write_json(folder / "config.json", {"model_type": "llama", "hidden_size": 64})
    write_json(folder / "quantize_config.json", SETTINGS)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_names_and_settings_are_todays_and_no_weight_is_copied(old):
    before = contents(old)
    new = upgrade(old)
    assert new.name == "old-upgraded" and contents(old) == before
    assert sorted(contents(new)) == ["config.json", "model.safetensors", "quantize_config.json", "tokenizer.json"]
    assert os.path.samefile(new / "model.safetensors", old / "gptq_model-4bit-32g.safetensors")
    assert not os.path.samefile(new / "tokenizer.json", old / "tokenizer.json")  # it may be edited
    settings = read_json(new / "config.json")["quantization_config"]
    kept = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    assert settings == kept | {"quant_method": "gptq", "checkpoint_format": "gptq"}
    assert read_json(new / "quantize_config.json") == settings


def test_in_place_only_when_asked_and_twice_is_no_harm(old):
    weights = (old / "gptq_model-4bit-32g.safetensors").read_bytes()
    assert upgrade(old, old) == old
    first = contents(old)
    assert first["model.safetensors"] == weights and "gptq_model-4bit-32g.safetensors" not in first
    upgrade(old, old)
    assert contents(old) == first and [path.name for path in old.parent.iterdir()] == ["old"]


@pytest.mark.parametrize("suffix", [".bin", ".pt"])
def test_pickled_weights_are_rewritten(old, suffix):
    file = old / "gptq_model-4bit-32g.safetensors"
    tensors = load_file(file)
    torch.save(tensors, file.with_suffix(suffix))
    file.unlink()
    written = load_file(upgrade(old) / "model.safetensors")
    assert written.keys() == tensors.keys() and all(torch.equal(written[name], tensors[name]) for name in tensors)


def test_pickled_code_is_not_run(old):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(old / "ran"),)

    (old / "gptq_model-4bit-32g.safetensors").unlink()
    torch.save({"x": Code()}, old / "gptq_model-4bit-32g.bin")
    with pytest.raises(HelpersError, match="could run code"):
        upgrade(old)
    assert not (old / "ran").exists()


def test_shards_get_an_index_under_their_new_names(old):
    file = old / "gptq_model-4bit-32g.safetensors"
    halves = [dict(list(load_file(file).items())[part::2]) for part in (0, 1)]
    file.unlink()
    names = [f"gptq_model-4bit-32g-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, old / name)
    weight_map = {name: file for half, file in zip(halves, names, strict=True) for name in half}
    write_json(old / "gptq_model-4bit-32g.safetensors.index.json", {"weight_map": weight_map})
    new = upgrade(old)
    index = read_json(new / "model.safetensors.index.json")["weight_map"]
    assert set(index) == set(weight_map) and all(name in load_file(new / file) for name, file in index.items())
    assert sorted(path.name for path in new.glob("*gptq*")) == []
    (old / names[1]).unlink()
    with pytest.raises(HelpersError, match=f"shard {names[1]} is missing"):
        upgrade(old, old.parent / "other")


def other_settings(**change):
    def apply(folder):
        write_json(folder / "quantize_config.json", SETTINGS | change)

    return apply


REFUSED = [
    (lambda folder: (folder / "quantize_config.json").unlink(), "says how it was quantised"),
    (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    (lambda folder: (folder / "gptq_model-4bit-32g.safetensors").unlink(), "it holds no weight file"),
    (lambda folder: save_file({"x": torch.ones(1)}, folder / "gptq_model-4bit-32g.safetensors"), r"called \*.qweight"),
    (lambda folder: (folder / "gptq_model-4bit-32g.safetensors").write_bytes(b"\0" * 50), "truncated or damaged"),
    (lambda folder: (folder / "quantize_config.json").write_text("{"), "it is not JSON"),
    (other_settings(is_marlin_format=True), "'marlin'"),
    (other_settings(checkpoint_format="gptq_v2"), "'gptq_v2'"),
    (other_settings(quant_method="awq"), "quantised by awq"),
    (other_settings(version="GEMM"), "quantised by awq"),
    (other_settings(bits=5), "say 5 bits"),
    (other_settings(bits=8), "4 bits a weight, quantize_config.json says 8"),
]


@pytest.mark.parametrize(("spoil", "why"), REFUSED, ids=[why for _, why in REFUSED])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_no_such_folder_is_refused_and_left_alone(old, spoil, why, in_place):
    spoil(old)
    before = contents(old)
    with pytest.raises(HelpersError, match=why) as caught:
        upgrade(old, old if in_place else None)
    assert len(str(caught.value).splitlines()) == 1
    assert contents(old) == before and [path.name for path in old.parent.iterdir()] == ["old"]


def test_a_failure_while_writing_leaves_the_original_and_nothing_else(old, monkeypatch):
    before = contents(old)
    rename = Path.rename

    def fails(self, target):
        if self.name.endswith(".partial"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    for target in (None, old):
        with pytest.raises(OSError, match="no"):
            upgrade(old, target)
        assert contents(old) == before and [path.name for path in old.parent.iterdir()] == ["old"]


def test_a_folder_named_by_a_dot_is_upgraded(old, monkeypatch):
    monkeypatch.chdir(old)
    assert upgrade(".") == old.with_name("old-upgraded") and (old.parent / "old-upgraded" / "config.json").exists()


def test_what_a_stopped_run_left_is_named_and_kept(old):
    before = contents(old)
    left = old.with_name("old.before-upgrade")
    shutil.copytree(old, left)
    with pytest.raises(HelpersError, match=r"^cannot upgrade old in place: old\.before-upgrade of a stopped run lies"):
        upgrade(old, old)
    assert contents(old) == contents(left) == before and len(list(old.parent.iterdir())) == 2
    upgrade(old)  # beside it: no harm


def test_an_existing_target_is_not_overwritten(old):
    upgrade(old)
    with pytest.raises(HelpersError, match="will not overwrite old-upgraded: it exists"):
        upgrade(old)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_is_undone_by_unpacking(bits):
    numbers = torch.randint(2**bits, (3, 64), dtype=torch.int32)
    numbers[:, -1] = 2**bits - 1  # the sign bit
    packed = pack_columns(numbers, bits)
    assert packed.dtype == torch.int32 and packed.shape == (3, 2 * bits)
    assert torch.equal(unpack_columns(packed, bits), numbers)


@pytest.mark.parametrize(
    ("model", "bits"), [("qwen-7b", 4), ("qwen-7b", 8), ("baichuan2-7b", 4), ("internlm2-7b", 4), ("chatglm3-6b", 2)]
)
def test_an_original_architecture_becomes_its_native_class_exactly(model, bits, tmp_path):
    """Converted and then unpacked is the same as unpacked and then converted."""
    published(model, tmp_path / "old", bits)
    new = upgrade(tmp_path / "old", tmp_path / "new")
    native = load_file(convert(tmp_path / "old" / "dense", tmp_path / "native") / "model.safetensors")
    made = load_file(new / "model.safetensors")
    layers = [name.removesuffix("qweight") for name in made if name.endswith(".qweight")]
    assert len(layers) == sum(".layers." in name and tensor.ndim == 2 for name, tensor in native.items())
    for layer in layers:
        numbers = unpack_columns(made.pop(layer + "qweight").T.contiguous(), bits)
        zeros, scales = unpack_columns(made.pop(layer + "qzeros"), bits) + 1, made.pop(layer + "scales").float()
        group = made.pop(layer + "g_idx").long()
        weight = (numbers - zeros[group].T) * scales[group].T
        torch.testing.assert_close(weight, native.pop(layer + "weight"), rtol=0, atol=0)
    assert made.keys() == native.keys()
    assert read_json(new / "config.json")["quantization_config"]["bits"] == bits


def test_a_bias_that_is_not_zero_is_not_dropped(tmp_path):
    published("qwen-7b", tmp_path / "old")
    file = tmp_path / "old" / "gptq_model-4bit-32g.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.0.mlp.w1.bias"][3] = 1
    save_file(tensors, file)
    with pytest.raises(HelpersError, match=r"transformer\.h\.0\.mlp\.w1\.bias"):
        upgrade(tmp_path / "old", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_missing_matrix_is_named(tmp_path):
    published("qwen-7b", tmp_path / "old")
    file = tmp_path / "old" / "gptq_model-4bit-32g.safetensors"
    tensors = {name: part for name, part in load_file(file).items() if "h.1.mlp.w2.q" not in name}
    save_file(tensors, file)
    with pytest.raises(HelpersError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight"):
        upgrade(tmp_path / "old", tmp_path / "new")


def test_an_upgraded_qwen_loads_and_computes_what_its_numbers_say(tmp_path):
    published("qwen-7b", tmp_path / "old")
    shutil.move(tmp_path / "old" / "dense", tmp_path / "qwen-7b")
    ids = torch.arange(300, 340)[None]
    quantised, _ = load("qwen-7b", upgrade(tmp_path / "old", tmp_path / "new"), device="cpu")
    dense, tokenizer = load("qwen-7b", tmp_path / "qwen-7b", "fp32", "cpu")
    with torch.inference_mode():
        ours, theirs = quantised(input_ids=ids).logits, dense(input_ids=ids).logits
    assert (ours - theirs).abs().max() < 0.1 * theirs.std()  # GPTQModel's CPU kernel rounds scales to 16 bit
    assert tokenizer.chat_template


def test_older_config_tells_transformers_4_the_base():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    older = older_config({"rope_parameters": rope})
    assert (older["rope_theta"], older["rope_scaling"]) == (1e6, {"rope_type": "dynamic", "factor": 2.0})
    plain = older_config({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    assert (plain["rope_theta"], plain["rope_scaling"]) == (1e4, None)
    assert older_config({"rope_theta": 5.0}) == {"rope_theta": 5.0}


def test_code_for_venv_answers_or_fails_in_one_line(monkeypatch, tmp_path):
    assert (ROOT / ".venv").exists() or pytest.skip("there is no .venv: this is another environment")
    assert run_in_venv("import sys; print(sys.version_info[0])") == "3"
    with pytest.raises(HelpersError, match=r"^unknown model 'x': it is not one of the names known here\. Valid: "):
        run_in_venv("from helpers import catalog; catalog.model('x')")
    with pytest.raises(HelpersError, match=r"the code for \.venv failed: ZeroDivisionError: division by zero\. Run"):
        run_in_venv("1 / 0")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    asked = "import os; print(os.environ.get('HF_HUB_OFFLINE'))"
    assert [run_in_venv(asked), run_in_venv(asked, offline=False)] == ["1", "None"]
    monkeypatch.setattr(legacy, "SERIES", tmp_path)
    with pytest.raises(HelpersError, match="make setup"):
        run_in_venv("1")


# --- a notebook with a kernel of its own


def book(kernel):
    named = {"display_name": kernel, "language": "python", "name": kernel}
    return new_notebook(cells=[new_markdown_cell("# Title")], metadata={"kernelspec": named})


def test_a_notebook_whose_kernel_is_missing_is_skipped_and_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    for name, kernel in (("01_usual", "python3"), ("14_other", "autogptq")):
        nbformat.write(book(kernel), tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setattr(series.sys, "prefix", str(tmp_path))
    usual, other = series.run(progress=False)
    assert usual.status == "ok"
    assert (other.status, other.error) == ("skipped", "its kernel 'autogptq' is not installed: run make autogptq")
    assert "<h1>Series run: 1 ok, 1 skipped</h1>" in (tmp_path / "build" / "index.html").read_text()


@pytest.mark.parametrize(("kernel", "kept"), [("autogptq", "autogptq"), ("python3", "python3"), ("mine", "python3")])
def test_a_stored_notebook_keeps_a_kernel_of_the_series(kernel, kept):
    assert series.cleaned(book(kernel)).metadata["kernelspec"]["name"] == kept


# --- AutoGPTQ itself


def autogptq(code):
    if not AUTOGPTQ.exists():
        pytest.skip("there is no .venv-autogptq (make autogptq; Python 3.11 on Linux x86-64)")
    done = subprocess.run([AUTOGPTQ, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_autogptqs_own_layer_agrees_with_the_numbers_taken_apart(tmp_path):
    four, dense = rounded(torch.randn(64, 96))
    save_file(four | {"dense": dense, "bias": torch.zeros(64)}, tmp_path / "layer.safetensors")
    code = f"""
import torch
from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear
from safetensors.torch import load_file
tensors = load_file({str(tmp_path / "layer.safetensors")!r})
dense = tensors.pop("dense")
layer = QuantLinear(4, 32, 96, 64, bias=True, weight_dtype=torch.float32)
layer.load_state_dict(tensors)
print((layer(torch.eye(96)).T - dense).abs().max().item())
"""
    assert float(autogptq(code).splitlines()[-1]) < 1e-6


def test_autogptqs_environment_is_the_locked_one():
    lock = re.findall(r"^([\w.-]+)==([\w.+]+)", (ROOT / "env/autogptq/lock.txt").read_text(), flags=re.M)
    code = f"from importlib.metadata import version\nprint([n for n, v in {lock!r} if version(n) != v])"
    assert len(lock) > 40 and autogptq(code) == "[]"


def test_the_kernel_is_that_environment():
    if not AUTOGPTQ.exists():
        pytest.skip("there is no .venv-autogptq (make autogptq; Python 3.11 on Linux x86-64)")
    from jupyter_client.kernelspec import KernelSpecManager

    assert Path(KernelSpecManager().get_kernel_spec("autogptq").argv[0]) == AUTOGPTQ


def test_autogptq_quantises_on_a_gpu_only(tmp_path):
    with pytest.raises(HelpersError, match="it is not in this environment"):
        quantise_by_autogptq(TINY / "internlm2-7b", tmp_path / "new")
    with pytest.raises(HelpersError, match="unknown bits 5"):
        quantise_by_autogptq(TINY / "internlm2-7b", tmp_path / "new", bits=5)
    code = f"""
from helpers import HelpersError
from helpers.quantization.with_autogptq import autogptq
try:
    autogptq({str(TINY / "internlm2-7b")!r}, {str(tmp_path / "new")!r})
except HelpersError as error:
    print(error)
"""
    assert "it needs CUDA, and PyTorch finds none here. Use a GPU" in autogptq(code) and not any(tmp_path.iterdir())


def test_what_autogptq_makes_is_the_same_model_there_and_here(tmp_path):
    """Its own code, on a CPU: only its look for CUDA is taken off. InternLM2 has another base of positions."""
    source, old = str(native_folder("internlm2-7b", "tiny")), tmp_path / "old"
    code = f"""
import torch, auto_gptq.modeling._base as base
base.CUDA_0, torch.cuda.synchronize, torch.cuda.is_available = base.CPU, lambda *_: None, lambda: True
from helpers.quantization.with_autogptq import autogptq
autogptq({source!r}, {str(old)!r}, samples=32)
torch.cuda.is_available = lambda: False
from auto_gptq import AutoGPTQForCausalLM
from transformers import PreTrainedTokenizerFast
from helpers.quantization import perplexity, poems
model = AutoGPTQForCausalLM.from_quantized({str(old)!r}, device="cpu", torch_dtype=torch.float32).model
tokenizer = PreTrainedTokenizerFast(tokenizer_file={str(old / "tokenizer.json")!r})
print(perplexity(model, tokenizer, [poem.text for poem in poems("held_out")[:20]]))
"""
    theirs = float(autogptq(code).splitlines()[-1])
    made = {"gptq_model-4bit-128g.safetensors", "quantize_config.json", "quantization.json", "tokenizer.json"}
    assert made < set(os.listdir(old)) and "older" not in os.listdir(old)
    receipt = read_json(old / "quantization.json")
    assert receipt["method"] == "autogptq" and receipt["versions"]["auto-gptq"] == "0.7.1"
    assert read_json(old / "quantize_config.json")["model_name_or_path"] == "internlm2-7b"
    texts = [poem.text for poem in poems("held_out")[:20]]
    model, tokenizer = load("internlm2-7b", upgrade(old), "auto", "cpu")
    assert perplexity(model, tokenizer, texts) == pytest.approx(theirs, rel=1e-3)
    plain, _ = load("internlm2-7b", "tiny", "fp32", "cpu")
    assert 1 < theirs / perplexity(plain, tokenizer, texts) < 1.15
