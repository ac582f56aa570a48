"""LMDeploy's AWQ on a CPU, as notebook 34 uses it: the packing, and the folder read by transformers."""

import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from helpers import load
from helpers.checkpoints.load import native_folder
from helpers.frameworks.compare import SERIES
from helpers.quantization import perplexity, poems

PYTHON = SERIES / ".venv-frameworks" / "bin" / "python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="make frameworks")

QUANTISE = """
import sys
from lmdeploy.lite.apis import calibrate
from lmdeploy.lite.apis.auto_awq import auto_awq
from helpers.quantization import poems

def calibration(name, tokenizer, nsamples, seqlen, **_):
    ids = tokenizer("".join(poem.text for poem in poems("train_sample")[:200]), return_tensors="pt").input_ids
    return list(ids[:, : nsamples * seqlen].split(seqlen, dim=1))

calibrate.get_calib_loaders = calibration
folder, rounded, awq = sys.argv[1:]
settings = {"device": "cpu", "dtype": "float16", "w_group_size": 64, "calib_seqlen": 64}
auto_awq(folder, work_dir=rounded, calib_samples=0, **settings)
auto_awq(folder, work_dir=awq, calib_samples=8, **settings)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("lmdeploy")
    command = [PYTHON, "-c", QUANTISE, native_folder("internlm2-7b"), place / "rounded", place / "awq"]
    subprocess.run(command, check=True, cwd=SERIES, capture_output=True)
    return place


def unpack(packed):
    """The eight 4-bit numbers of an integer stand in the order 0 2 4 6 1 3 5 7."""
    return torch.stack([(packed >> 4 * place) & 15 for place in (0, 4, 1, 5, 2, 6, 3, 7)], dim=-1).flatten(1)


def test_a_weight_is_number_minus_zero_times_scale_to_half_a_step(made):
    lm, _ = load("internlm2-7b", "tiny", "fp32", "cpu")
    tensors, original = load_file(made / "rounded" / "model.safetensors"), lm.state_dict()
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith("qweight")]
    assert len(layers) == 14  # two layers of seven matrices
    for layer in layers:
        numbers, scales = unpack(tensors[f"{layer}.qweight"]), tensors[f"{layer}.scales"].float()
        zeros = unpack(tensors[f"{layer}.qzeros"])
        scales, zeros = scales.repeat_interleave(64, 0), zeros.repeat_interleave(64, 0)
        off = ((numbers - zeros) * scales).T - original[f"{layer}.weight"]
        assert (off.abs() <= 0.51 * scales.T + 1e-3).float().mean() > 0.99, layer


def test_transformers_reads_the_folder_and_little_is_lost(made):
    texts = [poem.text for poem in poems("held_out")[:30]]
    before = perplexity(*load("internlm2-7b", "tiny", "fp32", "cpu"), texts)
    after = perplexity(*load("internlm2-7b", made / "awq", device="cpu"), texts)
    assert before < after < 1.25 * before


def test_the_config_says_awq(made):
    config = json.loads((made / "awq" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == {
        **{"bits": 4, "group_size": 64, "quant_method": "awq", "version": "gemm", "zero_point": True}
    }
    assert "auto_map" not in config
