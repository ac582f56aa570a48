"""GGUF files of the stand-ins answer as transformers does, in llama.cpp's own library and server.

Largest differences of logits seen on 2026-11-26, of logits up to 24: 6e-5 (transformers in fp32 against a file in f32).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import HelpersError, catalog
from helpers.frameworks import libllama
from helpers.frameworks.to_gguf import as_the_converter_reads

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-frameworks" / "bin" / "python"
MODELS = ["qwen-7b", "chatglm3-6b", "baichuan2-7b", "internlm2-7b", "llama2-chinese-7b", "qwen3-8b", "rwkv-6-7b"]
KINDS = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]
QUIET = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def start(code: str, **pipes) -> subprocess.Popen:
    """Start Python code in the frameworks' environment."""
    if not PYTHON.exists():
        pytest.skip("there is no .venv-frameworks (make frameworks; Linux x86-64)")
    return subprocess.Popen([PYTHON, "-c", code], text=True, stdout=subprocess.PIPE, cwd=ROOT, env=QUIET, **pipes)


def there(code: str):
    """Run code there and return the JSON of its last line."""
    process = start(code, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Convert every model, and quantise two of them; one process, as importing takes longest."""
    return there(f"""
import json, torch
from pathlib import Path
from helpers import load
from helpers.checkpoints.load import native_folder
from helpers.checkpoints.make.poems import read
from helpers.frameworks import llama_cpp as llama, perplexity_of
from helpers.quantization.quality import perplexity

work = Path({str(tmp_path_factory.mktemp("gguf"))!r})
texts = [poem.text for poem in read("held_out")[:40]]
found = {{}}
for model in {MODELS}:
    lm, tokenizer = load(model, device="cpu")
    folder = native_folder(model)
    file = llama.to_gguf(folder, work / f"{{model}}.gguf", "f32")
    asked = tokenizer.apply_chat_template([{{"role": "user", "content": "背诵《静夜思》"}}], add_generation_prompt=True)
    asked = asked["input_ids"]
    with torch.inference_mode():
        logits = lm(torch.tensor([asked])).logits[0]
        said = lm.generate(torch.tensor([asked]), attention_mask=torch.ones(1, len(asked)), max_new_tokens=40)
    opening = tokenizer("").input_ids
    one = found[model] = {{"said": said[0, len(asked):].tolist(), "asked": asked, "opening": opening}}
    samples = [*texts[:10], "a b  c\\n12 3.5 ok?", " 床", "中文 and 😀 mixed", ""]
    one["cut"] = [tokenizer(text).input_ids[len(opening):] for text in samples]
    one["fp32"] = perplexity(lm, tokenizer, texts)
    with llama.Gguf(file) as gguf:
        one["adds"] = gguf.tokenize("")
        one["cut_there"] = [gguf.tokenize(text)[len(one["adds"]):] for text in samples]
        one["difference"] = float((torch.from_numpy(gguf.logits(asked)) - logits).abs().max())
        one["said_there"] = gguf.greedy(asked, 40)
        one["f32"] = perplexity_of(gguf.logits, tokenizer, texts)
    kinds = {KINDS} if model in ("qwen-7b", "chatglm3-6b") else ["Q8_0"]
    if len(kinds) > 1:
        file = llama.to_gguf(llama.widen(folder, work / f"wide-{{model}}"), work / f"wide-{{model}}.gguf", "f32")
        with llama.Gguf(file) as gguf:
            one["difference_widened"] = float((torch.from_numpy(gguf.logits(asked)) - logits).abs().max())
    for kind in kinds:
        small = llama.quantize(file, work / f"{{kind}}-{{model}}.gguf", kind)
        with llama.Gguf(small) as gguf:
            one[kind] = perplexity_of(gguf.logits, tokenizer, texts)
        one[kind + " types"] = sorted({{tensor.type for tensor in llama.tensors(small)}})
        one[kind + " bits"] = llama.bits_per_weight(small)
print(json.dumps(found))
""")


@pytest.mark.parametrize("model", MODELS)
def test_a_file_cuts_texts_as_the_tokenizer_does(seen, model):
    assert seen[model]["cut_there"] == seen[model]["cut"]
    # llama.cpp has room for one token before every text; ChatGLM3 has two, which its chat template writes
    expected = [] if len(seen[model]["opening"]) > 1 else seen[model]["opening"]
    assert seen[model]["adds"] == expected


@pytest.mark.parametrize("model", MODELS)
def test_a_file_in_f32_gives_the_logits_and_the_answer_of_transformers(seen, model):
    one = seen[model]
    assert one["difference"] < 1e-3
    assert one["said_there"] == one["said"] and len(one["said"]) > 15
    assert one["f32"] == pytest.approx(one["fp32"], rel=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_q8_0_keeps_the_perplexity_to_half_a_percent(seen, model):
    assert seen[model]["Q8_0"] == pytest.approx(seen[model]["fp32"], rel=0.005)


@pytest.mark.parametrize("model", ["qwen-7b", "chatglm3-6b"])
def test_fewer_bits_cost_perplexity(seen, model):
    one = seen[model]
    assert one["difference_widened"] < 1e-3
    assert [one[f"{kind} bits"] for kind in KINDS] == sorted((one[f"{kind} bits"] for kind in KINDS), reverse=True)
    # neighbours of many bits may change places by chance; from 4 bits down every step is felt
    assert one["fp32"] < 1.005 * one["Q8_0"] < 1.01 * one["Q6_K"] < 1.02 * one["Q5_K_M"]
    assert one["Q5_K_M"] < one["Q4_K_M"] < one["Q3_K_M"] < one["Q2_K"]
    assert one["Q2_K types"] == ["Q2_K", "Q3_K", "Q6_K"]  # the K types themselves, without falling back


def test_rows_that_256_does_not_divide_fall_back(tmp_path):
    types = there(f"""
import json
from helpers.checkpoints.load import native_folder
from helpers.frameworks import llama_cpp as llama
file = llama.to_gguf(native_folder("qwen-7b"), {str(tmp_path / "f16.gguf")!r})
small = llama.quantize(file, {str(tmp_path / "q2.gguf")!r}, "Q2_K")
print(json.dumps([[one.name, one.type, one.shape] for one in llama.tensors(small)]))
""")
    assert {"Q4_0", "Q8_0"} == {kind for _, kind, _ in types}
    assert ["blk.0.ffn_down.weight", "Q4_0", [128, 384]] in types
    assert sorted(file.name for file in tmp_path.iterdir()) == ["f16.gguf", "q2.gguf"]


def test_rwkv_7_with_random_weights(tmp_path):
    """There is no stand-in of version 7; its tensors have other names and ranks than those of version 6."""
    difference, size = there(f"""
import json, shutil, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
from helpers.checkpoints.load import native_folder
from helpers.frameworks import llama_cpp as llama
from helpers.native import register

register()
source, folder = native_folder("rwkv-6-7b"), Path({str(tmp_path / "rwkv-7")!r})
folder.mkdir()
for file in source.iterdir():
    if file.suffix != ".safetensors":
        shutil.copy(file, folder)
config = json.loads((source / "config.json").read_text()) | {{"version": 7, "num_hidden_layers": 3, "dtype": "float32"}}
(folder / "config.json").write_text(json.dumps(config))
lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
draw = torch.Generator().manual_seed(1)
with torch.no_grad():
    for name, tensor in lm.named_parameters():
        drawn = torch.randn(tensor.shape, generator=draw)
        if name.endswith(".w0"):
            tensor.copy_(-3 + drawn)  # decays
        elif ".x_" in name:
            tensor.copy_(drawn.sigmoid())  # blends
        elif "ln" in name and name.endswith("weight"):
            tensor.copy_(1 + 0.3 * drawn)
        else:
            tensor.copy_(drawn * (0.3 if tensor.shape[0] == 1 or tensor.dim() == 1 else tensor.shape[-1] ** -0.5))
lm.save_pretrained(folder)
ids = [5, 100, 234, 300, 401, 44, 77, 900, 1500]
for _ in range(2):  # the converter's class gathers tensors, and must not keep those of another file
    file = llama.to_gguf(folder, Path({str(tmp_path)!r}) / "rwkv-7.gguf", "f32")
with torch.inference_mode(), llama.Gguf(file) as gguf:
    logits = lm(torch.tensor([ids])).logits[0]
    print(json.dumps([float((torch.from_numpy(gguf.logits(ids)) - logits).abs().max()), float(logits.abs().max())]))
""")
    assert difference < 1e-4 and size > 1


@pytest.fixture(scope="module")
def sizes():
    return there("""
import json
from helpers.frameworks import llama_cpp as llama
found = {kind: {name: llama.full_size(name, kind) for name in ("qwen-7b", "chatglm3-6b", "internlm2-7b")}
         for kind in ("Q8_0", "Q6_K", "Q4_0", "Q4_K_M")}
llama.full_size("chatglm3-6b", "Q4_K_M")
print(json.dumps([found, [line for line in llama.said if "fallback" in line]]))
""")


@pytest.mark.parametrize("model", ["qwen-7b", "chatglm3-6b", "internlm2-7b"])
def test_full_sizes_are_bits_times_weights(sizes, model):
    found, weights = sizes[0], catalog.model(model).parameters
    assert found["Q8_0"][model] == pytest.approx(weights * 34 / 32, rel=0.002)  # norms and biases stay in fp32
    if model == "chatglm3-6b":  # its rows of 13,696 cannot be Q6_K
        return
    assert found["Q6_K"][model] == pytest.approx(weights * 210 / 256, rel=0.002)
    assert 4.5 < 8 * found["Q4_0"][model] / weights < 4.7  # 18 bytes for 32, and the head in Q6_K
    assert 4.8 < 8 * found["Q4_K_M"][model] / weights < 5.0


def test_chatglms_rows_fall_back_at_full_size(sizes):
    found, words = sizes
    assert re.search(r"28 of 227 tensor\(s\) required fallback", words[0])
    weights = catalog.model("chatglm3-6b").parameters
    assert 8 * found["Q6_K"]["chatglm3-6b"] / weights > 7


# --- the server

SERVED = """
import json, sys
from helpers.checkpoints.load import native_folder
from helpers.frameworks import llama_cpp as llama
file = llama.to_gguf(native_folder("{model}"), "{folder}/{model}.gguf", "f32")
"""


@pytest.mark.parametrize("model", ["internlm2-7b", "chatglm3-6b"])
def test_server_streams_asks_for_its_key_and_ends(tmp_path, model):
    got = there(
        SERVED.format(model=model, folder=tmp_path)
        + """
import httpx, os
from transformers import AutoTokenizer
question = [{"role": "user", "content": "背诵《静夜思》"}]
tokenizer = AutoTokenizer.from_pretrained(native_folder(file.stem))
asked = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
with llama.Gguf(file) as gguf:
    expected = tokenizer.decode(gguf.greedy(asked, 40), skip_special_tokens=True)
with llama.served(file) as server:
    pieces = server.client().chat.completions.create(
        model="any", messages=question, max_tokens=40, temperature=0, stream=True,
        stream_options={"include_usage": True})
    pieces = list(pieces)
    refused = {}
    for path in ("/v1/models", "/v1/chat/completions", "/completion", "/props", "/metrics", "/slots", "/tokenize"):
        for key in ("", "Bearer wrong"):
            refused[path + key] = httpx.post(server.url + path, json={}, headers={"Authorization": key}).status_code
    command = open(f"/proc/{server.pid}/cmdline").read()
answer = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
print(json.dumps({"answer": answer, "expected": expected, "refused": refused, "read": pieces[-1].usage.prompt_tokens,
    "asked": len(asked), "url": server.url, "alive": os.path.exists(f"/proc/{server.pid}"),
    "told": server.key in command}))
"""
    )
    assert "".join(got["answer"]).strip() == got["expected"].strip() != ""
    assert len(got["answer"]) > 10
    assert got["read"] == got["asked"]  # no second <s> before the one of the template
    assert set(got["refused"].values()) == {401}
    assert got["url"].startswith("http://127.0.0.1:")
    assert not got["alive"] and not got["told"]


def test_server_ends_with_a_killed_parent(tmp_path):
    code = SERVED.format(model="qwen-7b", folder=tmp_path)
    code += "with llama.served(file) as server:\n    print(server.pid, flush=True)\n    sys.stdin.read()\n"
    parent = start(code, stdin=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    parent.kill()
    parent.wait()
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(") ")[2].startswith("Z"):
            break
        time.sleep(0.1)
    else:
        os.kill(pid, 9)
        pytest.fail("the server outlived its parent")
    parent.stdin.close()
    parent.stdout.close()


# --- refusals


def test_refusals_are_one_line_and_leave_nothing(tmp_path):
    (tmp_path / "half.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    lines = there(f"""
import json
from pathlib import Path
from helpers import HelpersError
from helpers.checkpoints.load import native_folder, tiny_folder
from helpers.frameworks import llama_cpp as llama
work = Path({str(tmp_path)!r})
f16 = llama.to_gguf(native_folder("qwen-7b"), work / "f16.gguf")
q8 = llama.quantize(f16, work / "q8.gguf", "Q8_0")
said = []
for attempt in (
    lambda: llama.Gguf(work / "half.gguf"),
    lambda: llama.Gguf(work / "none.gguf"),
    lambda: llama.quantize(work / "half.gguf", work / "never", "Q8_0"),
    lambda: llama.quantize(q8, work / "never", "Q4_K_M"),
    lambda: llama.quantize(f16, work / "never", "Q4"),
    lambda: llama.served(work / "half.gguf").__enter__(),
    lambda: llama.to_gguf(native_folder("baichuan-13b"), work / "never"),
    lambda: llama.to_gguf(tiny_folder("qwen-7b"), work / "never"),
    lambda: llama.to_gguf(native_folder("qwen-7b"), work / "never", "q8_0"),
    lambda: llama.widen(native_folder("rwkv-6-7b"), work / "never"),
    lambda: llama.full_size("baichuan-13b", "Q8_0"),
    lambda: llama.Gguf(f16, context=16).logits(range(20)),
):
    try:
        attempt()
        said.append("nothing")
    except HelpersError as error:
        said.append(str(error))
print(json.dumps([said, sorted(file.name for file in work.iterdir())]))
""")
    said, files = lines
    for line, words in zip(said, [
        "invalid magic characters", "failed to open", "invalid magic characters", "requantizing from type q8_0",
        "Q4_K_M", "invalid magic characters", "does not know AlibiLlamaForCausalLM", "names code of its own",
        "valid: f32", "cannot widen rwkv-6-7b", "AlibiLlamaForCausalLM", "its context is 1 to 16",
    ], strict=True):  # fmt: skip
        assert words.lower() in line.lower() and "\n" not in line, line
    assert files == ["f16.gguf", "half.gguf", "q8.gguf"]


def test_a_context_without_room_is_one_line(tmp_path):
    said = there(f"""
import json, re, resource
from pathlib import Path
from helpers import HelpersError
from helpers.checkpoints.load import native_folder
from helpers.frameworks import llama_cpp as llama
file = llama.to_gguf(native_folder("qwen-7b"), Path({str(tmp_path)!r}) / "f16.gguf")
llama.Gguf(file).close()
taken = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**29, resource.RLIM_INFINITY))
try:
    llama.Gguf(file, context=10**6)  # a KV cache of 2 GB
except HelpersError as error:
    print(json.dumps(str(error)))
""")
    assert re.fullmatch(
        r"no room for a context of 1,000,000 tokens: .*(allocate|bad_alloc).* Take a smaller one\.", said
    )


def test_glm_is_given_what_the_converter_would_guess():
    config = {"architectures": ["GlmForCausalLM"], "max_position_embeddings": 8192, "rms_norm_eps": 2e-5}
    read = as_the_converter_reads(config | {"rope_parameters": {"rope_theta": 500_000.0}})
    assert (read["seq_length"], read["layernorm_epsilon"], read["rope_ratio"]) == (8192, 2e-5, 50)
    assert as_the_converter_reads({"architectures": ["LlamaForCausalLM"]}) == {"architectures": ["LlamaForCausalLM"]}


@pytest.mark.skipif(Path(sys.prefix).name == ".venv-frameworks", reason="is about the other environments")
def test_other_environments_are_told_what_to_run(tmp_path, monkeypatch):
    assert libllama.version() == "not installed"
    with pytest.raises(HelpersError, match="Run make frameworks"):
        libllama.library()
    monkeypatch.setattr(libllama, "FOLDER", tmp_path)
    for name in ("libggml.so", "libllama.v9.so"):
        (tmp_path / name).write_bytes(b"no library")
    libllama.library.cache_clear()
    with pytest.raises(HelpersError, match=r"cannot load llama\.cpp"):
        libllama.library()
    assert libllama.version() == "v9"


def test_environment_is_the_locked_one():
    lock = re.findall(r"^([\w.-]+)==([\w.+]+)", (ROOT / "env/frameworks/lock.txt").read_text(), flags=re.M)
    code = f"""
import json
from importlib.metadata import version
print(json.dumps([name for name, locked in {lock} if version(name) != locked]))
"""
    assert len(lock) > 100 and there(code) == []


def test_kernel_is_that_environment():
    from jupyter_client.kernelspec import KernelSpecManager

    if not PYTHON.exists():
        pytest.skip("there is no .venv-frameworks (make frameworks; Linux x86-64)")
    assert Path(KernelSpecManager().get_kernel_spec("frameworks").argv[0]) == PYTHON


@pytest.mark.parametrize(("cores", "size", "expected"), [("3", 10, 3), ("", 10, 1), ("", 2 * 10**8, os.cpu_count())])
def test_a_small_file_gets_one_thread(tmp_path, monkeypatch, cores, size, expected):
    file = tmp_path / "file"
    file.touch()
    os.truncate(file, size)
    monkeypatch.setenv("OMP_NUM_THREADS", cores)
    assert libllama.threads(file) == expected
