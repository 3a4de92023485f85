"""Keys and routes: who is let in, and that nothing slips past a pattern by being written otherwise."""

from __future__ import annotations

import hashlib
import posixpath
import re
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.auth import (
    Access,
    KeyProblem,
    Keys,
    KeysError,
    Routes,
    check_name,
    credentials_of,
    keys_line,
    parse_keys,
    parse_upstream_key,
    substitution,
)
from relay.core.headers import passed_fields, request_head
from relay.errors import RequestRefused

if TYPE_CHECKING:
    from relay.core.headers import Headers


def hexdigest(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


# -- the file of keys


def test_keys_by_name() -> None:
    data = f"""\ufeff# clients
alice:{hexdigest(b"one")}\r
  # rotated in May
alice:{hexdigest(b"two").upper()}

team-b.2@example+x:{hexdigest(b"three")}"""
    keys = parse_keys(data.encode())
    assert [keys.name_of(secret) for secret in (b"one", b"two", b"three")] == ["alice", "alice", "team-b.2@example+x"]
    assert keys.name_of(b"four") is None
    assert keys.name_of(b"") is None
    assert keys.name_of(hexdigest(b"one").encode()) is None  # what the file holds lets nobody in
    assert repr(keys) == "<Keys 3: alice, team-b.2@example+x>"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sk-secret", "is not NAME:SHA256"),
        (f":{hexdigest(b'x')}", "has no valid name"),
        (f"a b:{hexdigest(b'x')}", "has no valid name"),
        (f"-a:{hexdigest(b'x')}", "has no valid name"),
        (f"{'a' * 65}:{hexdigest(b'x')}", "has no valid name"),
        (f"ä:{hexdigest(b'x')}", "has no valid name"),
        ("alice:sk-secret", "has no SHA-256"),
        (f"alice:{hexdigest(b'x')[:-1]}", "has no SHA-256"),
        (f"alice:{hexdigest(b'x')}0", "has no SHA-256"),
        (f"alice: {hexdigest(b'x')}", "has no SHA-256"),
        (f"alice:{hexdigest(b'x')} # comment", "has no SHA-256"),
        (f"bob:{hexdigest(b'first')}", "is the key of line 1"),
    ],
)
def test_a_wrong_line_is_named_and_never_quoted(line: str, message: str) -> None:
    with pytest.raises(KeysError) as caught:
        parse_keys(f"first:{hexdigest(b'first')}\n\n{line}\nlast:{hexdigest(b'last')}\n".encode())
    (problem,) = caught.value.problems
    assert problem.line == 3
    assert problem.message.startswith(message)
    assert "secret" not in str(caught.value)


def test_every_wrong_line_is_named() -> None:
    with pytest.raises(KeysError) as caught:
        parse_keys(b"one\n\xff\xfe:x\n# fine\nthree:3\n")
    assert [problem.line for problem in caught.value.problems] == [1, 2, 4]


@pytest.mark.parametrize("data", [b"", b"\n\n", b"# nobody yet\n"])
def test_a_file_without_keys_would_let_nobody_in(data: bytes) -> None:
    with pytest.raises(KeysError) as caught:
        parse_keys(data)
    message = "holds no key, so every request would be refused; `relay key new NAME` makes one"
    assert caught.value.problems == (KeyProblem(0, message),)


def test_the_digest_is_that_of_sha256sum() -> None:
    """As `printf %s secret-of-alice | sha256sum` has it."""
    line = "alice:2e63581f3ad310ec6d04ce0f6adb96d3a7808722dab1612486486190086013f6"
    assert keys_line("alice", b"secret-of-alice") == line
    assert parse_keys(line.encode()).name_of(b"secret-of-alice") == "alice"


@given(
    st.dictionaries(
        st.binary(min_size=1), st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}", fullmatch=True), min_size=1
    )
)
def test_what_is_written_is_read(names: dict[bytes, str]) -> None:
    for name in names.values():
        check_name(name)
    keys = parse_keys("\n".join(keys_line(name, secret) for secret, name in names.items()).encode())
    assert {secret: keys.name_of(secret) for secret in names} == names


# -- keys in requests


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ([], []),
        ([(b"authorization", b"Bearer k")], [b"k"]),
        ([(b"authorization", b"bearer  k ")], [b"k"]),
        ([(b"authorization", b"BEARER k")], [b"k"]),
        ([(b"authorization", b"Bearer")], []),
        ([(b"authorization", b"Bearer ")], []),
        ([(b"authorization", b"Bearerk")], []),
        ([(b"authorization", b"k")], []),
        ([(b"authorization", b"Basic k")], []),
        ([(b"authorization", b"Bearer one"), (b"authorization", b"Bearer two")], []),
        ([(b"x-authorization", b"Bearer k"), (b"proxy-authorization", b"Bearer k"), (b"api-key", b"k")], []),
    ],
)
def test_bearer(headers: Headers, found: list[bytes]) -> None:
    assert credentials_of(headers, b"/v1/chat/completions") == found


@pytest.mark.parametrize(
    ("target", "takes_api_key"),
    [
        (b"/v1/messages", True),
        (b"/v1/messages?beta=true", True),
        (b"/v1/messages/count_tokens", True),
        (b"/v1/messagesx", False),
        (b"/v1/chat/completions", False),
        (b"/v1/models?x=/v1/messages", False),
    ],
)
def test_anthropics_field_on_its_routes(target: bytes, takes_api_key: bool) -> None:
    api_key = (b"x-api-key", b"a")
    bearer = (b"authorization", b"Bearer b")
    assert credentials_of([api_key], target) == ([b"a"] if takes_api_key else [])
    assert credentials_of([api_key, bearer], target) == ([b"b", b"a"] if takes_api_key else [b"b"])
    assert credentials_of([api_key, api_key], target) == []
    assert credentials_of([(b"x-api-key", b"")], target) == []


# -- routes


@pytest.mark.parametrize(
    "target",
    [
        b"/v1/chat/completions",
        b"/v1/chat/completions?api-version=1&path=/../metrics",
        b"/v1/",
        b"/v1/models/",
        b"/v1/models/Qwen/Qwen3-32B",
        b"/v1/models/Qwen%2FQwen3-32B",  # as OpenAI's client writes it
        b"/v1/models/org:base@1,2",
        b"/v1/%63hat/completions",
        b"/v1/files/a%20b",
        b"/v1/..x",
        b"/v1/...",
        b"/v1/.well-known",
        b"/v1/x?%zz",
    ],
)
def test_allowed(target: bytes) -> None:
    assert Routes(["/v1/*"]).allow(target)


@pytest.mark.parametrize(
    "target",
    [
        b"/metrics",
        b"/v1",
        b"/V1/models",
        b"/v1x/models",
        b"/",
        b"",
        b"*",
        b"v1/models",
        b"http://engine/v1/models",
        b"/metrics?/v1/",
        b"/v1/../metrics",
        b"/v1/..",
        b"/v1/.",
        b"/v1/./../metrics",
        b"/v1/%2e%2e/metrics",
        b"/v1/%2E./metrics",
        b"/v1/..%2fmetrics",
        b"/v1%2f..%2fmetrics",
        b"/v1/%252e%252e/metrics",
        b"/v1/%25",
        b"/v1/..;/metrics",
        b"/v1/x;/../metrics",
        b"/v1/..\\metrics",
        b"/v1/%5c..%5cmetrics",
        b"//v1/models",
        b"/v1//models",
        b"/v1/%2fmetrics",
        b"/%2f/v1/models",
        b"/v1/models%00",
        b"/v1/models%0d%0aX:%20y",
        b"/v1/models%3fx",
        b"/v1/models%23x",
        b"/v1/%zz",
        b"/v1/%",
        b"/v1/%2",
        b"/v1/\xc0\xae\xc0\xae/metrics",
        b"/v1/%c0%ae%c0%ae/metrics",
        b"/v1/models\n",
    ],
)
def test_not_allowed(target: bytes) -> None:
    assert not Routes(["/v1/*"]).allow(target)


def test_patterns() -> None:
    routes = Routes(["/v1/chat/completions", "/v[12]/models", "/tokenize?"])
    allowed = [b"/v1/chat/completions", b"/v1/models", b"/v2/models", b"/tokenizer", b"/v2/%6dodels"]
    assert all(map(routes.allow, allowed))
    refused = [b"/v1/chat/completions/", b"/v1/chat/completionsx", b"/v3/models", b"/tokenize", b"/x/v1/models"]
    assert not any(map(routes.allow, refused))
    assert not Routes([]).allow(b"/v1/models")
    assert Routes(["/*"]).allow(b"/metrics")
    assert Routes(["/"]).allow(b"/?x")


PIECES = [
    "/",
    "/v1/",
    "v1",
    "metrics",
    ".",
    "..",
    "%2e",
    "%2E%2e",
    "%252e",
    "%2f",
    "%252f",
    "%",
    ";",
    "%3b",
    "\\",
    "%5c",
    "?",
    "%3f",
    "a",
]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map(lambda pieces: "/v1/" + "".join(pieces)))
def test_however_an_allowed_target_is_read_it_is_below_v1(target: str) -> None:
    if not Routes(["/v1/*"]).allow(target.encode()):
        return
    readings = [target.partition("?")[0]]
    for _ in range(3):
        readings.append(unquote_to_bytes(readings[-1]).decode("latin-1"))
    for reading in readings:
        for spelt in (reading, reading.replace("\\", "/"), re.sub(r";[^/]*", "", reading), reading.partition("?")[0]):
            clean = posixpath.normpath(spelt)
            assert clean == "/v1" or clean.startswith("/v1/")
            assert "//" not in spelt


# -- both together


ACCESS = Access(Keys({hashlib.sha256(b"one").digest(): "alice"}), Routes(["/v1/*"]))
BEARER: Headers = [(b"host", b"h"), (b"authorization", b"Bearer one")]
PREFLIGHT: Headers = [(b"origin", b"https://chat.example"), (b"access-control-request-method", b"POST")]


def test_let_in() -> None:
    assert ACCESS.admit(b"POST", b"/v1/completions", BEARER) == "alice"
    placeholder = (b"x-api-key", b"placeholder")
    assert ACCESS.admit(b"POST", b"/v1/messages", [placeholder, *BEARER]) == "alice"
    assert ACCESS.admit(b"POST", b"/v1/messages", [(b"x-api-key", b"one"), (b"authorization", b"Bearer x")]) == "alice"
    assert ACCESS.admit(b"OPTIONS", b"/v1/completions", PREFLIGHT) is None


@pytest.mark.parametrize(
    ("method", "target", "headers", "status", "code"),
    [
        (b"POST", b"/v1/completions", [], 401, "invalid_api_key"),
        (b"POST", b"/v1/completions", [(b"authorization", b"Bearer two")], 401, "invalid_api_key"),
        (b"POST", b"/v1/completions", [(b"x-api-key", b"one")], 401, "invalid_api_key"),
        (b"POST", b"/v1/completions", PREFLIGHT, 401, "invalid_api_key"),
        (b"OPTIONS", b"/v1/completions", [], 401, "invalid_api_key"),
        (b"GET", b"/metrics", BEARER, 404, "not_found"),
        (b"GET", b"/v1/../metrics", BEARER, 404, "not_found"),
        (b"OPTIONS", b"/metrics", PREFLIGHT, 404, "not_found"),
    ],
)
def test_refused(method: bytes, target: bytes, headers: Headers, status: int, code: str) -> None:
    with pytest.raises(RequestRefused) as caught:
        ACCESS.admit(method, target, headers)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert "two" not in caught.value.message


# -- towards the engine


def head_for_engine(headers: Headers, *, has_keys: bool, upstream_key: bytes | None) -> bytes:
    change = substitution(has_keys=has_keys, upstream_key=upstream_key)
    passed = passed_fields(
        headers, version=b"1.1", client_ip="", scheme=b"http", original_host=b"relay",
        without=change.without, extra=change.extra,
    )  # fmt: skip
    return request_head(b"POST", b"/v1/messages", passed, host=b"engine", request_id="1", body=0)


CLIENTS: Headers = [
    (b"authorization", b"Bearer theirs"),
    (b"x-api-key", b"theirs"),
    (b"x-api-key", b"theirs"),
    (b"connection", b"authorization, x-api-key"),
]


def test_the_relays_keys_never_reach_an_engine() -> None:
    assert b"theirs" not in head_for_engine(CLIENTS, has_keys=True, upstream_key=None)


@pytest.mark.parametrize("has_keys", [False, True])
def test_the_engines_key_takes_the_place_of_the_clients(has_keys: bool) -> None:
    head = head_for_engine(CLIENTS, has_keys=has_keys, upstream_key=b"ours")
    assert b"theirs" not in head
    assert head.count(b"\r\nauthorization: Bearer ours\r\n") == 1


def test_without_keys_the_clients_key_is_for_the_engine() -> None:
    head = head_for_engine(CLIENTS, has_keys=False, upstream_key=None)
    assert head.count(b"theirs") == 3


def test_an_upstream_key_is_one_word() -> None:
    assert parse_upstream_key(b" sk-ours \r\n") == b"sk-ours"
    for data in (b"", b"\n", b"one two", b"one\ntwo", b"one\r\nx-evil: 1", b"\xc3\xa4", b"a\0b"):
        with pytest.raises(ValueError, match="does not hold one key"):
            parse_upstream_key(data)
