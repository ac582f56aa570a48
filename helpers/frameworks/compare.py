"""The same greedy answers from several engines, each in a process of its own: how fast, how large, and are they equal.

    prepare("llama.cpp", "Q8_0", folder, target)   what the engine reads, made from a native folder
    answer("llama.cpp", "Q8_0", made, prompts)     a child process loads it and answers the prompts, one by one

A child has the engine's environment, one thread and the CPU. An engine is a context manager that yields a function from
prompt ids to an iterator of new ids; the clock and the stop are the same for all.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import HelpersError, unknown

SERIES = Path(__file__).parents[2]
STATUS = Path("/proc/self/status")

Stream = Callable[[list[int], int], Iterator[int]]
"""From prompt ids and the most new ids to the new ids, each as soon as it is known."""


@dataclass(frozen=True)
class Engine:
    """Where an engine lives (environment, module to look for) and the precisions it is compared in."""

    environment: str
    module: str
    precisions: tuple[str, ...]


ENGINES = {
    "transformers": Engine(".venv", "transformers", ("fp32",)),
    "vllm": Engine(".venv", "vllm", ("fp32",)),
    "llama.cpp": Engine(".venv-frameworks", "xllamacpp", ("f32", "Q8_0")),
    "ctranslate2": Engine(".venv-frameworks", "ctranslate2", ("float32", "int8_float32")),
    "mnn": Engine(".venv-frameworks", "MNN", ("int8",)),
    "airllm": Engine(".venv-frameworks", "airllm", ("fp32",)),
}


@dataclass(frozen=True)
class Answers:
    """What one engine answered and what it took; times are this machine's.

    Attributes:
        ids: the new ids of each prompt, without the one that ends an answer.
        ttft: seconds from a prompt to its first id, the median over the prompts.
        tpot: seconds for each further id, over all prompts; 0 where no answer had a second one. An engine with a thread
            of its own may hand over several at once, so compare engines by ``speed``.
        speed: new ids a second over all prompts, from the question to the last id.
        load_seconds: from the libraries' import to the first question.
        libraries: bytes of RAM after the import, before anything is loaded.
        peak: most bytes of RAM from there on, the libraries included; outside Linux the most that a look every
            hundredth of a second has seen.
        trace: RAM while it loaded and answered, as (seconds, bytes).
    """

    ids: list[list[int]]
    ttft: float
    tpot: float
    speed: float
    load_seconds: float
    libraries: int
    peak: int
    trace: list[tuple[float, int]]


def why_not(engine: str) -> str | None:
    """Say in a few words why an engine cannot be asked here; None if it can.

    Raises:
        HelpersError: there is no such engine; the valid ones are listed.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, list(ENGINES))
    row = ENGINES[engine]
    how = "make setup" if row.environment == ".venv" else "make frameworks"
    if not _python(engine).exists():
        return f"there is no {row.environment}: run {how}"
    if not _is_true(engine, f"__import__('importlib.util').util.find_spec({row.module!r})"):
        return f"{row.environment} has no {row.module}: run {how}"
    if engine == "vllm" and not _is_true(engine, "__import__('helpers.serving.launch').serving.launch.is_cpu_build()"):
        return "its vLLM is built for CUDA: the engines are compared on a CPU, so leave it out"
    return None


def prepare(engine: str, precision: str, folder: str | Path, target: str | Path) -> Path:
    """Make what an engine reads from a native folder, in a process of its own.

    Args:
        engine, precision: a name of ``ENGINES`` and one of its precisions.
        folder: native checkpoint of the class Llama, Qwen2 or GLM.
        target: folder to make; it must not exist.

    Returns:
        ``target``; ``folder`` itself for transformers and vLLM, which need nothing else.

    Raises:
        HelpersError: the engine is not there, or its converter refuses; its last line is told.
    """
    job = {"folder": str(folder), "target": str(target), "precision": precision}
    return Path(_child(engine, "prepare", job))


def answer(
    engine: str,
    precision: str,
    made: str | Path,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    stops: Sequence[int] = (),
    warm_up: bool = True,
    cap: int | None = None,
) -> Answers:
    """Let an engine answer prompts one after the other, always with the likeliest id, on one thread.

    Args:
        engine, precision: a name of ``ENGINES`` and one of its precisions.
        made: what ``prepare`` returned.
        prompts: ids of each prompt.
        new_tokens: most new ids of an answer.
        stops: ids that end an answer.
        warm_up: answer the first prompt once before the clock runs.
        cap: bytes that the process may take on top of what its libraries have (RLIMIT_DATA, on Linux; a file mapped to
            be written to counts); without a limit when None.

    Raises:
        HelpersError: the engine is not there, or fails; its last line is told.
    """
    job = {"made": str(made), "precision": precision, "prompts": [list(ids) for ids in prompts]}
    job |= {"new_tokens": new_tokens, "stops": list(stops), "warm_up": warm_up, "cap": cap}
    return Answers(**_child(engine, "answer", job))


def size(made: str | Path) -> int:
    """Return the bytes of the weights in a folder: what is neither JSON, nor text, nor a tokenizer."""
    files = [Path(made)] if Path(made).is_file() else [file for file in Path(made).rglob("*") if file.is_file()]
    other = {".json", ".txt", ".jinja", ".model", ".mtok", ".done", ".md"}
    return sum(file.stat().st_size for file in files if file.suffix not in other)


def first_difference(ids: Sequence[int], reference: Sequence[int]) -> int | None:
    """Return the place of the first id that differs, counted from 0; None if the two are equal."""
    for place, (one, other) in enumerate(zip(ids, reference, strict=False)):
        if one != other:
            return place
    return None if len(ids) == len(reference) else min(len(ids), len(reference))


# --- the parent


def _python(engine: str) -> Path:
    """Return an engine's Python; where the series has no .venv (Colab, conda, Windows), the one that asks."""
    python = SERIES / ENGINES[engine].environment / "bin" / "python"
    return Path(sys.executable) if ENGINES[engine].environment == ".venv" and not python.exists() else python


def _is_true(engine: str, expression: str) -> bool:
    """Tell whether an expression is true in an engine's Python."""
    code = f"raise SystemExit(not {expression})"
    settings = os.environ | {"PYTHONPATH": str(SERIES)}
    return subprocess.run([_python(engine), "-c", code], check=False, capture_output=True, env=settings).returncode == 0


def _child(engine: str, task: str, job: dict[str, Any]) -> Any:
    if reason := why_not(engine):
        raise HelpersError(f"cannot ask {engine}", reason.partition(": ")[0], reason.partition(": ")[2])
    if job["precision"] not in ENGINES[engine].precisions:
        raise unknown(f"precision of {engine}", job["precision"], list(ENGINES[engine].precisions))
    settings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    # A cap counts what glibc keeps: 64 MiB for each thread that reads ahead, and large blocks that were freed.
    settings |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    settings["PYTHONPATH"] = str(SERIES)
    with tempfile.TemporaryDirectory() as place:  # engines print past Python; a file keeps the result apart
        result = Path(place) / "result.json"
        command = [_python(engine), "-m", "helpers.frameworks.compare", engine, task, result]
        done = subprocess.run(
            command, input=json.dumps(job), text=True, capture_output=True, check=False, env=settings, cwd=place
        )
        if not result.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
            why = lines[-1].strip().rstrip(".")
            raise HelpersError(f"{engine} failed", why, "run its own notebook to see all of it")
        return json.loads(result.read_text(encoding="utf-8"))


# --- the child


def main() -> None:
    """Do one task of the parent: engine, task and result file in ``sys.argv``, the job as JSON on stdin."""
    engine, task, result = sys.argv[1:]
    job = json.load(sys.stdin)
    done = _prepare(engine, **job) if task == "prepare" else asdict(_answer(engine, **job))
    Path(result).write_text(json.dumps(done), encoding="utf-8")


def _prepare(engine: str, folder: str, target: str, precision: str) -> str:
    if engine in ("transformers", "vllm"):
        return folder
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    if engine == "llama.cpp":
        from .llama_cpp import quantize, to_gguf

        file = to_gguf(folder, Path(target) / "f32.gguf", "f32")
        if precision != "f32":
            quantize(file, Path(target) / f"{precision}.gguf", precision)
            file.unlink()
    elif engine == "ctranslate2":
        from .ctranslate2 import convert

        convert(folder, target, precision)
    elif engine == "mnn":
        from .mnn import export

        export(folder, target, bits=8)
    else:
        from airllm.utils import find_or_create_local_splitted_path

        names = {"embed": "model.embed_tokens", "layer_prefix": "model.layers", "norm": "model.norm"}
        find_or_create_local_splitted_path(folder, target, layer_names=names | {"lm_head": "lm_head"})
        (Path(target) / "of.json").write_text(json.dumps(folder), encoding="utf-8")  # it wants the config there, too
    return target


def _answer(
    engine: str,
    made: str,
    precision: str,
    prompts: list[list[int]],
    new_tokens: int,
    stops: list[int],
    warm_up: bool,
    cap: int | None,
) -> Answers:
    load = LOADERS[engine]
    _import(engine)
    if cap is not None:
        import resource  # Unix alone has it

        resource.setrlimit(resource.RLIMIT_DATA, (_memory("VmData") + cap, resource.RLIM_INFINITY))
    libraries, start = _memory("VmRSS"), time.perf_counter()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the kernel counts the peak from here on (man 5 proc)
    trace: list[tuple[float, int]] = []
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(trace, over), daemon=True)
    watcher.start()
    with load(made, precision) as stream:
        loaded = time.perf_counter() - start
        if warm_up:
            _write(stream, prompts[0], new_tokens, stops)
        answers = [_write(stream, ids, new_tokens, stops) for ids in prompts]
        peak = _memory("VmHWM")
    over.set()
    watcher.join()
    further = sum(len(times) - 1 for _, times in answers if times)
    spent = sum(times[-1] - times[0] for _, times in answers if times)
    return Answers(
        ids=[[id for id in ids if id not in stops] for ids, _ in answers],
        ttft=statistics.median([times[0] for _, times in answers if times] or [0.0]),
        tpot=spent / further if further > 0 else 0.0,
        speed=sum(len(times) for _, times in answers) / max(sum(times[-1] for _, times in answers if times), 1e-9),
        load_seconds=loaded,
        libraries=libraries,
        peak=max(peak, max((memory for _, memory in trace), default=0)),
        trace=trace[:: len(trace) // 400 + 1],
    )


def _write(stream: Stream, prompt: list[int], most: int, stops: list[int]) -> tuple[list[int], list[float]]:
    """Return the ids of one answer, up to the first that ends it, and when each came, in seconds."""
    ids: list[int] = []
    times: list[float] = []
    start = time.perf_counter()
    for id in stream(prompt, most):
        ids.append(id)
        times.append(time.perf_counter() - start)
        if id in stops or len(ids) == most:
            break
    return ids, times


def _memory(field: str) -> int:
    """Return bytes of this process: VmRSS is the RAM in use now, VmHWM the most since the last reset, VmData its data.

    Only Linux tells them apart; elsewhere each is the RAM in use now.
    """
    if not STATUS.exists():
        import psutil

        return psutil.Process().memory_info().rss
    return 1024 * int(STATUS.read_text(encoding="utf-8").partition(f"{field}:")[2].split()[0])


def _watch(trace: list[tuple[float, int]], over: threading.Event) -> None:
    start = time.perf_counter()
    while not over.wait(0.01):
        trace.append((time.perf_counter() - start, _memory("VmRSS")))


def _import(engine: str) -> None:
    """Import what an engine needs before the clock and the memory are looked at."""
    import importlib

    names = {"transformers": ["torch", "transformers"], "airllm": ["airllm.airllm_base"], "mnn": ["MNN.llm"]}
    names |= {"llama.cpp": ["helpers.frameworks.llama_cpp", "numpy"], "ctranslate2": ["ctranslate2"]}
    if engine == "vllm":
        from ..serving.launch import pass_for_vllm

        pass_for_vllm()
    for name in names.get(engine, [engine]):
        importlib.import_module(name)


def _by_logits(lm: Any) -> Stream:
    """Greedy decoding with a transformers model: read, take the likeliest id, read that."""
    import torch
    from transformers import DynamicCache

    @torch.inference_mode()
    def step(ids: list[int], cache: Any) -> int:
        out = lm(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    def stream(prompt: list[int], most: int) -> Iterator[int]:
        cache, ids = DynamicCache(config=lm.config), prompt
        for _ in range(most):
            ids = [step(ids, cache)]
            yield ids[0]

    return stream


@contextmanager
def _transformers(made: str, precision: str) -> Iterator[Stream]:
    from transformers import AutoModelForCausalLM

    yield _by_logits(AutoModelForCausalLM.from_pretrained(made, dtype="float32").eval())


@contextmanager
def _airllm(made: str, precision: str) -> Iterator[Stream]:
    import torch
    from airllm.airllm_base import AirLLMBaseModel

    class Layerwise(AirLLMBaseModel):
        def get_tokenizer(self, hf_token: str | None = None) -> None:
            """Load none: AirLLM would allow code from the folder, and ids are all that is asked for here."""

    folder = json.loads((Path(made) / "of.json").read_text(encoding="utf-8"))
    lm = Layerwise(folder, device="cpu", dtype=torch.float32, layer_shards_saving_path=made, prefetching=False)
    yield _by_logits(lm.model)


@contextmanager
def _vllm(made: str, precision: str) -> Iterator[Stream]:
    from vllm import SamplingParams

    from .. import catalog
    from ..serving import offline_engine

    kind = json.loads((Path(made) / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model = next(row.id for row in catalog.models().values() if row.native_class == kind)
    with offline_engine(model, made, precision, "cpu", enforce_eager=True, max_model_len=512) as engine:

        def stream(prompt: list[int], most: int) -> Iterator[int]:
            wanted = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, detokenize=False)
            name, seen = str(time.perf_counter_ns()), 0
            engine.llm_engine.add_request(name, {"prompt_token_ids": prompt}, wanted)
            try:
                while engine.llm_engine.has_unfinished_requests():
                    for out in engine.llm_engine.step():
                        yield from out.outputs[0].token_ids[seen:]
                        seen = len(out.outputs[0].token_ids)
            finally:  # whoever asked has enough
                engine.llm_engine.abort_request([name])

        yield stream


@contextmanager
def _llama_cpp(made: str, precision: str) -> Iterator[Stream]:
    from .llama_cpp import Gguf

    with Gguf(Path(made) / f"{precision}.gguf") as lm:
        yield lm.stream


@contextmanager
def _ctranslate2(made: str, precision: str) -> Iterator[Stream]:
    import ctranslate2

    words = json.loads((Path(made) / "vocabulary.json").read_text(encoding="utf-8"))
    lm = ctranslate2.Generator(made, device="cpu", compute_type=precision, inter_threads=1, intra_threads=1)

    def stream(prompt: list[int], most: int) -> Iterator[int]:
        tokens = [words[id] for id in prompt]
        for step in lm.generate_tokens(tokens, max_length=most, sampling_topk=1):
            yield step.token_id

    yield stream


@contextmanager
def _mnn(made: str, precision: str) -> Iterator[Stream]:
    from .mnn import Mnn

    yield Mnn(made).stream


LOADERS: dict[str, Callable[[str, str], AbstractContextManager[Stream]]] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "llama.cpp": _llama_cpp,
    "ctranslate2": _ctranslate2,
    "mnn": _mnn,
    "airllm": _airllm,
}

if __name__ == "__main__":
    main()
