"""What is kept of one request: its marks, and the metrics that follow from them."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import msgspec

from relay_bench.load.stats import Histogram

_S: Final = 1e-9


class Record(msgspec.Struct, kw_only=True):
    """One request. Marks are ns from the start of the run, None where it never got there (see `relay_bench.load`)."""

    index: int  #: in the schedule
    planned_ns: int
    due_ns: int
    sent_ns: int
    connected_ns: int | None = None
    written_ns: int | None = None
    head_ns: int | None = None
    first_byte_ns: int | None = None
    first_content_ns: int | None = None
    last_content_ns: int | None = None
    done_ns: int
    #: why it failed; empty: it did not. See `relay_bench.load.answer.LABELS`.
    label: str = ""
    error: str = ""
    status: int | None = None
    is_reused: bool = False  #: on a kept connection
    frames: int = 0
    content_frames: int = 0
    bytes_in: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    #: where its inter-token latencies come from: ``continuous``, ``frames`` (as many frames as tokens), ``none``
    itl_source: str = "none"
    gap_max_ns: int | None = None  #: the longest pause between two content frames
    frame_delay_ns: int | None = None  #: median over its content frames, where they have stamps
    is_measured: bool = True  #: planned between warm-up and cool-down
    content_ns: list[int] | None = None  #: marks of all content frames, on demand
    itls_ns: list[int] | None = None  #: on demand

    def metric_s(self, name: str) -> float | None:
        """A metric of `relay_bench.load` in seconds; None: this request has none."""
        first, last = self.first_content_ns, self.last_content_ns
        if name == "send_lag":
            return (self.sent_ns - self.due_ns) * _S
        if first is None or last is None:
            return None
        if name == "ttft":
            return (first - self.sent_ns) * _S
        if name == "ttft_planned":
            return (first - self.planned_ns) * _S
        if name == "e2el":
            return (last - self.sent_ns) * _S
        if name == "e2el_planned":
            return (last - self.planned_ns) * _S
        if name == "tpot":
            tokens = self.completion_tokens
            return None if tokens is None or tokens < 2 else (last - first) / (tokens - 1) * _S
        if name == "frame_gap_mean":
            return (last - first) / (self.content_frames - 1) * _S if self.content_frames > 1 else None
        if name == "frame_gap_max":
            return None if self.gap_max_ns is None else self.gap_max_ns * _S
        if name == "frame_delay":
            return None if self.frame_delay_ns is None else self.frame_delay_ns * _S
        raise KeyError(name)


def inter_token_ns(content_ns: list[int], token_counts: list[int] | None) -> list[int]:
    """Inter-token latencies of one request, from its content frames' marks and the tokens known at each.

    `token_counts` is the running total at each mark; None: a token a frame. A frame of k tokens gives k values of a
    k-th of its gap; those of the first frame give none, as nothing came before them. Frames that bring no token (part
    of a character) lend their gap to the next one that does.
    """
    if token_counts is None:
        return [later - earlier for earlier, later in pairwise(content_ns)]
    found: list[int] = []
    since, known = content_ns[0], token_counts[0]
    for mark, count in zip(content_ns[1:], token_counts[1:], strict=True):
        new = count - known
        if new > 0:
            found += [(mark - since) // new] * new
            since, known = mark, count
    return found


class Tally(msgspec.Struct):
    """What a load process hands over at its end."""

    records: list[Record]
    frame_gap: Histogram
    itl: Histogram
    client_delay: Histogram
    frame_delay: Histogram
    cpu_s: float  #: of the process, during the run
    wall_s: float
    waited_s: float = 0.0  #: ready to run, but other processes had the cores
    reads: int = 0
    retried: int = 0  #: requests sent again because a kept connection had just been closed
    lost_stamps: int = 0  #: content frames whose stamp could not be read

    def merge(self, other: Tally) -> None:
        """Adds another process's."""
        self.records += other.records
        for name in ("frame_gap", "itl", "client_delay", "frame_delay"):
            getattr(self, name).merge(getattr(other, name))
        self.cpu_s += other.cpu_s
        self.wall_s = max(self.wall_s, other.wall_s)
        self.waited_s += other.waited_s
        self.reads += other.reads
        self.retried += other.retried
        self.lost_stamps += other.lost_stamps
