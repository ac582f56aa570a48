"""Every notebook of the series: its shape (CONTRIBUTING.md), its stored outputs, and runs with other parameters."""

import re
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers.errors import HelpersError
from helpers.report.record import METADATA_KEY
from helpers.run import TYPES, check_parameters, run

ROOT = Path(__file__).parents[1]
SERIES = sorted((ROOT / "notebooks").rglob("*.ipynb"))
SERIES = [path for path in SERIES if ".ipynb_checkpoints" not in path.parts]

OTHER_PARAMETERS = {
    "00": {"model": "chatglm3-6b", "tokens": 8192},
    "01": {"model": "chatglm2-6b", "precision": "int8"},
    "02": {"model": "chinese-alpaca-plus-7b", "precision": "nf4"},
    "03": {"model": "atom-7b", "precision": "int8"},
    "04": {"model": "baichuan-7b", "precision": "nf4"},
    "05": {"precision": "int8"},
    "06": {"precision": "nf4"},
    "07": {"precision": "nf4"},
    "08": {"model": "baichuan-13b", "precision": "int8"},
    "09": {"model": "rwkv-4-7b", "precision": "nf4", "longest": 1024},
    "10": {"model": "glm-4-9b", "ancestor": "chatglm3-6b", "precision": "int8"},
    "11": {"model": "internlm2-7b", "precision": "nf4"},
    "12": {"model": "chatglm3-6b", "precision": "nf4"},
    "13": {"model": "chatglm3-6b", "precision": "nf4", "bits": 3, "group_size": 64},
    "14": {"model": "qwen-7b", "bits": 8, "group_size": 32},
    "15": {"model": "rwkv-6-7b", "precision": "nf4"},
    "16": {"model": "chatglm3-6b", "precision": "nf4", "gpu": "rtx-4090", "batch": 4},
    "17": {"model": "chatglm3-6b", "precision": "nf4", "gpu": "t4", "context": 4096},
    "20": {"model": "baichuan2-13b", "precision": "nf4", "largest_batch": 4},
    "21": {"model": "chatglm3-6b", "precision": "int8", "tool_parser": ""},
    "22": {"model": "chatglm3-6b", "precision": "nf4", "places": 2, "block_size": 64, "blocks": 40},
    "23": {"model": "chatglm3-6b", "methods": "int8 awq-int4 gptq-int3", "context": 256},
    "24": {
        "model": "chatglm3-6b",
        "precision": "nf4",
        "prompts": 4,
        "requests": 8,
        "seconds": 1.0,
        "loads": ["0.5", "2"],
    },
    "25": {"model": "chatglm3-6b", "precision": "nf4", "gpu": "t4"},
    "26": {"model": "chatglm3-6b", "precision": "nf4", "places": 2, "seconds": 8, "ttft": 0.02},  # no card meets it
    "30": {"model": "chatglm3-6b", "kinds": ["Q8_0", "Q5_0", "Q4_0"], "texts": 30},
    "31": {"model": "chatglm3-6b"},
    "32": {"model": "chatglm3-6b", "block": 32},
    "33": {"model": "internlm2-7b"},
    "34": {"model": "internlm2-7b", "group_size": 64},
    "35": {"model": "chatglm3-6b", "engines": ["transformers", "ctranslate2"]},
    "36": {"model": "baichuan2-13b"},
}
"""Beginning of a notebook's name -> what it must also run with, beside its defaults. Notebooks not there yet wait."""

MAX_LINES = 22
"""Most lines of a code cell; 15 is the aim, but the formatter gives each imported name its own."""

COLAB = """\
# On Colab only: take the series and what Colab lacks. Elsewhere `make setup` has done it.
import sys

if "google.colab" in sys.modules:
    !git clone --quiet --depth 1 --branch v{version} {address} series
    %cd series
    !pip install --quiet --no-deps -r env/colab/requirements.txt"""

IGNORED = "nbval-ignore-output"
TAGS = {"parameters", IGNORED}

HEADINGS = {
    "clean-up": r"clean(ing)?[- ]?up|清理",
    "what to try next": r"try next|下一步|接下来",
    "sources": r"sources|来源|参考",
}
PRIVATE_PATH = re.compile(r"(?<![\w.:/<])(/(home|root|work|tmp|Users|mnt|usr|opt)/|[A-Z]:\\)")
MACHINE_CALLS = re.compile(
    r"perf_counter|time\.time\(|monotonic|%+time|nvidia-smi|mem_get_info|cpu_count"
    r"|ready_seconds|server\.(metrics|log)\(|\bpreflight\(|\.table\(\)|copy_bandwidth\(|matmul_rate\(|request_seconds\("
    r"|__version__"
)
MACHINE_PRINTS = re.compile(r"print\(.*\b(used|speed)\.\w+|^(used|speed)(\.\w+)?$", re.MULTILINE)


def problems(book):
    """List what is wrong with a notebook as stored, each as one line that names the cell."""
    found = [*_shape(book), *_parameters(book)]
    for number, cell in enumerate(book.cells, start=1):
        found += [f"cell {number}: {what}" for what in _any_cell(cell)]
        if cell.cell_type == "code":
            found += [f"cell {number}: {what}" for what in _code_cell(cell)]
    counts = [cell.execution_count for cell in book.cells if cell.cell_type == "code"]
    if counts != list(range(1, len(counts) + 1)):
        found.append(f"execution counts are {counts}")
    return found


def _shape(book):
    first = book.cells[0] if book.cells else new_markdown_cell("")
    if first.cell_type != "markdown" or not first.source.startswith("# "):
        yield "the first cell is no title"
    opening = "\n".join(cell.source for cell in book.cells[:3] if cell.cell_type == "markdown")
    if not re.search(r"^\|.*\|$", opening, re.MULTILINE):
        yield "no table of needs in the opening"
    if "colab.research.google.com" not in opening:
        yield "no Colab badge in the opening"
    prose = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    for name, pattern in HEADINGS.items():
        if not re.search(rf"^#+ .*({pattern})", prose, re.MULTILINE | re.IGNORECASE):
            yield f"no heading about {name}"
    code = "\n".join(cell.source for cell in book.cells if cell.cell_type == "code")
    calls = re.search(r"\bload\(", code), re.search(r"\bpreflight\(", code)
    if calls[0] and not (calls[1] and calls[1].start() < calls[0].start()):
        yield "load( without preflight( before it"


def _parameters(book):
    cells = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        yield f"{len(cells)} cells are tagged parameters"
    for cell in cells:
        for line in cell.source.splitlines():
            typed = re.fullmatch(r"(\w+): ([\w\[\]]+) = .+", line)
            if line.strip() and not line.startswith("#") and not (typed and typed[2] in TYPES):
                yield f"parameter without a type of {', '.join(TYPES)}: {line}"


def _any_cell(cell):
    for path in {match[0] for match in PRIVATE_PATH.finditer(cell.source)}:
        yield f"absolute path {path}"
    for tag in set(cell.metadata.get("tags", [])) - TAGS:
        yield f"tag {tag}"
    for image in re.findall(r"<img\b[^>]*>|!\[\s*\]\(", cell.source):
        if not re.search(r'\balt="[^"]+"', image):
            yield f"picture without alt text: {image}"


def _code_cell(cell):
    if len(cell.source.splitlines()) > MAX_LINES:
        yield f"{len(cell.source.splitlines())} lines"
    if re.search(r"trust_remote_code", cell.source):
        yield "trust_remote_code"
    for about in re.findall(r"\bcommon\(([^()]*)", cell.source):
        if not re.search(r"\bdevice=", about):
            yield "common() without device=, so a figure may name another processor than the one that computed"
    compared = IGNORED not in cell.metadata.get("tags", [])
    if compared:
        for pattern in (MACHINE_CALLS, MACHINE_PRINTS):
            if machine := pattern.search(cell.source):
                yield f"shows the machine's {machine[0]} without record() or the tag {IGNORED}"
    for output in cell.outputs:
        yield from _output(output, compared)


def _output(output, compared):
    if output.output_type == "error":
        yield f"stored error {output.ename}"
    data = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data:
        yield "stored widget"
    if any(kind.startswith("image/") for kind in data):
        yield "picture without alt text: show it with show(fig, alt=...)"
    text = output.get("text", "") + "".join(value for value in data.values() if isinstance(value, str))
    for image in re.findall(r"<img\b[^>]*>", text):
        if not re.search(r'\balt="[^"]+"', image):
            yield f"picture without alt text: {image[:40]}"
    if PRIVATE_PATH.search(text):
        yield "stored output with an absolute path"
    if ": left out: " in text:
        yield "stored where something that it needs was missing"
    is_figure = METADATA_KEY in output.get("metadata", {})
    if compared and not is_figure and re.search(r"\d (tokens/s|GB/s|TFLOPS|ms|seconds)\b", text):
        yield "a speed or a time in the output that record() did not print"


# The rules themselves: a notebook that keeps them all, and one change for each that must be found.


def good():
    title = "# Load a model\n\nPromise.\n\n| needs | |\n| --- | --- |\n\n[badge](https://colab.research.google.com/x)"
    figure = {METADATA_KEY: {"name": "speed", "value": 1.0, "unit": "tokens/s", "machine": True}}
    line = new_output("display_data", {"text/plain": "speed = 1.000 tokens/s  (this machine)"}, metadata=figure)
    picture = new_output("display_data", {"text/html": '<img alt="a line" src="data:image/png;base64,AA">'})
    return new_notebook(
        cells=[
            new_markdown_cell(title),
            new_code_cell('# what to load\nmodel: str = "m"', execution_count=1, metadata={"tags": ["parameters"]}),
            new_code_cell("preflight(model)", execution_count=2, metadata={"tags": [IGNORED]}),
            new_code_cell("net = load(model)", execution_count=3, outputs=[line, picture]),
            new_markdown_cell("## Clean-up\n\n## What to try next\n\n## Sources"),
        ]
    )


def edit(number, **change):
    def apply(book):
        cell = book.cells[number]
        for key, value in change.items():
            cell[key] = value(cell[key]) if callable(value) else value

    return apply


def output(kind, *args, **more):
    return edit(3, outputs=[new_output(kind, *args, **more)])


BREAKS = [
    (edit(0, source=lambda text: text[2:]), "no title"),
    (edit(0, source=lambda text: text.replace("|", "")), "no table"),
    (edit(0, source=lambda text: text.replace("colab", "lab")), "no Colab badge"),
    (edit(1, metadata={}), "0 cells are tagged parameters"),
    (edit(1, source='model = "m"'), "parameter without a type"),
    (edit(1, source="model: Path = 1"), "parameter without a type"),
    (edit(2, source="1"), "load( without preflight("),
    (edit(2, metadata={}), "shows the machine's preflight("),
    (edit(2, metadata={"tags": ["raises-exception"]}), "tag raises-exception"),
    (edit(2, execution_count=None), "execution counts are [1, None, 3]"),
    (edit(3, source="load(model)\nused"), "shows the machine's used"),
    (edit(3, source="load(model)\nprint(f'{used.peak:.1f}')"), "shows the machine's print"),
    (edit(3, source="load(model)\n" + "x = 1\n" * 22), "23 lines"),
    (edit(3, source="load(model, trust_remote_code=False)"), "trust_remote_code"),
    (edit(3, source="load('/" + "home/me/model')"), "absolute path /home/"),
    (edit(3, source="load(model)\ncommon(model=model)"), "common() without device="),
    (output("error", ename="KeyError", evalue="", traceback=[]), "stored error KeyError"),
    (output("stream", text="12.3 tokens/s\n"), "record() did not print"),
    (output("stream", text="/" + "root/x.py\n"), "stored output with an absolute path"),
    (output("stream", text="mnn: left out: there is no .venv-frameworks\n"), "was missing"),
    (output("display_data", {"image/png": "AA"}), "show it with show("),
    (output("display_data", {"text/html": "<img src='x'>"}), "picture without alt text"),
    (output("display_data", {"application/vnd.jupyter.widget-view+json": {}}), "stored widget"),
    (edit(4, source=lambda text: text + "\n![](x.png)"), "picture without alt text"),
    (edit(4, source=lambda text: text.replace("Clean-up", "End")), "no heading about clean-up"),
    (edit(4, source=lambda text: text.replace("Sources", "End")), "no heading about sources"),
    (edit(4, source=lambda text: text.replace("try next", "do")), "no heading about what to try next"),
]


def test_rules_accept_a_notebook_that_keeps_them():
    assert problems(good()) == []


@pytest.mark.parametrize(("change", "expected"), BREAKS, ids=[expected for _, expected in BREAKS])
def test_rules_find_what_breaks_them(change, expected):
    book = good()
    change(book)
    found = problems(book)
    assert any(expected in problem for problem in found), found


# The series.


def name(path):
    return str(path.relative_to(ROOT / "notebooks")) if isinstance(path, Path) else None


@pytest.mark.parametrize("path", SERIES, ids=name)
def test_notebook_keeps_the_rules(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert problems(book) == []


@pytest.mark.parametrize("path", SERIES, ids=name)
def test_badge_and_colab_cell_name_this_repository_and_release(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address, cells = project["urls"]["Repository"], nbformat.read(path, as_version=4).cells
    page = f"{address.removeprefix('https://github.com/')}/blob/v{project['version']}/notebooks/{path.name}"
    assert f"(https://colab.research.google.com/github/{page})" in cells[0].source
    assert cells[1].source == COLAB.format(address=address, version=project["version"])


OTHERS = [(path, given) for start, given in OTHER_PARAMETERS.items() for path in SERIES if path.name.startswith(start)]


@pytest.mark.parametrize(("path", "given"), OTHERS, ids=name)
def test_notebook_runs_with_other_parameters(path, given, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (outcome,) = run([path.relative_to(ROOT)], given, tmp_path, progress=False)
    if outcome.status == "skipped":  # its kernel needs another Python than this one
        pytest.skip(outcome.error)
    assert (outcome.status, outcome.error) == ("ok", "")
    assert outcome.parameters == given  # it has all of them


WITH_MODEL = [path for path in SERIES if "model: str" in path.read_text(encoding="utf-8")]
OTHER_KERNEL = [path for path in WITH_MODEL if '"name": "python3"' not in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", OTHER_KERNEL, ids=name)
def test_unknown_model_fails_with_one_line(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (outcome,) = run([path.relative_to(ROOT)], {"model": "chatglm9"}, tmp_path, progress=False)
    if outcome.status == "skipped":
        pytest.skip(outcome.error)
    assert outcome.status == "failed" and outcome.error.startswith("HelpersError: unknown model 'chatglm9'")


@pytest.mark.parametrize("path", [path for path in WITH_MODEL if path not in OTHER_KERNEL], ids=name)
def test_unknown_model_is_the_first_error(path, monkeypatch):
    """As above, but in this process: starting a kernel for each would take minutes."""
    monkeypatch.chdir(path.parent)
    names = {}
    with pytest.raises(HelpersError, match=r"^unknown model 'chatglm9'"):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code" and "google.colab" not in cell.source:
                exec(compile(cell.source, str(path), "exec"), names)
                names["model"] = "chatglm9"


@pytest.mark.parametrize("path", SERIES, ids=name)
def test_defaults_have_the_declared_types(path):
    import ast

    tree = ast.parse(
        next(cell.source for cell in nbformat.read(path, 4).cells if "parameters" in cell.metadata.get("tags", []))
    )
    defaults = {line.target.id: ast.literal_eval(line.value) for line in tree.body}
    assert check_parameters([path], defaults)[path] == defaults


def test_the_pieces_of_notebook_16_fill_one_card():
    """Two engines' recorded pieces beside each other: taken from one card, something is free."""
    (path,) = (path for path in SERIES if path.name.startswith("16_"))
    printed = "".join(
        output.get("text", "")
        for cell in nbformat.read(path, 4).cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    free = [float(size) for size in re.findall(r"^\w+, bf16: .* free (-?[\d.]+);", printed, re.MULTILINE)]
    assert len(free) == 2 and all(size > 0 for size in free)
