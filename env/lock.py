"""Write the lock.txt of each set and env/uv.txt anew from what stands beside them (`make lock`).

A pin stays where it is unless its requirement moves it; `python env/lock.py --upgrade` renews all of them.
env/cpu/torch.txt is kept by hand: its hashes are listed on PyTorch's own index.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from setup import ROOT, VENV, pip_settings, uv_environment

UV = "uv==0.13.9\n"
# Linux and macOS in one file, by markers: small differences only.
CPU = ["--universal", "--excludes", "env/cpu/excluded.txt", "env/cpu/requirements.in", "-o", "env/cpu/lock.txt"]
# vLLM's GPU build is for one platform.
GPU = ["--python-platform", "x86_64-manylinux_2_28", "--excludes", "env/gpu/excluded.txt"]
GPU += ["--overrides", "env/gpu/overrides.txt", "env/gpu/requirements.in", "-o", "env/gpu/lock.txt"]
# AutoGPTQ's last wheel is for Linux x86-64 and Python 3.11; torch is left out as in the cpu set.
AUTOGPTQ = ["--python-platform", "x86_64-manylinux_2_28", "--excludes", "env/cpu/excluded.txt"]
AUTOGPTQ += ["env/autogptq/requirements.in", "-o", "env/autogptq/lock.txt"]
# LMDeploy's and MNN's wheels are for Linux x86-64; torch is left out as in the cpu set.
FRAMEWORKS = ["--python-platform", "x86_64-manylinux_2_28", "--excludes", "env/frameworks/excluded.txt"]
FRAMEWORKS += ["--overrides", "env/frameworks/overrides.txt", "env/frameworks/requirements.in"]
FRAMEWORKS += ["-o", "env/frameworks/lock.txt"]


def main(extra: list[str]) -> int:
    """Resolve each set; `extra` goes to `uv pip compile` as it is."""
    # An index only this machine knows must not get into the locks: of pip's sources the main one alone is passed on.
    only = ("index-url", "trusted-host", "cert", "proxy", "timeout")
    env = uv_environment(pip_settings(Path(sys.executable)), only)
    common = [VENV / "bin" / "uv", "pip", "compile", "--quiet", "--python-version", "3.11", "--generate-hashes"]
    common += ["--custom-compile-command", "make lock", *extra]
    for name, target in (("cpu", CPU), ("gpu", GPU), ("autogptq", AUTOGPTQ), ("frameworks", FRAMEWORKS)):
        print(f"-- resolving the {name} set", flush=True)
        subprocess.run([*common, *target], cwd=ROOT, env=env, check=True)
    print("-- resolving uv", flush=True)
    command = [*common, "--universal", "-", "-o", "env/uv.txt"]
    subprocess.run(command, cwd=ROOT, env=env, input=UV, text=True, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
