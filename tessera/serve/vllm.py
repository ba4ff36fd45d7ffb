"""The command that serves an exported model with stock vLLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from tessera.data.calls import MARKED, template_dialects
from tessera.data.template import TemplateError, template_of
from tessera.data.thought import CLOSE, OPEN
from tessera.data.tokenizer import Tokenizer, load_tokenizer
from tessera.export import decilm
from tessera.runs.files import RunError
from tessera.serve.app import ServeConfig, ServeError, api_keys
from tessera.vllm import worker
from tessera.vllm.engine import find_python

PARSERS = {"hermes": "hermes", "llama3": "llama3_json", "mistral": "mistral"}  # vLLM's names


class Command(NamedTuple):
    """environment: holds the keys, which a process listing would show among the arguments.

    note: what the server will not do, for the person who starts it; may be empty.
    """

    arguments: list[str]
    environment: dict[str, str]
    note: str = ""


def command(model: str, config: ServeConfig, python: str | None = None) -> Command:
    """The command that serves `model`. Raises ServeError where vLLM or the export is missing.

    vLLM reads the config of heterogeneous layers with Python of the checkpoint, which is trusted
    only where an export of tessera wrote it.
    """
    home = Path(model)
    if not (home / "config.json").is_file():
        raise ServeError(
            f"{model} is no exported directory; vLLM needs one: tessera export {model} OUT "
            "--format decilm, then tessera serve OUT --engine vllm"
        )
    values = json.loads((home / "config.json").read_text(encoding="utf-8"))
    arguments = [python or _python(), worker.__file__, "serve", "--model", str(home)]
    arguments += ["--host", config.host, "--port", str(config.port)]
    arguments += ["--served-model-name", config.name or home.resolve().name]
    arguments += ["--max-num-seqs", str(config.batch)]
    if room := values.get("max_position_embeddings"):
        arguments += ["--max-model-len", str(room)]
    if config.dtype != "auto":
        arguments += ["--dtype", config.dtype]
    if config.allow_origin:
        arguments += ["--allowed-origins", json.dumps(config.allow_origin)]
    if "auto_map" in values:
        if not decilm.is_own_code(home):
            raise ServeError(f"{model} brings Python that is not tessera's: export it again")
        arguments.append("--trust-remote-code")
    # vLLM's reasoning parser refuses to start unless both tags are single tokens.
    tokenizer, note = load_tokenizer(home), ""
    if missing := [mark for mark in (OPEN, CLOSE) if tokenizer.token_id(mark) is None]:
        note = (
            f"not a single token of this model: {' and '.join(missing)}; vLLM leaves its thoughts "
            "in the content"
        )
    else:
        arguments += ["--reasoning-parser", "deepseek_r1"]
    arguments += _calls(tokenizer)
    keys = api_keys(config)
    return Command(arguments, {worker.KEYS: "\n".join(keys)} if keys else {}, note)


def _calls(tokenizer: Tokenizer) -> list[str]:
    """Have vLLM read the calls of tools, where the template's dialect is one that it knows."""
    try:
        dialects = template_dialects(template_of(tokenizer))
    except TemplateError:
        return []
    parser = PARSERS.get(dialects[0].name) if dialects != MARKED else None
    return ["--enable-auto-tool-choice", "--tool-call-parser", parser] if parser else []


def _python() -> str:
    """The Python of a `vllm` on the PATH, else one that has vLLM."""
    program = shutil.which("vllm")
    beside = Path(program).with_name("python") if program else None
    if beside is not None and beside.is_file():
        return str(beside)
    try:
        return find_python(None)
    except RunError:
        raise ServeError(
            "vLLM is not installed here: make venv-vllm, or pip install vllm in an environment "
            "whose bin/ is on the PATH"
        ) from None
