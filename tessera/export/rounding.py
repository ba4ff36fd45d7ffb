"""A directory that is written, rounded to FP8 file by file: a quarter of float32's bytes."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from tessera.export.engines import Format
from tessera.export.errors import ExportError
from tessera.export.parity import Parity
from tessera.model import checkpoint
from tessera.model.checkpoint import INDEX

FORMATS: tuple[Format, ...] = ("decilm", "hf", "padded")


def check(form: Format) -> None:
    """Raises ExportError for a format whose readers know no such weights."""
    if form not in FORMATS:
        raise ExportError(
            f"format {form} is written in float32 only; FP8 goes with {', '.join(FORMATS)}"
        )


def convert(directory: Path) -> None:
    """Round the projections of a model directory, and say so in its config."""
    places: dict[str, str] = {}
    total = 0
    for file in sorted(directory.glob("*.safetensors")):
        tensors = checkpoint.compressed(load_file(file))
        plain = {name: one.contiguous() for name, one in tensors.items()}
        save_file(plain, file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
        total += sum(one.numel() * one.element_size() for one in tensors.values())
    if (directory / INDEX).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    checkpoint.write_config(directory)


def note(parity: Parity) -> str:
    """What the rounding changed, for the reader of the model card."""
    return (
        "projections rounded to FP8 (E4M3, a scale for each output channel), activations token by "
        f"token by the engine; on fixed prompts {parity.tokens_equal} of {parity.tokens} greedy "
        f"tokens are as before and a logit moves by at most {parity.max_logit_difference:.2g}, "
        "the rounding of activations not counted"
    )
