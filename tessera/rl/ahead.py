"""Work that goes on while the trainer trains."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Background:
    """One thread that does calls in turn, from the first on and as long as the process lives.

    It must not end before: the kernel ends a process that dies with its parent when the *thread*
    that started it ends (prctl(2), PR_SET_PDEATHSIG), and the workers that judge are such. As a
    daemon it holds no exit up.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """The result to be; what the call raises is raised where it is asked for."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        future: Future[Any] = Future()
        self._calls.put((future, call))
        return future

    def _run(self) -> None:
        while True:
            future, call = self._calls.get()
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del future, call  # an idle thread holds nobody's memory
