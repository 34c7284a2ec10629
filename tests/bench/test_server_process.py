"""A measured server ends with who measures it."""

import os
import signal
import subprocess
import sys
import time

import psutil

MEASURE = """
import sys, time
from jaxinfer.bench.server_process import ServerProcess, free_port
port = free_port()
command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
with ServerProcess(command, base_url=f"http://127.0.0.1:{port}", ready_path="/") as server:
    print(server.pid, flush=True)
    time.sleep(60)
"""


def test_sigterm_ends_the_server_too():
    measure = subprocess.Popen([sys.executable, "-c", MEASURE], stdout=subprocess.PIPE, text=True)
    assert measure.stdout is not None
    with measure.stdout as answers:
        server = psutil.Process(int(answers.readline()))
        os.kill(measure.pid, signal.SIGTERM)
        assert measure.wait(30) == 128 + signal.SIGTERM
    deadline_s = time.monotonic() + 10
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s, "the server was left behind"
        time.sleep(0.05)
