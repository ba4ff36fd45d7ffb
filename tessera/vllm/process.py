"""The process that vLLM runs in (`worker.py`), and the Python that has it. Torch-free."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tessera.generate.engine import GenerationError
from tessera.runs.files import FailureError, RunError

WORKER = Path(__file__).with_name("worker.py")
ENVIRONMENT = Path(".venv-vllm/bin/python")  # what `make venv-vllm` builds
# Scheduling in the same process: a spawned one starts later, and helps no offline queue.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def find_python(given: str | None) -> str:
    """The Python that has vLLM. Raises RunError, with the way to get one."""
    if given is not None:
        if shutil.which(given) is None:
            raise RunError(f"python = {given!r} is no program; `make venv-vllm` builds one")
        return given
    if importlib.util.find_spec("vllm"):
        return sys.executable
    if ENVIRONMENT.is_file():
        return str(ENVIRONMENT)
    raise RunError(
        f"no vLLM beside tessera or in {ENVIRONMENT}: `make venv-vllm` builds that environment, "
        'python = "PATH" names the Python of another'
    )


class DiedError(FailureError):
    """The process ended without an answer; the text ends with its last lines of standard error."""


class Process:
    """A started worker. environment: variables beside this process's own."""

    def __init__(self, python: str, environment: Mapping[str, str], script: Path = WORKER) -> None:
        self.python = python
        self.log = tempfile.NamedTemporaryFile("w+b", prefix="tessera-vllm-", suffix=".log")  # noqa: SIM115
        self.child = subprocess.Popen(
            [python, str(script)],
            env={**os.environ, **QUIET, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            encoding="utf-8",
        )

    def ask(self, do: str, progress: Callable[[int], None] | None = None, **keys: Any) -> dict:
        """The worker's answer to one question; `progress` is called with the samples done so far.

        Raises GenerationError with what the worker refused, DiedError where it has ended.
        """
        assert self.child.stdin is not None and self.child.stdout is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # ended: then it answers nothing
            self.child.stdin.write(json.dumps({"do": do, **keys}) + "\n")
            self.child.stdin.flush()
        for line in self.child.stdout:
            if not line.endswith("\n"):
                break  # killed while it wrote
            answer = json.loads(line)
            if answer.keys() != {"done"}:
                if "error" in answer:
                    raise GenerationError(f"vLLM: {answer['error']}")
                return answer
            if progress:
                progress(answer["done"])
        code = self.child.wait()
        self.log.seek(0)
        lines = self.log.read().decode("utf-8", "replace").splitlines()
        raise DiedError(
            f"vLLM's process ({self.python}) ended with code {code}; its last lines:\n"
            + "\n".join(lines[-12:])
        )

    def close(self, patience: float = 5.0) -> None:
        """Close its standard input, then kill it; an `ask` that waits raises DiedError."""
        assert self.child.stdin is not None and self.child.stdout is not None
        with contextlib.suppress(OSError):
            self.child.stdin.close()
        try:
            self.child.wait(patience)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()
        self.log.close()
