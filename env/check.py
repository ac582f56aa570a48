"""Run every check of the project in order, go on when one fails, and close with what passed (`make test`)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist"]
SERIES = "tests/test_series.py"
SECTIONS = {
    "style": [sys.executable, "-m", "ruff", "check"],
    "layout": [sys.executable, "-m", "ruff", "format", "--check"],
    "environments": [sys.executable, "env/setup.py", "autogptq", "frameworks", "--if-possible"],
    "tests": [*PYTEST, "loadscope", f"--ignore={SERIES}", "tests"],
    "other parameters": [*PYTEST, "worksteal", SERIES],  # a notebook each, from seconds to minutes
    "stored outputs": [*PYTEST, "loadscope", "--nbval", "--nbval-sanitize-with", "tests/nbval.cfg", "notebooks"],
}


KERNELS = Path(sys.prefix) / "share" / "jupyter" / "kernels"


def without_kernel() -> dict[str, str]:
    """Return the notebooks that cannot run here, with the reason: their kernel is not installed."""
    found = {}
    for path in sorted((ROOT / "notebooks").rglob("*.ipynb")):
        name = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("kernelspec", {}).get("name", "python3")
        if not (KERNELS / name).is_dir():
            found[str(path.relative_to(ROOT))] = f"its kernel {name!r} is not installed (make {name})"
    return found


@dataclass(frozen=True)
class Outcome:
    """How a section ended: its exit status, its time in seconds, and the closing line of its test runner, if any."""

    name: str
    status: int
    seconds: float
    closing: str

    def count(self, word: str) -> int:
        """Read a figure of the closing line, e.g. 3 for "failed" in "3 failed, 20 passed in 4.2s"."""
        found = re.search(rf"(\d+) {word}", self.closing)
        return int(found.group(1)) if found else 0


def run(name: str, command: list[str]) -> Outcome:
    """Run a section, passing its output on as it comes."""
    start = time.monotonic()
    closing = ""
    # pytest's plug-ins may read the terminal; there is none here.
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if re.search(r"\d+ (passed|failed|errors?|skipped|deselected|xfailed).* in [\d.]+s", line):
                closing = line.strip(" =\n")
    return Outcome(name, process.returncode, time.monotonic() - start, closing)


def main() -> int:
    """Run all sections; return 1 if any failed."""
    outcomes, left_out = [], {}
    for number, (name, command) in enumerate(SECTIONS.items(), 1):
        if "--nbval" in command:
            left_out = without_kernel()
            command = [*command, *(f"--ignore={path}" for path in left_out)]
        print(f"\n== {number}/{len(SECTIONS)} {name}: {' '.join(['python', *command[1:]])}", flush=True)
        outcomes.append(run(name, command))
        print(f"-- {name}: {outcomes[-1].seconds:.0f} s", flush=True)

    print("\n== summary")
    for one in outcomes:
        word = "ok" if one.status == 0 else f"FAILED (exit status {one.status})"
        print(f"{one.name:<16}{one.seconds:>6.0f} s  {word:<10}  {one.closing}".rstrip())
    for path, why in left_out.items():
        print(f"left out: {path}: {why}")
    # A section that counts no tests of its own counts as one.
    passed = sum(one.count("passed") if one.closing else one.status == 0 for one in outcomes)
    failed = sum((one.count("failed") + one.count("error")) or one.status != 0 for one in outcomes)
    print(f"{passed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
