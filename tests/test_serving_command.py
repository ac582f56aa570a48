"""What vLLM is asked for, and what is refused before it is started."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from helpers import catalog, engine_device, quantization
from helpers.errors import HelpersError
from helpers.serving import command
from helpers.serving.command import Job, adapters, flags, in_bitsandbytes, parallel, prepare

pytest.importorskip("vllm")

ROOT = Path(__file__).parent.parent


def test_options_become_flags():
    options = {"max_model_len": 512, "enforce_eager": True, "enable_prefix_caching": False, "chat_template": None}
    options |= {"lora_modules": ["a=x", "b=y"], "hf_overrides": {"num_hidden_layers": 1}}
    words = ["--max-model-len", "512", "--enforce-eager", "--no-enable-prefix-caching", "--lora-modules", "a=x", "b=y"]
    assert flags(options) == [*words, "--hf-overrides", '{"num_hidden_layers": 1}']


@pytest.mark.parametrize(
    ("precision", "dtype", "word"),
    [("auto", "float32", "fp32"), ("bf16", "bfloat16", "bf16"), ("fp16", "float16", "fp16")],
)
def test_precisions(precision, dtype, word, monkeypatch):
    monkeypatch.setattr(command, "is_cpu_build", lambda: True)
    job = prepare("qwen-7b", "tiny", precision, "auto", {})
    assert (job.options["dtype"], job.precision, job.device) == (dtype, word, "cpu")
    assert "quantization" not in job.options and job.options["enforce_eager"] is True


def test_bitsandbytes(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "is_cpu_build", lambda: True)
    nf4 = prepare("qwen-7b", "tiny", "nf4", "cpu", {})
    assert (nf4.options["quantization"], nf4.options["dtype"]) == ("bitsandbytes", "bfloat16")
    int8 = prepare("qwen-7b", "tiny", "int8", "cpu", {})
    saved = json.loads((int8.folder / "config.json").read_text())["quantization_config"]
    assert saved["load_in_8bit"] and int8.options["dtype"] == "float32"
    assert (int8.folder / "chat_template.jinja").exists() and (int8.folder / "generation_config.json").exists()
    again = prepare("qwen-7b", str(int8.folder), "auto", "cpu", {})
    assert (again.folder, again.precision) == (int8.folder, "as saved") and "dtype" not in again.options
    with pytest.raises(HelpersError, match="quantised already"):
        prepare("qwen-7b", int8.folder, "bf16", "cpu", {})
    with pytest.raises(HelpersError, match="random weights in nf4"):
        prepare("qwen-7b", "random", "nf4", "cpu", {})


def test_int8_of_other_weights_and_of_changed_ones_is_made_anew(monkeypatch, tmp_path):
    made = []

    def quantised(model, target, *, weights, **_):
        made.append((weights.parent.name, (weights / "model.safetensors").read_text()))
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text("{}")

    freed = []
    monkeypatch.setattr(quantization, "bitsandbytes", quantised)
    measure = sys.modules["helpers.memory.measure"]  # the package has a function of that name
    monkeypatch.setattr(measure, "free", lambda: freed.append(len(made)))  # the card is vLLM's then
    monkeypatch.setenv("LLM_DEPLOY_CACHE", str(tmp_path / "cache"))
    sources = {"tiny": tmp_path / "tiny" / "qwen-7b", "hub": tmp_path / "hub" / "qwen-7b"}
    sources |= {str(tmp_path / name / "mine"): tmp_path / name / "mine" for name in ("one", "two")}
    for folder in sources.values():
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("first")

    def served(weights):
        return in_bitsandbytes(catalog.model("qwen-7b"), weights, "int8", sources[weights], "cpu")[0]

    targets = [served(weights) for weights in sources for _ in range(2)]
    assert len(set(targets)) == len(sources)
    assert made == [(name, "first") for name in ("tiny", "hub", "one", "two")], "once for each source"
    assert freed == [1, 2, 3, 4]

    (sources["tiny"] / "model.safetensors").write_text("trained anew")
    assert served("tiny") == served("tiny") == targets[0] and served("hub") == targets[2]
    assert made[4:] == [("tiny", "trained anew")]


def test_random_weights_are_the_full_config_without_a_weight(monkeypatch):
    monkeypatch.setattr(command, "is_cpu_build", lambda: True)
    job = prepare("baichuan2-13b", "random", "auto", "auto", {"max_model_len": 64})
    config = json.loads((job.folder / "config.json").read_text())
    assert (config["hidden_size"], config["architectures"]) == (5120, ["AlibiLlamaForCausalLM"])
    assert job.options["load_format"] == "dummy" and job.options["max_model_len"] == 64
    assert not list(job.folder.glob("*.safetensors"))
    assert {"tokenizer.json", "generation_config.json"} <= {file.name for file in job.folder.iterdir()}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"model": "rwkv-6-7b"}, "vLLM has no model class for RWKV"),
        ({"model": "chatglm-6b"}, "vLLM has no model class for ChatGLM-6B"),
        ({"model": "qwen-7"}, "Did you mean qwen-7b"),
        ({"weights": "tin"}, "unknown weights 'tin'"),
        ({"precision": "int4"}, "unknown precision 'int4'"),
        ({"device": "cuda"}, "build for CPUs"),
        ({"options": {"trust_remote_code": "yes"}}, "cannot pass trust_remote_code"),
        ({"options": {"api_key": "x"}}, "cannot pass api_key"),
    ],
)
def test_refused_before_anything_starts(asked, message, monkeypatch):
    monkeypatch.setattr(command, "is_cpu_build", lambda: True)
    given = {"model": "qwen-7b", "weights": "tiny", "precision": "auto", "device": "auto", "options": {}} | asked
    with pytest.raises(HelpersError, match=message):
        prepare(**given)


@pytest.mark.parametrize(
    ("system", "in_colab", "message"),
    [
        ("Linux", False, "not installed in this Python.*make setup"),
        ("Linux", True, "conflicts with what Colab ships.*three commands under Google Colab in env/README.md"),
        ("Darwin", False, "no vLLM for Darwin.*load and chat"),
    ],
)
def test_without_vllm_the_reader_is_told_at_once(system, in_colab, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("platform.system", lambda: system)
    if in_colab:
        monkeypatch.setitem(sys.modules, "google.colab", object())
    for call in (engine_device, lambda: prepare("qwen-7b", "random", "auto", "auto", {})):
        with pytest.raises(HelpersError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_the_commands_for_colab_are_where_the_error_says():
    section = (ROOT / "env" / "README.md").read_text(encoding="utf-8").partition("## Google Colab")[2]
    commands = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("!")]
    assert len(commands) == 3 and commands[-1].endswith("-m helpers run 21")
    files = [word for line in commands for word in line.split() if word.startswith("env/")]
    assert files and all((ROOT / file).is_file() for file in files)


def test_adapters(tmp_path):
    for name, rank in (("a", 4), ("b", 17)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": rank}))
    options = adapters({"a": tmp_path / "a", "b": tmp_path / "b"})
    assert (options["max_lora_rank"], options["max_loras"]) == (32, 2)
    assert options["lora_modules"] == [f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}"]
    assert adapters({}) == {}
    with pytest.raises(HelpersError, match=r"no adapter_config\.json"):
        adapters({"c": tmp_path / "c"})


def test_the_environment_of_the_reader_goes_first(monkeypatch):
    monkeypatch.setattr(command, "is_cpu_build", lambda: True)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    job = prepare("qwen-7b", "tiny", "auto", "auto", {})
    assert job.environment()["VLLM_CPU_KVCACHE_SPACE"] == "1"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert job.environment()["VLLM_CPU_KVCACHE_SPACE"] == "4"
    job = prepare("qwen-7b", "tiny", "auto", "auto", {"kv_cache_memory_bytes": 2**28})
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    assert "VLLM_CPU_KVCACHE_SPACE" not in job.environment()


def test_a_second_card_is_counted_among_the_visible_ones(monkeypatch):
    job = Job("qwen-7b", "hub", "bf16", "cuda:1", Path("native/qwen-7b"), {})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert job.environment()["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert job.environment()["CUDA_VISIBLE_DEVICES"] == "6"
    assert "VLLM_CPU_KVCACHE_SPACE" not in job.environment()


def test_a_model_is_spread_in_one_way_and_the_row_says_which():
    assert parallel({"tensor_parallel_size": 2}) == "tp2" and parallel({"data_parallel_size": 3}) == "dp3"
    assert parallel({}) is None and parallel({"pipeline_parallel_size": 1}) is None
    with pytest.raises(HelpersError, match="cannot measure tp2 and pp2"):
        parallel({"tensor_parallel_size": 2, "pipeline_parallel_size": 2})
