"""vLLM serves a converted Baichuan2-13B: it finds our class by the entry point and says what transformers says.

The slow one: vLLM takes half a minute to start. It runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from reference import baichuan
from reference.checking import converted, random_weights

ROOT = Path(__file__).parent.parent
ORIGINAL = {
    "model_type": "baichuan",
    "tokenizer_class": "BaichuanTokenizer",
    "vocab_size": 300,
    "hidden_size": 320,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "model_max_length": 256,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
}
PROGRAM = """
import json, sys

import helpers.serving.launch  # lets vllm-cpu pass for vllm

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    folder, prompts = sys.argv[1], json.loads(sys.argv[2])
    options = dict(dtype="float32", max_model_len=200, max_num_seqs=4, enforce_eager=True, skip_tokenizer_init=True)
    engine = LLM(folder, **options)
    greedy = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in prompts], greedy)
    print("ANSWERS", json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
"""
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def test_greedy_tokens_are_those_of_transformers(tmp_path):
    pytest.importorskip("vllm")
    model = converted(tmp_path, ORIGINAL, random_weights(baichuan.shapes(ORIGINAL)))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 300, (tokens,), generator=generator).tolist() for tokens in (3, 40, 170)]
    model.generation_config.eos_token_id = None
    wanted = [model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, len(ids) :] for ids in prompts]

    # What an installed package leaves for its entry points: helpers is only on the path here.
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    installed = tmp_path / "site" / "llm_deploy_action-0.1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-deploy-action\nVersion: 0.1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()]
    (installed / "entry_points.txt").write_text("\n".join(lines))
    (tmp_path / "serve.py").write_text(PROGRAM)

    done = subprocess.run(
        [sys.executable, tmp_path / "serve.py", tmp_path / "native", json.dumps(prompts)],
        cwd=ROOT,
        env=os.environ | SETTINGS | {"PYTHONPATH": os.pathsep.join([str(installed.parent), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert answers, (done.stdout + done.stderr)[-3000:]
    assert json.loads(answers[0].removeprefix("ANSWERS")) == [row.tolist() for row in wanted]
