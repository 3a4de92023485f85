"""One request to one engine, up to the commit point, or just past it: a plain attempt, or a split one's decode part.

Past it where the pump has sent the first frame of a stream, and streams on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import trio

from relay.core import headers
from relay.core.connectors.base import LegRequest
from relay.core.request import Route
from relay.errors import ExchangeError, Phase, Side, UpstreamRefused, UpstreamTimeout
from relay.net import upstream as wire
from relay.net.fiber import in_task
from relay.net.opening import Opening

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import h11

    from relay.core.auth import Substitution
    from relay.net.exchange import Exchange
    from relay.net.group import Group
    from relay.net.pool import Upstream, UpstreamConnection


class Leg:
    """One request to one engine. `open` answers with what there is to commit to; then `close`, once."""

    def __init__(
        self,
        exchange: Exchange,
        group: Group,
        upstream: Upstream,
        sends: LegRequest,
        *,
        failure_statuses: Collection[int],
        may_go_on: Callable[[], bool],
        holds_first: bool = False,
    ) -> None:
        self.exchange = exchange
        self.group = group
        self.upstream = upstream
        self.sends = sends
        self.is_sent = False  #: the engine may have got the request
        self.failure_statuses = failure_statuses  #: that another engine is tried after
        self.may_go_on = may_go_on  #: whether another engine would be tried now, should this one fail
        self.holds_first = holds_first  #: whether who opens is to see a stream begin, and the client not yet
        self._timeouts = exchange.config.timeouts

    async def open(self) -> Opening:
        """Asks the engine, and tells its health of the outcome. Raises ExchangeError."""
        attempt = self.group.begin(self.upstream)
        opening: Opening | None = None
        try:
            idle = self.upstream.take_idle(self._timeouts.upstream_idle_s)
            if idle is not None:
                try:
                    opening = await self._over(idle)
                except wire.ConnectionDied:  # the engine closed it just then: no failure
                    self.is_sent = False
            if opening is None:
                opening = await self._over(await self._dial())
            attempt.answered(opening.answer.status, time.monotonic())
            self.exchange.service.tally.upstream_answered(self.exchange, self.upstream, opening.answer.status)
            return opening
        except ExchangeError as failure:
            if failure.side is Side.UPSTREAM:
                attempt.failed(time.monotonic())
                self.exchange.service.tally.upstream_failed(self.exchange, self.upstream, failure)
            raise
        except BaseException:
            if opening is not None:
                self.give_up(opening.connection)
            raise
        finally:
            self.group.end(attempt, self.upstream)

    def close(self, connection: UpstreamConnection, *, is_reusable: bool) -> None:
        """Parks the connection, or drops it, which frees the engine at once."""
        self.exchange.pair.detach()
        if is_reusable:
            self.upstream.give_back(connection)
        else:
            connection.close()

    async def _dial(self) -> UpstreamConnection:
        exchange = self.exchange
        exchange.phase = Phase.CONNECT
        began = time.monotonic()
        try:
            async with in_task():
                return await self.upstream.dial(self._timeouts.connect_s)
        finally:
            exchange.timeline.add_connect(time.monotonic() - began)

    async def _over(self, connection: UpstreamConnection) -> Opening:
        """Sends the request, and has the answer begin, within ``first_token_s``."""
        exchange = self.exchange
        pair = exchange.pair
        limit_s = self._timeouts.first_token_s
        exchange.phase = Phase.HEAD
        try:
            pair.attach(connection.under(exchange.service.pump))
            pair.limit(limit_s)
            head = head_of(exchange, self.upstream, self.sends)
            exchange.timeline.request_sent = time.monotonic()
            self.is_sent = True
            method, body = exchange.request.head.method, self.sends.body
            answer, interim = await wire.ask(pair, connection, method, head, body, exchange.expect_answer)
            exchange.timeline.head = time.monotonic()
            if interim:
                await self._pass_on(interim)
            self._refuse_failure(answer)
            opening = Opening(self, connection, answer)
            await self._begin_answer(opening)
            if not opening.has_begun:
                exchange.timeline.answered = time.monotonic()
            return opening
        except trio.TooSlowError:
            self.give_up(connection)
            message = f"the engine sent no token within first_token_s = {limit_s:g} s"
            raise UpstreamTimeout(message, phase=Phase.HEAD) from None
        except BaseException:
            self.give_up(connection)
            raise

    def give_up(self, connection: UpstreamConnection) -> None:
        """Drops the connection of an engine that is of no use: what it took is no time of the relay's."""
        self.close(connection, is_reusable=False)
        self.exchange.timeline.give_up(time.monotonic())

    async def _begin_answer(self, opening: Opening) -> None:
        """Reads of an answer what has to be known before it is committed to, or has its stream begin."""
        exchange, answer = self.exchange, opening.answer
        pair, editor, stream = exchange.pair, exchange.editor, exchange.config.stream
        idle_s = self._timeouts.between_tokens_s
        meter = exchange.meter
        exchange.is_streamed = answer.head.has_frames or (
            exchange.expects_stream and await opening.looks_like_event_stream(pair)
        )
        if not exchange.is_streamed:
            if editor is not None and editor.edits_bodies and is_plain_json(answer):
                await opening.read_whole(pair, meter, editor, max_bytes=stream.max_answer_bytes, idle_s=idle_s)
        elif exchange.is_forced and answer.status == 200:
            exchange.frames = await opening.collect(
                pair,
                meter,
                route=exchange.route,
                request=self.sends.body,
                max_bytes=stream.max_answer_bytes,
                idle_s=idle_s,
            )
            self._refuse_failure(answer)
            if editor is not None and opening.body is not None and answer.status == 200:
                opening.body = editor.edit_body(opening.body, meter)
        else:
            await opening.begin_stream(idle_s=idle_s)

    def _refuse_failure(self, answer: wire.Answer) -> None:
        """Raises UpstreamRefused for a status that another engine is tried after, if one is left."""
        if answer.status in self.failure_statuses and self.may_go_on():
            raise UpstreamRefused(f"the engine answered {answer.status}", phase=Phase.HEAD)

    async def _pass_on(self, interim: list[h11.InformationalResponse]) -> None:
        """Interim answers, to a client that may get some: in HTTP/1.0 there are none (RFC 9110 §15.2)."""
        reply = self.exchange.reply
        if self.exchange.request.head.version >= b"1.1" and not reply.is_early:
            for event in interim:
                fields = list(event.headers)
                await reply.send(reply.head(event.status_code, event.reason, fields, "none"))


def is_plain_json(answer: wire.Answer) -> bool:
    """Whether an answer's body is JSON that can be read as it comes, and a good answer."""
    is_json = headers.content_type(answer.fields) == b"application/json"
    return is_json and answer.status == 200 and not answer.head.is_encoded


def head_of(exchange: Exchange, upstream: Upstream, sends: LegRequest) -> bytes:
    """The head of a request to an engine: the client's own, with what `sends` changes."""
    request = exchange.request
    return headers.request_head(
        request.head.method,
        request.head.target,
        _passed_fields(exchange, sends),
        host=upstream.authority,
        request_id=sends.request_id,
        body=len(sends.body) if request.has_body else "none",
    )


def _passed_fields(exchange: Exchange, sends: LegRequest) -> bytes:
    """The client's own fields, as an engine gets them; kept for the client's next request, which may have that head."""
    client, request, rules = exchange.client, exchange.request, exchange.service.guard.substitution
    if sends.headers:
        replaced = {name for name, _ in sends.headers}
        fields = [*(field for field in request.fields if field[0] not in replaced), *sends.headers]
        return _written(exchange, rules, fields)
    if request.fields is not request.head.fields:
        return _written(exchange, rules, request.fields)
    if client.passed_fields is not None:
        of_head, by_rules, lines = client.passed_fields
        if of_head is request.head and by_rules is rules:
            return lines
    lines = _written(exchange, rules, request.fields)
    client.passed_fields = request.head, rules, lines  # not with the head: the client's address and scheme are in them
    return lines


def _written(exchange: Exchange, rules: Substitution, fields: headers.Headers) -> bytes:
    head, client = exchange.request.head, exchange.client
    return headers.passed_fields(
        fields,
        version=head.version,
        client_ip=client.ip,
        scheme=client.scheme,
        original_host=head.host,
        identity=exchange.route is not Route.OTHER,
        without=rules.without,
        extra=rules.extra,
    )
