"""What clients, records, metrics and engines say of the same requests, laid side by side."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from relay_bench.drill.attempts import KILLED, NORMAL, Attempts, Differences, Entry, Kind, Logs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from relay_bench.drill.attempts import Work
    from relay_bench.drill.mixed import Asked, Seen
    from relay_bench.drill.report import Report

#: A fault by which an engine sends a frame of content that is no token.
_HUGE: Final = "huge-frame"

#: What is promised of single requests.
_STATUSES: Final = "clients' statuses are the records'"
_BYTES: Final = "every byte of every answer is counted"
_ENDS: Final = "answers end well where the record says so, and nowhere else"
_TOKENS: Final = "client, record and request agree on tokens"
_CUT_TOKENS: Final = "client and record agree on the tokens of cut and faulty answers"
_FRAMES: Final = "client and record agree on frames"
_LEFT: Final = "clients that left had no more than the record says"
_ANSWERED: Final = "what the records say was answered, one engine did, token for token"
_MADE: Final = "of cut answers, engines made all tokens that the records count"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Accounts:
    """Takes in records, one by one, and compares."""

    def __init__(self, visits: Mapping[str, tuple[Asked, Seen]], logs: Logs) -> None:
        self._visits = visits
        self._logs = logs
        self._ids: Counter[str] = Counter()
        self.ended: Counter[tuple[str, str, str]] = Counter()  #: by pool, status and outcome
        self.sums: Counter[str] = Counter()
        self.attempts = Attempts(logs)
        self._differences = Differences(
            (_STATUSES, _BYTES, _ENDS, _TOKENS, _CUT_TOKENS, _FRAMES, _LEFT, _ANSWERED, _MADE)
        )

    def __repr__(self) -> str:
        return f"<Accounts {self.ended.total()} records of {len(self._visits)} visits>"

    def take(self, entry: Entry) -> None:
        """Takes in a record."""
        self.ended[entry.pool or "", str(entry.status or ""), entry.outcome] += 1
        self.sums["failovers"] += max(entry.attempts - 1, 0)
        self.sums["disconnects"] += entry.outcome.startswith("C")
        self.sums["bytes"] += entry.bytes_out
        self.sums["tokens"] += (entry.completion_tokens or 0) if entry.usage == "engine" else 0
        visit = self._visits.get(entry.id or "")
        self.attempts.take(entry, visit[0] if visit else None)
        if visit is None:
            return
        self._ids[entry.id or ""] += 1
        asked, seen = visit
        if seen.has_left:
            self._compare_leaver(entry, asked, seen)
        else:
            self._compare_client(entry, asked, seen)
        if entry.status == 200 and entry.upstream != self._logs.rogue:
            last = entry.attempt_ids[-1:]
            works = self._logs.find(Kind.ENGINE, last[0]) if last else ()
            if entry.outcome == NORMAL:
                self._compare_engine(entry, asked, works)
            else:
                self._compare_cut(entry, asked, works)

    def _compare_client(self, entry: Entry, asked: Asked, seen: Seen) -> None:
        check = self._differences.check
        check(_STATUSES, seen.status == entry.status, (asked, seen, entry))
        check(_BYTES, seen.received == entry.bytes_out, (asked, seen, entry))
        if entry.status == 200:
            is_well = entry.outcome == NORMAL
            check(_ENDS, seen.is_whole == is_well, (asked, seen, entry))
            if is_well and not asked.fault:
                is_right = seen.tokens == entry.completion_tokens == asked.tokens
                check(_TOKENS, is_right, (asked, seen, entry))
            else:
                # Where the engine counts itself, it does not count what it made no token for.
                more = is_well and asked.fault.startswith(_HUGE) and entry.usage == "engine"
                is_right = (seen.tokens or 0) == (entry.completion_tokens or 0) + more
                check(_CUT_TOKENS, is_right, (asked, seen, entry))
            if seen.frames is not None and entry.stream:
                # The relay's own last word is a frame, too.
                is_right = seen.frames == entry.frames + (not is_well)
                check(_FRAMES, is_right, (asked, seen, entry))

    def _compare_leaver(self, entry: Entry, asked: Asked, seen: Seen) -> None:
        """A client that has left may have had less than went out, and no more."""
        last_word = entry.outcome != NORMAL and not entry.outcome.startswith("C")
        is_right = seen.received <= entry.bytes_out and (seen.frames or 0) <= entry.frames + last_word
        if entry.status == 200:
            is_right = is_right and (seen.tokens or 0) <= (entry.completion_tokens or 0)
        self._differences.check(_LEFT, is_right, (asked, seen, entry))

    def _compare_engine(self, entry: Entry, asked: Asked, works: Sequence[Work]) -> None:
        if works and works[-1].state == KILLED and self._logs.was_killed(entry):
            self.sums["unlogged"] += 1
            return
        done = [work for work in works if work.state == "completed"]
        is_right = len(done) == 1 and (bool(asked.fault) or done[0].tokens == asked.tokens)
        self._differences.check(_ANSWERED, is_right, (asked, entry, works))

    def _compare_cut(self, entry: Entry, asked: Asked, works: Sequence[Work]) -> None:
        if works and works[-1].state == KILLED:
            self.sums["uncounted"] += 1
            return
        more = asked.fault.startswith(_HUGE)
        is_right = bool(works) and works[-1].tokens + more >= (entry.completion_tokens or 0)
        self._differences.check(_MADE, is_right, (asked, entry, works))

    def judge(self, report: Report, samples: Samples, *, is_long: bool = False) -> None:
        """What came of it, beside the metrics. `is_long`: as in `Differences.judge`."""
        sent = [id_ for id_, (_, seen) in self._visits.items() if seen.is_sent]
        records = self.ended.total()
        report.judge(
            "one record for each request begun", records == len(self._visits), f"{records:,} of {len(self._visits):,}"
        )
        alone = sum(self._ids[id_] == 1 for id_ in sent)
        report.judge("each request sent whole has its own", alone == len(sent), f"{alone:,} of {len(sent):,}")
        self._differences.judge(report, is_long=is_long)
        self.attempts.judge(report, is_long=is_long)
        self._judge_metrics(report, samples)

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
