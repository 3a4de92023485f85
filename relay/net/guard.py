"""Who may come in, and under whose key their requests go on."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from relay.config import AuthConfig
from relay.core import headers
from relay.core.auth import Access, KeysError, Routes, Substitution, parse_keys, parse_upstream_key, substitution

#: Paths of the relay's own that load balancers ask for, and that tell nothing.
_OPEN: Final = (b"/-/live", b"/-/ready")


class GuardError(Exception):
    """The files of keys cannot be used; the message has a line for each reason."""


class Guard:
    """The judgement on a request's head. Raises GuardError where a file of `config` cannot be used."""

    def __init__(self, config: AuthConfig) -> None:
        self.access: Access | None = None  #: None: everybody may, everywhere
        if config.keys_file:
            try:
                self.access = Access(parse_keys(_read(config.keys_file)), Routes(config.routes))
            except KeysError as error:
                lines = [f"{config.keys_file}:{problem.line}: {problem.message}" for problem in error.problems]
                raise GuardError("\n".join(lines)) from None
        upstream_key = None
        if config.upstream_key_file:
            try:
                upstream_key = parse_upstream_key(_read(config.upstream_key_file))
            except ValueError as error:
                raise GuardError(f"{config.upstream_key_file}: {error}") from None
        self.substitution: Substitution = substitution(has_keys=self.access is not None, upstream_key=upstream_key)

    def __repr__(self) -> str:
        return f"<Guard {self.access!r}>"

    def admit(self, method: bytes, target: bytes, fields: headers.Headers) -> str | None:
        """The name of the key a request comes with; None where none is asked for. Raises RequestRefused: 401 or 404."""
        if self.access is None or target.partition(b"?")[0] in _OPEN:
            return None
        return self.access.admit(method, target, fields)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise GuardError(f"{path}: cannot be read: {error.strerror}") from None
