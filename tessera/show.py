"""A run, a model directory or a config.json for a person to look at; torch-free.

    layer  attention            ffn
        0  gqa-8  ████████      swiglu-14336  ████████████████████████
        1  noop   ·             swiglu-7168   ████████████

A bar is KV heads out of the most, FFN width out of the widest. With it: parameters, KV
bytes a token, what the run was made from, and its tables. `describe` gives all of that as plain
values for `--json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tessera.manifest import Manifest, read_manifest
from tessera.model.config import FFN, GQA, Attention, BlockConfig, Linear, ModelConfig, SwiGLU
from tessera.progress import clock
from tessera.recipe import nearest
from tessera.run import RunError, read_json, read_table
from tessera.table import VIEWS, render_table, terminal_width

ATTENTION_BAR, FFN_BAR = 8, 24
TABLE_ROWS = 12
WHOLE = ("compare", "race")  # tables shown to their last row
_EIGHTHS = " ▏▎▍▌▋▊▉"


def describe(path: str | Path) -> dict[str, Any]:
    """What there is to say of a path, as JSON values. Raises RunError for what is none of ours."""
    path = Path(path)
    if (path / "run.json").is_file():
        return _describe_run(path)
    for depth in ("*", "*/*"):  # the runs of a recipe, those of several
        runs = [file.parent for file in path.glob(f"{depth}/run.json")] if path.is_dir() else []
        if runs:
            manifests = sorted(((read_manifest(run), run) for run in runs), key=_began)
            found = [_summary(one) | {"name": str(run.relative_to(path))} for one, run in manifests]
            return {"path": str(path), "runs": found}
    return {"path": str(path), "model": describe_model(model_config(path))}


def model_config(path: str | Path) -> ModelConfig:
    """The architecture of a run (its model, or the one its search chose), a model directory or a
    config.json. Raises RunError where there is none."""
    from tessera.model.families import read_config

    path = Path(path)
    for file in (path, path / "config.json", path / "model" / "config.json"):
        if file.is_file():
            return read_config(file)
    if (path / "tables" / "architecture.json").is_file():
        parent = _lineage_path(path, read_manifest(path).inputs["parent"]["path"])
        return model_config(parent).with_words(read_json(path, "architecture")["words"])
    if not path.exists():
        siblings = sorted(p.name for p in path.parent.glob("*") if not p.name.startswith("."))
        raise RunError(f"there is no {path}; {nearest(path.name, siblings)}")
    raise RunError(f"{path} is no run, no model directory and no config.json")


def tables(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Every table of a run, by name."""
    files = sorted((path / "tables").glob("*.jsonl"))
    return {file.stem: read_table(path, file.stem) for file in files}


def _describe_run(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    found: dict[str, Any] = {"path": str(path), **_summary(manifest), "error": manifest.error}
    found["lineage"] = lineage(path)
    try:
        found["model"] = describe_model(model_config(path))
    except RunError:
        found["model"] = None
    found["tables"] = tables(path)
    return found


def _began(pair: tuple[Manifest, Path]) -> tuple[str, str]:
    return str(pair[1].parent), pair[0].started


def _summary(manifest: Manifest) -> dict[str, Any]:
    keys = ("name", "stage", "status", "seconds", "started", "seed", "versions")
    return {key: getattr(manifest, key) for key in keys}


def lineage(path: Path) -> list[dict[str, Any]]:
    """The runs and directories a run was made from, ancestors first, itself last."""
    found: dict[Path, dict[str, Any]] = {}
    _trace(path, found)
    return list(found.values())


def _trace(path: Path, found: dict[Path, dict[str, Any]]) -> None:
    key = path.resolve()
    if key in found:
        return
    if not (path / "run.json").is_file():
        found[key] = {"name": str(path), "stage": None, "inputs": {}}
        return
    manifest = read_manifest(path)
    inputs: dict[str, Any] = {}
    for need, reference in manifest.inputs.items():
        references = reference if isinstance(reference, list) else [reference]
        given = [one["path"] for one in references if one]
        inputs |= {need: ", ".join(given)} if given else {}
        for one in given:
            _trace(_lineage_path(path, one), found)
    found[key] = {"name": manifest.name, "stage": manifest.stage, "inputs": inputs}


def _lineage_path(run: Path, recorded: str) -> Path:
    """An input as its manifest names it: relative to the directory that holds the run."""
    return run.parent / recorded


def describe_model(config: ModelConfig) -> dict[str, Any]:
    """Words, parameters and KV bytes a token of an architecture, as JSON values."""
    return {
        "family": config.family,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "num_params": config.num_params(),
        "kv_bytes_per_token": {
            "float32": config.kv_bytes_per_token(4),
            "bfloat16": config.kv_bytes_per_token(2),
            "float8": config.kv_bytes_per_token(1),
        },
        "words": [list(words) for words in config.words],
    }


def render(found: dict[str, Any], config: ModelConfig | None) -> str:
    """`describe`'s answer, and the architecture where there is one, as text."""
    if "runs" in found:
        rows = [{key: run[key] for key in ("name", "stage", "status")} for run in found["runs"]]
        times = [clock(r["seconds"]) if r["status"] == "done" else "-" for r in found["runs"]]
        return render_table([row | {"took": t} for row, t in zip(rows, times, strict=True)])
    parts = []
    if "status" in found:
        took = f", {clock(found['seconds'])}" if found["status"] == "done" else ""
        parts.append(f"{found['path']}: {found['stage']}, {found['status']}{took}")
        parts += [found["error"]] if found["error"] else []
        parts.append(_render_lineage(found["lineage"]))
    if config:
        parts.append(f"{_sizes(config)}\n{mosaic(config)}")
    parts += [render_named(name, rows) for name, rows in found.get("tables", {}).items()]
    return "\n\n".join(parts)


def render_named(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """A table of a run under its name, as wide as the terminal allows."""
    limit = None if name in WHOLE else TABLE_ROWS
    return f"{name}\n{render_table(rows, limit, VIEWS.get(name, ()), terminal_width())}"


def _render_lineage(rows: Sequence[dict[str, Any]]) -> str:
    width = max((len(row["name"]) for row in rows if row["inputs"]), default=0)
    lines = ["made from"]
    for row in rows:
        made = ", ".join(
            word if word == need else f"{need} {word}" for need, word in row["inputs"].items()
        )
        lines.append(f"  {row['name']:{width}}  <- {made}" if made else f"  {row['name']}")
    return "\n".join(lines)


def _sizes(config: ModelConfig) -> str:
    full, half, quarter = (config.kv_bytes_per_token(size) for size in (4, 2, 1))
    return (
        f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_params():,} parameters, "
        f"{full:,.0f} KV bytes a token in float32 ({half:,.0f} in bfloat16, {quarter:,.0f} in FP8)"
    )


def mosaic(config: ModelConfig) -> str:
    """The architecture, one line a layer: its words, and a bar for each."""
    wide = max(
        (b.ffn.intermediate_size for b in config.blocks if isinstance(b.ffn, SwiGLU)), default=1
    )
    heads = max(
        (b.attention.num_key_value_heads for b in config.blocks if isinstance(b.attention, GQA)),
        default=1,
    )
    first = max(len(words[0]) for words in [*config.words, ("attention", "")])
    second = max(len(words[1]) for words in config.words)
    lines = [f"layer  {'attention':{first + 2 + ATTENTION_BAR}}  ffn"]
    for layer, block in enumerate(config.blocks):
        lines.append(f"{layer:5}  {_tile_pair(block, first, second, heads, wide)}".rstrip())
    return "\n".join(lines)


def _tile_pair(block: BlockConfig, first: int, second: int, heads: int, wide: int) -> str:
    attention, ffn = block.words
    left = f"{attention:{first}}  {_bar(block.attention, heads, ATTENTION_BAR):{ATTENTION_BAR}}"
    return f"{left}  {ffn:{second}}  {_bar(block.ffn, wide, FFN_BAR)}"


def _bar(variant: Attention | FFN, full: int, width: int) -> str:
    match variant:
        case GQA(size) | SwiGLU(size):
            eighths = max(1, round(8 * width * size / full))
            return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        case Linear():
            return "─"
        case _:
            return "·"


def diff(a: ModelConfig, b: ModelConfig) -> dict[str, Any]:
    """Where two architectures differ, layer by layer, and by how much in size."""
    layers = []
    for layer in range(max(len(a.words), len(b.words))):
        before = a.words[layer] if layer < len(a.words) else ("absent", "absent")
        after = b.words[layer] if layer < len(b.words) else ("absent", "absent")
        if before != after:
            layers.append(
                {"layer": layer, "attention": _change(before[0], after[0])}
                | {"ffn": _change(before[1], after[1])}
            )
    sizes = [
        _size_row("parameters", a.num_params(), b.num_params()),
        _size_row("KV bytes a token", a.kv_bytes_per_token(4), b.kv_bytes_per_token(4)),
    ]
    for field in ("num_hidden_layers", "hidden_size", "vocab_size"):
        before, after = getattr(a, field), getattr(b, field)
        sizes += [_size_row(field, before, after)] if before != after else []
    return {"layers": layers, "sizes": sizes}


def _change(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


def _size_row(what: str, a: float, b: float) -> dict[str, Any]:
    return {"": what, "A": int(a), "B": int(b), "B - A": int(b - a), "B / A": b / a if a else None}


def render_diff(found: dict[str, Any]) -> str:
    """`diff`'s answer as text."""
    layers = render_table(found["layers"]) if found["layers"] else "the words are the same"
    return f"{layers}\n\n{render_table(found['sizes'])}"
