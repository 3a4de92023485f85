"""llhttp, by way of `httptools`: a strict parser of another family, to say what a peer makes of the relay's bytes."""

from __future__ import annotations

from typing import Any

import httptools

Headers = list[tuple[bytes, bytes]]


class Messages:
    """What llhttp reads in `data`, which is fed whole; `error` is why it stopped, None where it did not."""

    def __init__(self, parser: type[Any], data: bytes) -> None:
        self.begun = 0
        self.completed = 0
        self.target = b""
        self.headers: Headers = []
        self.trailers: Headers = []
        self.body = b""
        self.error: str | None = None
        self._is_in_body = False
        self._parser = parser(self)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.error = "upgrade"
        except httptools.HttpParserError as exc:
            self.error = str(exc)

    def __repr__(self) -> str:
        return f"<Messages {self.completed} of {self.begun} {self.headers!r} {self.body!r} error={self.error}>"

    @property
    def is_one(self) -> bool:
        """Whether the data is one message, to its last byte."""
        return self.error is None and self.begun == self.completed == 1

    @property
    def method(self) -> bytes:
        method: bytes = self._parser.get_method()
        return method

    @property
    def status(self) -> int:
        status: int = self._parser.get_status_code()
        return status

    def on_message_begin(self) -> None:
        self.begun += 1

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        (self.trailers if self._is_in_body else self.headers).append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self._is_in_body = True

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.completed += 1


def requests(data: bytes) -> Messages:
    return Messages(httptools.HttpRequestParser, data)


def responses(data: bytes) -> Messages:
    return Messages(httptools.HttpResponseParser, data)


def chunked_body(body: bytes) -> Messages:
    """`body` as that of an answer."""
    return responses(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
