"""The limits of keys, as the control process keeps them, or a worker that is the whole daemon: `relay.net.keyring`."""

from __future__ import annotations

import array
import fcntl
import os
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Final, TypeAlias

import trio

from relay.config import KeyLimitsConfig
from relay.core.metrics import KEY_LIMITS
from relay.daemon.limits import Limit, Limits
from relay.daemon.messages import KeyLimit, KeySemaphores, parts
from relay.daemon.scoreboard import KEY_NUMBERS, Numbers, Scoreboard, Subject
from relay.net.keyring import Keyring, Tokens
from relay.net.notices import Priority, say
from relay.net.shares import Cells, Semaphore

#: How often buckets are filled, seconds: the finest that ``Retry-After`` can tell of.
REFILL_S: Final = 1.0
#: What a pipe needs beyond its bytes: of its first page the front may have been read, of its last not all be written.
_PIPE_SLACK_BYTES: Final = 2 * os.sysconf("SC_PAGE_SIZE")

#: How much there may be of a kind, under a key.
_Wanted: TypeAlias = dict[tuple[str, str], int]


class Bucket:
    """Tokens for requests: as many as a minute brings at first and at most, then so many more in each minute."""

    fd = _filled_from = -1

    def __init__(self, per_minute: int, now: float) -> None:
        self.fd, self._filled_from = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._at = now
        self._owed = 0.0
        self.per_minute = 0
        self.set(per_minute, now)
        self._add(per_minute)

    def __repr__(self) -> str:
        return f"<Bucket {self.free} of {self.per_minute}>"

    @property
    def free(self) -> int:
        """Tokens that nobody has taken."""
        count = array.array("i", [0])
        fcntl.ioctl(self.fd, termios.FIONREAD, count)
        return count[0]

    def set(self, per_minute: int, now: float) -> None:
        """From now on it is filled at this rate, and holds no more."""
        if per_minute == self.per_minute:
            return
        self.refill(now)
        self.per_minute = per_minute
        if (too_many := self.free - per_minute) > 0:
            with suppress(BlockingIOError):  # taken meanwhile
                os.read(self.fd, too_many)
        with suppress(OSError):  # one user's pipes may have all they may (pipe(7)); it then keeps the size it has
            fcntl.fcntl(self._filled_from, fcntl.F_SETPIPE_SZ, per_minute + _PIPE_SLACK_BYTES)

    def refill(self, now: float) -> None:
        """Puts in what has been earned since the last time."""
        room = max(0, self.per_minute - self.free)
        self._owed = min(self._owed + (now - self._at) * self.per_minute / 60, room)
        self._at = now
        if self._owed >= 1:
            self._owed -= self._add(int(self._owed))

    def fileno(self) -> int:
        """The descriptor, which stays this object's."""
        return self.fd

    def end(self) -> None:
        """Nobody is limited by it any more, nor who has not been told so yet: what is read is the pipe's end."""
        os.close(self._filled_from)
        self._filled_from = -1

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        if self._filled_from >= 0:
            self.end()

    def _add(self, number: int) -> int:
        """Puts in as many tokens; answers how many the pipe has taken."""
        try:
            return os.write(self._filled_from, bytes(number))
        except BlockingIOError:
            return 0


def _by_kind(wanted: Mapping[str, KeyLimitsConfig]) -> _Wanted:
    limits = ((kind, name, getattr(each, kind)) for name, each in wanted.items() for kind in KEY_LIMITS)
    return {(kind, name): most for kind, name, most in limits if most}


def _subject(name: str) -> Subject:
    return "", "", name


def _warn_of_lack(subject: Subject) -> None:
    say(f"relay: {subject[2]}: too many limits of keys; its max_in_flight does not hold", Priority.WARNING)


class KeyLimits:
    """The limits of all keys. `settle` them whenever they may have changed, and `run` it."""

    def __init__(self, scoreboard: Scoreboard) -> None:
        self._numbers = Numbers(scoreboard, KEY_NUMBERS, _warn_of_lack)
        self._places = Limits()
        self._buckets: dict[str, Bucket] = {}
        self._settled: _Wanted = {}

    def __repr__(self) -> str:
        return f"<KeyLimits {self._places!r} buckets={len(self._buckets)}>"

    def prepare(self, wanted: Mapping[str, KeyLimitsConfig]) -> None:
        """Opens what `settle` needs for these limits: it cannot fail then, nor for those that were settled before.

        Raises OSError where descriptors are short: those that were are to be settled again.
        """
        self._settle(_by_kind(wanted) | self._settled)

    def settle(self, wanted: Mapping[str, KeyLimitsConfig]) -> None:
        """From now on these are the limits, by key. Raises OSError where descriptors are short: to be called again."""
        limits = _by_kind(wanted)
        self._settle(limits)
        self._settled = limits

    def _settle(self, wanted: _Wanted) -> None:
        self._settle_places({name: most for (kind, name), most in wanted.items() if kind == "max_in_flight"})
        self._settle_buckets({name: most for (kind, name), most in wanted.items() if kind == "requests_per_minute"})

    def _settle_places(self, wanted: Mapping[str, int]) -> None:
        for number in self._numbers.keep({_subject(name) for name in wanted}):
            self._places.drop(number)
        for name, most in wanted.items():
            place = self._numbers.of(_subject(name))
            if place is not None:
                self._places.set(place, most)

    def _settle_buckets(self, wanted: Mapping[str, int]) -> None:
        for name in self._buckets.keys() - wanted.keys():
            self._buckets.pop(name).end()
        now = time.monotonic()
        for name, per_minute in wanted.items():
            if name in self._buckets:
                self._buckets[name].set(per_minute, now)
            else:
                self._buckets[name] = Bucket(per_minute, now)

    def changes(self, told: dict[KeyLimit, Limit | Bucket]) -> Iterator[tuple[KeyLimit, Limit | Bucket | None]]:
        """Limits that are new since `told`, each with its source, or gone (None); `told` is brought up to date."""
        now = dict(self._all())
        for limit in told.keys() - now.keys():
            del told[limit]
            yield limit, None
        for limit, source in now.items():
            if told.get(limit) is not source:
                told[limit] = source
                yield limit, source

    def orders(self, told: dict[KeyLimit, Limit | Bucket]) -> Iterator[tuple[KeySemaphores, list[Limit | Bucket]]]:
        """What a worker is to be sent of its `changes`, with the descriptors beside it."""
        changes = [*self.changes(told)]
        gone = [limit for limit, source in changes if source is None]
        if gone:
            yield KeySemaphores(gone, are_gone=True), []
        for some in parts([(limit, source) for limit, source in changes if source is not None]):
            yield KeySemaphores([limit for limit, _ in some], are_gone=False), [source for _, source in some]

    def give_back(self, held: Mapping[int, int]) -> None:
        """The places of a worker that is gone, by number, are free again."""
        self._places.give_back(held)

    async def run(self) -> None:
        """Fills the buckets until cancelled."""
        async with trio.open_nursery() as nursery:
            self._places.nursery = nursery
            while True:
                await trio.sleep(REFILL_S)
                now = time.monotonic()
                for bucket in self._buckets.values():
                    bucket.refill(now)

    def _all(self) -> Iterator[tuple[KeyLimit, Limit | Bucket]]:
        for (_, _, name), number in self._numbers:
            yield KeyLimit(name, "max_in_flight", number), self._places.by_number[number]
        for name, bucket in self._buckets.items():
            yield KeyLimit(name, "requests_per_minute", 0), bucket


def impose(keys: Keyring, limit: KeyLimit, fd: int | None, held: Cells) -> None:
    """Has a worker's key bound by a limit from now on; `fd` is the worker's own from here on, None: no longer bound."""
    use = keys.of(limit.name)
    if limit.kind == "max_in_flight":
        use.places = None if fd is None else Semaphore(fd, limit.number, held)
    else:
        use.tokens = None if fd is None else Tokens(fd)


class OwnKeyLimits(KeyLimits):
    """Those of a worker that is the whole daemon."""

    def __init__(self, keys: Keyring) -> None:
        scoreboard = Scoreboard(1)
        super().__init__(scoreboard)
        self._keys = keys
        self._held = scoreboard.slot(0).held
        self._imposed: dict[KeyLimit, Limit | Bucket] = {}

    def _settle(self, wanted: _Wanted) -> None:
        super()._settle(wanted)
        for limit, source in self.changes(self._imposed):
            try:
                fd = None if source is None else os.dup(source.fd)
            except OSError:
                del self._imposed[limit]
                raise
            impose(self._keys, limit, fd, self._held)
