"""From what an engine sends to what its client gets: an event stream, passed on in whole frames.

The usual case decides the cost. Engines put one frame into one chunk and one chunk into one write, so what a read
brings is a run of whole chunks, each ending where a frame ends. Such a read goes on untouched, chunk headers and all,
as one view of the receive buffer: it is not copied to be sent. (It is copied to be looked at, as what is compiled reads
bytes without calls.) Everything else (frames over several chunks, several in one, a body without chunks, a client
without them) is decoded, and what is complete of it goes out as one new chunk, still as views of the buffer; only an
unfinished frame is kept, in `pending`.

Where an editor changes frames, those it is concerned with go the second way, and all others as before.
"""

from __future__ import annotations

import re
from typing import Final

from relay.core import ordinary
from relay.core.dialect import Meter
from relay.core.editor import UsageEditor
from relay.core.framing import BodyDecoder, Buffer, ChunkDecoder, size_at
from relay.core.sse import BOM, FrameFinder, missing_blank_line, split_frames
from relay.core.template import MOST_BYTES, Template

LAST_CHUNK: Final = b"0\r\n\r\n"
#: A comment, with the blank line without which `vllm bench serve` drops the next event.
COMMENT: Final = b": keep-alive\n\n"
COMMENT_CHUNK: Final = b"%x\r\n%b\r\n" % (len(COMMENT), COMMENT)
_CR: Final = 0x0D
_LF: Final = 0x0A
_DATA: Final = b"data: "
_match_opening: Final = ordinary.OPENING.fullmatch
#: Bytes of a blank line, at most, with the end of the line before it: CR LF CR LF.
_LONGEST_BLANK: Final = 4

Pieces = list[bytes | memoryview]


def _payload_at(data: bytes, position: int) -> tuple[int, int]:
    """Begin and end of the payload of the whole chunk at `position`, where it ends with a blank line and has no CR.

    Else -1 and -1, also for a chunk that is not whole or has an extension: those are the decoder's and the frame
    finder's.
    """
    size, begin = size_at(data, position)
    if data[begin : begin + 2] != b"\r\n":
        return -1, -1
    begin += 2
    end = begin + size
    if size <= 2 or data[end - 2 : end + 2] != b"\n\n\r\n" or _CR in data[begin:end]:
        return -1, -1  # two bytes: a blank line more; CR: other line ends, and so perhaps several frames
    return begin, end


def without_mark(data: bytes, *, is_chunked: bool) -> bytes:
    """What begins an engine's stream, less its byte order mark: behind a comment of the relay's it would be none.

    There it is a part of the first line, whose field nobody knows then (WHATWG HTML §9.2.5, "stream = [ bom ] *event").
    """
    if not is_chunked:
        return data.removeprefix(BOM)
    size, end = size_at(data, 0)
    if not end or not data.startswith(b"\r\n" + BOM, end):
        return data
    return b"%x\r\n%b" % (size - len(BOM), data[end + 2 + len(BOM) :])


class FrameRelay:
    """One event stream on its way: decoder, frame finder and meter around an unfinished rest.

    `decoder` says when and how the engine's body ended; after a clean end `finish` gives what is due.
    """

    __slots__ = (
        "_chunks",
        "_form",
        "_last_bytes",
        "_match_ordinary",
        "_ordinary",
        "_template",
        "decoder",
        "editor",
        "finder",
        "has_excess",
        "is_chunked",
        "is_unaligned",
        "max_frame_bytes",
        "meter",
        "pending",
    )

    def __init__(
        self,
        decoder: BodyDecoder,
        meter: Meter,
        *,
        is_chunked: bool,
        max_frame_bytes: int,
        editor: UsageEditor | None = None,
    ) -> None:
        self.decoder = decoder
        self.meter = meter
        self.editor = editor  #: changes some frames, and meters those; None: all pass as they come
        self.finder = FrameFinder()
        self.is_chunked = is_chunked  #: the client takes chunks (HTTP/1.1)
        self.max_frame_bytes = max_frame_bytes
        self.pending = bytearray()  #: the unfinished frame, never longer than `max_frame_bytes` and one read
        self.has_excess = False  #: bytes came behind the end of the body: the connection is of no further use
        self.is_unaligned = False  #: the frame being read outgrew the limit; its beginning has gone out
        self._last_bytes = b""  # of what has gone out of that frame: of a blank line a part, perhaps
        self._form = ordinary.CHUNKS[meter.route]
        self._match_ordinary = self._form.pattern.match
        self._ordinary = meter.ordinary
        self._template: Template | None = None
        self._chunks = decoder if is_chunked and isinstance(decoder, ChunkDecoder) else None

    @property
    def comment(self) -> bytes:
        """What can be sent between two frames to show that the stream goes on; empty where nothing can.

        That is within a frame that outgrew the limit, behind an ``id:`` (openai's SDK then takes a comment for an event
        without data, and fails), and behind the end mark.
        """
        if self.is_unaligned or self.meter.saw_id_field or self.meter.saw_end:
            return b""
        return COMMENT_CHUNK if self.is_chunked else COMMENT

    def passes_unread(self, data: bytes) -> bool:
        """Whether `data` can go out as it is, told by the ends of chunks and frames alone.

        `feed` has to read it all the same, be it afterwards. False where that is not certain.
        """
        chunks = self._chunks
        if chunks is None or self.editor is not None or len(data) > self.max_frame_bytes:
            return False
        if not (chunks.is_between_chunks and self.finder.at_boundary):
            return False
        position = 0
        while position < len(data):
            begin, end = _payload_at(data, position)
            if end < 0 or data[begin : begin + len(_DATA)] != _DATA:
                return False
            position = end + 2
        return True

    def feed(self, data: bytes, view: memoryview, out: Pieces) -> None:
        """Reads `data` and appends to `out` what can be sent, as parts of `view`, which is of the same bytes."""
        end = self._whole_chunks(data, 0) if self._is_between_chunks else 0
        if 0 < end == len(data):
            out.append(view)
        else:
            self._feed_other(data, view, end, out)

    @property
    def _is_between_chunks(self) -> bool:
        """Whether the next byte begins a chunk, and the client takes chunks."""
        chunks = self._chunks
        return chunks is not None and chunks.error is None and chunks.is_between_chunks

    def _feed_other(self, data: bytes, view: memoryview, position: int, out: Pieces) -> None:
        """Reads what is behind a run of whole chunks, which ends at `position`; appends to `out` that run, too."""
        decoder, chunks, stop = self.decoder, self._chunks, len(data)
        if position:
            out.append(view[:position])
        payload: Pieces = []
        while position < stop and not decoder.is_done and decoder.error is None:
            if chunks is not None and self._is_between_chunks and data.startswith(LAST_CHUNK, position):
                chunks.skip_last(len(LAST_CHUNK))  # without trailers, as engines end
                position += len(LAST_CHUNK)
                break
            # Behind a chunk that came in parts the usual case may go on: only up to there.
            limit = min(stop, position + 2) if chunks is not None and chunks.left == ChunkDecoder.DATA_END else stop
            begin, end, position = decoder.next(data, position, limit)
            if begin < end:
                self._take(data, view, begin, end, payload)
            if self._is_between_chunks and (end := self._whole_chunks(data, position)) > position:
                self._emit(payload, out)
                out.append(view[position:end])
                position = end
        self._emit(payload, out)
        if position < stop:
            self.has_excess = True

    def finish(self, out: Pieces) -> None:
        """After a clean end of the body: the rest, with the blank line it may lack, and the last chunk.

        There is none where the editor has found that the answer is cut.
        """
        rest = bytes(self.pending)
        if rest:
            rest += missing_blank_line(rest)
            self.finder.frames += 1
            self.pending.clear()
            rest = self._metered(rest) or b""
        elif self.is_unaligned:
            rest = b"\n" if self._last_bytes.endswith(b"\n") else b"\n\n"
            self.finder.frames += 1
        if rest:
            self._emit([rest], out)
        if self.is_chunked and (self.editor is None or self.editor.failure is None):
            out.append(LAST_CHUNK)

    def _whole_chunks(self, data: bytes, start: int) -> int:
        """How far from `start` there are only whole chunks of one frame each; meters those."""
        finder, meter = self.finder, self.meter
        if not finder.at_boundary:
            return start
        frames = counted = 0
        position = start
        while position < len(data):
            template = self._template
            if template is not None:
                end = template.end_of(data, position)
                if end > position:
                    counted += 1
                    position = end
                    continue
            found = self._match_ordinary(data, position)
            if found is not None:
                end = found.end()
                size = int(found[1], 16)
                if size == end - found.end(1) - 4:  # but for both line ends
                    if size < MOST_BYTES and (counted or meter.saw_content):  # the first may be the last
                        self._learn(found)
                    counted += 1
                    position = end
                    continue
            end = self._other_chunk(data, position)
            if end == position:
                break
            frames += 1
            position = end
        self._ordinary.frames += counted
        finder.frames += frames + counted
        if self._chunks is not None:
            self._chunks.skip(position - start)
        return position

    def _learn(self, found: re.Match[bytes]) -> None:
        """Has a frame be the template, where the last two were not like it: of two choices in turn, one is known."""
        template = self._template
        if template is None or template.has_missed:
            self._template = Template(found, is_line=self._form.is_line)
        else:
            template.has_missed = True

    def _other_chunk(self, data: bytes, position: int) -> int:
        """The end of a whole chunk of one frame that is not ordinary; `position` where there is none."""
        begin, end = _payload_at(data, position)
        if end < 0:
            return position
        # In this order: a slice of bytes that ends before it begins is empty, but an error where mypyc makes it.
        if data[begin : begin + len(_DATA)] == _DATA and _LF not in (event := data[begin + len(_DATA) : end - 2]):
            if self.editor is not None and self.editor.concerns(event):
                return position
            if position or self.finder.frames or _match_opening(event) is None:  # looked for where a stream begins
                self.meter.inspect_data(event)
        elif data.find(b"\n\n", begin, end) == end - 2:
            frame = data[begin:end]
            if self.editor is not None and self.editor.concerns(frame):
                return position
            self.meter.inspect(frame)
        else:
            return position  # several frames: for the frame finder
        return end + 2

    def _take(self, data: bytes, view: memoryview, begin: int, end: int, payload: Pieces) -> None:
        """Takes a run of payload: what completes frames goes to `payload`, the rest to `pending`."""
        boundary = self.finder.feed(data, begin, end)
        if boundary < 0:
            if self.is_unaligned:
                payload.append(view[begin:end])
                self._last_bytes = (self._last_bytes + view[max(begin, end - _LONGEST_BLANK) : end])[-_LONGEST_BLANK:]
                return
            self.pending += view[begin:end]
            if len(self.pending) > self.max_frame_bytes:
                payload.append(bytes(self.pending))
                self._last_bytes = bytes(self.pending[-_LONGEST_BLANK:])
                self.pending.clear()
                self.is_unaligned = True
            return
        if self.pending:
            # A frame begun in earlier pieces is complete.
            split = self._first_end(self.pending, data, begin, boundary)
            frame = bytes(self.pending) + view[begin:split]
            self.pending.clear()
            if passed := self._metered(frame):
                payload.append(passed)
            begin = split
        elif self.is_unaligned:
            # The rest of a frame that outgrew the limit is not metered: alone, it could be taken for something else.
            split = self._first_end(self._last_bytes, data, begin, boundary)
            if begin < split:  # else a CR that went out was the end; an empty chunk would be the last
                payload.append(view[begin:split])
            begin = split
        self.is_unaligned = False
        if begin < boundary:
            self._pass_on(data, view, begin, boundary, payload)
        self.pending += view[boundary:end]

    def _pass_on(self, data: bytes, view: memoryview, begin: int, end: int, payload: Pieces) -> None:
        """Meters a run of whole frames; appends it to `payload`, in one piece where no frame of it changes."""
        for frame_begin, frame_end in split_frames(data, begin, end):
            frame = data[frame_begin:frame_end]
            passed = self._metered(frame)
            if passed is not frame:
                payload += [piece for piece in (view[begin:frame_begin], passed) if piece]
                begin = frame_end
        if begin < end:
            payload.append(view[begin:end])

    def _metered(self, frame: bytes) -> bytes | None:
        """Takes note of a frame; answers what goes out in its place, the same object where nothing changes."""
        if self.editor is None or not self.editor.concerns(frame):
            self.meter.take(frame)
            return frame
        passed = self.editor.edit(frame, self.meter)
        self.finder.frames -= passed is None  # it counts what is passed on
        return passed

    def _first_end(self, before: Buffer, data: bytes, begin: int, boundary: int) -> int:
        """Where in ``data[begin:boundary]`` the frame ends that began with `before`, blank line in part included."""
        tail = bytes(before[-_LONGEST_BLANK:])
        _, end = next(split_frames(tail + data[begin:boundary], 0, len(tail) + boundary - begin))
        return begin + max(0, end - len(tail))

    def _emit(self, payload: Pieces, out: Pieces) -> None:
        """Moves payload to `out`, as one chunk where the client takes chunks."""
        if not payload:
            return
        if self.is_chunked:
            out.append(b"%x\r\n" % sum(map(len, payload)))
            out.extend(payload)
            out.append(b"\r\n")
        else:
            out.extend(payload)
        payload.clear()
