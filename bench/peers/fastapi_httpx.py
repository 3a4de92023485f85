"""The forwarder one writes oneself: FastAPI and httpx, round robin. ``fastapi_httpx.py PORT ENGINE_URL…``"""

from __future__ import annotations

import itertools
import sys

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

#: Of one connection, or made anew by whoever sends the body on.
NOT_FORWARDED = {"host", "content-length", "connection", "transfer-encoding"}

app = FastAPI()
engines = itertools.cycle(sys.argv[2:])
client = httpx.AsyncClient(
    timeout=None, limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=4)
)


@app.api_route("/{path:path}", methods=["GET", "POST"])
async def forward(path: str, request: Request) -> StreamingResponse:
    """One request, its answer streamed."""
    headers = [(name, value) for name, value in request.headers.items() if name not in NOT_FORWARDED]
    body = await request.body()
    onward = client.build_request(request.method, f"{next(engines)}/{path}", content=body, headers=headers)
    answer = await client.send(onward, stream=True)
    return StreamingResponse(
        answer.aiter_raw(),
        status_code=answer.status_code,
        headers={name: value for name, value in answer.headers.items() if name not in NOT_FORWARDED},
        background=BackgroundTask(answer.aclose),
    )


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)
