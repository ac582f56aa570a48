"""What several tests need: Ctrl+C that is heard, and a way into the environment of the other frameworks."""

import json
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Tests press Ctrl+C on programs they start, and a shell has its background jobs ignore it, with all they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def in_frameworks():
    """Return a function that runs code in .venv-frameworks and returns what its last line says as JSON."""
    python = ROOT / ".venv-frameworks" / "bin" / "python"

    def run(code, *arguments):
        if not python.exists():
            pytest.skip("there is no .venv-frameworks (make frameworks)")
        command = [python, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
