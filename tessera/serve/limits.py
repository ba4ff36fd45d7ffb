"""What keeps clients from freezing, filling or misusing the server, before a request is read."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import resource
import time
from typing import Any
from urllib.parse import urlsplit

import h11
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

PUBLIC_PATHS = ("/health", "/metrics", "/")  # for load balancers and browsers, without a key
MAX_LINE = 8192  # characters of a log line, or of a traceback
QUIET_SECONDS = 10.0  # between two lines about connections that cannot be accepted
BACKLOG = 256  # connections that the kernel holds; all may be accepted at once
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"


class Protocol(H11Protocol):
    """Closes connections above a number, and those whose client keeps the server waiting.

    patience: seconds for the whole of a request to come, and for a piece of a reply to be read.
    """

    most, patience = 1024, 30.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self.most:
            self.transport = transport
            transport.write(BUSY)
            transport.close()
            return
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self.flow is None:  # refused
            return
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop()
        elif self._timer is None:
            self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._stop()
        self._timer = self.loop.call_later(self.patience, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def protocol(max_connections: int, patience: float) -> type[Protocol]:
    """With as many connections as the process's limit of open files allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = BACKLOG + 128  # accepted before they are refused, and the server's own files
    wanted = max_connections + spare
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    most = max(8, min(max_connections, soft - spare))
    return type("_Protocol", (Protocol,), {"most": most, "patience": patience})


class AcceptErrors:
    """An exception handler of asyncio that says once in a while what comes thousands of times."""

    def __init__(self) -> None:
        self._said = -QUIET_SECONDS

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "accept" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._said >= QUIET_SECONDS:
            self._said = time.monotonic()
            text = "connections cannot be accepted (%s); raise ulimit -n"
            logging.getLogger("uvicorn.error").error(text, context.get("exception"))


class _Short(logging.Formatter):
    """Lines, tracebacks included, of at most MAX_LINE characters."""

    def format(self, record: logging.LogRecord) -> str:
        return shortened(super().format(record), MAX_LINE)


def shortened(text: str, most: int) -> str:
    """The beginning and the end of a text, which says of an error what it was."""
    half = most // 2 - 20
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"


LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"short": {"()": _Short, "format": "%(levelname)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "short"}},
    "loggers": {
        name: {"handlers": ["stderr"], "level": "ERROR", "propagate": False}
        for name in ("uvicorn", "asyncio")
    },
}


class Guard:
    """Middleware that checks host, origin, key and size before a body is read.

    Without keys the server is on loopback, where any page that a browser shows reaches it, under
    its own name even, if that is made to mean 127.0.0.1 (DNS rebinding): then the Host must be a
    name of loopback and the Origin the server's own, or allowed. refusal: makes a response of a
    status and a text.
    """

    def __init__(
        self,
        app: ASGIApp,
        refusal: Any,
        too_large: Exception,
        keys: tuple[str, ...],
        max_bytes: int,
        hosts: list[str],
        origins: list[str],
    ) -> None:
        self.app, self.refusal, self.too_large, self.keys = app, refusal, too_large, keys
        self.max_bytes, self.hosts, self.origins = max_bytes, hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        read = 0
        if refused := self._refused(scope):
            refused.headers["Connection"] = "close"  # the rest of the body is not waited for
            await refused(scope, receive, send)
            return

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_bytes:
                raise self.too_large
            return message

        await self.app(scope, counted, send)

    def _refused(self, scope: Scope) -> Response | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not self.keys and not self._is_own_host(host):
            return self.refusal(403, f"the Host {host[:200]!r} is not this server's: --allow-host")
        if not self.keys and not self._is_own_origin(origin, host):
            text = f"pages of {origin[:200]!r} may not ask this server: --allow-origin"
            return self.refusal(403, text)
        if scope["path"] not in PUBLIC_PATHS and not self._is_known(headers):
            return self.refusal(401, "give an API key: Authorization: Bearer KEY")
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or len(declared) > 18 or int(declared) > self.max_bytes:
            return self.refusal(413, too_large(self.max_bytes))
        return None

    def _is_own_host(self, host: str) -> bool:
        """A browser always sends a Host; what sends none is no browser."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return not host or "*" in self.hosts or name in self.hosts or is_loopback(name)

    def _is_own_origin(self, origin: str, host: str) -> bool:
        own = f"http://{host}"
        return not origin or "*" in self.origins or origin in (own, *self.origins)

    def _is_known(self, headers: dict[bytes, bytes]) -> bool:
        """Compares in constant time."""
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        same = [hmac.compare_digest(key.strip(), known.encode()) for known in self.keys]
        return not self.keys or (scheme.lower() == b"bearer" and any(same))


def too_large(most: int) -> str:
    return f"the body is larger than {most:,} bytes; shorten it, or raise --max-body-kib"


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False
