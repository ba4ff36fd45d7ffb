"""The command that serves an exported model with stock vLLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tessera.model import decilm
from tessera.serve.api.run import ServeConfig, ServeError, api_keys

PROGRAM = "vllm"


def command(model: str, config: ServeConfig, program: str | None = None) -> list[str]:
    """The words to run. Raises ServeError where vLLM or the export is not there.

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
    found = program or shutil.which(PROGRAM)
    if found is None:
        raise ServeError(
            "vLLM is not installed here; it has an environment of its own (make venv-vllm, or pip "
            "install vllm), whose bin/ must be on the PATH"
        )
    values = json.loads(told.read_text(encoding="utf-8"))
    room = values.get("max_position_embeddings", 0)
    words = [found, "serve", str(home), "--host", config.host, "--port", str(config.port)]
    words += ["--served-model-name", config.name or home.resolve().name]
    words += ["--max-num-seqs", str(config.batch)]
    words += ["--max-model-len", str(room)] if room else []
    words += ["--reasoning-parser", "deepseek_r1"]
    if "auto_map" in values:
        if not decilm.is_own_code(home):
            raise ServeError(
                f"{model} brings Python that is not tessera's, and nothing of it is run: export "
                "the model again, or call vllm serve yourself"
            )
        words.append("--trust-remote-code")
    keys = api_keys(config)
    return [*words, "--api-key", *keys] if keys else words
