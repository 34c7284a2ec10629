"""A process and all its descendants: processor time, memory, and holding them still. Linux only.

`memory_bytes` is the proportional set size (PSS), in which pages that processes share count once;
`peak_rss_bytes` adds up what the kernel remembers of each process, start-up included.
"""

import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

SAMPLE_EVERY_S = 1.0


def members(pid: int) -> list[psutil.Process]:
    """The process first, then its descendants; empty when it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_s(pid: int) -> float:
    """Processor time of the tree so far, with that of children which have ended."""
    total_s = 0.0
    for process in members(pid):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            times = process.cpu_times()
            total_s += times.user + times.system + times.children_user + times.children_system
    return total_s


def memory_bytes(pid: int) -> int:
    return _sum_of(pid, "smaps_rollup", "Pss:")


def peak_rss_bytes(pid: int) -> int:
    return _sum_of(pid, "status", "VmHWM:")


def _sum_of(pid: int, file: str, field: str) -> int:
    """A figure that /proc gives in kilobytes, added up over the tree, in bytes."""
    total = 0
    for process in members(pid):
        with suppress(OSError):
            lines = Path(f"/proc/{process.pid}/{file}").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    return total


def idle_cpu_share(pid: int, *, seconds: float = 2.0) -> float:
    """Processor time of the tree, as a share of one core, while nobody asks anything of it."""
    before_s, start_s = cpu_s(pid), time.perf_counter()
    time.sleep(seconds)
    return (cpu_s(pid) - before_s) / (time.perf_counter() - start_s)


def pause(pid: int) -> None:
    """Stops the whole tree: it keeps its memory and takes no processor time at all."""
    for process in members(pid):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGSTOP)


def resume(pid: int) -> None:
    for process in reversed(members(pid)):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


class MemoryWatch:
    """The most memory that the tree of `pid` had, seen once a second until `close`."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._pid = pid
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, memory_bytes(self._pid))
            if self._end.wait(SAMPLE_EVERY_S):
                return
