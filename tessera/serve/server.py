"""The server's process: a model, an engine thread, and uvicorn until SIGTERM.

SIGTERM and Ctrl-C drain: new requests get 503, those under way end, at most `drain_seconds` long.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from pydantic import Field

from tessera.data.tokenizer import load_tokenizer
from tessera.generate.torch_engine import EngineThread, TorchEngine
from tessera.model.checkpoint import load_model
from tessera.model.source import resolve
from tessera.runs.recipe import Config
from tessera.serve.app import Serving, build
from tessera.serve.session import Talker

KEY_VARIABLE = "TESSERA_API_KEY"


class ServeError(ValueError):
    """A server that cannot be started as asked; the text says what to change."""


class ServeConfig(Config):
    """host: this machine alone unless told. batch: samples decoded together. queue: samples that
    may wait. timeout: seconds of a request. drain_seconds: what requests have left at the end.
    prefix_cache: tokens of prompts whose KV is kept for later ones that begin alike."""

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


def api_keys(config: ServeConfig) -> tuple[str, ...]:
    """The keys of a file, one a line, else of the environment; none where there are none.

    Raises ServeError for a file without keys, and for an open server that others can reach.
    """
    if config.key_file:
        path = Path(config.key_file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ServeError(f"--key-file {path}: {error.strerror}") from None
        keys = tuple(line.strip() for line in lines if line.strip())
        if not keys:
            raise ServeError(f"--key-file {path} holds no key; write one on each line")
        return keys
    given = os.environ.get(KEY_VARIABLE, "").strip()
    if given:
        return (given,)
    if not _loopback(config.host):
        raise ServeError(
            f"--host {config.host} can be reached by others, and there is no key: give --key-file "
            f"FILE or {KEY_VARIABLE}, or serve on 127.0.0.1"
        )
    return ()


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def serving(model: str, config: ServeConfig) -> Iterator[Serving]:
    """A model behind an engine thread, for as long as the body runs."""
    keys = api_keys(config)
    home = resolve(model)
    engine = TorchEngine(
        load_model(home, frozen=True),
        max_batch_size=config.batch,
        max_queue=config.queue,
        prefix_cache_tokens=config.prefix_cache,
        int8=config.int8,
    )
    talker = Talker(engine, load_tokenizer(home), config.timeout)
    with EngineThread(engine, _tell) as thread:
        name = config.name or _name(model)
        yield Serving(name, talker, thread, keys, config.max_body_kib * 1024, config.web)


def _name(model: str) -> str:
    path = Path(model)
    return path.resolve().name if path.exists() else model


def _tell(error: Exception) -> None:
    print(f"a step of the engine failed: {type(error).__name__}: {error}", file=sys.stderr)


class _Server(uvicorn.Server):
    """Says where it listens, and lets the engine end what is under way before it leaves."""

    def __init__(self, config: uvicorn.Config, model: Serving) -> None:
        super().__init__(config)
        self.model = model

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's own it does not raise the signal again: a drained server ends with 0."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers if self.started else ():
            host, port = server.sockets[0].getsockname()[:2]
            print(f"serving {self.model.name} on http://{host}:{port}/v1", file=sys.stderr)
            if self.model.web:
                print(f"the page is http://{host}:{port}/", file=sys.stderr)
            sys.stderr.flush()

    async def shutdown(self, sockets: list | None = None) -> None:
        self.model.talker.engine.waiting.close()
        await super().shutdown(sockets)


def serve(model: str, config: ServeConfig) -> None:
    """Serves until a signal says to stop. Raises ServeError where the port is taken."""
    with serving(model, config) as one:
        settings = uvicorn.Config(
            build(one),
            host=config.host,
            port=config.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=max(1, round(config.drain_seconds)),
            h11_max_incomplete_event_size=64 * 1024,
        )
        server = _Server(settings, one)
        with contextlib.suppress(SystemExit):  # its way to say that the port is taken
            server.run()
        if not server.started:
            raise ServeError(
                f"{config.host}:{config.port} cannot be listened on; is it taken? Give another "
                "--port, or 0 for any"
            )
