"""How an exported model is served with stock vLLM: a command, and the keys beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from tessera.data.thought import CLOSE, OPEN
from tessera.data.tokenizer import load_tokenizer
from tessera.export import decilm
from tessera.runs.files import RunError
from tessera.serve.server import ServeConfig, ServeError, api_keys
from tessera.vllm import server
from tessera.vllm.process import find_python


class Command(NamedTuple):
    """words to run, and what stands in their environment: keys, which a process listing shows not.

    note: what the server will not do, for the person who starts it; empty where there is nothing.
    """

    words: list[str]
    environment: dict[str, str]
    note: str = ""


def command(model: str, config: ServeConfig, python: str | None = None) -> Command:
    """What serves `model`. Raises ServeError where vLLM or the export is not there.

    Layers that differ are built by vLLM's own code, but their config is read by Python of the
    checkpoint: that is trusted where it is what an export writes, and refused otherwise.
    """
    home = Path(model)
    told = home / "config.json"
    if not told.is_file():
        raise ServeError(
            f"{model} is no exported directory; vLLM needs one: tessera export {model} OUT "
            "--format decilm, then tessera serve OUT --engine vllm"
        )
    words = [python or _python(), server.__file__, "--model", str(home)]
    words += ["--host", config.host, "--port", str(config.port)]
    words += ["--served-model-name", config.name or home.resolve().name]
    words += ["--max-num-seqs", str(config.batch)]
    values = json.loads(told.read_text(encoding="utf-8"))
    room = values.get("max_position_embeddings", 0)
    words += ["--max-model-len", str(room)] if room else []
    if "auto_map" in values:
        if not decilm.is_own_code(home):
            raise ServeError(
                f"{model} brings Python that is not tessera's, and nothing of it is run: export "
                "the model again, or call vllm serve yourself"
            )
        words.append("--trust-remote-code")
    note = _unparsed(home)
    words += [] if note else ["--reasoning-parser", "deepseek_r1"]
    keys = api_keys(config)
    return Command(words, {server.KEYS: "\n".join(keys)} if keys else {}, note)


def _unparsed(home: Path) -> str:
    """Why vLLM's parser of thoughts would refuse to start: it looks for two tokens, not texts."""
    tokenizer = load_tokenizer(home)
    missing = [mark for mark in (OPEN, CLOSE) if tokenizer.token_id(mark) is None]
    if not missing:
        return ""
    return (
        f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} no single token of this "
        "model: vLLM leaves its thoughts in the content"
    )


def _python() -> str:
    """That beside a `vllm` on the PATH, else one that has vLLM. Raises ServeError."""
    program = shutil.which("vllm")
    beside = Path(program).with_name("python") if program else None
    if beside is not None and beside.is_file():
        return str(beside)
    try:
        return find_python(None)
    except RunError:
        raise ServeError(
            "vLLM is not installed here; it has an environment of its own (make venv-vllm, or pip "
            "install vllm), whose bin/ must be on the PATH"
        ) from None
