"""Notebook 23: its kernels against the installed vLLM, and recorded rows laid out and drawn, of any precisions."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from helpers import catalog
from helpers.serving import recorded

BOOK = Path(__file__).parents[1] / "notebooks" / "23_quantised_serving.ipynb"

LEAST = {
    # file in vllm/model_executor, its class, the format of RULES and a word of the kernel that it is about
    ("kernels/linear/mixed_precision/marlin.py", "MarlinLinearKernel"): ("gptq, awq", "Marlin"),
    ("kernels/linear/mixed_precision/machete.py", "MacheteLinearKernel"): ("gptq, awq", "Machete"),
    ("layers/quantization/auto_awq.py", "AutoAWQConfig"): ("gptq, awq", "Marlin"),
    ("layers/quantization/bitsandbytes.py", "BitsAndBytesConfig"): ("nf4, int8", "bitsandbytes"),
    ("layers/quantization/compressed_tensors/schemes/compressed_tensors_w8a8_int8.py", "W8A8Int8"): ("w8a8", "CUTLASS"),
    ("layers/quantization/compressed_tensors/schemes/compressed_tensors_w8a8_fp8.py", "W8A8Fp8"): ("fp8", "CUTLASS"),
    ("layers/quantization/compressed_tensors/schemes/compressed_tensors_w8a16_fp8.py", "W8A16Fp8"): ("fp8", "Marlin"),
}


@pytest.fixture(scope="module")
def sources():
    return [cell.source for cell in nbformat.read(BOOK, as_version=4).cells if cell.cell_type == "code"]


def run(sources, name, **names):
    """Run the cell that defines a name, and return what it defined."""
    (cell,) = [source for source in sources if re.search(rf"^(def )?{name}\b", source, re.MULTILINE)]
    exec(compile(cell, name, "exec"), names)
    return SimpleNamespace(**{key: value for key, value in names.items() if key.isidentifier()})


def of_vllm(file):
    """Return the source of a file of the installed vLLM, relative to its model_executor."""
    package = importlib.util.find_spec("vllm")
    if package is None:
        pytest.skip("vLLM is not installed")
    return (Path(package.submodule_search_locations[0]) / "model_executor" / file).read_text(encoding="utf-8")


def test_gptq_begins_where_marlin_does_whatever_its_config_says(sources):
    """AutoGPTQConfig and ExLlama would do from 6.0 on, but a layer asks for Marlin before it chooses a kernel."""
    layer = of_vllm("layers/quantization/auto_gptq.py").partition("\nclass AutoGPTQLinearMethod")[2]
    assert "verify_marlin_supported(" in layer.partition("def create_weights")[0]
    asked = of_vllm("layers/quantization/utils/marlin_utils.py").partition("def query_marlin_supported_quant_types")[2]
    least = int(re.search(r"if device_capability < (\d+):\n +return \[\]", asked)[1]) / 10
    rules = run(sources, "RULES").RULES
    assert min(first for name, first, *_ in rules if name == "gptq, awq") == least


@pytest.mark.parametrize(("file", "owner"), LEAST, ids=[owner for _, owner in LEAST])
def test_least_capability_is_that_of_the_installed_vllm(sources, file, owner):
    text = of_vllm(file)
    body = text[re.search(rf"^class \w*{owner}\b", text, re.MULTILINE).start() :]
    least = int(re.search(r"def get_min_capability\(.*?return (\d+)", body, re.DOTALL)[1]) / 10
    kind, word = LEAST[file, owner]
    rules = run(sources, "RULES").RULES
    assert min(first for name, first, _, kernel in rules if name == kind and word in kernel) == least


def test_cards_get_a_kernel_that_fits_them(sources):
    runs_with = run(sources, "RULES").runs_with
    for gpu in catalog.gpus().values():
        has = gpu.compute_capability
        assert runs_with("nf4, int8", has) == "bitsandbytes"
        assert ("in fp8" in runs_with("fp8", has)) == ("fp8" in gpu.formats)  # else unpacked to 16 bit, or refused
        assert runs_with("w8a8", has) == "no" or "int8" in gpu.formats
        assert "Machete" not in runs_with("gptq, awq", has) or gpu.architecture == "Hopper"
    assert [runs_with(kind, 7.0) for kind in ("gptq, awq", "w8a8", "fp8", "fp8 KV cache")] == ["no"] * 4


def row(kind, name, value, batch=None, tokens=128, **more):
    lengths = {"batch": batch, "prompt_tokens": tokens, "new_tokens": tokens} if batch else {}
    about = dict.fromkeys(["batch", "prompt_tokens", "new_tokens", "parallel", "requests_per_s"]) | lengths
    about |= {"model": "qwen-7b", "device": "a card", "date": "2026-11-26", "definition": "memory; Method with Kernel"}
    return SimpleNamespace(**about | {"precision": kind, "name": name, "value": value, "weights": "random"} | more)


def measured(rows):
    def answer(engine, **filters):
        return [
            one
            for one in rows
            if all(
                getattr(one, key) in want if isinstance(want, list) else getattr(one, key) == want
                for key, want in filters.items()
            )
        ]

    return SimpleNamespace(measured=answer)


ROWS = [
    *(row(kind, "weights", size) for kind, size in [("bf16", 14.4), ("gptq-int4", 5.3), ("nf4", 5.4), ("fp8", 8.4)]),
    *(row("bf16", "decode_speed", speed, batch) for batch, speed in [(1, 100.0), (256, 8000.0)]),
    *(row("gptq-int4", "decode_speed", speed, batch) for batch, speed in [(1, 250.0), (256, 7200.0)]),
    row("fp8", "decode_speed", 160.0, 1),
    row("fp8", "kv_tokens", 120000),
    row("gptq-int4", "decode_speed", 1.0, 1, tokens=2048),
    row("gptq-int4", "decode_speed", 2.0, 1, parallel="tp2"),
    row("gptq-int4", "decode_speed", 3.0, 1, weights="tiny"),
    row("gptq-int4", "decode_speed", 4.0, 1, requests_per_s=16.0),
    row("gptq-int4", "marlin_decode_speed", 300.0, 1),
    row("gptq-int4", "marlin_decode_speed", 900.0, 32),
    row("gptq-int4", "marlin_head_kv_tokens", 136448),
    row("gptq-int4", "marlin_ttft", 0.1, 1),
    row("fp32", "decode_speed", 5.0, 1),
]


def test_recorded_rows_of_one_card_at_one_length(monkeypatch):
    monkeypatch.setattr(recorded, "catalog", measured(ROWS))
    found = recorded.recorded_engines("qwen-7b")["a card"]
    assert list(found) == [
        "16 bit",
        "fp8",
        "gptq-int4",
        "gptq-int4, Marlin",
        "gptq-int4, Marlin, output layer too",
        "nf4",
    ]
    assert found["gptq-int4"] == {"weights": 5.3, "kernel": "Method with Kernel", 1: 250.0, 256: 7200.0}
    assert found["gptq-int4, Marlin"] == {1: 300.0, 32: 900.0}
    assert found["gptq-int4, Marlin, output layer too"] == {"kv_tokens": 136448}
    monkeypatch.setattr(recorded, "catalog", measured([]))
    assert recorded.recorded_engines("qwen-7b") == {}


def test_gains_are_those_of_batches_measured_in_16_bit_too(monkeypatch):
    monkeypatch.setattr(recorded, "catalog", measured(ROWS))
    gains = recorded.recorded_gains("qwen-7b")
    assert gains["a card", "gptq-int4"] == {1: 2.5, 256: 0.9}
    assert gains["a card", "gptq-int4, Marlin"] == {1: 3.0}  # nothing in 16 bit at 32
    assert gains["a card", "nf4"] == {} and ("a card", "16 bit") not in gains


def test_every_recorded_figure_of_an_engine_is_of_a_known_variant():
    lists = ["weights", "kv_tokens", "decode_speed"]
    names = {row.name for row in catalog.measured(engine="vllm") if row.name.endswith(tuple(lists))}
    assert {name for name in names if not recorded.FIGURE.fullmatch(name)} == set()


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        (["bf16", "gptq-int4"], "gptq-int4 2.50 times as fast as 16 bit at batch 1, 0.90 times as fast"),
        (["bf16", "fp8"], "fp8 1.60 times as fast as 16 bit at batch 1, weights 8.4 GiB, KV cache of 120.0 thousand"),
        (["nf4", "fp8"], "nf4 weights 5.4 GiB"),
        (["bf16"], None),  # nothing to compare: no picture
    ],
    ids=["two", "a gap", "no 16 bit", "16 bit alone"],
)
def test_picture_takes_any_precisions(sources, kinds, told, monkeypatch, capsys):
    import matplotlib.pyplot as plt

    rows = [one for one in ROWS if one.precision in kinds and not one.name.startswith("marlin")]
    monkeypatch.setattr(recorded, "catalog", measured(rows))
    names = {"plt": plt, "model": "qwen-7b", "BATCHES": (1, 8, 32, 256)} | vars(recorded)
    shown = []
    names |= vars(run(sources, "picture", **names))
    (cell,) = [source for source in sources if "by_device = " in source]
    cell = cell.replace("from helpers import show, style", "")
    exec(cell, names | {"style": lambda: None, "show": lambda figure, alt: shown.append((figure, alt))})
    if told is None:
        assert shown == [] and "qwen-7b quantised, in vLLM at full size: not recorded yet" in capsys.readouterr().out
        return
    (figure, alt) = shown[0]
    assert told in alt
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(labels) == len(kinds)
    compared = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert bool(compared) == ("bf16" in kinds)
    plt.close("all")


def test_kernels_are_found_in_the_method_or_its_scheme(sources):
    import torch

    kernels = run(sources, "kernels", torch=torch).kernels

    class FastKernel:
        pass

    def layer(**inside):
        one = torch.nn.Module()
        one.input_size, one.quant_method = 8, SimpleNamespace(config=1)
        for name, value in inside.items():
            setattr(one, name, value)
        return one

    net = torch.nn.Sequential(
        layer(quant_method=SimpleNamespace(kernel=FastKernel())),
        layer(scheme=SimpleNamespace(fp8_linear=FastKernel())),
        layer(),
        torch.nn.Linear(2, 2),
    )
    assert kernels(net) == {("SimpleNamespace", "FastKernel"): 2, ("SimpleNamespace", "no choice"): 1}
