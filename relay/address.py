"""Where to listen and whom to call: the three forms of an address, read strictly.

A mistake here shows up as traffic that goes nowhere, so everything doubtful is refused, and the message says how to
write what was probably meant, reading on from the text it refuses ("… has no port"). Names are not resolved, as this
module does no I/O.
"""

from __future__ import annotations

import ipaddress
import re

import msgspec

#: How an engine's URL may look, for messages.
UPSTREAM_FORMS = "http(s)://HOST:PORT, dns+http(s)://NAME:PORT or unix:/path"

_UNIX_PREFIX = "unix:"
_DNS_PREFIX = "dns+"
#: Each with the port that it stands for.
_SCHEMES = {"http": 80, "https": 443}

#: `sun_path` holds 108 bytes with the closing zero (unix(7)).
_UNIX_PATH_MAX_BYTES = 107

_EVERY_INTERFACE = frozenset({"0.0.0.0", "::"})
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

_LOOPBACK_NET = re.compile(r"127(\.\d{1,3}){3}")
# RFC 1035 §2.3.4: labels of 1 to 63 bytes, 253 in all. For any other the resolver raises what is no OSError.
_LABEL = r"[A-Za-z0-9_-]{1,63}"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\.?\Z)(?![.-]){_LABEL}(\.{_LABEL})*(?<!-)\.?")
_DIGITS_AND_DOTS = re.compile(r"[0-9.]+")
_ZONE = re.compile(r"[A-Za-z0-9._-]+")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# A comma before what begins an engine's URL, or behind a port. (A socket's path may have commas, and colons.)
_SEVERAL = re.compile(r".*,\s*(dns\+)?(https?://|unix:/)|(?!unix:).*:\d+/?,", re.IGNORECASE)


class Address(msgspec.Struct, frozen=True):
    """A TCP address, or with `unix_path` set a unix socket; an IPv6 `host` is without its brackets."""

    host: str = ""
    port: int = 0
    unix_path: str | None = None

    def __str__(self) -> str:
        """The address as it stands in a configuration."""
        if self.unix_path is not None:
            return _UNIX_PREFIX + self.unix_path
        return f"{_bracketed(self.host)}:{self.port}"

    @property
    def url(self) -> str:
        """The address as log lines and curl have it: ``http://…``, or ``unix:/…``."""
        return self.url_in("http")

    def url_in(self, scheme: str) -> str:
        """The same where ``https`` is spoken, or any other scheme."""
        return str(self) if self.unix_path is not None else f"{scheme}://{self}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.unix_path is not None or self.host in _LOOPBACK or bool(_LOOPBACK_NET.fullmatch(self.host))

    @property
    def is_wildcard(self) -> bool:
        """Whether it stands for every interface, and so cannot be called."""
        return self.host in _EVERY_INTERFACE

    def collides_with(self, other: Address) -> bool:
        """Whether both cannot be bound by one process: the same, or one is every interface of the other's family."""
        if self.unix_path is not None or other.unix_path is not None:
            return self.unix_path == other.unix_path
        if self.port != other.port or self.port == 0:
            return False
        same_family = (":" in self.host) == (":" in other.host)
        return self.host == other.host or (same_family and bool({self.host, other.host} & _EVERY_INTERFACE))


class UpstreamConfig(msgspec.Struct, frozen=True):
    """An engine as configured.

    `url` is the normal form, the engine's name in records and metrics; `authority` is the ``Host`` field sent to it.
    For a unix socket `host` is empty and `port` 0. With `is_dns`, it stands for an engine at each address of its name.
    """

    url: str
    host: str
    port: int
    unix_path: str | None
    authority: str
    weight: int = 1  #: its share of the requests, beside the other weights
    max_in_flight: int = 0  #: most exchanges at once; 0: no limit
    is_dns: bool = False
    is_tls: bool = False  #: ``https``
    ca: str = ""  #: the file with the certificates that vouch for it; empty: the system's
    server_name: str = ""  #: whose certificate it has to show; empty: that of `host`
    kv_address: str = ""  #: ``HOST:PORT`` of its key-value sockets (p2p_nccl)
    bootstrap: str = ""  #: URL of its bootstrap server (mooncake)
    bootstrap_port: int = 0  #: port of its bootstrap server (sglang)

    def at(self, ip: str) -> UpstreamConfig:
        """The engine at one of the addresses of a name; it is called, and verified, by the name all the same."""
        url = f"{_scheme(is_tls=self.is_tls)}://{_bracketed(ip)}:{self.port}"
        return msgspec.structs.replace(self, url=url, host=ip, is_dns=False, server_name=self.verified_name)

    @property
    def verified_name(self) -> str:
        """The name, or address, that the certificate of an ``https`` engine must be for."""
        return self.server_name or self.host.partition("%")[0]

    def is_served_by(self, address: Address) -> bool:
        """Whether a listener at `address` on this machine would answer calls to this upstream."""
        if self.unix_path is not None or address.unix_path is not None:
            return self.unix_path == address.unix_path
        if self.port != address.port:
            return False
        is_loopback = self.host in _LOOPBACK
        return self.host == address.host or (is_loopback and address.host in _LOOPBACK | _EVERY_INTERFACE)


def parse_address(text: str) -> Address:
    """Read where to listen; port 0 is allowed. Raises `ValueError` saying what is wrong and what is allowed."""
    if text.startswith(_UNIX_PREFIX):
        return Address(unix_path=_unix_path(text))
    if _SCHEME.match(text):
        raise ValueError("is a URL; an address has no scheme: HOST:PORT, [::1]:PORT or unix:/path")
    host, port = _host_and_port(text)
    if port is None:
        raise ValueError("has no port; allowed: HOST:PORT, [::1]:PORT or unix:/path")
    return Address(host, port)


def parse_address_or_off(text: str) -> Address | None:
    """Read an address that may be missing on purpose; otherwise as `parse_address`."""
    return None if text == "off" else parse_address(text)


def parse_upstream(text: str) -> UpstreamConfig:
    """Read an engine's URL. Raises `ValueError` saying what is wrong and what is allowed."""
    if _SEVERAL.match(text):
        allowed = "repeat the flag, once for each engine, or in the file give each a string of its own"
        raise ValueError(f"is more than one engine; {allowed}")
    if text.startswith(_UNIX_PREFIX):
        path = _unix_path(text)
        return UpstreamConfig(url=_UNIX_PREFIX + path, host="", port=0, unix_path=path, authority="localhost")
    if text[: len(_DNS_PREFIX)].lower() == _DNS_PREFIX:
        config = parse_upstream(text[len(_DNS_PREFIX) :])
        if config.unix_path is not None or config.is_dns:
            raise ValueError("has no name to resolve; allowed: dns+http(s)://NAME:PORT")
        return msgspec.structs.replace(config, url=_DNS_PREFIX + config.url, is_dns=True)
    scheme, found, rest = text.partition("://")
    scheme = scheme.lower()
    if not found or scheme not in _SCHEMES:
        raise ValueError(f"is not an engine's URL; allowed: {UPSTREAM_FORMS}")
    end = min((at for at in map(rest.find, "/?#") if at >= 0), default=len(rest))
    host_and_port, path = rest[:end], rest[end:]
    if "@" in host_and_port:
        allowed = f"{scheme}://HOST:PORT, credentials come with each request"
        raise ValueError(f"holds a user name or password; allowed: {allowed}")
    if path not in ("", "/"):
        raise ValueError(f"has a path, and requests keep their own; write {scheme}://{host_and_port} without {path}")
    host, port = _host_and_port(host_and_port)
    if port is None:
        port = _SCHEMES[scheme]
    elif port == 0:
        raise ValueError("has port 0, which nobody can call; allowed: 1 to 65535")
    host = host.lower()
    # A zone (fe80::1%eth0) has a meaning on this machine only, so it is not sent (RFC 6874 §4).
    name = _bracketed(host.partition("%")[0])
    authority = name if port == _SCHEMES[scheme] else f"{name}:{port}"
    return UpstreamConfig(
        url=f"{scheme}://{_bracketed(host)}:{port}",
        host=host,
        port=port,
        unix_path=None,
        authority=authority,
        is_tls=scheme == "https",
    )


def _scheme(*, is_tls: bool) -> str:
    return "https" if is_tls else "http"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _unix_path(text: str) -> str:
    path = text[len(_UNIX_PREFIX) :]
    if path.startswith("//"):
        raise ValueError(f"has too many slashes; write unix:/{path.lstrip('/')}")
    if not path.startswith("/") or path.endswith("/") or not path.isprintable():
        raise ValueError("is not a unix socket's absolute path; allowed: unix:/path/to/socket")
    if len(path.encode()) > _UNIX_PATH_MAX_BYTES:
        raise ValueError(f"is too long for a unix socket; allowed: at most {_UNIX_PATH_MAX_BYTES} bytes")
    return path


def _host_and_port(text: str) -> tuple[str, int | None]:
    if text.startswith("["):
        host, bracket, port_part = text[1:].partition("]")
        if not bracket or (port_part and not port_part.startswith(":")):
            raise ValueError("is not an address; IPv6 is written [::1]:PORT")
        name, percent, zone = host.partition("%")
        try:
            ipaddress.IPv6Address(name)
        except ValueError:
            raise ValueError("has no IPv6 address in its brackets; allowed: [::1]:PORT") from None
        if percent and not _ZONE.fullmatch(zone):
            raise ValueError("has no valid zone; allowed: [fe80::1%eth0]:PORT")
        return host, _port(port_part[1:]) if port_part else None
    host, colon, port_text = text.rpartition(":")
    if not colon:
        if text.isascii() and text.isdigit():
            raise ValueError(f"has no host; write 127.0.0.1:{text}, or 0.0.0.0:{text} for every interface")
        return _host(text), None
    if ":" in host:
        raise ValueError("has more than one colon; IPv6 is written [::1]:PORT")
    port = _port(port_text)
    if host in ("", "*"):
        raise ValueError(f"has no host; write 127.0.0.1:{port}, or 0.0.0.0:{port} or [::]:{port} for every interface")
    return _host(host), port


def _host(text: str) -> str:
    if not _HOST_NAME.fullmatch(text):
        raise ValueError("has no valid host; allowed: a name, an IPv4 address, or an IPv6 address in brackets")
    if _DIGITS_AND_DOTS.fullmatch(text):
        try:
            ipaddress.IPv4Address(text)
        except ValueError:
            raise ValueError("has no valid IPv4 address") from None
    return text


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535):
        raise ValueError("has no valid port; allowed: up to 65535")
    return int(text)
