"""The series runner on notebooks made here, which import no torch: a kernel's start is all they cost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from typer.testing import CliRunner

from helpers.__main__ import app
from helpers.errors import HelpersError
from helpers.run import check_parameters, cleaned, find_notebooks, run

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
PARAMETERS = 'model: str = "chatglm3-6b"\ncount: int = 2\nfast: bool = False\nsizes: list[str] = []'


def write(folder, name, title, *cells, parameters=None):
    code = [new_code_cell(cell) for cell in cells]
    if parameters:
        code.insert(0, new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    folder.mkdir(exist_ok=True)
    book = new_notebook(cells=[new_markdown_cell(f"# {title}"), *code], metadata={"kernelspec": KERNEL})
    nbformat.write(book, folder / f"{name}.ipynb")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def series(folder):
    books = folder / "notebooks"
    echo = (
        'from helpers import record\nrecord("doubled", 2 * count, "GB/s", machine=True, definition="d")\nprint(model)'
    )
    write(books, "01_echo", "Echo & more", echo, parameters=PARAMETERS)
    boom = "from helpers import HelpersError\nraise HelpersError('no <model>', 'it is small', 'take another')"
    write(books, "02_boom", "Boom", boom, "print('never')")
    write(books, "03_slow", "Slow", "import time\ntime.sleep(60)")
    write(books, "04_last", "Last", "1 + 1", parameters="other: float = 1.0")
    return books


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run of four notebooks with a parameter, two at a time, and a cell's limit of a few seconds."""
    folder = tmp_path_factory.mktemp("series")
    series(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        outcomes = run(parameters={"count": "21"}, jobs=2, timeout=6, progress=False)
    finally:
        os.chdir(before)
    return folder, {outcome.notebook.stem: outcome for outcome in outcomes}


def test_a_failure_does_not_stop_the_others(ran):
    _, outcomes = ran
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "01_echo": "ok", "02_boom": "failed", "03_slow": "failed", "04_last": "ok",
    }  # fmt: skip
    assert outcomes["02_boom"].error == "HelpersError: no <model>: it is small. Take another."
    assert outcomes["03_slow"].error.startswith("CellTimeoutError: ")


def test_parameters_reach_the_notebooks_that_have_them(ran):
    folder, outcomes = ran
    assert outcomes["01_echo"].parameters == {"count": 21} and outcomes["04_last"].parameters == {}
    (figure,) = outcomes["01_echo"].figures
    assert (figure["name"], figure["value"]) == ("doubled", 42)
    assert "count = 21" in (folder / "build/01_echo.ipynb").read_text()


def test_executed_notebooks_are_whole_and_nothing_else_is_left(ran):
    folder, _ = ran
    names = sorted(path.name for path in (folder / "build").iterdir())
    assert names == ["01_echo.ipynb", "02_boom.ipynb", "03_slow.ipynb", "04_last.ipynb", "index.html"]
    assert [path.name for path in folder.iterdir() if path.name not in ("build", "notebooks")] == []


def test_the_page_tells_title_status_figures_and_error(ran):
    folder, _ = ran
    page = (folder / "build/index.html").read_text()
    assert "<h1>Series run: 2 ok, 2 failed</h1>" in page
    assert '<a href="01_echo.ipynb">Echo &amp; more</a>' in page and "<li>doubled = 42 GB/s</li>" in page
    assert "no &lt;model&gt;: it is small" in page


def test_series_notebooks_are_not_touched_without_store(ran):
    folder, _ = ran
    assert 'execution_count": null' in (folder / "notebooks/01_echo.ipynb").read_text()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("count", "7", 7), ("count", 7, 7), ("fast", "true", True), ("sizes", '["a"]', ["a"]), ("model", "7", "7")],
)
def test_words_become_the_declared_type(here, name, value, expected):
    book = series(here) / "01_echo.ipynb"
    assert check_parameters([book], {name: value})[book] == {name: expected}


@pytest.mark.parametrize(
    ("name", "value"), [("count", "x"), ("count", 1.5), ("fast", "maybe"), ("model", 7), ("sizes", "a")]
)
def test_a_wrong_type_is_refused_before_anything_runs(here, name, value):
    series(here)
    with pytest.raises(HelpersError, match=rf"parameter '{name}': 01_echo declares it as .*default is"):
        run(parameters={name: value})
    assert not (here / "build").exists()


def test_an_unknown_parameter_lists_the_valid_ones(here):
    series(here)
    with pytest.raises(HelpersError, match=r"unknown parameter 'modle'.*01_echo: model, count, fast, sizes"):
        run(["01"], {"modle": "x"})


def test_notebooks_are_found_by_the_beginning_of_their_name(here):
    books = Path("notebooks")
    series(here)
    assert find_notebooks(["04", "01_echo"]) == [books / "04_last.ipynb", books / "01_echo.ipynb"]
    assert find_notebooks(["notebooks/02_boom.ipynb"]) == [books / "02_boom.ipynb"]
    with pytest.raises(HelpersError, match="unknown notebook '05'"):
        find_notebooks(["05"])


def test_an_empty_folder_says_where_to_go(here):
    with pytest.raises(HelpersError, match="from the repository root"):
        run()


def test_store_refuses_parameters(here):
    series(here)
    with pytest.raises(HelpersError, match="with parameters"):
        run(parameters={"count": 3}, store=True)


def test_store_writes_clean_outputs_back(here):
    write(
        here / "notebooks", "01_a", "A", "from helpers import record\nrecord('x', 1.0, 'GiB', machine=True)", "print(1)"
    )
    write(here / "notebooks", "02_b", "B", "import os\nprint(os.getcwd())")
    untouched = (here / "notebooks/02_b.ipynb").read_bytes()
    first, second = run(store=True, progress=False)
    book = nbformat.read(here / "notebooks/01_a.ipynb", as_version=4)
    nbformat.validate(book)
    assert first.status == "ok" and [cell.get("execution_count") for cell in book.cells] == [None, 1, 2]
    assert "papermill" not in book.metadata and all(cell.metadata == {} for cell in book.cells)
    assert set(book.cells[1].outputs[0].metadata["figure"]) == {"name", "value", "unit", "machine"}
    assert second.status == "failed" and "prints a path of this machine" in second.error
    assert (here / "notebooks/02_b.ipynb").read_bytes() == untouched


def executed(*outputs, count=1):
    return new_notebook(cells=[new_code_cell("x", execution_count=count, outputs=list(outputs))])


@pytest.mark.parametrize(
    ("book", "why"),
    [
        (executed(count=2), "has execution count 2"),
        (executed(new_output("error", ename="ValueError", evalue="", traceback=[])), "ends in ValueError"),
        (executed(new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}})), "shows a widget"),
        (executed(new_output("stream", text=f"{Path.home()}/x")), "path of this machine"),
        (executed(new_output("stream", name="stderr", text="/v/site-packages/x.py:1: UserWarning")), "path of this"),
    ],
)
def test_what_must_not_be_stored(book, why):
    with pytest.raises(HelpersError, match=why):
        cleaned(book)


def test_pieces_of_a_stream_are_joined():
    pieces = [
        new_output("stream", name=name, text=text) for name, text in (("stdout", "a"), ("stdout", "b"), ("stderr", "c"))
    ]
    assert [output.text for output in cleaned(executed(*pieces)).cells[0].outputs] == ["ab", "c"]


def test_ctrl_c_stops_the_kernel_and_leaves_a_page(here):
    wait = "import os, pathlib, time\npathlib.Path('kernel.pid').write_text(str(os.getpid()))\ntime.sleep(120)"
    write(here / "notebooks", "01_wait", "Wait", wait)
    write(here / "notebooks", "02_after", "After", "1")
    process = subprocess.Popen([sys.executable, "-m", "helpers", "run"], stderr=subprocess.PIPE, text=True)
    try:
        note = here / "notebooks/kernel.pid"
        deadline = time.monotonic() + 120
        while not (note.exists() and note.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        kernel = psutil.Process(int(note.read_text()))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "helpers/" not in errors  # no traceback of ours; the kernel's own may be there
    psutil.wait_procs([kernel], timeout=10)
    assert not kernel.is_running()
    page = (here / "build/index.html").read_text()
    assert re.search(r"<h1>.*1 not run, interrupted</h1>", page) and "not run" in page
    assert sorted(path.name for path in (here / "build").iterdir()) == ["index.html"]


def command_line(*words):
    return subprocess.run([sys.executable, "-m", "helpers", *words], capture_output=True, text=True)


def test_errors_are_one_line_on_stderr(here):
    series(here)
    result = command_line("run", "-p", "modle=x")
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch(r"unknown parameter 'modle': .*\n", result.stderr)


def test_run_exits_with_1_when_a_notebook_failed(here):
    series(here)
    result = CliRunner().invoke(app, ["run", "02"])
    assert result.exit_code == 1 and "HelpersError: no <model>" in result.stdout


def test_list_and_harvest_print_rows(ran):
    folder, _ = ran
    listed = CliRunner().invoke(app, ["list", "gpus"])
    assert listed.exit_code == 0 and len(listed.stdout.splitlines()) > 5
    without_model = CliRunner().invoke(app, ["harvest", str(folder / "build/04_last.ipynb")])
    assert without_model.exit_code == 0 and without_model.stdout == ""


def test_importing_helpers_imports_nothing_heavy():
    code = (
        "import helpers, sys; print([m for m in ('torch', 'transformers', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_public_name_is_there():
    import helpers

    assert all(callable(getattr(helpers, name)) or name == "catalog" for name in helpers.__all__)
    with pytest.raises(AttributeError, match="laod"):
        helpers.laod  # noqa: B018
    assert json.dumps(sorted(helpers.__all__)) == json.dumps(helpers.__dir__())
