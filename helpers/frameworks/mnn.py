"""MNN: a converted checkpoint exported for the phone engine, without its telemetry, and run on the CPU.

    native folder  ->  llmexport in a process of its own, kept offline  ->  llm.mnn, weights, tokenizer.mtok  ->  Mnn

llmexport 0.0.5 overlooks a few things in converted checkpoints. None is an error: the exported model just talks on, or
talks nonsense. ``_correct`` mends them while it runs, and says what they are.

Sources: the packages mnn 3.6.1 (https://github.com/alibaba/MNN) and llmexport 0.0.5
(https://github.com/wangzhaode/llm-export).
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import HelpersError
from ..native.convert import read_config

if TYPE_CHECKING:
    from numpy import ndarray

CLASSES = ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GlmForCausalLM"]
"""Native classes whose export was compared with transformers, token by token."""

REFUSED = {"os.system", "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "urllib.Request"}
"""Audit events (docs.python.org/3/library/audit_events.html) no export needs: a program, a connection, a name."""

ASKED = "asked for "
"""How ``_watch`` begins a line: the engine prints of its own, past Python."""


def export(folder: Path | str, target: Path | str, bits: int = 4, block: int = 64, mend: bool = True) -> Path:
    """Write a native checkpoint as MNN's engine reads it: weights rounded to nearest, in blocks, asymmetric.

    Args:
        folder: native checkpoint; ``helpers.checkpoints.load.native_folder`` makes one.
        target: folder to make. It holds ``llm.mnn`` (the graph), ``llm.mnn.weight`` (what is quantised: the layers and
            the output head), ``embeddings_bf16.bin``, ``tokenizer.mtok`` and two configs.
        bits: 4 or 8.
        block: weights of a row that share a scale and a lowest value; 0 for the whole row.
        mend: with what ``_correct`` puts right; False exports as llmexport does by itself, to see what that costs.

    Returns:
        The target.

    Raises:
        HelpersError: the target exists, the model is of a class not compared here, its folder names code of its own
            (llmexport would run it), or the exporter fails; nothing is left then.
    """
    folder, target = Path(folder).resolve(), Path(target).resolve()
    if target.exists():
        raise HelpersError(f"will not overwrite {target.name}", "it exists", "name a folder that does not exist yet")
    if bits not in (4, 8):
        raise HelpersError(f"cannot export to {bits} bits", "MNN's engine reads 4 and 8", "take bits=4 or bits=8")
    _check(read_config(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
        # It takes any path with "bge" or "gte" in it for an embedding model: a link gives the folder a harmless name.
        (Path(work) / "checkpoint").symlink_to(folder)
        arguments = ["--path", "checkpoint", "--export", "mnn", "--dst_path", "made", "--mnnconvert", "none"]
        arguments += ["--quant_bit", str(bits), "--quant_block", str(block)]
        _python(f"from helpers.frameworks.mnn import run_exporter; run_exporter({mend})", *arguments, cwd=work)
        made = Path(work) / "made"
        if not (made / "llm.mnn.weight").exists():
            raise HelpersError(
                f"cannot export {folder.name}", "llmexport wrote no weights", "run it by hand to see why"
            )
        (made / "llm.mnn.json").unlink(missing_ok=True)  # the graph once more, for people
        made.rename(target)
    return target


def reaches_out(guarded: bool, sdk: bool = False) -> list[str]:
    """Import MNN's converter in a process of its own, refuse what it asks the system for, and return these requests.

    Args:
        guarded: with ``keep_offline``, as ``export`` runs it.
        sdk: as if the package that it installs were there already.
    """
    said = _python(f"from helpers.frameworks.mnn import _watch; _watch({guarded}, {sdk})").splitlines()
    return [line.removeprefix(ASKED) for line in said if line.startswith(ASKED)]


def keep_offline() -> None:
    """Keep this process from what MNN's converter does when it is imported; for processes that only export.

    ``MNN/tools/utils/log.py`` runs ``pip install -U aliyun-log-python-sdk`` if that is missing, and otherwise asks a
    server for credentials to send usage with. An empty module in its place ends both: the names it should hold cannot
    be imported, and the converter goes on without its logger. Should a later version try another way, every program
    and connection that Python is asked for is refused, too.
    """
    _pretend(sdk=False)
    sys.addaudithook(_refuse)


def run_exporter(mend: bool = True) -> None:
    """Run llmexport as its README does, by path, with the arguments of this process; it never gets online.

    Raises:
        HelpersError: it is not installed.
    """
    keep_offline()
    os.environ["HF_HUB_OFFLINE"] = "1"
    spec = find_spec("llmexport")
    if spec is None or not spec.submodule_search_locations:
        raise HelpersError("cannot export", "llmexport is not installed here", "run make frameworks")
    folder = spec.submodule_search_locations[0]
    sys.path.insert(0, folder)  # it imports its modules as `utils`, which is why its console script is broken
    sys.argv[0] = str(Path(folder) / "llmexport.py")
    if mend:
        _correct()
    from llmexport import main  # the file of that name in the package's folder, now first on the path

    main()


def _correct() -> None:
    """Mend what llmexport 0.0.5 overlooks in a converted checkpoint.

    - The ids that end an answer stand in generation_config.json; it knows the tokenizer's single one, and a Qwen runs
      on past its answer.
    - The tokens that open a text are guessed from the letter A, whose own first token, a space, may be taken for one.
    - GLM's positions rotate neighbouring values; it knows that of the original class ``chatglm2`` only, and rotates
      the values of each half.
    """
    from utils import tokenizer, transformers

    def with_marks(self: Any, path: str, *rest: Any, init: Any = tokenizer.LlmTokenizer.__init__, **more: Any) -> None:
        init(self, path, *rest, **more)
        self.stop_ids = sorted({*self.stop_ids, *stop_ids(path)})
        if opening := self.tokenizer("").input_ids:
            self.tokenizer.get_prefix_tokens = lambda: opening

    def with_glm(self: Any, config: Any, init: Any = transformers.Rotary.__init__) -> None:
        init(self, config)
        self.model_type = "chatglm2" if self.model_type == "glm" else self.model_type

    tokenizer.LlmTokenizer.__init__ = with_marks
    transformers.Rotary.__init__ = with_glm


def stop_ids(folder: Path | str) -> list[int]:
    """Return the ids that end an answer, as generation_config.json of a native checkpoint lists them."""
    ids = json.loads((Path(folder) / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


class Mnn:
    """An exported model in this process, always taking the likeliest token.

    Args:
        folder: what ``export`` made.
        threads: of the CPU.
        memory: ``"low"`` keeps the weights quantised and rounds activations to 8 bit on the way; ``"high"`` unpacks
            the weights to fp32 while loading.
    """

    def __init__(self, folder: Path | str, threads: int = 1, memory: str = "low") -> None:
        with (Path(folder) / "tokenizer.mtok").open("rb") as file:  # counts of its marks, stops and opening tokens
            _, (marks, stops, _), ids = (list(map(int, file.readline().split())) for _ in range(3))
        self.stop_ids = ids[marks : marks + stops]
        with _hushed():
            import MNN.llm

            self._engine = MNN.llm.create(str(Path(folder) / "config.json"))
            self._engine.set_config({"thread_num": threads, "memory": memory, "sampler_type": "greedy"})
            self._engine.load()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, by the tokenizer that was exported.

        It puts the tokens that open a text (``<s>``) before every one, also before a prompt whose chat template wrote
        them already: give ``generate`` the ids of the original tokenizer.
        """
        return list(self._engine.tokenizer_encode(text))

    def generate(self, ids: Sequence[int], max_new_tokens: int = 64) -> list[int]:
        """Return the ids that follow; the last is the one that ended the answer, unless the room did."""
        self._restart(all_logits=False)
        with _hushed():  # the wrapper's generate(ids) hands on no length, and then the engine writes nothing
            return list(self._engine._c_obj.generate(list(ids), max_new_tokens))

    def stream(self, ids: Sequence[int], max_new_tokens: int = 64) -> Iterator[int]:
        """Yield the ids that follow one by one, each as soon as it is known, without any that ends an answer."""
        self._restart(all_logits=False)
        for _ in range(max_new_tokens):
            token = int(self._logits(ids)[-1].argmax())
            if token in self.stop_ids:
                return
            yield token
            ids = [token]

    def logits(self, ids: Sequence[int]) -> ndarray:
        """Return the scores of the token after each place, float32 [tokens, vocabulary]."""
        self._restart(all_logits=True)
        return self._logits(ids)

    def _restart(self, all_logits: bool) -> None:
        self._engine.set_config({"all_logits": all_logits})
        self._engine.reset()
        self._engine.generate_init()

    def _logits(self, ids: Sequence[int]) -> ndarray:
        import numpy

        with _hushed():
            scores = self._engine.forward(list(ids))  # lies in the engine's memory: kept past the engine it ends Python
        return numpy.array(scores.read(), dtype=numpy.float32).reshape(scores.shape)[0]


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep what the engine prints out of the page; it writes to the process's output, past Python."""
    library = ctypes.CDLL(None)
    library.fflush(None)
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _check(config: dict[str, Any]) -> None:
    """Refuse a model whose export would be silently wrong, or would run code from its folder."""
    name = ", ".join(config.get("architectures") or ["no class"])
    if "auto_map" in config:
        why = "its config.json names Python files of its own, which llmexport would run"
        raise HelpersError("will not export this checkpoint", why, "convert it first: helpers.native.convert")
    if name not in CLASSES:
        why = f"it is a {name}; compared with transformers were {', '.join(CLASSES)}"
        raise HelpersError("cannot export this checkpoint", why, "take a model that becomes one of these")


def _python(code: str, *arguments: str, cwd: str | None = None) -> str:
    """Run code in a Python of its own and return what it prints.

    Raises:
        HelpersError: it fails; the last line of its complaint is told.
    """
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise HelpersError("MNN's exporter failed", lines[-1].strip().rstrip("."), "run it by hand to see all of it")
    return done.stdout.strip()


def _pretend(sdk: bool) -> None:
    """Put a module where ``aliyun.log`` is looked for: an empty one, or one with the names that are asked for."""
    for name in ("aliyun", "aliyun.log", "aliyun.log.logitem"):
        sys.modules[name] = ModuleType(name)
        if sdk:
            vars(sys.modules[name]).update(LogClient=object, PutLogsRequest=object, LogItem=object)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in REFUSED:
        raise PermissionError(f"refused while exporting: {_request(event, arguments)}")


def _request(event: str, arguments: tuple[Any, ...]) -> str:
    what = arguments[1 if event == "socket.connect" else 0]  # the first is the socket
    return f"{event}: {what.decode() if isinstance(what, bytes) else what}"


def _watch(guarded: bool, sdk: bool) -> None:
    """Import the converter; print each request to the system instead of granting it."""
    asked = []

    def tell(event: str, arguments: tuple[Any, ...]) -> None:
        if event in REFUSED:
            asked.append(_request(event, arguments))
            raise PermissionError(event)

    sys.addaudithook(tell)
    _pretend(sdk) if sdk else None
    keep_offline() if guarded else None
    import MNN.tools.mnnconvert  # noqa: F401

    print(*(ASKED + line for line in asked), sep="\n")
