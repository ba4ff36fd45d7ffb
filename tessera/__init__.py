"""tessera: an open Llama-class checkpoint goes in, a faster one comes out.

The names below are the public ones. Each is imported when it is first used, so that
`import tessera` costs nothing and brings no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tessera.data.tokenizer import Tokenizer as Tokenizer
    from tessera.data.tokenizer import load_tokenizer as load_tokenizer
    from tessera.export.write import export_model as export_model
    from tessera.generate.engine import Completion as Completion
    from tessera.generate.engine import SamplingParams as SamplingParams
    from tessera.generate.torch_engine import TorchEngine as TorchEngine
    from tessera.model.checkpoint import load_model as load_model
    from tessera.model.checkpoint import save_model as save_model
    from tessera.model.config import ModelConfig as ModelConfig
    from tessera.model.transformer import Transformer as Transformer
    from tessera.pipeline import run_recipe as run_recipe
    from tessera.rl.verifiers.judge import judge as judge
    from tessera.runs.run import Run as Run
    from tessera.train.engine import Trainer as Trainer

__version__ = "0.1.0"

_HOMES = {
    "Completion": "generate.engine",
    "ModelConfig": "model.config",
    "Run": "runs.run",
    "SamplingParams": "generate.engine",
    "Tokenizer": "data.tokenizer",
    "TorchEngine": "generate.torch_engine",
    "Trainer": "train.engine",
    "Transformer": "model.transformer",
    "export_model": "export.write",
    "judge": "rl.verifiers.judge",
    "load_model": "model.checkpoint",
    "load_tokenizer": "data.tokenizer",
    "run_recipe": "pipeline",
    "save_model": "model.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tessera' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tessera.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
