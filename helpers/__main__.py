"""The command line: ``python -m helpers --help``.

Every command calls one public function; an expected error is one line on stderr and exit code 1.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import HelpersError

TOOK = ["quantise_seconds", "quantise_allocated_peak", "quantise_rss_peak"]
"""What ``quantize --rows`` writes down."""

app = typer.Typer(help=__doc__.splitlines()[0], no_args_is_help=True, add_completion=False)


class Kind(StrEnum):
    """What ``list`` lists."""

    MODELS = "models"
    GPUS = "gpus"
    FRAMEWORKS = "frameworks"


class Method(StrEnum):
    """How ``quantize`` quantises."""

    BITSANDBYTES = "bitsandbytes"
    GPTQ = "gptq"
    AWQ = "awq"
    RTN = "rtn"
    W8A8 = "w8a8"
    FP8 = "fp8"


class Engine(StrEnum):
    """Who computes in ``measure``."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


class Hub(StrEnum):
    """Where ``fetch`` fetches from."""

    HUGGINGFACE = "huggingface"
    MODELSCOPE = "modelscope"


@app.command("list")
def list_rows(kind: Annotated[Kind, typer.Argument(help="what to list")] = Kind.MODELS) -> None:
    """List the catalogue's models, GPUs or frameworks."""
    from . import catalog

    rows = {Kind.MODELS: catalog.models, Kind.GPUS: catalog.gpus, Kind.FRAMEWORKS: catalog.frameworks}[kind]()
    for row_id, row in rows.items():
        print(f"{row_id:24} {getattr(row, 'name', '')}".rstrip())


@app.command()
def preflight(
    model: Annotated[str, typer.Argument(help="model id, as `list` shows it")],
    weights: Annotated[str, typer.Option(help="tiny, random, hub or a folder")] = "hub",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, fp16, int8 or nf4")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="sequences at once")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="prompt and answer of one sequence")] = 2048,
) -> None:
    """Tell whether a model fits this machine, before anything is downloaded."""
    from .memory.preflight import preflight as check

    result = check(model, weights, precision, device, batch, tokens, strict=False)
    print(result)
    if not result.fits:
        raise typer.Exit(1)


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="model id, the path of a config.json, or owner/name on Hugging Face")],
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, fp16, fp8, int8, nf4, gptq-int4, ...")] = "auto",
    engine: Annotated[str, typer.Option(help="transformers or vllm")] = "transformers",
    batch: Annotated[int, typer.Option(help="sequences at once")] = 1,
    context: Annotated[int, typer.Option(help="prompt and answer of one sequence, in tokens")] = 2048,
    gpu: Annotated[
        str | None, typer.Option(help="card id, as `list gpus` shows it; this machine's if left out")
    ] = None,
    decoding: Annotated[str, typer.Option(help="default, static or compiled")] = "default",
    kv_dtype: Annotated[str, typer.Option(help="of vLLM's KV cache: auto or fp8")] = "auto",
) -> None:
    """Estimate memory and speed of a model on any card, from sizes alone."""
    from .memory.estimate import estimate as predict

    print(predict(model, precision, engine, batch, context, gpu, decoding=decoding, kv_dtype=kv_dtype))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="folder of the original checkpoint")],
    target: Annotated[Path, typer.Argument(help="folder to make")],
    adapter: Annotated[list[Path] | None, typer.Option(help="LoRA folder to merge; may be repeated")] = None,
    chat_format: Annotated[str | None, typer.Option(help="chat template; the family's own if left out")] = None,
) -> None:
    """Convert an original checkpoint to one that transformers and vLLM read without remote code."""
    from .native import convert as convert_checkpoint

    print(convert_checkpoint(source, target, adapters=adapter or [], chat_format=chat_format, progress=True))


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(help="model id, as `list` shows it")],
    source: Annotated[Hub, typer.Option("--from", help="the hub to ask")] = Hub.HUGGINGFACE,
    revision: Annotated[str | None, typer.Option(help="commit or tag; the catalogue's pin if left out")] = None,
) -> None:
    """Download a published checkpoint at a pinned revision."""
    from .checkpoints.hub import fetch as fetch_checkpoint

    print(fetch_checkpoint(model, source.value, revision))


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="model id, as `list` shows it, or a native folder")],
    target: Annotated[Path, typer.Argument(help="folder to make")],
    method: Annotated[Method, typer.Option(help="how")] = Method.GPTQ,
    weights: Annotated[str, typer.Option(help="tiny, random, hub or a folder")] = "hub",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1")] = "auto",
    option: Annotated[
        list[str] | None, typer.Option("-o", help="NAME=VALUE, e.g. bits=4 or calibration=texts.txt; may be repeated")
    ] = None,
    rows: Annotated[Path | None, typer.Option(help="JSON lines to add to: time and memory that it took")] = None,
) -> None:
    """Quantise a model to a folder that load, transformers and vLLM read."""
    from inspect import signature

    from . import quantization
    from .checkpoints.quantized import labels
    from .errors import unknown
    from .memory.matrix import append_rows
    from .memory.measure import measure
    from .report.record import common, figure

    way = getattr(quantization, method.value)
    options = {name: _value(value) for name, value in _pairs(option, "-o", "bits=4").items()}
    valid = [name for name in signature(way).parameters if name not in ("model", "target", "weights", "device")]
    for name in options:
        if name not in valid:
            raise unknown(f"option of {method.value}", name, valid)
    with measure("quantise") as used:
        print(way(model, target, weights=weights, device=device, **options))
    if rows:
        common(model=model, **labels(str(target), "auto"), device=device)
        took = [one for one in used.figures("quantise") if one["name"] in TOOK]
        append_rows(rows, [figure(**one) for one in took], "python -m helpers quantize")


@app.command()
def run(
    notebooks: Annotated[list[str] | None, typer.Argument(help="01, 02_chat or a path; all if left out")] = None,
    parameter: Annotated[list[str] | None, typer.Option("-p", help="NAME=VALUE; may be repeated")] = None,
    output: Annotated[Path, typer.Option(help="folder of the executed notebooks and index.html")] = Path("build"),
    store: Annotated[bool, typer.Option("--store", help="write the outputs back into the notebooks")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="notebooks at the same time")] = 1,
    timeout: Annotated[int, typer.Option(min=1, help="seconds that one cell may take")] = 1800,
) -> None:
    """Run the series and write a page about it; exit code 1 when a notebook failed."""
    from .run import run as run_series

    values = _pairs(parameter, "-p", "model=qwen-7b")
    outcomes = run_series(notebooks or None, values, output, store, jobs, timeout)
    for outcome in outcomes:
        print(f"{outcome.status:7} {outcome.seconds:7.1f} s  {outcome.notebook.name}  {outcome.error}".rstrip())
    print(output / "index.html")
    if any(outcome.status not in ("ok", "skipped") for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="model id, as `list` shows it")],
    weights: Annotated[str, typer.Option(help="tiny, random, hub or a folder")] = "tiny",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, fp16, int8 or nf4")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1")] = "auto",
    lora: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER of an adapter; may be repeated")] = None,
    host: Annotated[str, typer.Option(help="address to listen at; another than this lets others in")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="a free one if left out")] = None,
    option: Annotated[
        list[str] | None, typer.Option("-o", help="NAME=VALUE for vLLM, e.g. max_model_len=2048; may be repeated")
    ] = None,
) -> None:
    """Serve a model with vLLM until Ctrl-C; prints the address and the key to export."""
    from .serving import serve as start

    options = {name: _value(value) for name, value in _pairs(option, "-o", "max_model_len=2048").items()}
    adapters = _pairs(lora, "--lora", "verse=path/to/adapter")
    with start(model, weights, precision, device, lora=adapters, host=host, port=port, **options) as server:
        try:  # around the printing too: whoever reads the address may press Ctrl-C at once
            print(f"export OPENAI_BASE_URL={server.url}/v1\nexport OPENAI_API_KEY={server.key}", flush=True)
            server.wait()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)


@app.command("measure")
def measure_models(
    models: Annotated[list[str], typer.Argument(help="model ids, as `list` shows them")],
    precision: Annotated[list[str] | None, typer.Option(help="may be repeated; auto if left out")] = None,
    output: Annotated[Path, typer.Option(help="JSON lines to add to; points it holds are skipped")] = Path(
        "build/measured.jsonl"
    ),
    weights: Annotated[str, typer.Option(help="tiny, random, hub or a folder")] = "random",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1")] = "auto",
    engine: Annotated[Engine, typer.Option(help="who computes")] = Engine.TRANSFORMERS,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="sequences at once; may be repeated")] = None,
    prompt_tokens: Annotated[list[int] | None, typer.Option(min=1, help="may be repeated; 128 if left out")] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=2, help="tokens of each answer; 64 if left out, vllm 128")
    ] = None,
    decoding: Annotated[list[str] | None, typer.Option(help="default, static or compiled; may be repeated")] = None,
    option: Annotated[
        list[str] | None, typer.Option("-o", help="NAME=VALUE for vLLM, e.g. tensor_parallel_size=2; may be repeated")
    ] = None,
    prefix: Annotated[str, typer.Option(help="of vLLM's figures' names, for a variant that no field tells")] = "",
) -> None:
    """Measure memory and speed of models x precisions x lengths; goes on where it was stopped."""
    from .memory.matrix import measure_matrix
    from .serving.matrix import measure_engines

    output.parent.mkdir(parents=True, exist_ok=True)
    points = {"weights": weights, "device": device, "batches": batch or [1], "prompt_tokens": prompt_tokens or [128]}
    if engine == Engine.VLLM:
        if decoding:
            raise HelpersError("cannot measure", "decoding is a choice of transformers", "leave --decoding out")
        more = {name: _value(value) for name, value in _pairs(option, "-o", "tensor_parallel_size=2").items()}
        lengths = {"new_tokens": new_tokens or 128, "prefix": prefix}
        measure_engines(models, precision or ["auto"], output, **lengths, **points, **more)
    else:
        decodings = decoding or ["default"]
        measure_matrix(
            models, precision or ["auto"], output, new_tokens=new_tokens or 64, decodings=decodings, **points
        )


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(help="model ids, as `list` shows them")],
    rate: Annotated[list[float], typer.Option(help="requests a second, inf for all at once; may be repeated")],
    precision: Annotated[list[str] | None, typer.Option(help="may be repeated; auto if left out")] = None,
    output: Annotated[Path, typer.Option(help="JSON lines to add to; rates it holds are skipped")] = Path(
        "build/bench.jsonl"
    ),
    weights: Annotated[str, typer.Option(help="tiny, random, hub or a folder")] = "random",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1")] = "auto",
    requests: Annotated[int, typer.Option(min=1, help="sent at a rate, at the least")] = 100,
    seconds: Annotated[float, typer.Option(min=1, help="for how long they are sent, at the least")] = 30,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="tokens of each prompt")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="tokens of each answer")] = 128,
    goodput: Annotated[list[str] | None, typer.Option(help="NAME=MS, e.g. ttft_ms=500; may be repeated")] = None,
    option: Annotated[
        list[str] | None, typer.Option("-o", help="NAME=VALUE for vLLM, e.g. data_parallel_size=2; may be repeated")
    ] = None,
) -> None:
    """Serve models with vLLM and measure latency over the request rate; goes on where it was stopped."""
    from .serving.bench import bench_matrix

    limits = {name: float(value) for name, value in _pairs(goodput, "--goodput", "ttft_ms=500").items()}
    more = {name: _value(value) for name, value in _pairs(option, "-o", "data_parallel_size=2").items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    bench_matrix(
        models,
        precision or ["auto"],
        output,
        rates=rate,
        weights=weights,
        device=device,
        requests=requests,
        seconds=seconds,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        goodput=limits,
        options=more,
    )


@app.command()
def quality(
    models: Annotated[list[str], typer.Argument(help="model ids, as `list` shows them")],
    precision: Annotated[list[str] | None, typer.Option(help="may be repeated; all of them if left out")] = None,
    output: Annotated[Path, typer.Option(help="JSON lines to add to; points it holds are skipped")] = Path(
        "build/quality.jsonl"
    ),
    weights: Annotated[str, typer.Option(help="tiny, hub or a folder")] = "tiny",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1")] = "auto",
) -> None:
    """Quantise models and measure what it cost: perplexity, recitation, bytes; goes on where it was stopped."""
    from .quantization.matrix import KV_CACHE, WAYS, quality_matrix

    output.parent.mkdir(parents=True, exist_ok=True)
    quality_matrix(models, precision or ["fp32", *WAYS, KV_CACHE], output, weights=weights, device=device)


@app.command()
def table() -> None:
    """Print the two measured tables that README.md shows, in Markdown."""
    from .report.headline import fewer_bits, headline

    print(headline(), fewer_bits(), sep="\n\n")


@app.command()
def harvest(
    notebooks: Annotated[list[Path], typer.Argument(help="executed notebooks, e.g. build/*.ipynb")],
) -> None:
    """Print the figures that executed notebooks recorded, one JSON row a line."""
    from .report import harvest as harvest_notebook

    for notebook in notebooks:
        for row in harvest_notebook(notebook):
            print(json.dumps(row, ensure_ascii=False))


@app.command("bench-device")
def bench_device(device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1")] = "auto") -> None:
    """Measure a device's memory bandwidth and matrix rate."""
    from .checkpoints.load import pick_device
    from .memory.bandwidth import copy_bandwidth, matmul_rate
    from .report import record

    device = pick_device(device)
    record("bandwidth", copy_bandwidth(device), "GB/s", machine=True, device=device)
    for dtype in ["fp32"] if device == "cpu" else ["fp32", "bf16", "fp16"]:
        rate = matmul_rate(dtype, device=device)
        record(f"matmul_rate_{dtype}", rate, "TFLOPS", machine=True, device=device)


@app.command("make-tiny")
def make_tiny(
    models: Annotated[list[str] | None, typer.Argument(help="model ids; all if left out")] = None,
) -> None:
    """Make the stand-ins anew (minutes each on a GPU); `python -m helpers.checkpoints.make --help` has more choices."""
    from .checkpoints.make.__main__ import main as make

    make(["train", "--prepared", "build/corpus", "--device", "cuda", "--models", *(models or ["all"])])


def _pairs(given: list[str] | None, option: str, example: str) -> dict[str, str]:
    """Split NAME=VALUE."""
    pairs = [pair.partition("=") for pair in given or []]
    for name, equals, _ in pairs:
        if not equals:
            raise HelpersError(f"cannot read {option} {name}", "it is not NAME=VALUE", f"write e.g. {option} {example}")
    return {name: value for name, _, value in pairs}


def _value(text: str) -> Any:
    """Read a number, true, false, a list or an object as JSON; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> None:
    """Run the command line."""
    try:
        app(prog_name="python -m helpers")
    except HelpersError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
