"""Every fault and every shape that ``x-sim-*`` headers can ask for, seen from outside."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
import trio

from relay_bench.engine.faults import FAULTS, RECHUNKS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bench.conftest import Answer, Client

DONE = b"data: [DONE]\n\n"
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]


@pytest.mark.parametrize(("fault", "end"), [("die-before-head", "fin"), ("rst-before-head", "rst")])
async def test_no_answer(client: Client, fault: str, end: str) -> None:
    answer = await client.stream(sim_fault=fault)
    assert (answer.raw, answer.end) == (b"", end)
    assert client.states == ["failed"]


@pytest.mark.parametrize(("how", "end"), [("die", "fin"), ("rst", "rst")])
async def test_cut_after_the_head(client: Client, how: str, end: str) -> None:
    answer = await client.stream(sim_fault=f"{how}-after-head")
    assert (answer.status, answer.body, answer.end) == (200, b"", end)
    assert client.states == ["failed"]


@pytest.mark.parametrize(("how", "end"), [("die", "fin"), ("rst", "rst")])
@pytest.mark.parametrize("frames", [0, 1, 3, 6])
async def test_cut_after_frames(client: Client, how: str, end: str, frames: int) -> None:
    answer = await client.stream(sim_fault=f"{how}-after:{frames}")
    assert (len(answer.chunks), answer.rest, answer.end) == (frames, b"", end)
    assert not answer.is_whole
    assert client.states == ["failed"]


@pytest.mark.parametrize(("how", "end"), [("die", "fin"), ("rst", "rst")])
async def test_cut_in_mid_frame(client: Client, how: str, end: str) -> None:
    answer = await client.stream(sim_fault=f"{how}-mid-frame:2")
    assert (len(answer.chunks), answer.end) == (2, end)
    assert re.match(rb'[0-9a-f]+\r\ndata: \{"id', answer.rest)
    assert b"\n\n" not in answer.rest


async def test_cut_in_mid_frame_between_chunks(client: Client) -> None:
    answer = await client.stream(sim_fault="die-mid-frame:2", sim_rechunk="split:2")
    assert (len(answer.chunks), answer.rest) == (5, b"")
    assert b"\n\n" not in answer.chunks[4]


@pytest.mark.parametrize("fault", ["stall-before-head", "stall-after-head", "stall-after:2", "stall-mid-frame:2"])
async def test_stalls_last_until_the_client_leaves(client: Client, fault: str) -> None:
    async with await client.connect() as stream:
        await stream.send_all(client.request({**client.ASK, "stream": True}, sim_fault=fault))
        if "head" not in fault:
            await client.read_until(stream, b"\n\n\r\n", 2)
        await client.until(lambda: client.states == ["running"])
    await client.until(lambda: client.states == ["aborted"])
    assert client.engine.stats()["running"] == 0


async def test_bad_chunk(client: Client) -> None:
    async with await client.connect() as stream:
        await stream.send_all(client.request({**client.ASK, "stream": True}, sim_fault="bad-chunk:1"))
        raw = await client.read_until(stream, b"not a chunk\r\n")
    assert raw.endswith(b"\n\n\r\nzz\r\nnot a chunk\r\n")
    await client.until(lambda: client.states == ["aborted"])


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize(("fault", "before"), [("error-frame:2", 2), ("error-first", 0)])
async def test_error_inside_the_stream(
    client: Client, recorded: Callable[[str], Answer], path: str, fault: str, before: int
) -> None:
    answer = await client.stream(path=path, sim_fault=fault)
    assert answer.frames[before:] == recorded("sigterm_stream").frames[-2:]
    assert answer.is_whole


async def test_error_inside_the_named_dialects(client: Client) -> None:
    responses = await client.stream(path="/v1/responses", sim_fault="error-frame:3")
    assert len(responses.frames) == 4
    assert responses.frames[3].startswith(b'event: error\ndata: {"code":"server_error","message":"EngineCore')
    messages = await client.stream(path="/v1/messages", sim_fault="error-first")
    assert [f.split(b"message")[0] for f in messages.frames] == [
        b'event: error\ndata: {"type":"error","error":{"type":"internal_error","'
    ]


async def test_content_types(client: Client) -> None:
    assert (await client.stream()).headers["content-type"] == "text/event-stream; charset=utf-8"
    wrong = await client.stream(sim_fault="wrong-content-type")
    assert wrong.headers["content-type"] == "application/json"
    assert wrong.frames[-1] == DONE
    assert "content-type" not in (await client.stream(sim_fault="no-content-type")).headers


@pytest.mark.parametrize("status", [400, 429, 500, 502, 503, 504, 529])
@pytest.mark.parametrize("fault", ["status", "json-error"])
async def test_statuses(client: Client, fault: str, status: int) -> None:
    answer = await client.stream(sim_fault=f"{fault}:{status}")
    assert answer.status == status
    assert answer.json()["error"]["code"] == status
    assert answer.headers.get("retry-after") == ("7" if status in {429, 503} else None)
    assert client.states == ["failed"]


async def test_json_although_a_stream_was_asked(client: Client) -> None:
    answer = await client.stream(sim_fault="json-on-stream")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["object"] == "chat.completion"


async def test_frame_that_is_no_json(client: Client) -> None:
    answer = await client.stream(sim_fault="non-json-frame:2")
    assert [frame == b"data: not json\n\n" for frame in answer.frames] == [False, False, True, *[False] * 4]


@pytest.mark.parametrize("path", PATHS)
async def test_no_end_mark(client: Client, path: str) -> None:
    good, answer = await client.stream(path=path), await client.stream(path=path, sim_fault="no-done")
    assert len(answer.frames) == len(good.frames) - 1
    assert answer.is_whole


@pytest.mark.parametrize("path", PATHS)
async def test_no_final_blank_line(client: Client, path: str) -> None:
    answer = await client.stream(path=path, sim_fault="no-final-blank")
    assert re.search(rb"[^\n]\n\Z", b"".join(answer.chunks))
    assert answer.is_whole


async def test_comments(client: Client) -> None:
    answer = await client.stream(sim_fault="comment:2")
    assert [frame == b": ping\n\n" for frame in answer.frames] == [False, False, True] * 3


async def test_line_ends(client: Client) -> None:
    plain = b"".join((await client.stream(x_request_id="1")).chunks)
    crlf = b"".join((await client.stream(x_request_id="1", sim_fault="crlf")).chunks)
    cr = b"".join((await client.stream(x_request_id="1", sim_fault="cr")).chunks)

    def normal(text: bytes) -> bytes:
        return re.sub(rb'"created":\d+', b"", text)

    assert normal(crlf) == normal(plain).replace(b"\n", b"\r\n")
    assert normal(cr) == normal(plain).replace(b"\n", b"\r")


async def test_byte_order_mark(client: Client) -> None:
    answer = await client.stream(sim_fault="bom")
    assert [frame[:3] == b"\xef\xbb\xbf" for frame in answer.frames] == [True, *[False] * 5]


async def test_huge_frame(client: Client) -> None:
    answer = await client.stream(sim_fault="huge-frame:300000")
    assert [len(frame) >= 300000 for frame in answer.frames].index(True) == 1
    assert len(answer.frames[1]) == 300000
    assert json.loads(answer.frames[1][6:])["choices"][0]["delta"]["content"].strip("x") == ""


async def test_truncated_length(client: Client) -> None:
    answer = await client.ask(client.ASK, sim_fault="truncate-length")
    assert 0 < len(answer.body) < int(answer.headers["content-length"])
    assert answer.end == "fin"


@pytest.mark.parametrize("fault", ["die-after-head", "die-after:0", "die-mid-frame:0"])
async def test_cut_of_a_whole_answer(client: Client, fault: str) -> None:
    answer = await client.ask(client.ASK, sim_fault=fault)
    assert len(answer.body) < int(answer.headers["content-length"])
    assert (not answer.body) == ("mid" not in fault)


async def test_interim_answer(client: Client) -> None:
    for answer in (await client.stream(sim_fault="1xx"), await client.ask(client.ASK, sim_fault="1xx")):
        assert answer.raw.startswith(b"HTTP/1.1 103 Early Hints\r\n")
        assert answer.status == 200


async def test_early_answer_comes_before_the_body(client: Client) -> None:
    request = client.request({**client.ASK, "stream": True}, sim_fault="early-answer")
    async with await client.connect() as stream:
        await stream.send_all(request[:-10])
        answer = await client.read_to_end(stream)
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert client.states == ["failed"]


async def test_early_answer_with_a_reset(client: Client) -> None:
    request = client.request({**client.ASK, "stream": True}, sim_fault="early-answer:rst")
    async with await client.connect() as stream:
        await stream.send_all(request[:-10])
        assert (await client.read_to_end(stream)).status == 400


async def test_close_without_saying_so(client: Client) -> None:
    async with await client.connect() as stream:
        await stream.send_all(client.request({**client.ASK, "stream": True}, sim_fault="close-idle"))
        answer = await client.read_to_end(stream)
    assert answer.is_whole
    assert "connection" not in answer.headers
    assert client.states == ["completed"]


async def test_several_faults_at_once(client: Client) -> None:
    answer = await client.stream(sim_fault="crlf, comment:1, die-after:3")
    assert len(answer.chunks) == 3
    assert answer.chunks[1] == b": ping\r\n\r\n"


@pytest.mark.parametrize(
    "header", ["sim_fault", "sim_rechunk", "sim_usage", "sim_tokens", "sim_ttft_ms", "sim_step_ms", "sim_play"]
)
async def test_misspelt_controls_are_refused(client: Client, header: str) -> None:
    answer = await client.stream(**{header: "nonsense"})
    assert answer.status == 400
    assert "nonsense" in answer.json()["error"]["message"]


@pytest.mark.parametrize("fault", sorted(FAULTS - {"early-answer"}))
async def test_arguments_are_numbers(client: Client, fault: str) -> None:
    assert (await client.stream(sim_fault=f"{fault}:x")).status == 400


# --- shapes ---


async def payload(client: Client, **headers: str) -> bytes:
    """The payload of an answer, in whatever chunks it came, less what differs between requests."""
    answer = await client.stream(x_request_id="1", **headers)
    body = b"".join(answer.chunks) if "transfer-encoding" in answer.headers else answer.body
    return re.sub(rb'"created":\d+', b"", body)


@pytest.mark.parametrize("shape", [*(sorted(RECHUNKS)), "size:7", "split:3", "frames:4", "size:5, writes:2, ext"])
@pytest.mark.parametrize("fault", ["", "crlf"])
async def test_shapes_do_not_change_the_payload(client: Client, shape: str, fault: str) -> None:
    assert await payload(client, sim_rechunk=shape, sim_fault=fault) == await payload(client, sim_fault=fault)


async def test_chunks_of_each_shape(client: Client) -> None:
    frames = (await client.stream(x_request_id="1")).frames
    assert {len(chunk) for chunk in (await client.stream(sim_rechunk="bytes")).chunks} == {1}
    assert len((await client.stream(sim_rechunk="frames:4")).chunks) == 2
    assert len((await client.stream(sim_rechunk="split:3")).chunks) == 3 * len(frames)
    sizes = [len(chunk) for chunk in (await client.stream(sim_rechunk="size:100")).chunks]
    assert set(sizes[:-1]) == {100}


async def test_small_writes(client: Client) -> None:
    async with await client.connect() as stream:
        assert isinstance(stream, trio.SocketStream)
        await stream.send_all(
            client.request({**client.ASK, "stream": True}, connection="close", sim_rechunk="writes:9")
        )
        answer = await client.read_to_end(stream)
    assert answer.is_whole
    assert len(answer.chunks) == 6


async def test_extensions_and_trailer(client: Client) -> None:
    answer = await client.stream(sim_rechunk="ext")
    assert re.match(rb'[0-9a-f]+;name="a b"\r\n', answer.body)
    assert answer.rest == b"0;last=1\r\nx-trailer: 1\r\n\r\n"


async def test_length_framed(client: Client) -> None:
    answer = await client.stream(sim_rechunk="length")
    assert int(answer.headers["content-length"]) == len(answer.body)
    cut = await client.stream(sim_rechunk="length", sim_fault="die-after:2")
    assert cut.headers["content-length"] == answer.headers["content-length"]
    assert len(cut.frames) == 2


async def test_close_delimited(client: Client) -> None:
    async with await client.connect() as stream:
        await stream.send_all(client.request({**client.ASK, "stream": True}, sim_rechunk="close"))
        answer = await client.read_to_end(stream)
    assert answer.headers["connection"] == "close"
    assert not {"transfer-encoding", "content-length"} & answer.headers.keys()
    assert (answer.frames[-1], answer.end) == (DONE, "fin")


# --- recordings ---


async def test_recording_is_played(client: Client, recorded: Callable[[str], Answer]) -> None:
    real, ours = recorded("chat_200.stream_usage"), await client.stream(sim_play="chat_200.stream_usage")
    assert ours.chunks == real.chunks
    assert ours.is_whole
    pieces = await client.stream(sim_play="chat_200.stream_usage", sim_rechunk="size:11")
    assert b"".join(pieces.chunks) == b"".join(real.chunks)


async def test_recording_of_a_whole_answer(client: Client, recorded: Callable[[str], Answer]) -> None:
    assert (await client.stream(sim_play="chat_max1.nonstream")).body == recorded("chat_max1.nonstream").body
    refused = await client.stream(sim_play="err_unknown_model.stream")
    assert (refused.status, refused.body) == (404, recorded("err_unknown_model.stream").body)


@pytest.mark.parametrize("name", ["../conftest", "nothing", "/etc/passwd"])
async def test_recordings_outside_the_folder(client: Client, name: str) -> None:
    assert (await client.stream(sim_play=name)).status == 400


# --- clocks, defaults ---


async def test_a_burst_is_a_chunk_a_frame_and_a_write_for_several(client: Client) -> None:
    usual = await client.stream(x_request_id="1")
    burst = await client.stream(x_request_id="1", sim_rechunk="burst:4")
    assert len(burst.chunks) == len(usual.chunks)
    async with await client.connect() as stream:
        body = {**client.ASK, "stream": True}
        await stream.send_all(client.request(body, sim_rechunk="burst:3", sim_step_ms="0"))
        raw = await client.read_until(stream, b"\r\n0\r\n\r\n")
    assert raw.count(b"\n\n\r\n") == len(usual.frames)


async def test_streams_with_clocks_of_their_own_do_not_wait_for_each_other(
    client: Client, autojump_clock: trio.testing.MockClock
) -> None:
    """The second begins 30 ms into the steps of the first: with a shared clock its second token comes with a step."""

    async def times(**headers: str) -> list[float]:
        found = []
        async with await client.connect() as stream:
            body = {**client.ASK, "stream": True}
            await stream.send_all(client.request(body, connection="close", sim_step_ms="100", **headers))
            while data := await stream.receive_some():
                found += [trio.current_time()] * (data.count(b'"content":') - data.count(b'"content":""'))
        return found

    async def second(clock: str) -> list[float]:
        found: list[float] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(times)
            await trio.sleep(0.03)
            found += await times(sim_clock=clock)
        return found

    shared, own = await second("shared"), await second("own")
    assert shared[1] - shared[0] == pytest.approx(0.07)
    assert own[1] - own[0] == pytest.approx(0.1)


async def test_defaults_hold_for_requests_that_say_nothing(client: Client) -> None:
    told = await client.ask(b'{"x-sim-tokens": "2"}', path="/sim/defaults")
    assert told.status == 200
    assert len((await client.stream()).frames) == 4
    assert len((await client.stream(sim_tokens="3")).frames) == 5
    refused = await client.ask(b'{"x-sim-step-ms": "soon"}', path="/sim/defaults")
    assert refused.status == 400
    assert "soon" in refused.json()["error"]["message"]
    assert (await client.ask(b"[]", path="/sim/defaults")).status == 400
    await client.ask(b"{}", path="/sim/defaults")
    assert len((await client.stream()).frames) == 6
