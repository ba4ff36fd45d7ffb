"""Counters in Prometheus' text format, under vLLM's kind of names.

The server: routes, keys, limits, and what went wrong in the API's own form.

Every refusal is JSON with a sentence: 400 what the request says, 401 no key, 404 no such model or
path, 413 a body too large, 429 a full queue (with Retry-After), 503 draining or broken.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tessera.data.conversation import SchemaError
from tessera.data.switch import SwitchError
from tessera.data.template import TemplateError
from tessera.generate.engine import ClosedError, GenerationError, QueueFullError
from tessera.generate.requests import EngineError
from tessera.generate.torch_engine import EngineThread, TorchEngine
from tessera.serve import replies
from tessera.serve.schema import ChatRequest, CompletionRequest
from tessera.serve.session import Talk, Talker


@dataclass
class Metrics:
    """What was answered since the server began."""

    ended: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, talk: Talk) -> None:
        """Counts a request that has ended, or was left by its client."""
        usage = talk.usage
        with self._lock:
            for stream, completion in zip(talk.streams, talk.handle.completions, strict=True):
                reason = "stop" if stream.stopped else completion.finish_reason
                self.ended[reason if talk.handle.done else "cancelled"] += 1
            self.tokens["prompt"] += usage["prompt_tokens"]
            self.tokens["generation"] += usage["completion_tokens"]
            self.tokens["reasoning"] += usage["completion_tokens_details"]["reasoning_tokens"]

    def text(self, engine: TorchEngine) -> str:
        """All of it, with what the engine does at this moment."""
        with self._lock:
            ended, tokens = dict(self.ended), dict(self.tokens)
        lines = [
            "# HELP tessera_requests_running Samples being decoded.",
            "# TYPE tessera_requests_running gauge",
            f"tessera_requests_running {engine.running}",
            "# HELP tessera_requests_waiting Samples waiting for a place.",
            "# TYPE tessera_requests_waiting gauge",
            f"tessera_requests_waiting {len(engine.waiting)}",
            "# HELP tessera_requests_finished_total Samples that ended, by reason.",
            "# TYPE tessera_requests_finished_total counter",
        ]
        lines += [
            f'tessera_requests_finished_total{{reason="{reason}"}} {count}'
            for reason, count in sorted(ended.items())
        ]
        lines += [
            "# HELP tessera_tokens_total Tokens, by kind.",
            "# TYPE tessera_tokens_total counter",
        ]
        lines += [f'tessera_tokens_total{{kind="{k}"}} {n}' for k, n in sorted(tokens.items())]
        return "\n".join(lines) + "\n"


PAGE = Path(__file__).with_name("page.html")
RETRY_SECONDS = 1
OPEN_PATHS = ("/health", "/metrics", "/")  # asked by load balancers and browsers, without a key
REFUSALS: tuple[tuple[type[Exception], int], ...] = (
    (QueueFullError, 429),
    (ClosedError, 503),
    (EngineError, 503),
    (GenerationError, 400),
    (SchemaError, 400),
    (SwitchError, 400),
    (TemplateError, 400),
)


@dataclass
class Serving:
    """A model being served. keys: one of them must be given; none, anybody may ask."""

    name: str
    talker: Talker
    thread: EngineThread
    keys: tuple[str, ...] = ()
    max_body_bytes: int = 1 << 20
    web: bool = False
    metrics: Metrics = field(default_factory=Metrics)


def build(serving: Serving) -> FastAPI:
    """The application of a served model."""
    app = FastAPI(title="tessera", version="1", docs_url=None, redoc_url=None)
    app.add_middleware(Limits, serving=serving)
    for kind, status in REFUSALS:
        app.add_exception_handler(kind, _handler(status))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _broken)
    _add_looks(app, serving)
    _add_chat(app, serving)
    return app


def _add_looks(app: FastAPI, serving: Serving) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether requests are answered."""
        alive = serving.thread.alive and serving.thread.error is None
        return JSONResponse({"status": "ok" if alive else "broken"}, 200 if alive else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Counters for Prometheus."""
        return PlainTextResponse(serving.metrics.text(serving.talker.engine))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served."""
        room = serving.talker.engine.packed.config.max_position_embeddings
        one = {"id": serving.name, "object": "model", "created": 0, "owned_by": "tessera"}
        return {"object": "list", "data": [{**one, "max_model_len": room}]}

    if serving.web:

        @app.get("/", include_in_schema=False)
        async def page() -> HTMLResponse:
            return HTMLResponse(PAGE.read_text(encoding="utf-8"))


def _add_chat(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/chat/completions", response_model=None, responses=REPLIES)
    async def chat(request: ChatRequest, http: Request) -> JSONResponse | StreamingResponse:
        """Answer a conversation."""
        _check_model(serving, request.model)
        talk = serving.talker.chat(request)
        if request.stream:
            usage = request.tells_usage
            events = replies.chat_events(talk, serving.name, request.logprobs, usage)
            return _stream(serving, talk, events)
        return await _whole(
            serving, talk, http, replies.whole_chat(talk, serving.name, request.logprobs)
        )

    @app.post("/v1/completions", response_model=None, responses=REPLIES)
    async def complete(
        request: CompletionRequest, http: Request
    ) -> JSONResponse | StreamingResponse:
        """Go on with a text."""
        _check_model(serving, request.model)
        talk = serving.talker.complete(request)
        echo = request.prompt if request.echo and isinstance(request.prompt, str) else ""
        wanted = request.logprobs is not None
        if request.stream:
            usage = request.tells_usage
            events = replies.completion_events(talk, serving.name, wanted, usage, echo)
            return _stream(serving, talk, events)
        return await _whole(
            serving, talk, http, replies.whole_completion(talk, serving.name, wanted, echo)
        )


REPLIES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The reply, or its events where stream is true.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}
REPLIES |= {
    code: {"description": text, "content": {"application/json": {}}}
    for code, text in {
        400: "the request is not one",
        401: "no key",
        404: "no such model",
        413: "a body too large",
        429: "the queue is full",
        503: "draining, or broken",
    }.items()
}


def _check_model(serving: Serving, name: str) -> None:
    if name and name != serving.name:
        text = f"this server serves {serving.name!r} and not {name!r}; see /v1/models"
        raise HTTPException(404, text)


def _stream(serving: Serving, talk: Talk, events: AsyncIterator[str]) -> StreamingResponse:
    """Events as they come; a client that hangs up ends the generator, which ends the request."""

    async def counted() -> AsyncIterator[str]:
        try:
            async for event in events:
                yield event
        except EngineError as error:
            yield f"data: {json.dumps(_error(503, str(error)))}\n\n"
        finally:
            talk.handle.cancel()
            serving.metrics.note(talk)

    return StreamingResponse(counted(), media_type="text/event-stream")


async def _whole(
    serving: Serving, talk: Talk, http: Request, reply: Awaitable[dict[str, Any]]
) -> JSONResponse:
    watcher = asyncio.create_task(_hung_up(http, talk))
    try:
        return JSONResponse(await reply)
    finally:
        watcher.cancel()
        talk.handle.cancel()
        serving.metrics.note(talk)


async def _hung_up(http: Request, talk: Talk) -> None:
    """Cancels a request whose client has gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    talk.handle.cancel()


def _error(status: int, text: str) -> dict[str, Any]:
    kinds = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": text, "type": kind, "param": None, "code": status}}


def _reply(status: int, text: str) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else None
    return JSONResponse(_error(status, text), status, headers)


def _handler(status: int) -> Callable[[Request, Exception], Awaitable[JSONResponse]]:
    async def handle(_: Request, error: Exception) -> JSONResponse:
        return _reply(status, str(error))

    return handle


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["loc"] == ("body",) or first["type"] == "json_invalid":
        text = "the body is no JSON object; send one with Content-Type: application/json"
        return _reply(400, text)
    return _reply(400, f"{where}: {first['msg']}")


async def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _reply(error.status_code, str(error.detail))


async def _broken(_: Request, error: Exception) -> JSONResponse:
    return _reply(500, f"a mistake in the server: {type(error).__name__}")


class Limits:
    """Keys and sizes, before anything of a body is read."""

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self.app, self.serving = app, serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["path"] not in OPEN_PATHS and not self._knows(headers.get(b"authorization", b"")):
            await _reply(401, "give an API key: Authorization: Bearer KEY")(scope, receive, send)
            return
        most = self.serving.max_body_bytes
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > most:
            await self._too_large(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise HTTPException(413, f"the body is larger than {most:,} bytes")
            return message

        await self.app(scope, counted, send)

    async def _too_large(self, scope: Scope, receive: Receive, send: Send) -> None:
        most = self.serving.max_body_bytes
        text = f"the body is larger than {most:,} bytes; shorten it, or raise --max-body-kib"
        await _reply(413, text)(scope, receive, send)

    def _knows(self, given: bytes) -> bool:
        """Compared in a time that tells nothing of where keys differ."""
        if not self.serving.keys:
            return True
        word, _, key = given.partition(b" ")
        same = [hmac.compare_digest(key.strip(), known.encode()) for known in self.serving.keys]
        return word.lower() == b"bearer" and any(same)
