"""What the soak's accounts find, by made-up records and logs: a line too many, too few, twice, elsewhere."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest

from relay.core.request import Route
from relay_bench.drill.accounts import Accounts
from relay_bench.drill.attempts import KILLED, UNENDED, Attempts, Differences, Entry, Kind, Logs, Work
from relay_bench.drill.mixed import Asked, Seen
from relay_bench.drill.report import Report
from relay_bench.drill.soak import worked

if TYPE_CHECKING:
    from collections.abc import Iterator

ENDED: Final = datetime(2026, 1, 1, tzinfo=UTC)
NOW: Final = ENDED.timestamp()
ENGINE, OTHER, PREFILLER, DECODER, ROGUE = (f"http://{name}" for name in ("e", "o", "p", "d", "rogue"))
POOLS: Final = {"plain": [ENGINE, OTHER, ROGUE], "split": [PREFILLER, DECODER]}

IN_LOG, IS_ATTEMPT, ONCE = (
    "what {} answered by the records is in its log",
    "what is in the log of {} is an attempt of a record, and where that says",
    "no attempt is in the log of {} twice",
)
FAILED_AT: Final = "an attempt that failed had met an engine, or one that was down"
ANSWERED: Final = "what the records say was answered, one engine did, token for token"
UNLOGGED: Final = "what an engine has begun it has ended, unless it was killed"
CUT_TOKENS: Final = "client and record agree on the tokens of cut and faulty answers"
MADE: Final = "of cut answers, engines made all tokens that the records count"
LEFT: Final = "clients that left had no more than the record says"

WHOLE: Final = Entry(
    ts=ENDED, id="", outcome="--", status=200, pool="plain", upstream=ENGINE, prefill_upstream=None, stream=True,
    attempts=1, total_ms=100.0, frames=5, bytes_out=10, completion_tokens=3, usage="engine",
)  # fmt: skip


def entry(id_: str, **changes: Any) -> Entry:
    return msgspec.structs.replace(WHOLE, id=id_, **changes)


#: Of each kind one, and what the logs say of it: an answer, one over two engines, an error of the rogue engine, an
#: answer in the second attempt, a stream that its engine cut, one whose client left.
RECORDS: Final = (
    entry("whole", total_ms=2000.0),
    entry("split", pool="split", upstream=DECODER, prefill_upstream=PREFILLER),
    entry("bad", upstream=ROGUE, status=500, completion_tokens=None, usage="none"),
    entry("again", attempts=2),
    entry("cut", outcome="UD", completion_tokens=2, usage="estimated", frames=4),
    entry("left", outcome="CD", completion_tokens=2, usage="estimated", frames=4),
)
_DONE: Final = Work(ENGINE, "completed", 3)

Lines = dict[Kind, dict[str, list[Work]]]


def lines() -> Lines:
    return {
        Kind.ENGINE: {
            "whole": [_DONE],
            "split": [Work(DECODER, "completed", 3)],
            "again-2": [_DONE],
            "cut": [Work(ENGINE, "failed", 2)],
            "left": [Work(ENGINE, "aborted", 3)],
        },
        Kind.PREFILLER: {"split": [Work(PREFILLER, "completed", 1)]},
        Kind.ROGUE: {"bad": [Work(ROGUE, "500")], "again": [Work(ROGUE, "resets")]},
    }


def broken_by(
    found: Lines,
    *,
    seen: dict[str, Seen] | None = None,
    downs: dict[str, list[tuple[float, float]]] | None = None,
    fault: str = "",
) -> tuple[list[str], Accounts]:
    """What is broken of the promises that are not the metrics', of which there are none here."""
    visits = {}
    for one in RECORDS:
        id_ = str(one.id)
        asked = Asked(id=id_, route=Route.CHAT, model="plain", tokens=3, key="k", is_stream=True, fault=fault)
        is_well, has_left = one.outcome == "--", id_ == "left"
        own = Seen(
            is_sent=True, has_left=has_left, status=one.status or 0, received=10, tokens=one.completion_tokens,
            frames=5, is_whole=is_well,
        )  # fmt: skip
        visits[id_] = asked, (seen or {}).get(id_, msgspec.structs.replace(own, frames=4) if has_left else own)
    accounts = Accounts(visits, Logs(of=found, pools=POOLS, downs=downs or {}, rogue=ROGUE))
    for one in RECORDS:
        accounts.take(one)
    report = Report("soak")
    accounts.judge(report, {})
    return [text for text in report.broken if not text.startswith("metrics")], accounts


def test_what_agrees() -> None:
    assert broken_by(lines())[0] == []


def test_what_was_compared_is_told_and_in_a_long_soak_it_is_something() -> None:
    differences = Differences(("never met", "met"))
    for seen in range(1_200):
        differences.check("met", True, seen)
    for is_long, broken in ((False, []), (True, ["never met"])):
        report = Report("soak")
        differences.judge(report, is_long=is_long)
        assert [promise.seen for promise in report.promises] == ["0 compared", "1,200 compared"]
        assert report.broken == broken
    differences.check("met", False, "this one")
    differences.judge(report, is_long=True)
    assert (report.broken, report.promises[1].seen) == (["never met", "met"], "1,201 compared, 1 do not: this one")


def test_a_soak_in_which_nothing_was_met() -> None:
    """Each promise of single requests tells of it."""
    for is_long in (False, True):
        report = Report("soak")
        accounts = Accounts({}, Logs(of={}, pools={}, downs={}))
        accounts.judge(report, {}, is_long=is_long)
        empty = [promise for promise in report.promises if promise.seen == "0 compared"]
        assert len(empty) == 21
        assert report.broken == [promise.text for promise in empty if is_long]


_WHOLE_ERRORS: Final = "of the rogue engine's answers, errors alone are whole"


def cases() -> Iterator[tuple[str, Kind, dict[str, list[Work]], list[str]]]:
    """What is put in a log's place, by id, and what it breaks."""
    for kind, id_, work, missed in (
        (Kind.ENGINE, "whole", _DONE, [ANSWERED]),
        (Kind.PREFILLER, "split", Work(PREFILLER, "completed", 1), []),
        (Kind.ROGUE, "bad", Work(ROGUE, "500"), [_WHOLE_ERRORS]),
    ):
        is_attempt, twice = IS_ATTEMPT.format(kind.value), ANSWERED if kind is Kind.ENGINE else ""
        elsewhere, unended = msgspec.structs.replace(work, url=OTHER), msgspec.structs.replace(work, state=UNENDED)
        yield "one too many", kind, {"nobody": [work]}, [is_attempt]
        yield "an attempt more than the record has", kind, {f"{id_}-2": [work]}, [is_attempt]
        yield "one missing", kind, {id_: []}, [IN_LOG.format(kind.value), *missed]
        yield "one twice", kind, {id_: [work, work]}, [ONCE.format(kind.value), *filter(None, [twice])]
        yield "one elsewhere", kind, {id_: [elsewhere]}, [is_attempt]
        yield "one without an end", kind, {"nobody": [unended]}, [is_attempt, UNLOGGED]
    yield "what an engine has, too", Kind.ROGUE, {"whole": [Work(ENGINE, "resets")]}, [ONCE.format("the rogue engine")]
    engine, prefiller, rogue = Kind.ENGINE, Kind.PREFILLER, Kind.ROGUE
    yield "a failed attempt that nobody knows", rogue, {"again": []}, [FAILED_AT]
    other_pool = [Work(DECODER, "failed")]
    yield (
        "a failed attempt at two, one of another pool",
        engine,
        {"again": other_pool},
        [IS_ATTEMPT.format("an engine"), ONCE.format("the rogue engine")],
    )
    yield "a prefill cut off", prefiller, {"split": [Work(PREFILLER, "aborted")]}, [IN_LOG.format("a prefiller")]
    too_much = [Work(PREFILLER, "completed", 3)]
    yield "a prefill of too much", prefiller, {"split": too_much}, [IN_LOG.format("a prefiller")]
    yield "a misdeed that is no answer", rogue, {"bad": [Work(ROGUE, "stalls")]}, [_WHOLE_ERRORS]
    yield "an answer of more tokens", engine, {"whole": [Work(ENGINE, "completed", 4)]}, [ANSWERED]
    yield "a cut answer of fewer tokens", engine, {"cut": [Work(ENGINE, "failed", 1)]}, [MADE]
    yield "a stream that was left, of fewer", engine, {"left": [Work(ENGINE, "aborted", 1)]}, [MADE]


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [pytest.param(kind, changes, expected, id=f"{kind.value}: {name}") for name, kind, changes, expected in cases()],
)
def test_what_does_not_agree(kind: Kind, changes: dict[str, list[Work]], expected: list[str]) -> None:
    """Each change of a log breaks what is promised of it, and nothing else."""
    found = lines()
    found[kind] = {id_: works for id_, works in (found[kind] | changes).items() if works}
    assert sorted(broken_by(found)[0]) == sorted(expected)


@pytest.mark.parametrize(
    ("status", "tokens", "is_whole", "expected"),
    [
        (200, 3, True, []),
        (502, 3, True, ["clients' statuses are the records'"]),
        (200, 2, True, ["client, record and request agree on tokens"]),
        (200, 3, False, ["answers end well where the record says so, and nowhere else"]),
    ],
)
def test_what_clients_had_of_whole_answers(status: int, tokens: int, is_whole: bool, expected: list[str]) -> None:
    seen = Seen(
        is_sent=True, has_left=False, status=status, received=10, tokens=tokens, frames=5, is_whole=is_whole
    )  # fmt: skip
    assert broken_by(lines(), seen={"whole": seen})[0] == expected


@pytest.mark.parametrize(
    ("tokens", "frames", "received", "expected"),
    [
        (2, 5, 10, []),
        (1, 5, 10, [CUT_TOKENS]),
        (3, 5, 10, [CUT_TOKENS]),
        (2, 4, 10, ["client and record agree on frames"]),  # without the relay's own last word
        (2, 5, 9, ["every byte of every answer is counted"]),
    ],
)
def test_what_clients_had_of_cut_answers(tokens: int, frames: int, received: int, expected: list[str]) -> None:
    seen = Seen(is_sent=True, has_left=False, status=200, received=received, tokens=tokens, frames=frames)
    assert broken_by(lines(), seen={"cut": seen})[0] == expected


@pytest.mark.parametrize(
    ("tokens", "frames", "received", "expected"),
    [(2, 4, 10, []), (0, 0, 0, []), (3, 4, 10, [LEFT]), (2, 5, 10, [LEFT]), (2, 4, 11, [LEFT])],
)
def test_what_clients_had_that_left(tokens: int, frames: int, received: int, expected: list[str]) -> None:
    seen = Seen(is_sent=True, has_left=True, status=200, received=received, tokens=tokens, frames=frames)
    assert broken_by(lines(), seen={"left": seen})[0] == expected


@pytest.mark.parametrize(
    ("log", "died_s", "unlogged", "expected"),
    [
        ([KILLED], 0.1, 1, []),  # behind the answer, and before its end was logged
        ([KILLED], -1.0, 1, []),  # the same, and the record was late
        ([KILLED], 5.0, 0, [ANSWERED]),
        ([KILLED], -5.0, 0, [ANSWERED]),  # before it began, and back
        (["aborted"], 0.1, 0, [ANSWERED]),  # not excused: it knew of this one's end
        ([], 0.1, 0, [ANSWERED, IN_LOG.format("an engine")]),  # nor this: what has an answer was logged before
    ],
)
def test_answers_of_engines_that_were_killed(log: list[str], died_s: float, unlogged: int, expected: list[str]) -> None:
    found = lines()
    found[Kind.ENGINE]["whole"] = [Work(ENGINE, state) for state in log]
    broken, accounts = broken_by(found, downs={ENGINE: [(NOW + died_s, NOW + died_s + 1)]})
    assert (broken, accounts.sums["unlogged"]) == (expected, unlogged)


@pytest.mark.parametrize(
    ("pool", "since_s", "until_s", "expected"),
    [
        (OTHER, -5.0, -0.05, []),
        (OTHER, -0.05, 1.0, []),
        (OTHER, -5.0, -4.0, [FAILED_AT]),  # before it began
        (OTHER, 4.0, 5.0, [FAILED_AT]),  # when it had ended
        (DECODER, -5.0, 5.0, [FAILED_AT]),  # of another pool
    ],
)
def test_attempts_that_met_an_engine_while_it_was_down(
    pool: str, since_s: float, until_s: float, expected: list[str]
) -> None:
    found = lines()
    del found[Kind.ROGUE]["again"]
    assert broken_by(found, downs={pool: [(NOW + since_s, NOW + until_s)]})[0] == expected


def test_a_prefiller_that_was_killed() -> None:
    found = lines()
    found[Kind.PREFILLER]["split"] = [Work(PREFILLER, KILLED)]
    assert broken_by(found)[0] == [IN_LOG.format("a prefiller")]
    assert broken_by(found, downs={DECODER: [(NOW, NOW + 1)]})[0] == [IN_LOG.format("a prefiller")]
    broken, accounts = broken_by(found, downs={PREFILLER: [(NOW, NOW + 1)]})
    assert (broken, accounts.attempts.sums["unlogged prefills"]) == ([], 1)


@pytest.mark.parametrize(
    ("first", "fault", "is_kept"),
    [
        (Work(ENGINE, "failed"), "die-before-head", True),
        (Work(ENGINE, "failed"), "rst-before-head", True),
        (Work(ENGINE, KILLED), "", True),
        (Work(ENGINE, "failed"), "status:503", False),
        (Work(ENGINE, "failed", 1), "die-before-head", False),  # it had begun to answer
        (Work(OTHER, "failed"), "die-before-head", False),
    ],
)
def test_what_is_sent_again_for_its_kept_connection_was_closed(first: Work, fault: str, is_kept: bool) -> None:
    found = lines()
    found[Kind.ENGINE]["whole"] = [first, _DONE]
    assert (ONCE.format("an engine") not in broken_by(found, fault=fault)[0]) is is_kept
    found[Kind.ENGINE]["whole"].insert(0, first)
    assert ONCE.format("an engine") in broken_by(found, fault=fault)[0]


@pytest.mark.parametrize(
    ("first", "second", "record", "is_kept"),
    [
        (KILLED, Work(DECODER, "failed"), {"attempts": 2}, True),  # the killed one has read what is held
        (KILLED, Work(DECODER, "completed", 1), {"attempts": 2}, True),
        (KILLED, Work(DECODER, "completed", 1), {"outcome": "UC", "status": 502}, True),
        (KILLED, Work(DECODER, "completed", 2), {"attempts": 2}, False),  # no drain takes more
        ("failed", Work(DECODER, "failed"), {"attempts": 2}, False),
        (KILLED, Work(DECODER, "completed", 1), {}, False),  # nor is there one where there was an answer
    ],
)
def test_what_is_held_for_an_attempt_is_freed_by_another_decoder(
    first: str, second: Work, record: dict[str, Any], is_kept: bool
) -> None:
    logs = Logs(of={Kind.ENGINE: {"split": [Work(OTHER, first), second]}}, pools=POOLS, downs={})
    attempts, report = Attempts(logs), Report("soak")
    asked = Asked(
        id="split", route=Route.CHAT, model="split", tokens=3, key="k", is_stream=True, fault="die-before-head"
    )  # fmt: skip
    attempts.take(entry("split", pool="split", upstream=DECODER, prefill_upstream=PREFILLER, **record), asked)
    attempts.judge(report)
    assert (ONCE.format("an engine") not in report.broken) is is_kept
    assert attempts.sums["again"] == is_kept


def test_an_engines_log() -> None:
    """Beginnings and ends, of requests of which one comes twice."""
    said = [("a", "queued", 0), ("b", "queued", 0), ("a", "failed", 0), ("a", "queued", 0), ("b", "completed", 3)]
    known = [("a", Work(ENGINE, "failed")), ("b", Work(ENGINE, "completed", 3))]
    assert list(worked(ENGINE, said, was_killed=True)) == [*known, ("a", Work(ENGINE, KILLED))]
    assert list(worked(ENGINE, said, was_killed=False)) == [*known, ("a", Work(ENGINE, UNENDED))]
    assert list(worked(ENGINE, [("c", "failed", 0)], was_killed=False)) == [("c", Work(ENGINE, "failed"))]
