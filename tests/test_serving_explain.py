"""What vLLM says when it cannot start, told in one line; the messages are compared with the installed source."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

from helpers.checkpoints.load import tiny_folder
from helpers.errors import HelpersError
from helpers.memory.parts import UTILISATION
from helpers.serving.command import Job
from helpers.serving.explain import CAUSES, explain, is_known, last_words, sizes

CPU = Job("qwen-7b", "hub", "fp32", "cpu", Path("native/qwen-7b"), {"dtype": "float32"})
GPU = Job("qwen-7b", "hub", "bf16", "cuda:0", Path("native/qwen-7b"), {"dtype": "bfloat16"})

BEFORE = "(EngineCore pid=12) ERROR 11-26 09:20:11 [core.py:345] "
ECHO = "Engine core initialization failed. See root cause above. Failed core proc(s): {}"
SAID = [
    (
        GPU,
        "To serve at least one request with the model's max seq len (8192), (4.0 GiB KV cache is needed, which "
        "is larger than the available KV cache memory (1.5 GiB). Based on the available memory, the estimated maximum "
        "model length is 3072. Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU "
        "backend) or decreasing `max_model_len` when initializing the engine. See "
        "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details.",
        "one sequence of 8,192 tokens needs 4.0 GiB of KV cache, and there are 1.5. Pass max_model_len=3072, the most "
        "that fits, or gpu_memory_utilization= more",
    ),
    (
        CPU,
        "To serve at least one request with the model's max seq len (8192), (8.0 GiB KV cache is needed, which "
        "is larger than the available KV cache memory (0.0 GiB). Try increasing",
        "Pass a smaller max_model_len, or kv_cache_memory_bytes= more (or VLLM_CPU_KVCACHE_SPACE in GiB)",
    ),
    (
        GPU,
        "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
        "the weights take 14.38 GiB and every token 512 KiB of KV cache, which leaves no room for a cache. "
        f"Pass gpu_memory_utilization= more ({UTILISATION} if left out), or take precision nf4",
    ),
    (
        GPU,
        "Free memory on device cuda:0 (60.0/80.0 GiB) on startup is less than desired GPU memory utilization "
        "(0.9, 72.0 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        "60.0 of 80.0 GiB are free and vLLM takes 90% of the whole",
    ),
    (GPU, "Free memory on device cuda:0 (60.0/80.0 GiB) on startup is less than desired GPU memory utilization (0.9, 7",
     "or pass gpu_memory_utilization=0.71"),
    (
        CPU,
        "Available memory on node 0 (3.5/12.6 GiB) on kv cache allocation is less than requested memory for kv "
        "(40.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE,",
        "its KV cache was to take 40.0 GiB of RAM, and 3.5 are free",
    ),
    (GPU, "torch.OutOfMemoryError: CUDA out of memory. Tried to", "memory ran out; the weights take"),
    (
        CPU,
        "User-specified max_model_len (9000) is greater than the derived max_model_len "
        "(max_position_embeddings=8192 or model_max_length=None in model's config.json).",
        "max_model_len=9000 is longer than the 8,192 tokens it was made for",
    ),
    (
        GPU,
        "The quantization method fp8 is not supported for the current GPU. Minimum capability: 89. Current "
        "capability: 75.",
        "fp8 kernels need compute capability 8.9 and the card has 7.5",
    ),
    (
        GPU,
        "torch.bfloat16 is not supported for quantization method awq. Supported dtypes: [torch.float16]",
        "awq computes in [torch.float16] only, not in torch.bfloat16",
    ),
    (CPU, "fp8 quantization is currently not supported in cpu.", "vLLM has no fp8 for cpu"),
    (CPU, "AttributeError: '_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'",
     "vLLM has no kernel cpu_gemm_wna16 for this CPU (GPTQ, AWQ and an FP8 KV cache need AVX-512 there)"),
    (CPU, "FP8 KV cache on CPU requires x86 with AVX-512 or AMX.", "vLLM has no kernel FP8 KV cache"),
    (
        GPU,
        "Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your Tesla T4 GPU has "
        "compute capability 7.5. You can use float16 instead by explicitly setting the `dtype` flag in CLI, for "
        "example: --dtype=half.",
        "Tesla T4 is older than Ampere and has no bf16. Take precision fp16 or auto",
    ),
    (
        GPU,
        "Model architecture QWenLMHeadModel was supported in vLLM until v0.23.0, and is not supported "
        "anymore. Please use an older version of vLLM if you want to use this model architecture.",
        "vLLM dropped QWenLMHeadModel after v0.23.0. Serve the converted folder",
    ),
    (
        GPU,
        "Model architectures ['RwkvWorldForCausalLM'] are not supported for now. Supported architectures: x",
        "vLLM has no model class ['RwkvWorldForCausalLM']",
    ),
    (GPU, "Model architectures ['AlibiLlamaForCausalLM'] are not supported for now. ", "pip install --no-deps -e ."),
    (GPU, "OSError: [Errno 98] Address already in use", "the port is taken. Leave port out"),
    (GPU, "Cannot find any model weights with `native/qwen-7b`", "qwen-7b holds no weights"),
    (GPU, "RuntimeError: No model weights found in: `native/qwen-7b`", "qwen-7b holds no weights"),
    (GPU, "Invalid repository ID or local directory specified: 'native/qwen-7b'.", "is no checkpoint"),
    (GPU, "or use the `--trust-remote-code` flag in the CLI.", "asks to run code that came with it"),
    (GPU, "vLLM only supports modules_to_save being None.", "Merge it first"),
    (GPU, "vllm serve: error: unrecognized arguments: --len 4", "vllm serve says: unrecognized arguments: --len 4"),
]  # fmt: skip


@pytest.mark.parametrize(("job", "said", "told"), SAID)
def test_each_message_is_told_in_one_line(job, said, told):
    log = "\n".join(BEFORE + line for line in ["starting", "Traceback", said, "RuntimeError: " + ECHO])
    error = explain(log, job, "it ended with exit status 1")
    assert isinstance(error, HelpersError) and "\n" not in str(error)
    assert told.lower() in str(error).lower()
    assert "Engine core initialization failed" in error.__notes__[0]


def test_every_cause_has_an_example():
    for cause in CAUSES:
        assert any(re.search(cause.pattern, said) for _, said, _ in SAID), cause.pattern


def test_a_message_over_two_lines_is_found():
    log = f"{BEFORE}ValueError: No available memory\n{BEFORE}for the cache blocks. Try"
    assert is_known(log) and "leaves no room" in str(explain(log, GPU, "it ended"))


def test_an_unknown_end_quotes_the_error_that_came_first():
    log = f"{BEFORE}KeyError: 'rope'\n{BEFORE}RuntimeError: Engine core initialization failed. See root cause above."
    assert last_words(log) == "KeyError: 'rope'"
    assert "it ended with exit status 1; KeyError: 'rope'" in str(explain(log, GPU, "it ended with exit status 1"))
    assert not is_known("INFO 11-26 09:20:11 [core.py:1] Starting to load model\nLoading weights")
    killed = str(explain("loading", GPU, "it was killed by signal 9"))
    assert "when RAM runs out; the weights take 14.38 GiB" in killed


def test_sizes_are_of_what_is_served(tmp_path):
    assert sizes(GPU) == (pytest.approx(14.38, abs=0.01), 512)
    assert sizes(CPU) == (pytest.approx(28.76, abs=0.01), 1024)
    halved = Job("qwen-7b", "hub", "bf16", "cuda:0", Path("x"), {"dtype": "bfloat16", "kv_cache_dtype": "fp8_e4m3"})
    assert sizes(halved)[1] == 256
    tiny = Job("qwen-7b", "tiny", "fp32", "cpu", Path("x"), {"dtype": "float32"})
    assert sizes(tiny)[1] < 4
    (tmp_path / "config.json").write_text((tiny_folder("qwen-7b") / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(bytes(2**20))
    assert sizes(Job("qwen-7b", str(tmp_path), "as saved", "cpu", tmp_path, {}))[0] == 1 / 1024


@cache
def messages(file):
    """Return the texts in a file of vLLM, what is filled in at run time as a NUL."""
    package = importlib.util.find_spec("vllm")
    if package is None:
        pytest.skip("vLLM is not installed")
    found = []
    for node in ast.walk(ast.parse((Path(package.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [each.value if isinstance(each, ast.Constant) else "\0" for each in node.values]
            found.append("".join(str(part) for part in parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


@pytest.mark.parametrize("cause", [cause for cause in CAUSES if cause.file], ids=lambda cause: cause.pattern[:40])
def test_the_installed_vllm_says_what_is_looked_for(cause):
    filled = [re.sub(r"\s+", " ", text.replace("\0", word)) for text in messages(cause.file) for word in ("1", "[1]")]
    assert any(re.search(cause.pattern, text) for text in filled), f"{cause.file} does not say it (any more)"


def test_errors_that_warnings_quote_are_not_the_last_words():
    log = (
        "AssertionError: param_data.shape == loaded_weight.shape\n"
        'WARNING 11-26 [system_utils.py:1] the limit may cause "OSError: [Errno 24] Too many open files": raise it\n'
    )
    assert last_words(log) == "AssertionError: param_data.shape == loaded_weight.shape"


def test_the_share_it_names_is_the_one_vllm_takes():
    package = importlib.util.find_spec("vllm")
    if package is None:
        pytest.skip("vLLM is not installed")
    source = Path(package.submodule_search_locations[0], "config", "cache.py").read_text(encoding="utf-8")
    assert float(re.search(r"gpu_memory_utilization: float = Field\(default=([\d.]+)", source)[1]) == UTILISATION
