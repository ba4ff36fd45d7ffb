"""A thread that steps an engine while there is something to do: what a server stands on.

    with EngineThread(engine):                     start … stop
        handle = engine.submit(prompt, params)     from any thread

A failed step fails the requests in it (`EngineError` at their readers) and the thread goes on; so
many failures in a row mean that the engine is broken, and then everything is refused.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tessera.generate.torch_engine import TorchEngine

IDLE = 0.5  # seconds between two looks at the clock when nothing waits
BROKEN = 5  # failures in a row


class EngineThread:
    """Steps `engine` from `start` to `stop`. on_error: told of every failed step."""

    def __init__(
        self, engine: TorchEngine, on_error: Callable[[Exception], None] | None = None
    ) -> None:
        self.engine = engine
        self.error: Exception | None = None  # what broke the engine
        self._on_error = on_error
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tessera-engine", daemon=True)

    def __enter__(self) -> EngineThread:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def drain(self, timeout: float) -> bool:
        """Refuse new requests and let the others end; whether all did within `timeout` seconds."""
        self.engine.waiting.close()
        end = time.monotonic() + timeout
        while not self.engine.idle and self.alive and time.monotonic() < end:
            time.sleep(0.01)
        return self.engine.idle

    def stop(self) -> None:
        """End the thread after its step, what is in flight with "cancelled", and the engine."""
        self._stop.set()
        self.engine.waiting.close()
        if self._thread.ident is not None:
            self._thread.join()
        self.engine.close()

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                busy = self.engine.step()
                failures = 0
            except Exception as error:
                failures += 1
                if self._on_error is not None:
                    self._on_error(error)
                if failures == BROKEN:
                    self.error = error
                    self.engine.close()
                    return
                continue
            if not busy:
                self.engine.waiting.wait(IDLE)
