"""Reading the configuration again while the daemon runs: all of it is right, or nothing changes.

What is read takes effect in the processes that run. Fresh ones for the new configuration while old ones drain, as nginx
has them, would cost each idle connection, each engine's health and the balancing by one load for all, for as long as a
generation drains; and nothing in the configuration needs them: the number of workers and the listeners change in place.
"""

from __future__ import annotations

from collections.abc import Callable

from relay.config import Config, ConfigError
from relay.net.guard import Guard, GuardError


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


def what_came_of(config: Config, started_with: Config, *, left: tuple[str, ...] = ()) -> str:
    """What is told of a reload; `left` are keys that this daemon could not take on."""
    if config.admin.address != started_with.admin.address:
        left = ("admin.address", *left)
    if (config.listen.tls is None) != (started_with.listen.tls is None):
        left = ("listen.tls", *left)
    return f"yes, but a restart is needed for: {', '.join(left)}" if left else "yes"
