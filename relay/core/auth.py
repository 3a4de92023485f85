"""Who may ask for what: the keys of ``auth.keys_file``, the routes of ``auth.routes``, and what an engine sees of both.

**Keys are stored as their SHA-256**, so the file, a backup or a log of it lets nobody in. Neither salt nor a slow hash
is needed, and a slow one would be a way to keep a worker busy: `relay key new` makes keys of 256 random bits, which no
dictionary holds. A key is looked up by its digest. What that takes depends on digests alone: to learn something of a
stored one by timing, a client would have to try keys until their digests share its first bits, and would then hold a
piece of a digest that cannot be turned back into a key. Hence a dictionary serves as well as comparing with each key in
constant time, and costs the same for one key and for thousands.

**A route is allowed if every reader reads it so.** The target goes on to the engine as it came, and what stands there
decodes and cleans paths in its own way: uvicorn decodes percent signs, nginx and Go resolve dot segments and merge
slashes, Java servers cut off what follows a semicolon, some decode twice. So a path is decoded once, and one that could
still mean two things (RFC 3986 §6.2.2: dot segments, empty segments, another layer of encoding, a backslash) matches
nothing, rather than be guessed at.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from relay.core.headers import Headers, find_all
from relay.errors import RequestRefused

#: The fields in which a client's key comes. With keys configured they never reach an engine, right or wrong.
CREDENTIAL_FIELDS: Final = frozenset({b"authorization", b"x-api-key"})

#: What an answer of status 401 has to carry (RFC 9110 §15.5.2, RFC 6750 §3).
CHALLENGE: Final = (b"www-authenticate", b'Bearer realm="relay"')

#: Names go into records, metrics and file names.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
_NAMES_ALLOWED = "1 to 64 letters, digits and . _ @ + -, the first a letter or digit"
_DIGEST = re.compile(r"[0-9A-Fa-f]{64}")

#: Segments of RFC 3986 §3.3's pchar as it is decoded, and the space; without the semicolon, and none is "." or "..".
#: The group is not possessive: before Python 3.11.5 it would then eat the slash of a segment that is none.
_UNAMBIGUOUS_PATH = re.compile(rb"/|(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9\-._~!$&'()*+,=:@ ]++)+/?")

_UPSTREAM_KEY = re.compile(rb"[\x21-\x7e]+")


class KeyProblem(NamedTuple):
    """One mistake in a keys file: its line (0: the file as a whole), and a sentence that never quotes the line."""

    line: int
    message: str


class KeysError(Exception):
    """A keys file cannot be used; `problems` has every reason."""

    def __init__(self, problems: list[KeyProblem]) -> None:
        super().__init__("\n".join(f"{problem.line}: {problem.message}" for problem in problems))
        self.problems = tuple(problems)


class Keys:
    """The keys that let a client in, as digests, and the name of each."""

    __slots__ = ("names",)

    def __init__(self, names: Mapping[bytes, str]) -> None:
        self.names = dict(names)  #: by digest

    def __repr__(self) -> str:
        return f"<Keys {len(self.names)}: {', '.join(sorted({*self.names.values()}))}>"

    def name_of(self, secret: bytes) -> str | None:
        """Whose key this is; `None` for nobody's. In constant time: see the module's head."""
        return self.names.get(_digest(secret))


def check_name(name: str) -> None:
    """Raise `ValueError` for what cannot name a key."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"not a name for a key; allowed: {_NAMES_ALLOWED}")


def keys_line(name: str, secret: bytes) -> str:
    """The line of a keys file that lets the holder of `secret` in."""
    return f"{name}:{_digest(secret).hex()}"


def parse_keys(data: bytes) -> Keys:
    """Read a keys file: lines of ``name:sha256-hex``, empty lines, and comments behind a ``#`` at a line's start.

    A name may stand on several lines, so that its key can be replaced while the old one still works.

    Raises `KeysError`. A line that is wrong may well hold a key that somebody forgot to hash, so none is quoted.
    """
    names: dict[bytes, str] = {}
    lines: dict[bytes, int] = {}
    problems: list[KeyProblem] = []
    for number, line in enumerate(data.decode("utf-8-sig", "replace").split("\n"), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, colon, digest_text = text.partition(":")
        if not colon:
            problems.append(KeyProblem(number, "is not NAME:SHA256; `relay key new NAME` prints such a line"))
        elif not _NAME.fullmatch(name):
            problems.append(KeyProblem(number, f"has no valid name before the colon; allowed: {_NAMES_ALLOWED}"))
        elif not _DIGEST.fullmatch(digest_text):
            message = "has no SHA-256 in 64 hex digits behind the colon; a key itself is never stored"
            problems.append(KeyProblem(number, message))
        elif (digest := bytes.fromhex(digest_text)) in lines:
            problems.append(KeyProblem(number, f"is the key of line {lines[digest]}; allowed: each key once"))
        else:
            names[digest] = name
            lines[digest] = number
    if not names and not problems:
        problems.append(
            KeyProblem(0, "holds no key, so every request would be refused; `relay key new NAME` makes one")
        )
    if problems:
        raise KeysError(problems)
    return Keys(names)


def credentials_of(headers: Headers, target: bytes) -> list[bytes]:
    """The keys a request comes with: of ``Authorization: Bearer``, and under ``/v1/messages`` of ``x-api-key``.

    Anthropic's clients send the second, or both, one of them a placeholder. A field that is there twice counts as
    absent, as it may come once only (RFC 9110 §5.3, §11.6.2).
    """
    found = []
    authorization = find_all(headers, b"authorization")
    if len(authorization) == 1:
        scheme, _, token = authorization[0].partition(b" ")
        if scheme.lower() == b"bearer":
            found.append(token.strip(b" "))
    path = target.partition(b"?")[0]
    if path == b"/v1/messages" or path.startswith(b"/v1/messages/"):
        api_key = find_all(headers, b"x-api-key")
        if len(api_key) == 1:
            found.append(api_key[0])
    return [secret for secret in found if secret]


class Routes:
    """The paths that clients may ask for: globs in which ``*`` stands for anything, slashes included."""

    __slots__ = ("_allowed", "_patterns")

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = tuple(patterns)
        self._allowed = [re.compile(fnmatch.translate(pattern).encode()).match for pattern in self._patterns]

    def __repr__(self) -> str:
        return f"<Routes {' '.join(self._patterns)}>"

    def allow(self, target: bytes) -> bool:
        """Does a pattern match the path of an origin-form `target`, however it is read? Never for ``*``."""
        path = target.partition(b"?")[0]
        if b"%" in path:
            path = unquote_to_bytes(path)  # what is no escape stays, and "%" is not allowed below
        return _UNAMBIGUOUS_PATH.fullmatch(path) is not None and any(matches(path) for matches in self._allowed)


class Access:
    """The judgement on a request's head, before any of its body is read."""

    __slots__ = ("keys", "routes")

    def __init__(self, keys: Keys, routes: Routes) -> None:
        self.keys = keys
        self.routes = routes

    def __repr__(self) -> str:
        return f"<Access {self.keys!r} {self.routes!r}>"

    def admit(self, method: bytes, target: bytes, headers: Headers) -> str | None:
        """The name of the key that lets a request in; `None` for a CORS preflight, which never has one.

        Browsers send no credentials with a preflight (Fetch §4.8), so vLLM's own check lets OPTIONS pass as well.

        Raises `RequestRefused`: 404 for a route that is not open, 401 without a key that is known.
        """
        if not self.routes.allow(target):
            raise RequestRefused(404, "not_found", "this relay does not serve this path; see auth.routes")
        credentials = credentials_of(headers, target)
        for secret in credentials:
            name = self.keys.name_of(secret)
            if name is not None:
                return name
        if method == b"OPTIONS" and find_all(headers, b"access-control-request-method"):
            return None
        if credentials:
            raise RequestRefused(
                401, "invalid_api_key", "this API key is not known here; ask the relay's operator for one"
            )
        raise RequestRefused(401, "invalid_api_key", "an API key is needed; send it as `Authorization: Bearer KEY`")


class Substitution(NamedTuple):
    """What of a request's head changes for the engine: the arguments of these names of `headers.passed_fields`."""

    without: frozenset[bytes]
    extra: tuple[tuple[bytes, bytes], ...]


def substitution(*, has_keys: bool, upstream_key: bytes | None) -> Substitution:
    """The engine's own key in the place of the client's.

    `has_keys`: clients authenticate to the relay, so theirs are none of the engine's business. Without either, the
    engine checks keys itself, and the client's goes on to it.
    """
    extra = () if upstream_key is None else ((b"authorization", b"Bearer " + upstream_key),)
    return Substitution(CREDENTIAL_FIELDS if has_keys or extra else frozenset(), extra)


def parse_upstream_key(data: bytes) -> bytes:
    """Read ``auth.upstream_key_file``: one key, and white space around it. Raises `ValueError`, never quoting it."""
    key = data.strip()
    if not _UPSTREAM_KEY.fullmatch(key):
        raise ValueError("does not hold one key; allowed: one line of visible ASCII characters, without spaces")
    return key


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
