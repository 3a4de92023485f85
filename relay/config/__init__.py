"""The configuration: settings (`tables`), how they are read (`reading`), and what does not go together (`checks`)."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Any

from relay.config.checks import conflicts
from relay.config.checks import doubts as doubts
from relay.config.reading import Problem as Problem
from relay.config.reading import read_table, read_value
from relay.config.tables import *  # noqa: F403 - the settings are this package's interface
from relay.config.tables import Config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class ConfigError(Exception):
    """A configuration cannot be used; `problems` has every reason."""

    def __init__(self, source: str, problems: list[Problem]) -> None:
        super().__init__("\n".join(problem.line(source) for problem in problems))
        self.source = source
        self.problems = tuple(problems)


def load(path: str | Path, override: Callable[[Config], Config] = lambda config: config) -> Config:
    """Read a configuration file, let `override` (the flags) change it, and check the whole. Raises `ConfigError`."""
    source = str(path)
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise ConfigError(source, [Problem("", f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(source, [Problem("", f"is not UTF-8, as TOML must be: {error.reason}")]) from error
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise ConfigError(source, [Problem(line[1] if line else "", f"is not TOML: {error}")]) from error
    problems: list[Problem] = []
    config = override(read_table(Config, table, "", problems))
    problems += conflicts(config, wrong={re.split(r"[.\[]", problem.key)[0] for problem in problems})
    if problems:
        raise ConfigError(source, problems)
    return config


def check(config: Config, source: str) -> Config:
    """Check a configuration that was made without a file. Raises `ConfigError` under the name `source`."""
    if problems := [*conflicts(config)]:
        raise ConfigError(source, problems)
    return config


def read_flag(setting: Any, text: str) -> Any:
    """Read a value of a setting's type (`Delay`, `Listener`) from a flag's text; a wrong one raises `ValueError`."""
    return read_value(setting, text, strict=False)
