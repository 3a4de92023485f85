"""``relay-bench load``: requests by a schedule, and when each part of each answer came.

What the words mean, here and in every result file. All marks are CLOCK_MONOTONIC; a frame's mark is the instant at
which ``recv`` returned with its last byte, before anything looks at it.

=================  =================================================================================================
planned            when the schedule wanted the request sent. Closed loop: when a place became free
due                planned; with ``--max-concurrency`` beside a rate, when a place became free, if that was later
sent               the client began with it: took a connection or dialled one
connected          the connection was there (TLS included); on a kept connection: sent
written            the last byte of the request was the kernel's
head               the answer's head was complete
first byte         the first byte of its body
content            each frame that carries output: text, reasoning, a tool call. Not role, usage, comments, ``[DONE]``
done               the body ended, or the request failed

ttft               first content - sent (vLLM's TTFT)
ttft_planned       first content - planned: what a user who came at that moment waited
e2el               last content - sent (vLLM's E2EL)
e2el_planned       last content - planned
tpot               e2el less ttft, over output tokens - 1; only where there are 2 or more, and the engine counted them
frame_gap          between successive content frames of a request: what vLLM calls ITL
itl                between successive tokens. A frame of k tokens gives k times a k-th of its gap. Needs a count for
                   every frame: ``--continuous-usage``, or as many content frames as usage counts tokens
send_lag           sent - due: the client's own lateness
client_delay       recv returned - the kernel had the bytes (its receive time stamp): the client's own slowness. Of a
                   read that brought several segments: of the last one
frame_delay        content frame received - engine made it, by the stamps of ``relay-bench engine --stamp`` on the same
                   machine
request_goodput    requests that met every ``--goodput`` objective, a second; ``slo_attainment``: their part of all sent
=================  =================================================================================================

Percentiles are numpy's (linear interpolation) for what a request has one of, and within 0.2 % for what it has many of
(histograms). Standard deviations are the population's. Failed requests are in no latency; they are counted by label.

Pure: `schedule`, `datasets`, `lengths`, `answer`, `records`, `stats`, `slo`. On sockets: `client`, `worker`.
"""
