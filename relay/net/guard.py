"""Who may come in, and under whose key their requests go on."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, Self

import msgspec

from relay.config import AuthConfig, KeyLimitsConfig
from relay.core import headers
from relay.core.auth import Access, Keys, KeysError, Routes, Substitution, parse_keys, parse_upstream_key, substitution
from relay.core.by_name import ByName

#: Paths of the relay's own that load balancers ask for, and that tell nothing.
_OPEN: Final = (b"/-/live", b"/-/ready")


#: Keys with limits at once: each is two descriptors in every process of the daemon.
MOST_LIMITED_KEYS: Final = 2000
#: Of a key that none are set for.
NO_LIMITS: Final = KeyLimitsConfig()


class GuardError(Exception):
    """The files of keys cannot be used; each of the `problems` says by which setting, and why."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Credentials(msgspec.Struct, frozen=True, array_like=True):
    """What is in the files that [auth] names. Read once for the whole daemon: its workers are told."""

    names: dict[bytes, str] | None = None  #: of keys, by their digests; None: no keys, everybody may
    upstream_key: bytes | None = None

    def __repr__(self) -> str:
        return f"<Credentials {len(self.names or ())} keys>"


class Guard:
    """The judgement on a request's head."""

    def __init__(self, config: AuthConfig, credentials: Credentials) -> None:
        self.credentials = credentials
        self._config = config
        self.access: Access | None = None  #: None: everybody may, everywhere
        if credentials.names is not None:
            self.access = Access(Keys(credentials.names), Routes(config.routes))
        #: Of the keys that have some, by name.
        self.limits: dict[str, KeyLimitsConfig] = dict(_limits_of(config, {*(credentials.names or {}).values()}))
        self.substitution: Substitution = substitution(
            has_keys=self.access is not None, upstream_key=credentials.upstream_key
        )

    @classmethod
    def read(cls, config: AuthConfig) -> Self:
        """With what is in the files of `config` now. Raises GuardError where one cannot be used."""
        names = upstream_key = None
        if config.keys_file:
            try:
                names = parse_keys(_read(config.keys_file, "auth.keys_file")).names
            except KeysError as error:
                where = f"auth.keys_file: {config.keys_file}"
                lines = [f"{where}:{problem.line}: {problem.message}" for problem in error.problems]
                raise GuardError(*lines) from None
        if config.upstream_key_file:
            try:
                upstream_key = parse_upstream_key(_read(config.upstream_key_file, "auth.upstream_key_file"))
            except ValueError as error:
                raise GuardError(f"auth.upstream_key_file: {config.upstream_key_file}: {error}") from None
        guard = cls(config, Credentials(names, upstream_key))
        if len(guard.limits) > MOST_LIMITED_KEYS:
            message = f"limits {len(guard.limits)} keys; allowed: {MOST_LIMITED_KEYS}, as each takes descriptors"
            raise GuardError(f"auth.limits: {message}")
        return guard

    def __repr__(self) -> str:
        return f"<Guard {self.access!r}>"

    def unmatched_limits(self) -> list[str]:
        """Names and patterns of ``auth.limits`` that fit no key."""
        names = {*(self.credentials.names or {}).values()}
        return [pattern for pattern in self._config.limits if not any(map(ByName([(pattern, True)]).get, names))]

    def admit(self, method: bytes, target: bytes, fields: headers.Headers) -> str | None:
        """The name of the key a request comes with; None where none is asked for. Raises RequestRefused: 401 or 404."""
        if self.access is None or target.partition(b"?")[0] in _OPEN:
            return None
        return self.access.admit(method, target, fields)


def _limits_of(config: AuthConfig, names: Collection[str]) -> Iterator[tuple[str, KeyLimitsConfig]]:
    limits = ByName.longest_first(config.limits)
    for name in names:
        found = limits.get(name)
        if found is not None and found != NO_LIMITS:
            yield name, found


def _read(path: str, setting: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise GuardError(f"{setting}: {path}: cannot be read: {error.strerror}") from None
