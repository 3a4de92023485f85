"""What a wheel has of compiled modules, and what becomes of it where they cannot be compiled."""

from __future__ import annotations

import shutil
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hatchling.bridge.app import Application
from hatchling.builders.config import BuilderConfig

from relay import hatch_build

ROOT = Path(__file__).parents[1]

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="no C compiler, or not Python's headers",
)


def hook(root: Path, *modules: str) -> hatch_build.CompileHook:
    builder: Any = object()
    config = {"modules": list(modules)}
    where = str(root)
    build = BuilderConfig(builder, where, "wheel", {}, {})
    return hatch_build.CompileHook(where, config, build, builder, where, "wheel", Application())


def package(root: Path, text: str) -> Path:
    (root / "relay").mkdir()
    (root / "relay" / "__init__.py").touch()
    (root / "relay" / "double.py").write_text(text)
    return root


def build_data() -> dict[str, Any]:
    return {"force_include": {}, "pure_python": True, "infer_tag": False}


@needs_compiler
def test_a_module_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_COMPILE", "1")
    data = build_data()
    compiling = hook(package(tmp_path, "def double(number: int) -> int:\n    return 2 * number\n"), "relay/double.py")
    compiling.initialize("standard", data)
    assert (data["pure_python"], data["infer_tag"]) == (False, True)
    places = {place.partition(".")[0]: Path(path) for path, place in data["force_include"].items()}
    assert {*places} == {"relay/double", "relay__mypyc"}
    assert all(path.is_file() for path in places.values())
    compiling.finalize("standard", data, "")
    assert not any(path.exists() for path in places.values())


def test_what_cannot_be_compiled_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RELAY_COMPILE", raising=False)
    data = build_data()
    hook(package(tmp_path, "number: int = 'none'\n"), "relay/double.py").initialize("standard", data)
    assert data == build_data()
    assert "relay is installed without its compiled part: relay/double.py:1: error" in "".join(capsys.readouterr())


def test_whoever_wants_it_compiled_is_told_why_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_COMPILE", "1")
    with pytest.raises(hatch_build.CompileError, match="Incompatible types in assignment"):
        hook(package(tmp_path, "number: int = 'none'\n"), "relay/double.py").initialize("standard", build_data())


@needs_compiler
def test_flags_that_warn_are_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", "-Wall -Wextra -Wpedantic")
    package(tmp_path, "def double(number: int) -> int:\n    return 2 * number\n")
    assert hatch_build.compile_modules(tmp_path, tmp_path / "elsewhere", ["relay/double.py"])


@needs_compiler
def test_what_the_c_compiler_finds_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", "-include no_such_header.h")
    package(tmp_path, "def double(number: int) -> int:\n    return 2 * number\n")
    with pytest.raises(hatch_build.CompileError, match=r"error: .*no_such_header.*apt-get install gcc python3-dev"):
        hatch_build.compile_modules(tmp_path, tmp_path / "elsewhere", ["relay/double.py"])


def test_an_unknown_wish_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_COMPILE", "yes")
    with pytest.raises(hatch_build.CompileError, match="RELAY_COMPILE is 'yes'; it may be 0 or 1"):
        hook(tmp_path, "relay/double.py").initialize("standard", build_data())


def test_a_package_whose_types_are_not_there_is_not_compiled(tmp_path: Path) -> None:
    """What mypyc does not know of, it makes other code of."""
    with pytest.raises(hatch_build.CompileError, match="no_such_package"):
        hatch_build.compile_modules(package(tmp_path, "import no_such_package\n"), tmp_path / "x", ["relay/double.py"])


@needs_compiler
def test_a_wheel_with_it_is_made_the_same_twice(tmp_path: Path) -> None:
    package(tmp_path, "def double(number: int) -> int:\n    return 2 * number\n")
    twice = []
    for name in ("one", "two"):
        places = hatch_build.compile_modules(tmp_path, tmp_path / name, ["relay/double.py"])
        twice.append({place: Path(path).read_bytes() for path, place in places.items()})
    assert twice[0] == twice[1]


@pytest.mark.parametrize(("version", "wanted"), [("editable", "1"), ("editable", ""), ("standard", "0")])
def test_what_is_not_to_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, wanted: str) -> None:
    monkeypatch.setenv("RELAY_COMPILE", wanted)
    monkeypatch.setattr(hatch_build, "compile_modules", None)
    data = build_data()
    hook(package(tmp_path, ""), "relay/double.py").initialize(version, data)
    assert data == build_data()


def test_the_modules_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    modules = project["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]["modules"]
    assert "relay/net/pump.py" in modules
    assert all((ROOT / module).is_file() for module in modules)
    # What the compiler cannot do: msgspec's structs, whose settings it drops without a word.
    assert not any("Struct" in (ROOT / module).read_text() for module in modules)
