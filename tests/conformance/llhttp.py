"""llhttp, by way of `httptools`: a strict parser of another family, to say what a peer makes of the relay's bytes."""

from __future__ import annotations

from typing import Any, NamedTuple

import httptools

Headers = list[tuple[bytes, bytes]]


class Message(NamedTuple):
    """One whole message."""

    start: tuple[bytes, bytes] | int  #: method and target of a request; an answer's status
    headers: Headers
    body: bytes


class Messages:
    """What llhttp reads in `data`, which is fed whole; `error` is why it stopped, None where it did not.

    What is read is that of all messages together; `whole` has them one by one, but for the last where it is cut.
    """

    def __init__(self, parser: type[Any], data: bytes) -> None:
        self.whole: list[Message] = []
        self.begun = 0
        self.completed = 0
        self.target = b""
        self.headers: Headers = []
        self.trailers: Headers = []
        self.body = b""
        self.error: str | None = None
        self._is_in_body = False
        self._begun_at = 0, 0, 0  # of `target`, `headers` and `body`
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
    def last_body(self) -> bytes:
        """Of the last message begun, as far as it was read."""
        return self.body[self._begun_at[2] :]

    @property
    def last_headers(self) -> Headers:
        return self.headers[self._begun_at[1] :]

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
        self._is_in_body = False
        self._begun_at = len(self.target), len(self.headers), len(self.body)

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
        target = self.target[self._begun_at[0] :]
        is_answer = isinstance(self._parser, httptools.HttpResponseParser)
        self.whole.append(
            Message(self.status if is_answer else (self.method, target), self.last_headers, self.last_body)
        )


def requests(data: bytes) -> Messages:
    return Messages(httptools.HttpRequestParser, data)


def responses(data: bytes) -> Messages:
    return Messages(httptools.HttpResponseParser, data)


def chunked_body(body: bytes) -> Messages:
    """`body` as that of an answer."""
    return responses(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
