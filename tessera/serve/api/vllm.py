"""The command that serves an exported model with stock vLLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tessera.serve.api.run import ServeConfig, ServeError, api_keys

PROGRAM = "vllm"


def command(model: str, config: ServeConfig, program: str | None = None) -> list[str]:
    """The words to run. Raises ServeError where vLLM or the export is not there.

    A model of layers that differ is a `DeciLMForCausalLM`, whose layers vLLM's own code builds, so
    nothing of the checkpoint's remote code needs to be trusted.
    """
    home = Path(model)
    told = home / "config.json"
    if not told.is_file():
        raise ServeError(
            f"{model} is no exported directory; vLLM needs one: tessera export {model} OUT "
            "--format decilm, then tessera serve OUT --engine vllm"
        )
    found = program or shutil.which(PROGRAM)
    if found is None:
        raise ServeError(
            "vLLM is not installed here; it has an environment of its own (make venv-vllm, or pip "
            "install vllm), whose bin/ must be on the PATH"
        )
    room = json.loads(told.read_text(encoding="utf-8")).get("max_position_embeddings", 0)
    words = [found, "serve", str(home), "--host", config.host, "--port", str(config.port)]
    words += ["--served-model-name", config.name or home.resolve().name]
    words += ["--max-num-seqs", str(config.batch)]
    words += ["--max-model-len", str(room)] if room else []
    words += ["--reasoning-parser", "deepseek_r1"]
    for key in api_keys(config):
        words += ["--api-key", key]
    return words
