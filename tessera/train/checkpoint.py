"""Resume state: one safetensors file, replaced atomically, so a kill at any instant loses nothing.

It holds what the next step depends on and nothing else: trainable parameters, optimizer
moments, torch's random state, and the source's position (JSON, in the header).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from tessera.run import atomic_write

if TYPE_CHECKING:
    from tessera.train.engine import Trainer

FILE = "trainer.safetensors"


def save_state(directory: Path, step: int, trainer: Trainer) -> None:
    """Write the state after `step` steps; the one before it is replaced by a rename."""
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    for key, parameter in trainer.trainable.items():
        tensors[f"model.{key}"] = parameter.detach()
        for field, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{field}.{key}"] = value
    header = {"step": step, "source": trainer.source.state_dict()}
    metadata = {"state": json.dumps(header)}
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {key: value.contiguous() for key, value in tensors.items()}
    atomic_write(directory / FILE, save(contiguous, metadata))


def load_state(directory: Path, trainer: Trainer) -> int:
    """Put a saved state back into `trainer`; returns its step, 0 where there is none."""
    path = directory / FILE
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        header: dict[str, Any] = json.loads(file.metadata()["state"])
        # Copies: a tensor that maps the file would hold its space after the next state replaces it.
        saved = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    torch.set_rng_state(saved.pop("rng"))
    for key, parameter in trainer.trainable.items():
        with torch.no_grad():
            parameter.copy_(saved.pop(f"model.{key}"))
    for key, value in saved.items():
        _, field, name = key.split(".", 2)
        trainer.optimizer.state[trainer.trainable[name]][field] = value
    trainer.source.load_state_dict(header["source"])
    return header["step"]
