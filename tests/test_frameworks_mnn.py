"""MNN: no pip, no telemetry, not even another way out; and an export that writes transformers' tokens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import HelpersError
from helpers.frameworks import mnn
from helpers.frameworks.mnn import export, stop_ids

ROOT = Path(__file__).parents[1]

REACHES = """
import json
from helpers.frameworks.mnn import reaches_out
print(json.dumps([reaches_out(guarded, sdk) for guarded in (False, True) for sdk in (False, True)]))
"""

COMPARE = """
import json, sys
from pathlib import Path
import torch
from helpers import load
from helpers.checkpoints.load import native_folder
from helpers.frameworks.mnn import Mnn, export
from helpers.quantization import poems
work, told = Path(sys.argv[1]), {}
for name in ["chatglm3-6b", "internlm2-7b"]:
    lm, tokenizer = load(name, "tiny", "fp32", "cpu")
    folder = export(native_folder(name), work / name, bits=8)
    engine, equal, streamed = Mnn(folder), [], []
    for poem in poems("famous")[:5]:
        turns = [{"role": "user", "content": f"背诵《{poem.title}》"}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        with torch.inference_mode():
            wanted = lm.generate(input_ids=torch.tensor([ids]), max_new_tokens=40, do_sample=False)
        wanted = wanted[0, len(ids):].tolist()
        answer = engine.generate(ids, max_new_tokens=40)
        equal.append(answer == wanted)
        streamed.append([*engine.stream(ids, max_new_tokens=40), wanted[-1]] == answer)
    text = poems("held_out")[0].text
    ids = tokenizer(text).input_ids
    with torch.inference_mode():
        wanted = lm(torch.tensor([ids])).logits[0]
    told[name] = {
        "equal": equal,
        "streamed": streamed,
        "ids": engine.encode(text) == ids,
        "off": float((torch.tensor(engine.logits(ids)) - wanted).abs().mean() / wanted.std()),
        "stops": engine.stop_ids == sorted(lm.generation_config.eos_token_id),
        "files": sorted(file.name for file in folder.iterdir()),
        "bits": 8 * (folder / "llm.mnn.weight").stat().st_size / sum(
            part.numel() for path, part in lm.named_parameters() if part.ndim == 2 and "embed" not in path
        ),
    }
    again = Mnn(folder, memory="high")  # a second engine beside the first
    del engine
    told[name]["again"] = again.generate(ids, max_new_tokens=2) == again.generate(ids, max_new_tokens=2)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def compared(in_frameworks, tmp_path_factory):
    return in_frameworks(COMPARE, tmp_path_factory.mktemp("mnn"))


def test_the_converter_reaches_out_and_behind_the_guard_does_not(in_frameworks):
    bare, with_sdk, guarded, guarded_with_sdk = in_frameworks(REACHES)
    assert set(bare) == {"os.system: pip install -U aliyun-log-python-sdk"}
    assert with_sdk and all(request.startswith("urllib.Request: https://") for request in with_sdk)
    assert guarded == guarded_with_sdk == []


@pytest.mark.parametrize(
    "act",
    [
        "os.system('true')",
        "subprocess.run(['true'])",
        "socket.create_connection(('127.0.0.1', 9))",
        "socket.socket().connect(('127.0.0.1', 9))",
        "urllib.request.urlopen('http://127.0.0.1:9')",
    ],
)
def test_a_guarded_process_has_no_shell_and_no_network(act):
    opening = "import os, socket, subprocess, urllib.request; from helpers.frameworks.mnn import keep_offline"
    code = f"{opening}; keep_offline(); {act}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "PermissionError: refused while exporting" in done.stderr


@pytest.mark.parametrize("model", ["chatglm3-6b", "internlm2-7b"])
def test_eight_bit_writes_the_tokens_of_transformers(model, compared):
    assert sum(compared[model]["equal"]) >= 4  # one near tie may fall the other way on another CPU
    assert all(compared[model]["streamed"]) and compared[model]["ids"] and compared[model]["again"]
    assert compared[model]["off"] < 0.1


@pytest.mark.parametrize("model", ["chatglm3-6b", "internlm2-7b"])
def test_every_stop_and_the_size_that_was_promised(model, compared):
    assert compared[model]["stops"]
    assert 8 + 64 / 64 < compared[model]["bits"] < 9.5  # a scale and a lowest value in fp32 for each 64 weights
    assert compared[model]["files"] == [
        "config.json", "embeddings_bf16.bin", "export_args.json", "llm.mnn", "llm.mnn.weight", "llm_config.json",
        "tokenizer.mtok",
    ]  # fmt: skip


def checkpoint(folder, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]} | config))
    return folder


@pytest.mark.parametrize(
    ("config", "options", "why"),
    [
        ({"architectures": ["RwkvForCausalLM"]}, {}, "it is a RwkvForCausalLM"),
        ({"auto_map": {"AutoModel": "modeling.M"}}, {}, "names Python files of its own"),
        ({}, {"bits": 3}, "cannot export to 3 bits"),
    ],
)
def test_what_would_be_wrong_is_refused_before_anything_runs(config, options, why, tmp_path, monkeypatch):
    monkeypatch.setattr(mnn, "_python", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(HelpersError, match=why):
        export(checkpoint(tmp_path / "model", **config), tmp_path / "made", **options)
    assert not (tmp_path / "made").exists()


def test_an_existing_target_is_not_overwritten(tmp_path):
    with pytest.raises(HelpersError, match=r"will not overwrite model: it exists\."):
        export(checkpoint(tmp_path / "model"), tmp_path / "model")


def test_an_exporter_that_fails_is_told_in_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(HelpersError, match=r"^MNN's exporter failed: .*llmexport is not installed here"):
        export(checkpoint(tmp_path / "model"), tmp_path / "made")  # .venv has none
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("said", "ids"), [({}, []), ({"eos_token_id": 2}, [2]), ({"eos_token_id": [2, 5]}, [2, 5])])
def test_stops_are_those_of_the_generation_config(said, ids, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert stop_ids(tmp_path) == ids
