"""The kernel's accounts of processes."""

from __future__ import annotations

import errno
import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from relay_bench import processes


def test_processes_are_counted_with_their_children() -> None:
    words = [sys.executable, "-c", "import subprocess, sys; subprocess.run(['cat'])"]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process:
        while len(found := processes.family(process.pid)) < 2:
            assert process.poll() is None
        assert found[0] == process.pid
        assert processes.memory_bytes(process.pid) > processes.memory_bytes(process.pid, alone=True) > 1 << 20
        own = processes.own_memory_bytes(process.pid)
        assert 1 << 16 < own < processes.memory_bytes(process.pid)  # which counts programs and libraries, too
        assert processes.cpu_ns(process.pid) > 0
    assert processes.cpu_ns(process.pid) == processes.own_memory_bytes(process.pid) == 0
    assert processes.family(os.getpid())[0] == os.getpid()


def test_cpu_time_that_the_kernel_does_not_tell_of_is_not_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(time, "clock_gettime_ns", refuse)
    with pytest.raises(OSError, match="Invalid argument"):
        processes.cpu_ns(os.getpid())


def test_cpu_time_of_threads_that_have_ended_still_counts() -> None:
    burnt_ns = 20_000_000

    def burn() -> None:
        while time.thread_time_ns() < burnt_ns:
            pass

    before = processes.cpu_ns(os.getpid())
    thread = threading.Thread(target=burn)
    thread.start()
    thread.join()
    assert processes.cpu_ns(os.getpid()) - before >= burnt_ns


def test_a_free_port_is_none_that_the_kernel_gives() -> None:
    first, last = (int(word) for word in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    port = processes.free_port()
    with socket.create_server(("127.0.0.1", port)):
        assert not first <= port <= last


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    free = processes.free_port()
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        monkeypatch.setattr(random, "sample", lambda ports, k: [taken, free])
        assert processes.free_port() == free
        monkeypatch.setattr(random, "sample", lambda ports, k: [taken])
        assert processes.free_port() not in (taken, 0)
