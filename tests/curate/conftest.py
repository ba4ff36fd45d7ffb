"""A curate run made by the stage itself, and a server of the OpenAI API that fails on demand."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tessera.curate.config import CurateConfig
from tessera.curate.runner import stage
from tessera.runs.recipe import validate
from tessera.runs.run import Run


class Curated:
    """What a finished run holds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for file in sorted((self.path / "chats").iterdir()) for row in lines(file)]

    @property
    def removed(self) -> list[dict[str, Any]]:
        return [row for file in sorted((self.path / "removed").iterdir()) for row in lines(file)]

    def counts(self) -> dict[str, tuple[int, int]]:
        table = lines(self.path / "tables/steps.jsonl")
        return {row["step"]: (row["in"], row["out"]) for row in table}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_stage(
    where: Path, table: dict[str, Any], seed: int = 0, model: Path | None = None
) -> Curated:
    config = validate(CurateConfig, table, "curate")
    resolved, inputs = config.model_dump(mode="json"), {"model": model}
    with Run.open(
        where, stage="curate", config=resolved, inputs={"model": None}, seed=seed, quiet=True
    ) as run:
        stage(config, run, inputs)
        run.finish()
    return Curated(where)


@pytest.fixture
def curate(tmp_path: Path) -> Callable[..., Curated]:
    """`curate(rows, [step, …], **table)` writes the rows to a file and runs the stage over it."""

    def made(rows: list[Any] | Path, steps: list[dict[str, Any]], **table: Any) -> Curated:
        name = f"run{len(list(tmp_path.iterdir()))}"
        file = rows if isinstance(rows, Path) else write_lines(tmp_path / f"{name}.jsonl", rows)
        source = {"paths": str(file), **table.pop("source", {})}
        return run_stage(tmp_path / name, {"sources": [source], "steps": steps, **table})

    return made


class Server:
    """`answer(body)` makes the reply of a chat; `faults[n]` is what the n-th request meets instead.

    A fault is a status, "cut" for a connection that ends, "odd" for JSON of another form, bytes for
    a body, or "drip" for one that never ends.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Any]) -> None:
        self.answer = answer
        self.faults: dict[int, Any] = {}
        self.delay = 0.0
        self.asked: list[dict[str, Any]] = []
        self.answered: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def teacher(self, **more: Any) -> dict[str, Any]:
        """The table of this server as a teacher that is tried again at once."""
        return {"url": self.url, "model": "m", "concurrency": 8, **more}

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                size = int(self.headers["content-length"])
                body = json.loads(self.rfile.read(size))
                with server.lock:
                    number = len(server.asked)
                    server.asked.append(body)
                    server.headers.append(dict(self.headers))
                    server.busy += 1
                    server.busiest = max(server.busiest, server.busy)
                time.sleep(server.delay)
                with server.lock:
                    server.busy -= 1
                fault = server.faults.get(number)
                if fault == "cut":
                    self.close_connection = True
                    return
                if isinstance(fault, int):
                    self._send(fault, {"error": {"message": "as asked"}})
                elif fault == "odd":
                    self._send(200, {"choices": []})
                elif fault == "drip":
                    self._drip()
                elif isinstance(fault, bytes):
                    self._body(200, fault)
                else:
                    found = server.answer(body)
                    with server.lock:
                        server.answered[json.dumps(body, sort_keys=True)] += 1
                    self._send(200, found if isinstance(found, dict) else _completion(found))

            def _drip(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.close_connection = True
                with contextlib.suppress(OSError):
                    for _ in range(1000):
                        self.wfile.write(b" ")
                        time.sleep(0.02)

            def _send(self, status: int, value: Any) -> None:
                self._body(status, json.dumps(value).encode())

            def _body(self, status: int, data: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json; charset=zlib_codec")
                self.send_header("Content-Length", str(len(data)))
                if status == 429:
                    self.send_header("Retry-After", "0.01")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def _completion(text: str) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"completion_tokens": len(text.split())}}


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """`serve(answer)` starts a server; `answer` takes a request's body."""
    started: list[Server] = []

    def start(answer: Callable[[dict[str, Any]], Any]) -> Server:
        started.append(Server(answer))
        return started[-1]

    yield start
    for one in started:
        one.close()


def killed(where: Path, table: dict[str, Any], after: Callable[[], bool]) -> None:
    """Runs the stage into `where` in a process of its own, killed once `after()` holds."""
    code = (
        "import sys, json; from pathlib import Path\n"
        "from tests.curate.conftest import run_stage\n"
        f"run_stage(Path({str(where)!r}), json.loads({json.dumps(table)!r}))\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    until = time.monotonic() + 60
    while process.poll() is None and not after() and time.monotonic() < until:
        time.sleep(0.002)
    process.kill()
    process.wait()
