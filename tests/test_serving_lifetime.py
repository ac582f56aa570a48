"""A server ends with its block, its process and its kernel, and tells why it did not start.

A program stands in for vLLM: it answers /health and has a child process, like vLLM's engine, that ignores everything.
It is started by the launcher that starts the real one, which test_serving.py does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from jupyter_client.manager import start_new_kernel

from helpers.errors import HelpersError
from helpers.serving import serve
from helpers.serving import server as module

STAND_IN = """
import http.server, multiprocessing, os, signal, sys, time

def engine():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

def main():
    exec(os.environ.get("STAND_IN_DOES", ""))
    multiprocessing.get_context("spawn").Process(target=engine).start()
    port = int(sys.argv[sys.argv.index("--port") + 1])
    print("argv", sys.argv, flush=True)
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path, monkeypatch):
    folder = tmp_path / "vllm" / "entrypoints" / "cli"
    folder.mkdir(parents=True)
    for each in (folder, folder.parent, folder.parent.parent):
        (each / "__init__.py").touch()
    (folder / "main.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(module, "GRACE", 1.0)


def family(server):
    """Return the processes of a server: vLLM's and the engine's."""
    parent = psutil.Process(server.pid)
    end = time.monotonic() + 60
    while len(found := parent.children(recursive=True)) < 2 and time.monotonic() < end:  # the engine and a tracker
        time.sleep(0.1)
    assert len(found) == 2
    return [parent, *found]


def alive(processes):
    """Return those that still run after they had time to end."""
    _, left = psutil.wait_procs(processes, timeout=15)
    return [each for each in left if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("reason", [None, ValueError, KeyboardInterrupt])
def test_the_end_of_the_block_is_the_end_of_the_server(reason):
    try:
        with serve("qwen-7b") as server:
            processes = family(server)
            if reason:
                raise reason
    except (ValueError, KeyboardInterrupt):
        pass
    assert alive(processes) == []
    assert "argv" in server.log(), "the log is gone with the server"
    server.stop()


def test_an_interrupt_while_it_starts_leaves_nothing(monkeypatch):
    started = []

    def interrupt(self, timeout, progress):
        started.extend(family(self))
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Server, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        serve("qwen-7b")
    assert started and alive(started) == []


SCRIPT = """
from helpers import serve
server = serve("qwen-7b")
print(server.pid, flush=True)
"""


def test_a_script_that_ends_takes_its_server_along():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=600, check=True)
    group = int(done.stdout.split()[-1])
    assert [each for each in psutil.process_iter() if _group(each) == group] == []


def test_the_command_line_serves_until_ctrl_c():
    command = [sys.executable, "-m", "helpers", "serve", "qwen-7b", "-o", "max_model_len=64"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        printed = [process.stdout.readline() for _ in range(3)]
        assert printed[1].startswith("export OPENAI_BASE_URL=http://127.0.0.1:") and "OPENAI_API_KEY" in printed[2]
        processes = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert processes and alive(processes) == []
    finally:
        process.kill()
        process.communicate()


def test_a_kernel_that_is_killed_takes_its_server_along():
    manager, client = start_new_kernel(env=os.environ | {"PYTHONPATH": os.environ["PYTHONPATH"]})
    try:
        printed = []
        client.execute_interactive(SCRIPT, output_hook=printed.append, timeout=600)
        text = "".join(each["content"].get("text", "") for each in printed)
        pid = int(text.split()[-1])
        server = psutil.Process(pid)
        processes = [server, *server.children(recursive=True)]
        port = next(each.laddr.port for each in server.net_connections() if each.status == psutil.CONN_LISTEN)
        os.kill(manager.provisioner.pid, signal.SIGKILL)
        assert alive(processes) == []
        listening = [each.laddr.port for each in psutil.net_connections() if each.status == psutil.CONN_LISTEN]
        assert port not in listening
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_the_engine_does_not_outlive_a_server_that_was_killed():
    with serve("qwen-7b") as server:
        processes = family(server)
        os.kill(server.pid, signal.SIGKILL)
        assert alive(processes[1:]) == []


def test_the_key_is_in_no_command_line_and_not_shown():
    with serve("qwen-7b") as server:
        assert len(server.key) >= 32
        assert server.key not in repr(server) + str(vars(server.job)) + server.log(None)
        assert all(server.key not in " ".join(each.cmdline()) for each in family(server))
    with serve("qwen-7b") as other:
        assert other.key != server.key


def test_a_start_that_dies_without_a_word_is_tried_once_more(monkeypatch, tmp_path):
    first = f"f = {str(tmp_path / 'first')!r}\nif not os.path.exists(f): open(f, 'w'); os._exit(1)"
    monkeypatch.setenv("STAND_IN_DOES", first)
    with serve("qwen-7b") as server:
        assert server.ready_seconds > 0
    monkeypatch.setenv("STAND_IN_DOES", "print('only this'); sys.stdout.flush(); os._exit(3)")
    with pytest.raises(HelpersError, match=r"cannot serve qwen-7b.*exit status 3; only this") as caught:
        serve("qwen-7b")
    assert "only this" in caught.value.__notes__[0]


def test_a_start_that_lost_the_port_of_its_workers_is_tried_once_more(monkeypatch, tmp_path):
    lost = "raise type('DistNetworkError', (Exception,), {})('port: 44191, address already in use')"
    once = f"f = {str(tmp_path / 'first')!r}\nif not os.path.exists(f):\n    open(f, 'w')\n    {lost}"
    monkeypatch.setenv("STAND_IN_DOES", once)
    with serve("qwen-7b") as server:
        assert server.ready_seconds > 0
    monkeypatch.setenv("STAND_IN_DOES", lost)
    with pytest.raises(HelpersError, match=r"cannot serve qwen-7b.*DistNetworkError: port: 44191"):
        serve("qwen-7b")


def test_a_start_that_fails_is_explained_and_not_tried_again(monkeypatch, tmp_path):
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')\n"
    monkeypatch.setenv("STAND_IN_DOES", count + "raise ValueError('No available memory for the cache blocks. ')")
    with pytest.raises(HelpersError, match=r"weights take .* GiB .* leaves no room for a cache") as caught:
        serve("qwen-7b")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "count").read_text() == "x"


def test_one_that_never_answers_is_stopped(monkeypatch, tmp_path):
    pid = tmp_path / "pid"
    monkeypatch.setenv("STAND_IN_DOES", f"open({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)")
    with pytest.raises(HelpersError, match=r"did not answer within 8 s"):
        serve("qwen-7b", timeout=8)
    assert not psutil.pid_exists(int(pid.read_text()))


def test_a_port_that_is_taken_is_refused_before_anything_starts():
    with serve("qwen-7b") as server, pytest.raises(HelpersError, match=r"at port \d+: it is taken"):
        serve("qwen-7b", port=server.port)


def _group(process):
    try:
        return os.getpgid(process.pid) if process.status() != psutil.STATUS_ZOMBIE else None
    except (ProcessLookupError, psutil.Error):
        return None
