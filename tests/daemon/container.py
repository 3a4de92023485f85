"""A booted systemd to try units in: this machine's root under an overlay, in systemd-nspawn, without a network."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

#: For one command; booting takes about ten.
LIMIT_S = 60.0

#: Debian's own, since the service sees no home directories.
PYTHON = Path("/usr/bin/python3")


def why_not() -> str | None:
    """Why there can be no container here; `None`: there can."""
    if os.geteuid() != 0:
        return "needs root"
    for tool in ("systemd-nspawn", "nsenter", "mount", "chroot"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    if not PYTHON.exists():
        return f"needs {PYTHON}"
    version = run(str(PYTHON), "-c", "import sys; print(*sys.version_info[:2], sep='.')").strip()
    if version != f"{sys.version_info[0]}.{sys.version_info[1]}":
        return f"needs {PYTHON} to be the Python of the tests, whose packages it gets; it is {version}"
    return None


def run(*command: str, script: str | None = None) -> str:
    """Runs a command, and returns its standard output; fails with all of its output."""
    result = subprocess.run(command, input=script, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert result.returncode == 0, f"{command}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


class Container:
    """The overlay at `root`, below a directory of the test's, and the systemd that was booted in it."""

    def __init__(self, directory: Path) -> None:
        self._writable = directory / "writable"
        self.root = directory / "root"
        self._log = directory / "boot.log"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._init = 0

    def mount(self) -> None:
        """Makes the root: what is written there stays in memory, and the machine's own files as they are."""
        self._writable.mkdir()
        self.root.mkdir()
        run("mount", "-t", "tmpfs", "tmpfs", str(self._writable))
        for name in ("upper", "work"):
            (self._writable / name).mkdir()
        layers = f"lowerdir=/,upperdir={self._writable}/upper,workdir={self._writable}/work"
        run("mount", "-t", "overlay", "overlay", "-o", layers, str(self.root))
        (self.root / "etc/machine-id").unlink(missing_ok=True)
        (self.root / "etc/machine-id").touch()  # empty: systemd makes one, for this boot

    def boot(self) -> None:
        """Starts systemd, and waits until it has started everything."""
        with self._log.open("wb") as log:
            self._nspawn = subprocess.Popen(
                ["systemd-nspawn", "--register=no", "--keep-unit", "--private-network", "--link-journal=no",
                 "--console=pipe", "--boot", "--machine=relay-test", f"--directory={self.root}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + LIMIT_S
        while not self._is_up():
            has_time = self._nspawn.poll() is None and time.monotonic() < deadline
            assert has_time, self._log.read_text()
            time.sleep(0.1)  # nobody tells of it: there is no machined to register with
        self.sh("ip link set lo up")

    def _is_up(self) -> bool:
        assert self._nspawn is not None
        for child in Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split():
            if Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                self._init = int(child)
                return self.sh("systemctl is-system-running || true") in ("running\n", "degraded\n")
        return False

    def sh(self, script: str) -> str:
        """Runs a shell script inside; its standard output."""
        inside = ["nsenter", f"--target={self._init}", "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"]
        return run(*inside, "--wd=/", "bash", "-e", script=script)

    def close(self) -> None:
        """Ends it, and takes the overlay away."""
        if self._nspawn is not None:
            os.killpg(self._nspawn.pid, signal.SIGKILL)
            if self._init:
                os.kill(self._init, signal.SIGKILL)
            self._nspawn.wait()
        for mounted in (self.root, self._writable):
            if mounted.is_mount():
                run("umount", "--lazy", str(mounted))
