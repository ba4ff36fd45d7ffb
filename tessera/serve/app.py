"""The server of the OpenAI API: routes, API keys, limits, metrics, and its process.

Refusals are JSON in the API's form; `MEANINGS` lists their statuses. SIGTERM, SIGHUP and Ctrl-C
drain: new requests get 503, those under way may end for `drain_seconds`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prometheus_client
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.routing import APIRoute
from prometheus_client import Counter, Gauge
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from tessera.data.bounded import LimitError
from tessera.data.conversation import SchemaError
from tessera.data.switch import Switch, SwitchError
from tessera.data.template import TemplateError
from tessera.data.tokenizer import TokenizerError, load_tokenizer
from tessera.generate.engine import ClosedError, GenerationError, QueueFullError
from tessera.generate.requests import EngineError
from tessera.generate.torch_engine import EngineThread, TorchEngine
from tessera.model.placed import DtypeName
from tessera.model.placement import for_inference
from tessera.model.source import resolve
from tessera.runs.recipe import Config
from tessera.serve import limits
from tessera.serve.fields import ChatRequest, CompletionRequest
from tessera.serve.prepare import FieldError, Limits, Preparers
from tessera.serve.replies import Session
from tessera.serve.session import ServedModel

KEY_VARIABLE = "TESSERA_API_KEY"
PAGE = Path(__file__).with_name("page.html")
MAX_MESSAGE = 2000  # characters of what an error says
WRONG = (
    *(GenerationError, SchemaError, SwitchError, TemplateError, TokenizerError),
    *(FieldError, LimitError),
)
STATUSES: dict[type[Exception], int] = {
    **dict.fromkeys(WRONG, 400),
    QueueFullError: 429,
    ClosedError: 503,
    EngineError: 503,
}
MEANINGS = {
    200: "The reply, or its events where stream is true.",
    400: "a bad request",
    401: "no key",
    403: "a Host or an Origin that is not allowed",
    404: "no such model",
    413: "a body too large",
    429: "the queue is full",
    503: "draining, or broken",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {}}}
    for status, text in MEANINGS.items()
}
RESPONSES[200]["content"]["text/event-stream"] = {}


class ServeError(ValueError):
    """A server that cannot be started as configured; the text says what to change."""


class ServeConfig(Config):
    """The options of `tessera serve`."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    name: str = ""
    key_file: str = ""
    batch: int = Field(default=32, ge=1)
    queue: int = Field(default=256, ge=1)
    timeout: float = Field(default=600.0, gt=0)
    drain_seconds: float = Field(default=30.0, ge=0)
    max_body_kib: int = Field(default=1024, ge=1)
    prefix_cache: int = Field(default=0, ge=0)
    int8: bool = False
    web: bool = False
    allow_origin: list[str] = Field(default_factory=list)
    allow_host: list[str] = Field(default_factory=list)
    max_connections: int = Field(default=1024, ge=1)
    patience: float = Field(default=30.0, gt=0)
    switch: Switch | None = None
    dtype: DtypeName = "auto"


def api_keys(config: ServeConfig) -> tuple[str, ...]:
    """The keys of `key_file`, one a line, else that of the environment, else none.

    Raises ServeError for a server without keys that others can reach.
    """
    if config.key_file:
        path = Path(config.key_file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ServeError(f"--key-file {path}: {error.strerror}") from None
        if keys := tuple(line.strip() for line in lines if line.strip()):
            return keys
        raise ServeError(f"--key-file {path} holds no key; write one on each line")
    if key := os.environ.get(KEY_VARIABLE, "").strip():
        return (key,)
    if not limits.is_loopback(config.host):
        raise ServeError(
            f"--host {config.host} can be reached by others, and there is no key: give --key-file "
            f"FILE or {KEY_VARIABLE}, or serve on 127.0.0.1"
        )
    return ()


class Metrics:
    """Counters of one server for Prometheus."""

    def __init__(self, engine: TorchEngine) -> None:
        prometheus_client.disable_created_metrics()
        self.registry = to = prometheus_client.CollectorRegistry()
        running = Gauge("tessera_requests_running", "Samples being decoded.", registry=to)
        running.set_function(lambda: engine.running)
        waiting = Gauge("tessera_requests_waiting", "Samples waiting for a place.", registry=to)
        waiting.set_function(lambda: len(engine.waiting))
        ended = "tessera_requests_finished"
        self.finished = Counter(ended, "Samples that ended.", ["reason"], registry=to)
        self.tokens = Counter("tessera_tokens", "Tokens, by kind.", ["kind"], registry=to)

    def count(self, session: Session) -> None:
        """Count a request that has ended, or that its client has left."""
        usage, samples = session.usage, [s for h in session.handles for s in h.samples]
        for choice, sample in zip(session.choices, samples, strict=False):
            reason = "stop" if choice.stream.stopped else sample.completion.finish_reason
            self.finished.labels(reason if sample.handle.done else "cancelled").inc()
        details = usage["completion_tokens_details"]
        self.tokens.labels("prompt").inc(usage["prompt_tokens"])
        self.tokens.labels("generation").inc(usage["completion_tokens"])
        self.tokens.labels("reasoning").inc(details["reasoning_tokens"])


@dataclass
class Serving:
    """A model being served. keys: a request must give one of them; with none, anybody may ask."""

    name: str
    model: ServedModel
    thread: EngineThread
    prepare: Preparers
    metrics: Metrics
    keys: tuple[str, ...]
    config: ServeConfig


@contextlib.contextmanager
def serving(model: str, config: ServeConfig) -> Iterator[Serving]:
    """A model behind an engine thread, for as long as the body runs."""
    keys, path, directory = api_keys(config), Path(model), resolve(model)
    engine = TorchEngine(
        for_inference(directory, dtype=config.dtype).load(directory, frozen=True),
        max_batch_size=config.batch,
        max_queue=config.queue,
        prefix_cache_tokens=config.prefix_cache,
        int8=config.int8,
    )
    config_of = engine.config
    room = Limits(config_of.max_position_embeddings, config_of.vocab_size, config.queue)
    prepare = Preparers(directory, config.switch, room)
    served = ServedModel(engine, load_tokenizer(directory), config.timeout, config.switch)
    served.prepare()
    name = config.name or (path.resolve().name if path.exists() else model)

    def report(error: Exception) -> None:
        text = f"a step of the engine failed: {type(error).__name__}: {error}"
        print(limits.shortened(text, limits.MAX_LINE), file=sys.stderr)

    with contextlib.closing(prepare), EngineThread(engine, report) as thread:
        yield Serving(name, served, thread, prepare, Metrics(engine), keys, config)


def build(serving: Serving) -> FastAPI:
    """The application of a served model."""
    app = FastAPI(title="tessera", version="1", docs_url=None, redoc_url=None)
    config = serving.config
    app.add_middleware(
        limits.Guard,
        refusal=_refusal,
        too_large=HTTPException(413, limits.too_large(config.max_body_kib * 1024)),
        keys=serving.keys,
        max_bytes=config.max_body_kib * 1024,
        hosts=config.allow_host,
        origins=config.allow_origin,
    )
    if origins := serving.config.allow_origin:  # outside of the guard: preflights carry no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        return _refusal(*_status(error))

    for kind in (*STATUSES, HTTPException, Exception):
        app.add_exception_handler(kind, refuse)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether requests are answered."""
        finite = serving.model.engine.stats.not_finite == 0
        alive = finite and serving.thread.alive and serving.thread.error is None
        return JSONResponse({"status": "ok" if alive else "broken"}, 200 if alive else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Counters for Prometheus."""
        return PlainTextResponse(prometheus_client.generate_latest(serving.metrics.registry))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [_model(serving)]}

    @app.get("/v1/models/{name:path}", responses={404: RESPONSES[404]})
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        _check_name(serving, name)
        return _model(serving)

    # The bodies are read by `_Raw`; the fields of a request are named for the schema's sake.
    app.router.route_class = _raw_route(serving)

    @app.post("/v1/chat/completions", response_model=None, responses=RESPONSES)
    async def chat(request: ChatRequest) -> None:
        """Answer a conversation."""

    @app.post("/v1/completions", response_model=None, responses=RESPONSES)
    async def text(request: CompletionRequest) -> None:
        """Continue a text."""

    app.router.route_class = APIRoute
    if serving.config.web:

        @app.get("/", include_in_schema=False)
        async def page() -> HTMLResponse:
            return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    return app


def _model(serving: Serving) -> dict[str, Any]:
    room = serving.model.engine.config.max_position_embeddings
    one = {"id": serving.name, "object": "model", "created": 0, "owned_by": "tessera"}
    return {**one, "max_model_len": room}


def _check_name(serving: Serving, name: str) -> None:
    if name not in ("", serving.name):
        text = f"this server serves {serving.name!r} and not {name!r}; see /v1/models"
        raise HTTPException(404, text)


def _raw_route(serving: Serving) -> type[APIRoute]:
    """Routes whose bodies are read as they are, and validated in another process."""

    class Raw(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            kind = self.name  # of KINDS in prepare.py

            async def handle(http: Request) -> Response:
                return await _answer(serving, kind, http)

            return handle

    return Raw


async def _answer(serving: Serving, kind: str, http: Request) -> Response:
    media = http.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        raise FieldError("send a JSON object with Content-Type: application/json", None)
    try:
        body = b"".join([piece async for piece in http.stream()])
    except ClientDisconnect:
        return Response(status_code=400)  # nobody reads it
    asked = await serving.prepare(kind, body)
    request = asked.request
    _check_name(serving, request.model)
    # Grammars and prompts' log-probs take time that others must not wait.
    session = await asyncio.to_thread(serving.model.submit, asked)
    del body, asked

    async def stream() -> AsyncIterator[str]:
        """A client that hangs up ends this generator, which ends the request."""
        usage = bool((request.stream_options or {}).get("include_usage"))
        try:
            async for event in session.events(serving.name, usage):
                yield _event(event)
            yield "data: [DONE]\n\n"
        except EngineError as error:
            yield _event(_error(503, str(error)))
        finally:
            session.cancel()
            serving.metrics.count(session)

    async def cancel_on_disconnect() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        session.cancel()

    if request.stream:
        return StreamingResponse(stream(), media_type="text/event-stream")
    watcher = asyncio.create_task(cancel_on_disconnect())
    try:
        return JSONResponse(await session.whole(serving.name))
    finally:
        watcher.cancel()
        session.cancel()
        serving.metrics.count(session)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _error(status: int, text: str, param: str | None = None) -> dict[str, Any]:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    text = limits.shortened(text, MAX_MESSAGE)
    return {"error": {"message": text, "type": kind, "param": param, "code": status}}


def _refusal(status: int, text: str, param: str | None = None) -> JSONResponse:
    headers = {"Retry-After": "1"} if status in (429, 503) else None  # seconds
    return JSONResponse(_error(status, text, param), status, headers)


def _status(error: Exception) -> tuple[int, str, str | None]:
    """The status of a request that raised `error`, what is said of it, and of which field."""
    if isinstance(error, FieldError):
        return 400, *error.args
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail), None
    for kind, status in STATUSES.items():
        if isinstance(error, kind):
            return status, str(error), None
    return 500, f"a mistake in the server: {type(error).__name__}", None


class _Server(uvicorn.Server):
    """Prints its address, and refuses new requests while it drains."""

    def __init__(self, config: uvicorn.Config, serving: Serving) -> None:
        super().__init__(config)
        self.serving = serving

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, does not raise the signal again: a drained server exits with 0."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(limits.AcceptErrors())
        await super().startup(sockets)
        for server in self.servers if self.started else ():
            host, port = server.sockets[0].getsockname()[:2]
            print(f"serving {self.serving.name} on http://{host}:{port}/v1", file=sys.stderr)
            if self.serving.config.web:
                print(f"the page is http://{host}:{port}/", file=sys.stderr)
            sys.stderr.flush()

    async def shutdown(self, sockets: list | None = None) -> None:
        self.serving.model.engine.waiting.close()
        await super().shutdown(sockets)


def serve(model: str, config: ServeConfig) -> None:
    """Serve until a signal. Raises ServeError where the port is taken."""
    with serving(model, config) as one:
        settings = uvicorn.Config(
            build(one),
            host=config.host,
            port=config.port,
            http=limits.protocol(config.max_connections, config.patience),
            ws="none",
            log_config=limits.LOGGING,
            access_log=False,
            backlog=limits.BACKLOG,
            timeout_graceful_shutdown=max(1, round(config.drain_seconds)),
            h11_max_incomplete_event_size=64 * 1024,
        )
        server = _Server(settings, one)
        with contextlib.suppress(SystemExit):  # uvicorn's way to say that the port is taken
            server.run()
        if not server.started:
            raise ServeError(
                f"{config.host}:{config.port} cannot be listened on; is it taken? Give another "
                "--port, or 0 for any"
            )
