"""What records say of their attempts, and engines of what they were asked: laid side by side, both ways.

An engine logs a request when it has read it, before any byte of an answer, and again when it has ended. So what was
answered is always in a log, and what is in a log is an attempt of a record. That leaves two things for which nobody can
vouch: how a request ended whose engine was killed over it, and an attempt that met an engine while it was down.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from relay_bench.drill.mixed import Asked
    from relay_bench.drill.report import Report

#: A record's outcome where all went well.
NORMAL: Final = "--"
#: States of what an engine has begun, and not logged the end of.
KILLED: Final = "killed"
UNENDED: Final = "unended"
_COMPLETED: Final = "completed"
#: What makes an engine close a connection without a word: on a kept one, the request is sent once more.
_SILENT: Final = ("die-before-head", "rst-before-head")
#: By how much the times of day of two processes, taken behind what they are of, may be off, seconds.
_APART_S: Final = 0.25
#: The rogue engine's whole answers: their statuses.
_WHOLE: Final = ("500", "503")
_ROGUE_WHOLE: Final = "of the rogue engine's answers, errors alone are whole"
_MET: Final = "an attempt that failed had met an engine, or one that was down"
_ENDED: Final = "what an engine has begun it has ended, unless it was killed"
#: Examples shown of what does not agree.
_EXAMPLES: Final = 3


class Kind(Enum):
    """Who logs."""

    ENGINE = "an engine"  #: that give whole answers, or go on from a prefill
    PREFILLER = "a prefiller"
    ROGUE = "the rogue engine"


class Work(msgspec.Struct, frozen=True):
    """One request at an engine, by its log."""

    url: str
    state: str  #: its last, `KILLED` or `UNENDED`; the rogue engine's misdeed
    tokens: int = 0


class Entry(msgspec.Struct):
    """What is looked at of a record."""

    ts: datetime
    id: str | None
    outcome: str
    status: int | None
    pool: str | None
    upstream: str | None
    prefill_upstream: str | None
    stream: bool
    attempts: int
    total_ms: float | None
    frames: int
    bytes_out: int
    completion_tokens: int | None
    usage: str

    @property
    def attempt_ids(self) -> list[str]:
        """What its attempts were called at the engines."""
        return [f"{self.id}" if number == 1 else f"{self.id}-{number}" for number in range(1, self.attempts + 1)]

    @property
    def is_answered(self) -> bool:
        """Whether its last attempt had an answer, or the beginning of one."""
        return self.attempts > 0 and (self.outcome == NORMAL or self.outcome[1] == "D")

    @property
    def is_prefilled(self) -> bool:
        """Whether its last attempt had a prefiller's answer."""
        return self.prefill_upstream is not None and (self.is_answered or self.outcome[1] in "CH")


class Logs(msgspec.Struct, frozen=True, kw_only=True):
    """What engines have said, when all is over."""

    of: Mapping[Kind, Mapping[str, Sequence[Work]]]  #: by the id that the request had there
    pools: Mapping[str, Collection[str]]  #: each one's engines, all roles, by URL
    downs: Mapping[str, Sequence[tuple[float, float]]]  #: of engines, by URL: from when to when, times of day
    rogue: str = ""  #: its URL

    def find(self, kind: Kind, id_: str) -> Sequence[Work]:
        """What is logged of a request, the earlier first."""
        return self.of.get(kind, {}).get(id_, ())

    def was_down(self, entry: Entry, url: str | None = None) -> bool:
        """Whether an engine was, that of a URL or any of its pool, at some time while the exchange lasted."""
        began, ended = _lasted(entry)
        urls = self.pools.get(entry.pool or "", ()) if url is None else (url,)
        downs = [down for url in urls for down in self.downs.get(url, ())]
        return any(died < ended and began < back for died, back in downs)

    def was_killed(self, entry: Entry) -> bool:
        """Whether its engine was, while the exchange lasted: behind its last byte perhaps, the record being late."""
        began, ended = _lasted(entry)
        return any(began < died < ended for died, _ in self.downs.get(entry.upstream or "", ()))


def _lasted(entry: Entry) -> tuple[float, float]:
    """From when to when at most the exchange has lasted, times of day."""
    ended = entry.ts.timestamp()
    return ended - (entry.total_ms or 0.0) / 1000 - _APART_S, ended + _APART_S


class Differences:
    """What did not agree, by promise. Each is judged, and tells how much was met that could have broken it."""

    def __init__(self, promises: Iterable[str]) -> None:
        self._found: dict[str, list[str]] = {promise: [] for promise in promises}
        self._compared: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Differences {self._found}>"

    def check(self, promise: str, is_kept: bool, seen: object) -> None:
        """Notes what is not as promised."""
        self._compared[promise] += 1
        if not is_kept:
            self._found[promise].append(str(seen))

    def judge(self, report: Report, *, is_long: bool) -> None:
        """All of it, with a few examples each. Where it took long, something must have been compared for each."""
        for promise, found in self._found.items():
            compared = self._compared[promise]
            seen = f"{compared:,} compared"
            if found:
                seen += f", {len(found):,} do not: {'; '.join(found[:_EXAMPLES])}"
            report.judge(promise, not found and (compared > 0 or not is_long), seen)


class Attempts:
    """Takes in records, one by one, and looks for their attempts in the logs."""

    def __init__(self, logs: Logs) -> None:
        self._logs = logs
        self._claimed: set[str] = set()
        of_kinds = [of(kind) for kind in Kind for of in (_there, _right, _once)]
        self._differences = Differences((*of_kinds, _ROGUE_WHOLE, _MET, _ENDED))
        self.sums: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Attempts {dict(self.sums)}>"

    def take(self, entry: Entry, asked: Asked | None) -> None:
        """Takes in a record; `asked`: what its client did."""
        ids = entry.attempt_ids
        self._claimed.update(ids)
        self.sums["attempts"] += len(ids)
        for id_ in ids:
            is_last = id_ == ids[-1]
            found = {kind: self._logs.find(kind, id_) for kind in Kind}
            self._check_found(entry, asked, found, is_last=is_last)
            if not is_last or not (entry.is_answered or entry.outcome.startswith("C")):
                self._check_failed(entry, id_, found)
        if ids:
            self._check_last(entry, {kind: self._logs.find(kind, ids[-1]) for kind in Kind})

    def _check_found(
        self, entry: Entry, asked: Asked | None, found: Mapping[Kind, Sequence[Work]], *, is_last: bool
    ) -> None:
        """What is in the logs of one attempt: whether it should be there, and there once."""
        for kind, works in found.items():
            if works:
                named = self._named(entry, kind, is_last=is_last)
                self._differences.check(_right(kind), all(work.url in named for work in works), (entry, works))
                # A leg lost with a kept connection counts as never sent: what is held for it is freed elsewhere.
                may_drain = entry.prefill_upstream is not None and not (is_last and entry.is_answered)
                is_once = _is_once(works, asked, may_drain=may_drain and kind is Kind.ENGINE)
                is_once = is_once and not (kind is Kind.ROGUE and found[Kind.ENGINE])
                self.sums["again"] += is_once and len(works) > 1
                self._differences.check(_once(kind), is_once, (entry, found))

    def _named(self, entry: Entry, kind: Kind, *, is_last: bool) -> Collection[str | None]:
        """Where an attempt may have been. Of those that have failed, the record names the pool alone."""
        if is_last and kind is Kind.PREFILLER:
            return (entry.prefill_upstream,)
        # Where a client leaves between two legs, any decoder may take the handle from the prefiller.
        if is_last and (entry.is_answered or entry.prefill_upstream is None):
            return (entry.upstream,)
        return self._logs.pools.get(entry.pool or "", ())

    def _check_failed(self, entry: Entry, id_: str, found: Mapping[Kind, Sequence[Work]]) -> None:
        is_known = any(found.values())
        self.sums["unmet"] += not is_known
        self._differences.check(_MET, is_known or self._logs.was_down(entry), (id_, entry))

    def _check_last(self, entry: Entry, found: Mapping[Kind, Sequence[Work]]) -> None:
        """What must be in the logs, for there was an answer."""
        check = self._differences.check
        engine, prefiller, rogue = found[Kind.ENGINE], found[Kind.PREFILLER], found[Kind.ROGUE]
        if entry.is_prefilled:
            is_refusal = entry.outcome == NORMAL and (entry.status or 0) >= 400
            is_done = bool(prefiller) and _is_done(prefiller[-1], 1)
            if prefiller and prefiller[-1].state == KILLED and self._logs.was_down(entry, prefiller[-1].url):
                self.sums["unlogged prefills"] += 1
                is_done = True
            check(_there(Kind.PREFILLER), is_done or (is_refusal and bool(prefiller)), (entry, prefiller))
            if is_refusal and not is_done:
                return  # the prefiller's own: no decoder was asked
        if entry.is_answered and entry.upstream == self._logs.rogue:
            check(_there(Kind.ROGUE), bool(rogue), (entry, rogue))
            if entry.outcome == NORMAL:
                is_whole = bool(rogue) and rogue[-1].state in _WHOLE and rogue[-1].state == str(entry.status)
                check(_ROGUE_WHOLE, is_whole, (entry, rogue))
        elif entry.is_answered:
            check(_there(Kind.ENGINE), bool(engine), (entry, engine))

    def judge(self, report: Report, *, is_long: bool = False) -> None:
        """What came of it. `is_long`: as in `Differences.judge`."""
        for kind in Kind:
            for id_, works in self._logs.of.get(kind, {}).items():
                if id_ not in self._claimed:
                    self._differences.check(_right(kind), False, (id_, works))
                for work in works:
                    self._differences.check(_ENDED, work.state != UNENDED, (id_, work))
        self._differences.judge(report, is_long=is_long)


def _there(kind: Kind) -> str:
    return f"what {kind.value} answered by the records is in its log"


def _right(kind: Kind) -> str:
    return f"what is in the log of {kind.value} is an attempt of a record, and where that says"


def _once(kind: Kind) -> str:
    return f"no attempt is in the log of {kind.value} twice"


def _is_done(work: Work, tokens: int) -> bool:
    return work.state == _COMPLETED and work.tokens == tokens


def _is_once(works: Sequence[Work], asked: Asked | None, *, may_drain: bool) -> bool:
    """Whether it is one request; or two to one engine, the first of which was lost with a kept connection.

    With `may_drain` also where that engine was killed, and another was asked for the one token that frees a handle.
    """
    if len(works) == 1:
        return True
    first, *others = works
    is_silent = first.state == "failed" and first.tokens == 0 and asked is not None and asked.fault in _SILENT
    if len(others) != 1 or not (is_silent or first.state == KILLED):
        return False
    return first.url == others[0].url or (may_drain and first.state == KILLED and others[0].tokens <= 1)
