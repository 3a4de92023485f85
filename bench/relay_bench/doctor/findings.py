"""What the doctor makes of what was observed. Pure."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import msgspec

from relay.core.request import Route
from relay_bench.doctor.mends import MENDS
from relay_bench.doctor.observe import Observation

#: Content frames closer together than this came in one batch: no engine makes two tokens of a sequence so fast.
_SAME_BATCH_S: Final = 0.0002
#: Share of frames in a batch with the one before from which on a stream is bunched: on average two to a batch.
_BUNCHED_SHARE: Final = 0.5
#: Fewer frames, or a shorter answer, say nothing of buffering.
_LEAST_FRAMES: Final = 8
_LEAST_SPAN_S: Final = 0.05
#: Reads of a compressed stream, for each content frame, from which on it is flushed as it is made.
_FLUSHED_SHARE: Final = 0.5
#: A cut after so long a silence is a timeout's.
_LEAST_SILENCE_S: Final = 0.5
#: A first token later than direct by more than this, and than half of the direct one's time, is late.
_LATE_S: Final = 0.05

_CUTS: Final = frozenset({"truncated", "reset", "no_answer"})
_GATEWAY_TIMEOUTS: Final = frozenset({"http_408", "http_504", "http_524"})


class Finding(msgspec.Struct, frozen=True):
    """Something that is wrong: a code, what was seen, and what mends it."""

    code: str
    what: str

    @property
    def mends(self) -> tuple[str, ...]:
        """Settings that mend it."""
        return MENDS[self.code]


class Visit(msgspec.Struct, kw_only=True):
    """All that was observed of one path."""

    stream: Observation
    again: Observation | None = None  #: a second request, which could come on the same connection
    compressed: Observation | None = None  #: one that says it takes gzip
    silent: Observation | None = None  #: one whose answer was asked to keep silent first
    silence_s: float = 0.0  #: for so long
    direct: Observation | None = None  #: the stream without the path


def examine(visit: Visit) -> tuple[list[Finding], list[str]]:
    """What is wrong with a path, and remarks on what could not be told."""
    stream = visit.stream
    if stream.label in ("connect", "tls", "bad_head") or (stream.status and stream.status != 200):
        code = "connect" if stream.label in ("connect", "tls") else "http"
        return [Finding(code, f"{stream.label}: {stream.error}")], []
    found: list[Finding] = []
    remarks: list[str] = []
    found += _content_type(stream)
    found += _ending(stream)
    buffered, remark = _buffering(stream, visit.direct)
    found += buffered
    remarks += remark
    found += _late_first(stream, visit.direct)
    if stream.saw_end and not stream.label and not stream.has_usage:
        found.append(Finding("usage", "usage was asked for (stream_options.include_usage), and none came"))
    compressed, remark = _compression(stream, visit.compressed)
    found += compressed
    remarks += remark
    found += _keep_alive(stream, visit.again)
    found += _idle(visit)
    if stream.headers.get("x-accel-buffering") != "no":
        remarks.append("the answer does not say `X-Accel-Buffering: no`, so an nginx before it would buffer by default")
    if visit.silent is None:
        remarks.append("long silences were not tried: --silence-s (of an engine that keeps silent when asked to)")
    return found, remarks


def _content_type(stream: Observation) -> list[Finding]:
    kind = stream.headers.get("content-type", "")
    if kind.lower().startswith("text/event-stream") or not stream.status:
        return []
    what = "an event stream" if stream.frames else "a body that is no event stream"
    return [Finding("content_type", f"{what} came as {kind or 'no content type at all'}")]


def _ending(stream: Observation) -> list[Finding]:
    """How the stream ended; a cut after a silence is `idle_cut`, wherever it happens."""
    if stream.label == "timeout":
        text = f"nothing came for {stream.last_silence_s:.1f} s, and the doctor gave up (--timeout-s)"
        return [Finding("stalled", text)]
    if stream.label in _CUTS:
        if stream.last_silence_s >= _LEAST_SILENCE_S:
            return [_idle_cut(stream)]
        return [Finding("cut", f"the answer broke off after {stream.end_s:.2f} s: {stream.label}, {stream.error}")]
    if stream.label == "bad_framing":
        return [Finding("framing", f"the body breaks the rules of its framing: {stream.error}")]
    if stream.label == "error_frame":
        return [Finding("error_frame", f"an error inside the stream: {stream.error}")]
    if stream.frames and not stream.saw_end:
        mark = "its last event" if stream.route in (Route.RESPONSES, Route.MESSAGES) else "`data: [DONE]`"
        return [Finding("end_mark", f"the stream ended cleanly, but without {mark}")]
    return []


def _idle_cut(stream: Observation) -> Finding:
    return Finding("idle_cut", f"cut after {stream.last_silence_s:.1f} s of silence ({stream.label}: {stream.error})")


def bunched_share(content_s: list[float]) -> float:
    """Share of content frames that came in one batch with the one before."""
    gaps = [later - earlier for earlier, later in pairwise(content_s)]
    return sum(gap < _SAME_BATCH_S for gap in gaps) / len(gaps) if gaps else 0.0


def _batches(content_s: list[float]) -> int:
    return 1 + sum(later - earlier >= _SAME_BATCH_S for earlier, later in pairwise(content_s))


def _buffering(stream: Observation, direct: Observation | None) -> tuple[list[Finding], list[str]]:
    if "content-length" in stream.headers and stream.frames:
        text = "the event stream has a Content-Length: somebody waited for its end before sending its beginning"
        return [Finding("content_length", text)], []
    content = stream.content_s
    if len(content) < _LEAST_FRAMES:
        return [], [f"{len(content)} content frames are too few to tell buffering: ask for a longer answer"]
    share = bunched_share(content)
    if share < _BUNCHED_SHARE:
        return [], []
    if content[-1] < _LEAST_SPAN_S:
        return [], [f"the whole answer took {content[-1] * 1000:.0f} ms: too fast to tell buffering"]
    if direct is not None and len(direct.content_s) >= _LEAST_FRAMES:
        own = bunched_share(direct.content_s)
        if own >= _BUNCHED_SHARE and share - own < _BUNCHED_SHARE / 2:
            return [], [f"frames come in batches direct, too ({own:.0%} of them): the engine makes them so"]
    batches = _batches(content)
    where = "all at once" if batches == 1 else f"in {batches} batches"
    text = (
        f"{len(content)} frames came {where}, the first after {content[0] * 1000:.0f} ms of {content[-1] * 1000:.0f} ms"
    )
    if direct is not None and direct.ttft_s is not None:
        text += f"; direct, in {_batches(direct.content_s)} batches, the first after {direct.ttft_s * 1000:.0f} ms"
    return [Finding("buffering", text)], []


def _late_first(stream: Observation, direct: Observation | None) -> list[Finding]:
    if direct is None or direct.ttft_s is None or stream.ttft_s is None:
        return []
    late_s = stream.ttft_s - direct.ttft_s
    if late_s <= max(_LATE_S, direct.ttft_s / 2):
        return []
    through, own = stream.ttft_s * 1000, direct.ttft_s * 1000
    return [Finding("late_first", f"first token after {through:.0f} ms, direct after {own:.0f} ms")]


def _compression(stream: Observation, compressed: Observation | None) -> tuple[list[Finding], list[str]]:
    """Compressed frames cannot be looked into here, but each that is flushed takes a read of its own."""
    coding = compressed.headers.get("content-encoding", "identity") if compressed is not None else "identity"
    if compressed is None or coding.lower() == "identity":
        return [], []
    reads, frames = len(compressed.read_s), len(stream.content_s)
    text = f"the stream comes as {coding} to a client that takes it, in {reads} reads for {frames} content frames"
    if reads >= frames * _FLUSHED_SHARE:
        return [], [f"{text}: flushed frame by frame, which costs bytes and saves none"]
    return [Finding("compression", f"{text}: they wait in the compressor")], []


def _keep_alive(stream: Observation, again: Observation | None) -> list[Finding]:
    if stream.label or again is None:
        return []
    if not stream.may_reuse:
        return [Finding("keep_alive", "the answer closes the connection: each request pays for a new one")]
    if not again.is_reused:
        return [Finding("keep_alive", "the connection was closed right after the answer, though its head let it stay")]
    return []


def _idle(visit: Visit) -> list[Finding]:
    silent = visit.silent
    if silent is None or not silent.label:
        return []
    if silent.label in _GATEWAY_TIMEOUTS:
        return [Finding("idle_cut", f"given up on after {silent.end_s:.1f} s of silence: {silent.label}")]
    if silent.label in _CUTS and silent.last_silence_s >= min(_LEAST_SILENCE_S, visit.silence_s / 2):
        return [_idle_cut(silent)]
    return []
