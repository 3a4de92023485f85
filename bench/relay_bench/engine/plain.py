"""Answers that are not generated: heads, JSON errors, and the routes that only report."""

from __future__ import annotations

import functools
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

import msgspec


class Refusal(Exception):
    """A request the engine does not serve: status and the fields of vLLM's error object."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.is_flat = False  #: SGLang's form, without an ``error`` around it

    @classmethod
    def invalid(cls, what: str, param: str | None) -> Refusal:
        """A body that fails validation, in the words of vLLM's handler for pydantic's errors."""
        return cls(400, f"1 validation error:\n  {what}", "Bad Request", param)

    @classmethod
    def flat(cls, status: int, message: str) -> Refusal:
        """SGLang's."""
        refusal = cls(status, message, "BadRequestError")
        refusal.is_flat = True
        return refusal

    def body(self, *, is_anthropic: bool) -> bytes:
        """The JSON body, which on ``/v1/messages`` has Anthropic's form."""
        if self.is_flat:
            fields = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
            return msgspec.json.encode({"object": "error", **fields})
        if is_anthropic:
            return msgspec.json.encode({"type": "error", "error": {"type": self.kind, "message": self.message}})
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}}
        )


@functools.lru_cache(maxsize=4)
def _date(now_s: int) -> bytes:
    return b"date: %b\r\nserver: uvicorn\r\n" % formatdate(now_s, usegmt=True).encode()


def response_head(status: int, now_s: int, *fields: bytes) -> bytes:
    """A head as uvicorn writes it: lower-case names, ``date`` and ``server`` first; `fields` are whole lines."""
    try:
        reason = HTTPStatus(status).phrase.encode()
    except ValueError:  # 529 and its like, which uvicorn sends without a phrase, too
        reason = b""
    return b"HTTP/1.1 %d %b\r\n%b" % (status, reason, _date(now_s)) + b"".join(b"%b\r\n" % f for f in fields) + b"\r\n"


def json_answer(
    status: int, body: bytes, now_s: int, *fields: bytes, is_head: bool = False, close: bool = False
) -> bytes:
    """A whole JSON answer; `fields` (``allow``, ``retry-after``) stand before the framing, as in the recordings.

    `is_head` leaves the body out but keeps its length; vLLM has no HEAD routes, so only errors are answered so.
    """
    ending = (b"vary: Origin", b"connection: close") if close else (b"vary: Origin",)
    length = b"content-length: %d" % len(body)
    head = response_head(status, now_s, *fields, length, b"content-type: application/json", *ending)
    return head if is_head else head + body


def body_answer(body: bytes, content_type: bytes, now_s: int, *, close: bool = False) -> bytes:
    """200 with a body of that type."""
    ending = (b"vary: Origin", b"connection: close") if close else (b"vary: Origin",)
    return (
        response_head(200, now_s, b"content-length: %d" % len(body), b"content-type: " + content_type, *ending) + body
    )


def empty_answer(now_s: int, *, close: bool = False) -> bytes:
    """200 without a body and without a type, as ``/health`` answers."""
    ending = (b"vary: Origin", b"connection: close") if close else (b"vary: Origin",)
    return response_head(200, now_s, b"content-length: 0", *ending)


def models_body(model: str, now_s: int) -> bytes:
    """``GET /v1/models`` of an engine that serves one model."""
    permission: dict[str, Any] = {
        "id": "modelperm-8094485adbbf2e22",
        "object": "model_permission",
        "created": now_s,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    entry: dict[str, Any] = {
        "id": model,
        "object": "model",
        "created": now_s,
        "owned_by": "vllm",
        "root": model,
        "parent": None,
        "max_model_len": 131072,
        "permission": [permission],
    }
    return msgspec.json.encode({"object": "list", "data": [entry]})
