"""What `pip install` runs: where there is a C compiler, the modules that pyproject.toml lists are compiled by mypyc.

They are ordinary modules, listed in pyproject.toml, and stay beside their compiled form, which Python prefers; where
nothing can be compiled they are what runs, with the same behaviour for more CPU. An editable install is not compiled,
so that an edit counts. ``RELAY_COMPILE=0`` leaves all as it is, ``RELAY_COMPILE=1`` fails where it cannot be compiled;
`relay version` says what an install has.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Run by itself in a folder with a copy of the package: mypyc has the names of modules from relative paths, and exits
# where it finds fault. What it knows of types decides what code it makes, so types that are missing are a fault too.
_SCRIPT = """
import sys
from mypyc.build import mypycify
from setuptools import setup
modules = mypycify(["--config-file=", *sys.argv[1:]], opt_level="2", debug_level="0", group_name="relay")
for module in modules:
    module.extra_compile_args.append("-Wno-error")  # a compiler's new warning, or one of the user's CFLAGS, is no fault
setup(name="relay", packages=[], ext_modules=modules, script_args=["build_ext", "--inplace"])
"""
_HINT = "what it takes: apt-get install gcc python3-dev; RELAY_COMPILE=0 does without"


class CompileError(Exception):
    """The modules could not be compiled; the message is the compiler's."""


class CompileHook(BuildHookInterface[BuilderConfig]):
    """Puts the compiled modules into a wheel."""

    _folder: tempfile.TemporaryDirectory[str] | None = None  # of what is compiled, until it is in the wheel

    def dependencies(self) -> list[str]:
        """The compiler, and what relay's own types are made of."""
        if os.environ.get("RELAY_COMPILE") == "0":
            return []
        return [*self.config["compiler"], *self.metadata.core.dependencies]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is built. Raises CompileError with ``RELAY_COMPILE=1``, where that is not possible."""
        wanted = os.environ.get("RELAY_COMPILE", "")
        if wanted not in ("", "0", "1"):
            raise CompileError(f"RELAY_COMPILE is {wanted!r}; it may be 0 or 1")
        if version == "editable" or wanted == "0":
            return
        self._folder = tempfile.TemporaryDirectory()
        try:
            compiled = compile_modules(Path(self.root), Path(self._folder.name), self.config["modules"])
        except (CompileError, OSError) as exc:
            self._folder.cleanup()
            if wanted == "1":
                raise
            self.app.display_warning(f"relay is installed without its compiled part: {exc}")
            return
        build_data["force_include"].update(compiled)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called behind it."""
        if self._folder is not None:
            self._folder.cleanup()


def compile_modules(root: Path, folder: Path, modules: list[str]) -> dict[str, str]:
    """Compiles modules of a package in `root`, by way of `folder`; by file, the place it has in a wheel.

    Raises CompileError, and OSError where `folder` has no room.
    """
    shutil.copytree(root / "relay", folder / "relay", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = subprocess.run([sys.executable, "-c", _SCRIPT, *modules], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{_errors(done.stdout + done.stderr)}; {_HINT}")
    paths = [*folder.glob("*.so"), *(folder / "relay").rglob("*.so")]
    return {str(path): str(path.relative_to(folder)) for path in paths}


def _errors(said: str) -> str:
    """What a compiler says is wrong, first things first: the last line is the whole command."""
    lines = [line.strip() for line in said.splitlines() if "error:" in line] or said.splitlines()[-1:]
    return "; ".join(lines)[:600]
