"""Reading the configuration again while the daemon runs: all of it is right, or nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from relay.config import Config, ConfigError
from relay.net.guard import Guard, GuardError

#: Tables that a reload leaves as they are.
_FIXED: Final = ("listen", "admin", "log")


def read_again(load_config: Callable[[], Config] | None) -> tuple[Config, Guard]:
    """What the configuration file, and the files it names, say now. Raises ValueError: they cannot be used."""
    if load_config is None:
        raise ValueError("there is no file to read again: the daemon was started without --config")
    try:
        config = load_config()
        return config, Guard.read(config.auth)
    except GuardError as exc:
        raise ValueError(str(exc)) from None
    except ConfigError as exc:
        raise ValueError("; ".join(problem.line(exc.source) for problem in exc.problems)) from None


def what_came_of(config: Config, before: Config) -> str:
    """What is told of a reload."""
    fixed = [f"[{name}]" for name in _FIXED if getattr(config, name) != getattr(before, name)]
    if config.daemon.workers != before.daemon.workers:
        fixed.append("daemon.workers")
    return f"yes, but a restart is needed for: {', '.join(fixed)}" if fixed else "yes"
