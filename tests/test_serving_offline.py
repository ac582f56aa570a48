"""vLLM's engine in a process of its own choosing: the same tokens as transformers, and nothing left when it is freed.

The slow one: vLLM's import takes half a minute, each engine some seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import catalog, load
from helpers.errors import HelpersError
from helpers.serving import offline
from helpers.serving.command import NOT_IN_VLLM, Job
from helpers.serving.launch import is_cpu_build

pytest.importorskip("vllm")

ROOT = Path(__file__).parent.parent
SERVED = {id: row for id, row in catalog.models().items() if row.native_class and row.native_class not in NOT_IN_VLLM}
MODELS = [id for id, row in SERVED.items() if row.stand_in == id]
"""Every family: each model that vLLM has a class for and that has a stand-in of its own."""
PROMPTS = ["背诵《静夜思》", "《春晓》的作者是谁", "下一句：白日依山尽，"]
TOKENS = 40

PROGRAM = """
import json, os, sys
import psutil, torch
from helpers import catalog, offline_engine

prompts, tokens = json.loads(sys.argv[1]), int(sys.argv[2])
before, said, memory, set_threads = dict(os.environ), {}, [], torch.set_num_threads
for model in sys.argv[3:]:
    with offline_engine(model) as engine:
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=tokens)
        if catalog.model(model).chat_format == "none":
            answers = engine.generate(prompts, greedy, use_tqdm=False)
        else:
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            answers = engine.chat(chats, greedy, use_tqdm=False)
        said[model] = [list(answer.outputs[0].token_ids) for answer in answers]
        during = psutil.Process().memory_info().rss
    memory.append([during, psutil.Process().memory_info().rss])
clean = dict(os.environ) == before and torch.set_num_threads is set_threads
print("RESULT", json.dumps({"said": said, "memory": memory, "clean": clean}))
"""


@pytest.fixture(scope="module")
def result():
    if not is_cpu_build():
        pytest.skip("compares with fp32 on a CPU")
    command = [sys.executable, "-c", PROGRAM, json.dumps(PROMPTS), str(TOKENS), *MODELS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, (done.stdout + done.stderr)[-3000:]
    return json.loads(lines[0].removeprefix("RESULT"))


def test_every_class_that_vllm_is_given_is_compared():
    assert {SERVED[model].native_class for model in MODELS} == {row.native_class for row in SERVED.values()}


@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_are_those_of_transformers(result, model):
    lm, tokenizer = load(model)
    for prompt, said in zip(PROMPTS, result["said"][model], strict=True):
        if catalog.model(model).chat_format == "none":
            ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        else:
            turns, how = [{"role": "user", "content": prompt}], {"return_tensors": "pt", "return_dict": True}
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **how)
        with torch.inference_mode():
            wanted = lm.generate(**ids, max_new_tokens=TOKENS)[0, ids["input_ids"].shape[1] :].tolist()
        assert said == wanted and len(said) > 1


def test_engines_in_one_process_are_freed_one_after_the_other(result):
    """Each holds a KV cache of 1 GiB; the process is left as it was."""
    for during, after in result["memory"]:
        assert during - after > 0.7 * 2**30
    assert result["clean"]


def test_another_card_is_refused_in_a_process_that_has_counted_the_cards(monkeypatch):
    job = Job("qwen-7b", "tiny", "bf16", "cuda:1", Path("native/qwen-7b"), {})
    monkeypatch.setattr(offline, "prepare", lambda *_: job)
    monkeypatch.setattr(offline, "pass_for_vllm", lambda: pytest.fail("it went on"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    before = dict(os.environ)
    told = "apart=True, or set CUDA_VISIBLE_DEVICES=6 before Python starts"
    with pytest.raises(HelpersError, match=told), offline.offline_engine("qwen-7b", device="cuda:1"):
        pass
    assert dict(os.environ) == before


def test_what_cannot_be_served_is_refused_here_too():
    from helpers import offline_engine

    with pytest.raises(HelpersError, match="vLLM has no model class"), offline_engine("rwkv-6-7b"):
        pass
