"""Reading the configuration again while the daemon runs: all of it is right, or nothing changes.

What is read takes effect in the processes that run. Fresh ones for the new configuration while old ones drain, as nginx
has them, would cost each idle connection, each engine's health and the balancing by one load for all, for as long as a
generation drains; and nothing in the configuration needs them: the number of workers and the listeners change in place.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from relay.config import Config, ConfigError
from relay.daemon import systemd
from relay.net.guard import Guard, GuardError
from relay.net.notices import Priority, say


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


def left_for_restart(config: Config, started_with: Config, others: tuple[str, ...] = ()) -> str:
    """What is told of keys that a reload could not take on, `others` among them; "" if there are none."""
    if config.admin.address != started_with.admin.address:
        others = ("admin.address", *others)
    if (config.listen.tls is None) != (started_with.listen.tls is None):
        others = ("listen.tls", *others)
    return f"a restart is needed for: {', '.join(others)}" if others else ""


async def reload_and_tell(
    reload: Callable[[], Awaitable[str]], settle: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
) -> str:
    """Reloads and waits until all workers know, `settle`, says what came of it, and answers what takes a restart.

    Raises ValueError, which has been said: nothing changed, or a worker does not answer. `reload` itself may also raise
    OSError: descriptors or memory are short, and nothing changed.
    """
    told = "not reloaded: "
    try:
        left = await reload()
        told = "reloaded, but "
        await settle()
    except (ValueError, OSError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)  # and not itself, whose frames hold this one
        say(f"relay: {told}{reason}", Priority.ERROR)
        raise ValueError(f"{told}{reason}") from None
    say(f"relay: {_success(left)}", Priority.NOTICE)
    return left


class ReloadBySignal:
    """What SIGHUP does: `reload_and_tell`, and ``systemctl status`` shows what came of it.

    As long as the daemon `is_serving`: one that has not been announced yet, or drains, must not say that it is ready.
    Each signal has its turn, as systemd would take the end of the first reload for that of all.
    """

    def __init__(self, reload: Callable[[], Awaitable[str]], is_serving: Callable[[], bool]) -> None:
        self._reload = reload
        self._is_serving = is_serving
        self._turn = trio.Lock()

    async def run(self) -> None:
        """Reloads once. Raises nothing: a configuration that cannot be used has been told of."""
        async with self._turn:
            if self._is_serving():
                systemd.reloading("reading the configuration")
            try:
                told = _success(await self._reload())
            except ValueError as problem:
                told = str(problem)
            if self._is_serving():
                systemd.ready(told)


def _success(left: str) -> str:
    return f"reloaded; {left}" if left else "reloaded"
