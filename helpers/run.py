"""Run the series: every notebook through papermill, one after another or some at a time, and a page about it.

Each notebook runs in a process of its own, which writes below ``<output>/.parts`` and is moved to its place when it
has ended: a notebook in the output folder is whole, whatever happened.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import HelpersError, unknown
from .report.record import format_value, recorded

if TYPE_CHECKING:
    from nbformat import NotebookNode

NOTEBOOKS = Path("notebooks")
CELL_SECONDS = 1800
"""How long one cell may take unless told otherwise."""

STOP_SECONDS = 30
"""How long an interrupted notebook has to stop its kernel before it is ended."""

KERNELS = {
    "python3": "Python 3 (ipykernel)",
    "autogptq": "AutoGPTQ (Python 3.11)",
    "frameworks": "Other frameworks",
}
"""The kernels a notebook may name, with the names JupyterLab shows; env/setup.py makes them."""

TYPES: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool, "list[str]": list[str]}
"""The annotations a parameters cell may use."""


@dataclass
class Outcome:
    """What became of one notebook.

    Attributes:
        notebook: the file in the series.
        title: its first heading.
        status: ``"not run"``, ``"ok"``, ``"failed"``, ``"interrupted"``, or ``"skipped"`` where its kernel is missing.
        seconds: wall time, the kernel's start included.
        parameters: those this notebook was given.
        figures: what it recorded.
        error: the last line of the error, or why it was skipped; empty when there is nothing to say.
        result: the executed notebook, relative to the output folder.
    """

    notebook: Path
    title: str
    parameters: dict[str, Any]
    result: Path
    status: str = "not run"
    seconds: float = 0.0
    figures: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""


def run(
    notebooks: Sequence[str | Path] | None = None,
    parameters: Mapping[str, Any] | None = None,
    output: str | Path = "build",
    store: bool = False,
    jobs: int = 1,
    timeout: int = CELL_SECONDS,
    progress: bool = True,
) -> list[Outcome]:
    """Execute notebooks; a failure does not stop the others.

    Args:
        notebooks: paths, or beginnings of names in ``notebooks/`` such as ``"01"``; all of ``notebooks/*.ipynb`` in
            order when None.
        parameters: values for the cell tagged ``parameters``. Each notebook gets those it has; one that no notebook
            has is an error. Words are turned into the annotated type, as they come from a command line.
        output: folder of the executed notebooks and of index.html, which is renewed after every notebook.
        store: also write outputs back into the notebooks, cleaned; only without parameters.
        jobs: notebooks at the same time.
        timeout: seconds that one cell may take.
        progress: show a bar over the notebooks, and one over the cells of each that runs.

    Returns:
        One outcome a notebook, in order; those interrupted or not reached say so.

    Raises:
        HelpersError: no such notebook, an unknown parameter or a value of the wrong type; nothing has run then.
        KeyboardInterrupt: after kernels were stopped and the page was written.
    """
    if store and parameters:
        why = "the repository keeps the outputs of the default run"
        raise HelpersError("cannot store outputs of a run with parameters", why, "leave out --store or -p")
    files = find_notebooks(notebooks)
    given = check_parameters(files, parameters or {})
    output = Path(output)
    outcomes = [Outcome(file, _title(file), given[file], _result_name(file)) for file in files]
    for outcome in outcomes:
        if missing := missing_kernel(outcome.notebook):
            outcome.status, outcome.error = "skipped", missing
    output.mkdir(parents=True, exist_ok=True)
    try:
        _run_all(outcomes, output, jobs, timeout, progress, store)
    finally:
        shutil.rmtree(output / ".parts", ignore_errors=True)
        write_page(outcomes, output)
    return outcomes


def find_notebooks(names: Sequence[str | Path] | None = None) -> list[Path]:
    """Turn paths and beginnings of names into files; see ``run``."""
    series = sorted(NOTEBOOKS.glob("*.ipynb"))
    if names is None:
        if not series:
            raise HelpersError(
                "nothing to run", f"there is no notebook in {NOTEBOOKS}/", "run from the repository root"
            )
        return series
    files = []
    for name in map(str, names):
        found = [Path(name)] if name.endswith(".ipynb") else [file for file in series if file.name.startswith(name)]
        if not found or not all(file.is_file() for file in found):
            raise unknown("notebook", name, [file.stem for file in series])
        files += found
    return list(dict.fromkeys(files))


def kernel_of(notebook: Path) -> str:
    """Return the name of the kernel a notebook asks for: one of ``KERNELS``, the series' own where it names another."""
    metadata = json.loads(notebook.read_text(encoding="utf-8"))["metadata"]
    name = metadata.get("kernelspec", {}).get("name")
    return name if name in KERNELS else "python3"


def missing_kernel(notebook: Path) -> str:
    """Say in one line what is missing to run a notebook here, and what to do; empty when nothing is."""
    name = kernel_of(notebook)
    if name == "python3" or (Path(sys.prefix) / "share" / "jupyter" / "kernels" / name).is_dir():
        return ""
    return f"its kernel {name!r} is not installed: run make {name}"


def check_parameters(files: Sequence[Path], parameters: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """Return the parameters of each notebook, as the types its parameters cell declares.

    Raises:
        HelpersError: a name that none of the notebooks has (their valid ones are listed), or a wrong type.
    """
    import papermill
    from pydantic import TypeAdapter, ValidationError

    declared = {}
    for file in files:
        try:
            declared[file] = papermill.inspect_notebook(file)
        except ValueError as error:  # not JSON, or no kernel named
            raise HelpersError(f"cannot read {file}", _one_line(str(error)), "save it from JupyterLab again") from None
    for name in parameters:
        if not any(name in known for known in declared.values()):
            valid = "; ".join(f"{file.stem}: {', '.join(known) or 'none'}" for file, known in declared.items())
            raise HelpersError(f"unknown parameter {name!r}", "no notebook of this run has it", f"valid: {valid}")
    given: dict[Path, dict[str, Any]] = {}
    for file, known in declared.items():
        given[file] = {}
        for name, value in parameters.items():
            if name not in known:
                continue
            annotation = known[name]["inferred_type_name"]
            if annotation not in TYPES:
                raise HelpersError(
                    f"cannot set {name!r} of {file.stem}",
                    f"its parameters cell declares it as {annotation}",
                    f"declare one of {', '.join(TYPES)}",
                )
            try:
                value = json.loads(value) if annotation.startswith("list") and isinstance(value, str) else value
                given[file][name] = TypeAdapter(TYPES[annotation]).validate_python(value)
            except (ValidationError, ValueError):
                raise HelpersError(
                    f"wrong value {value!r} for parameter {name!r}",
                    f"{file.stem} declares it as {annotation}",
                    f"its default is {known[name]['default']}",
                ) from None
    return given


def _run_all(outcomes: list[Outcome], output: Path, jobs: int, timeout: int, progress: bool, store: bool) -> None:
    """Keep up to ``jobs`` notebooks running until all have ended; on Ctrl-C stop those that run."""
    from tqdm import tqdm

    waiting, running = [outcome for outcome in outcomes if outcome.status != "skipped"], {}
    with tqdm(total=len(waiting), desc="notebooks", unit="notebook", disable=not progress) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < max(1, jobs):
                    child = _Child(waiting.pop(0), output, timeout, cells_bar=progress and jobs == 1)
                    running[child.process.sentinel] = child
                for sentinel in wait(list(running)):
                    running.pop(sentinel).finish(store)
                    bar.update()
                    write_page(outcomes, output)
        except KeyboardInterrupt:
            for child in running.values():
                child.interrupt()
            for child in running.values():
                child.end()
            raise


class _Child:
    """One notebook in its own process."""

    def __init__(self, outcome: Outcome, output: Path, timeout: int, cells_bar: bool) -> None:
        self.outcome, self.target = outcome, output / outcome.result
        self.part = output / ".parts" / outcome.result
        self.part.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        self.answer, theirs = context.Pipe(duplex=False)
        arguments = (theirs, outcome.notebook, self.part, outcome.parameters, timeout, cells_bar)
        self.process: BaseProcess = context.Process(target=_execute, args=arguments)
        self.start = time.monotonic()
        self.process.start()
        theirs.close()

    def finish(self, store: bool) -> None:
        """Take the ended process's result: move the notebook to its place, read its figures, note an error."""
        self.process.join()
        outcome = self.outcome
        outcome.seconds = time.monotonic() - self.start
        try:
            outcome.error = self.answer.recv()
        except EOFError:
            outcome.error = f"the process ended with exit code {self.process.exitcode}"
        outcome.status = "failed" if outcome.error else "ok"
        if self.part.exists():
            self.target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.part, self.target)
            outcome.figures = recorded(self.target)
        if store and not outcome.error:
            try:
                store_outputs(self.target, outcome.notebook)
            except HelpersError as error:
                outcome.status, outcome.error = "failed", str(error)

    def interrupt(self) -> None:
        """Ask the notebook to stop its kernel and end."""
        self.outcome.status, self.outcome.seconds = "interrupted", time.monotonic() - self.start
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGINT)

    def end(self) -> None:
        """Wait for an interrupted notebook, and end it when it takes too long."""
        self.process.join(STOP_SECONDS)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def _execute(
    answer: Connection, notebook: Path, part: Path, parameters: dict[str, Any], timeout: int, cells_bar: bool
) -> None:
    """Run one notebook (in the child) and answer with the line of its error, or with an empty one."""
    import logging

    import papermill

    os.setpgrp()  # Ctrl-C in a terminal reaches the parent alone, which interrupts each child once
    logging.getLogger("papermill").setLevel(logging.ERROR)
    bar = {"desc": notebook.stem, "position": 1, "leave": False} if cells_bar else False
    try:
        papermill.execute_notebook(
            notebook,
            part,
            parameters,
            kernel_name=kernel_of(notebook),
            progress_bar=bar,
            execution_timeout=timeout,
            resources={"metadata": {"path": str(notebook.parent)}},  # where the kernel starts, as in JupyterLab
        )
        answer.send("")
    except papermill.PapermillExecutionError as error:
        answer.send(f"{error.ename.rpartition('.')[2]}: {_one_line(error.evalue)}")
    except KeyboardInterrupt:  # papermill has stopped the kernel on its way here
        answer.send("interrupted")
    except Exception as error:  # a timeout, a kernel that died: whatever it was, the page tells it
        answer.send(f"{type(error).__name__}: {_one_line(str(error))}")


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[0] if lines else "no message"


def store_outputs(executed: Path, notebook: Path) -> None:
    """Write an executed notebook's outputs back into the series, without what belongs to one run or machine.

    Raises:
        HelpersError: a cell was not run, or an output holds an error, a widget or a path of this machine; the
            notebook of the series is left as it was.
    """
    import nbformat

    clean = cleaned(nbformat.read(executed, as_version=4))
    writing = notebook.with_suffix(".writing")
    nbformat.write(clean, writing)
    os.replace(writing, notebook)


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """Return an executed notebook as the repository keeps it; raises as ``store_outputs``."""
    from .report.record import METADATA_KEY

    name = notebook.metadata.get("kernelspec", {}).get("name")
    name = name if name in KERNELS else "python3"
    notebook.metadata = {
        "kernelspec": {"display_name": KERNELS[name], "language": "python", "name": name},
        "language_info": {"name": "python"},
    }
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells, start=1):
        if cell.execution_count != number:
            why = f"code cell {number} has execution count {cell.execution_count}"
            raise HelpersError("cannot store this notebook", why, "run all of it in order")
        cell.outputs = _joined(cell.outputs)
        for output in cell.outputs:
            _refuse(output, number)
            for name in ("device", "driver", "versions", "date"):
                output.get("metadata", {}).get(METADATA_KEY, {}).pop(name, None)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
    return notebook


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join pieces of one stream that follow each other: where they were cut depends on the time."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == "stream" == joined[-1].output_type and output.name == joined[-1].name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _refuse(output: NotebookNode, number: int) -> None:
    """Raise for an output that must not be stored."""
    texts = [output.get("text", ""), *(value for value in output.get("data", {}).values() if isinstance(value, str))]
    private = [place for place in (str(Path.cwd()), str(Path.home()), "site-packages") if place != "/"]
    why, fix = "", ""
    if output.output_type == "error":
        why, fix = f"ends in {output.ename}", "correct it"
    elif "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
        why, fix = "shows a widget, which nobody else can see", "turn the progress bar off"
    elif any(place in text for text in texts for place in private):
        why, fix = "prints a path of this machine", "print a relative path, or silence the warning"
    if why:
        raise HelpersError("cannot store this notebook", f"code cell {number} {why}", fix)


def _title(file: Path) -> str:
    """Return a notebook's first heading, without its marks."""
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        heading = re.search(r"^#+ +(.+)$", "".join(cell["source"]), re.MULTILINE)
        if cell["cell_type"] == "markdown" and heading:
            return heading[1].strip()
    return file.stem


def _result_name(file: Path) -> Path:
    """Keep subfolders of notebooks/, such as zh-CN/, in the output folder."""
    return file.relative_to(NOTEBOOKS) if file.is_relative_to(NOTEBOOKS) else Path(file.name)


STATUSES = ["ok", "failed", "skipped", "not run"]

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ heading }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid #ccc; padding: .4rem .6rem; text-align: left; vertical-align: top; }
.ok { color: #00694c; } .failed { color: #a33c00; font-weight: bold; }
ul { margin: 0; padding-left: 1rem; } code { overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ heading }}</h1>
<table>
<thead><tr><th scope="col">Notebook</th><th scope="col">Status</th><th scope="col">Seconds</th>
<th scope="col">Key figures</th></tr></thead>
<tbody>
{%- for outcome in outcomes %}
<tr>
<th scope="row">
{%- if outcome.status in ("ok", "failed") and (output / outcome.result).exists() -%}
<a href="{{ outcome.result.as_posix() }}">{{ outcome.title }}</a>
{%- else %}{{ outcome.title }}{% endif %}
{%- if outcome.parameters %}<br><code>{{ outcome.parameters }}</code>{% endif %}</th>
<td class="{{ outcome.status }}">{{ outcome.status }}
{%- if outcome.error %}<br><code>{{ outcome.error }}</code>{% endif %}</td>
<td>{{ "%.1f" % outcome.seconds if outcome.seconds else "" }}</td>
<td><ul>{% for figure in outcome.figures -%}
<li>{{ figure.name }} = {{ format_value(figure.value) }} {{ figure.unit }}</li>{% endfor %}</ul></td>
</tr>
{%- endfor %}
</tbody>
</table>
</body>
</html>
"""


def write_page(outcomes: Sequence[Outcome], output: Path) -> None:
    """Write index.html: one row a notebook with status, seconds, key figures and the error's line."""
    from jinja2 import Environment

    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in STATUSES}
    heading = "Series run: " + ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    if any(outcome.status == "interrupted" for outcome in outcomes):
        heading += ", interrupted"
    template = Environment(autoescape=True).from_string(PAGE)
    page = template.render(heading=heading, outcomes=outcomes, output=output, format_value=format_value)
    writing = output / "index.html.writing"
    writing.write_text(page, encoding="utf-8")
    os.replace(writing, output / "index.html")
