"""What clients, records, metrics and engines say of the same requests, laid side by side."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import datetime
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from relay_bench.drill.mixed import Asked, Seen
    from relay_bench.drill.report import Report

#: A record's outcome where all went well.
_NORMAL: Final = "--"
#: An engine logs an answer behind its last byte: how soon after that a killed one may not have, seconds.
_UNLOGGED_S: Final = 0.25
#: Examples shown of what does not agree.
_EXAMPLES: Final = 3

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Entry(msgspec.Struct):
    """What is looked at of a record."""

    ts: datetime
    id: str | None
    outcome: str
    status: int | None
    pool: str | None
    upstream: str | None
    stream: bool
    attempts: int
    frames: int
    bytes_out: int
    completion_tokens: int | None
    usage: str

    @property
    def attempt_ids(self) -> list[str]:
        """What its attempts were called at the engines."""
        return [f"{self.id}" if number == 1 else f"{self.id}-{number}" for number in range(1, self.attempts + 1)]


class Work(msgspec.Struct, frozen=True):
    """One line of an engine's log."""

    state: str
    tokens: int


class Differences:
    """What did not agree, by promise."""

    def __init__(self) -> None:
        self._found: defaultdict[str, list[str]] = defaultdict(list)

    def __repr__(self) -> str:
        return f"<Differences {dict(self._found)}>"

    def check(self, promise: str, is_kept: bool, seen: object) -> None:
        """Notes what is not as promised."""
        found = self._found[promise]
        if not is_kept:
            found.append(str(seen))

    def judge(self, report: Report) -> None:
        """All of it, with a few examples each."""
        for promise, found in self._found.items():
            report.judge(promise, not found, f"{len(found):,} do not: {'; '.join(found[:_EXAMPLES])}" if found else "")


class Accounts:
    """Takes in records, one by one, and compares."""

    def __init__(
        self,
        visits: Mapping[str, tuple[Asked, Seen]],
        work: Mapping[str, list[Work]],
        rogue: str,
        deaths: Mapping[str, Sequence[float]],
    ) -> None:
        self._visits = visits
        self._work = work  #: of engines that give whole answers, by the id that the request had there
        self._rogue = rogue
        self._deaths = deaths  #: of engines, by URL: the time of day
        self._ids: Counter[str] = Counter()
        self._claimed: set[str] = set()
        self.ended: Counter[tuple[str, str, str]] = Counter()  #: by pool, status and outcome
        self.sums: Counter[str] = Counter()
        self._differences = Differences()

    def __repr__(self) -> str:
        return f"<Accounts {self.ended.total()} records of {len(self._visits)} visits>"

    def take(self, entry: Entry) -> None:
        """Takes in a record."""
        self.ended[entry.pool or "", str(entry.status or ""), entry.outcome] += 1
        self.sums["failovers"] += max(entry.attempts - 1, 0)
        self.sums["disconnects"] += entry.outcome.startswith("C")
        self.sums["bytes"] += entry.bytes_out
        self.sums["tokens"] += (entry.completion_tokens or 0) if entry.usage == "engine" else 0
        self._claimed.update(entry.attempt_ids)
        visit = self._visits.get(entry.id or "")
        if visit is None:
            return
        self._ids[entry.id or ""] += 1
        asked, seen = visit
        if not seen.has_left:
            self._compare_client(entry, asked, seen)
        if entry.outcome == _NORMAL and entry.status == 200 and entry.upstream != self._rogue:
            self._compare_engine(entry, asked)

    def _compare_client(self, entry: Entry, asked: Asked, seen: Seen) -> None:
        check = self._differences.check
        check("clients' statuses are the records'", seen.status == entry.status, (asked, seen, entry))
        check("every byte of every answer is counted", seen.received == entry.bytes_out, (asked, seen, entry))
        if entry.status == 200:
            is_well = entry.outcome == _NORMAL
            check("answers end well where the record says so, and nowhere else", seen.is_whole == is_well,
                  (asked, seen, entry))  # fmt: skip
            if is_well and not asked.fault:
                is_right = seen.tokens == entry.completion_tokens == asked.tokens
                check("client, record and request agree on tokens", is_right, (asked, seen, entry))

    def _compare_engine(self, entry: Entry, asked: Asked) -> None:
        logged = self._work.get(entry.attempt_ids[-1], [])
        ended = entry.ts.timestamp()
        if not logged and any(abs(died - ended) < _UNLOGGED_S for died in self._deaths.get(entry.upstream or "", ())):
            self.sums["unlogged"] += 1
            return
        done = [work for work in logged if work.state == "completed"]
        is_right = len(done) == 1 and (bool(asked.fault) or done[0].tokens == asked.tokens)
        self._differences.check("what the records say was answered, one engine did, token for token", is_right,
                                (asked, entry, done))  # fmt: skip

    def judge(self, report: Report, samples: Samples) -> None:
        """What came of it, beside the metrics."""
        sent = [id_ for id_, (_, seen) in self._visits.items() if seen.is_sent]
        records = self.ended.total()
        report.judge(
            "one record for each request begun", records == len(self._visits), f"{records:,} of {len(self._visits):,}"
        )
        alone = sum(self._ids[id_] == 1 for id_ in sent)
        report.judge("each request sent whole has its own", alone == len(sent), f"{alone:,} of {len(sent):,}")
        self._differences.judge(report)
        self._judge_engines(report)
        self._judge_metrics(report, samples)

    def _judge_engines(self, report: Report) -> None:
        strangers = self._work.keys() - self._claimed
        report.judge(
            "every request at an engine is an attempt of a record",
            not strangers,
            f"{sum(map(len, self._work.values())):,} requests; {len(strangers)} are nobody's{_some(strangers)}",
        )
        twice = {id_ for id_, work in self._work.items() if sum(one.tokens > 0 for one in work) > 1}
        report.judge("no attempt is generated twice", not twice, f"{len(twice)} were{_some(twice)}")

    def _judge_metrics(self, report: Report, samples: Samples) -> None:
        ended: Counter[tuple[str, str, str]] = Counter()
        for (name, labels), value in samples.items():
            if name == "relay_requests_total":
                at = dict(labels)
                ended[at["pool"], at["status"], at["outcome"]] += round(value)
        other = {key: (ended[key], self.ended[key]) for key in ended | self.ended if ended[key] != self.ended[key]}
        report.judge(
            "metrics and records count the same ends, by pool, status and outcome",
            not other,
            f"{ended.total():,} in {len(ended)} series" + (f"; not: {other}" if other else ""),
        )
        for text, of_records, of_metrics in (
            ("failovers", self.sums["failovers"], _total(samples, "relay_failovers_total")),
            ("clients that left", self.sums["disconnects"], _total(samples, "relay_client_disconnects_total")),
            ("bytes sent", self.sums["bytes"], _total(samples, "relay_bytes_total", direction="out")),
            ("tokens", self.sums["tokens"], _total(samples, "relay_tokens_total", kind="completion")),
            ("records dropped", 0, _total(samples, "relay_records_dropped_total")),
        ):
            report.judge(
                f"metrics and records agree on {text}",
                of_records == of_metrics,
                f"{of_metrics:,}" if of_records == of_metrics else f"{of_metrics:,}, records {of_records:,}",
            )


def _total(samples: Samples, name: str, **labels: str) -> int:
    wanted = set(labels.items())
    return round(sum(value for (other, own), value in samples.items() if other == name and wanted <= own))


def _some(found: Iterable[str]) -> str:
    first = sorted(found)[:_EXAMPLES]
    return f", as {', '.join(first)}" if first else ""
