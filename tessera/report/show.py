"""A run, a model directory or a config.json for a person to look at; torch-free.

layer  attention            ffn
    1  noop   ░░░░░░░░      swiglu-7168   ████████████░░░░░░░░░░░░
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tessera.model.config import (
    FFN,
    GQA,
    Attention,
    BlockConfig,
    Chain,
    ConfigError,
    ModelConfig,
    NoOp,
    SwiGLU,
)
from tessera.model.source import ancestors, model_config
from tessera.report.explain import explain, headline, render_changes
from tessera.runs.files import RunError, in_use
from tessera.runs.run import Manifest, read_json, read_manifest, read_table, runs_in, whole_lines
from tessera.table import VIEWS, clock, render_table, terminal_width

ATTENTION_BAR, FFN_BAR = 8, 24
TABLE_ROWS = 12
ANSWERS = ("records.jsonl", "samples.jsonl")
WHOLE = ("compare", "race", "frontier")  # tables shown to their last row
STOPPED = "stopped: no process works on it; the tessera run that began it, given again, goes on"
_EIGHTHS = " ▏▎▍▌▋▊▉"
_SHADES, _LEAST = "·░▒▓█", -9  # below 2^-9, then two powers of two a shade


def describe(path: str | Path) -> dict[str, Any]:
    """What there is to say of a path, as JSON values. Raises RunError for what is none of ours."""
    path = Path(path)
    if (path / "run.json").is_file():
        return _describe_run(path)
    for depth in ("*", "*/*"):  # the runs of a recipe, those of several
        if runs := runs_in(path, depth):
            found = [_listed(run) | {"name": str(run.relative_to(path))} for run in runs]
            found.sort(key=lambda one: (str(Path(one["name"]).parent), one["started"]))
            return {"path": str(path), "runs": found}
    return {"path": str(path), "model": describe_model(model_config(path))}


def tables(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Every table of a run, by name; of a damaged one a row that tells it."""
    found = {}
    for file in sorted((path / "tables").glob("*.jsonl")):
        try:
            found[file.stem] = read_table(path, file.stem)
        except RunError as error:
            found[file.stem] = [{"told": str(error)}]
    return found


def _describe_run(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    found: dict[str, Any] = {"path": str(path), **_summary(manifest, path), "error": manifest.error}
    found["lineage"] = list(ancestors(path).values())
    try:
        found["model"] = describe_model(model_config(path))
        found["taken"] = explain(path)
    except (RunError, ConfigError) as error:
        found["model"] = found["taken"] = None
        if (path / "model").exists():
            found["error"] = found["error"] or str(error)
    found["tables"] = tables(path)
    if (path / "tables" / "dependency.json").is_file():
        with suppress(RunError):
            found["dependency"] = read_json(path, "dependency")
    return found


def _listed(path: Path) -> dict[str, Any]:
    try:
        return _summary(read_manifest(path), path)
    except RunError as error:
        unknown = dict.fromkeys(("stage", "started"), "")
        return unknown | {"status": "damaged", "seconds": 0.0, "error": str(error)}


def _summary(manifest: Manifest, path: Path) -> dict[str, Any]:
    keys = ("name", "stage", "status", "seconds", "started", "seed", "versions")
    found = {key: getattr(manifest, key) for key in keys}
    return found | {"status": status(manifest, path)}


def status(manifest: Manifest, path: Path) -> str:
    """The status of a run; `stopped` for one that was killed, and so could not say it itself."""
    stopped = manifest.status == "running" and not in_use(path)
    return "stopped" if stopped else manifest.status


def describe_model(config: ModelConfig) -> dict[str, Any]:
    """Words, parameters and KV bytes a token of an architecture, as JSON values."""
    keys = ("family", "num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim")
    sizes = {"float32": 4, "bfloat16": 2, "float8": 1}
    return {
        **{key: getattr(config, key) for key in (*keys, "vocab_size")},
        "num_params": config.num_params(),
        "kv_bytes_per_token": {name: config.kv_bytes_per_token(n) for name, n in sizes.items()},
        "words": [list(words) for words in config.words],
    }


def render(found: dict[str, Any], config: ModelConfig | None) -> str:
    """`describe`'s answer, and the architecture where there is one, as text."""
    if "runs" in found:
        rows = [{key: run[key] for key in ("name", "stage", "status")} for run in found["runs"]]
        times = [clock(r["seconds"]) if r["status"] == "done" else "-" for r in found["runs"]]
        listed = render_table([row | {"took": t} for row, t in zip(rows, times, strict=True)])
        listed += "".join(f"\n\n{r['error']}" for r in found["runs"] if r["status"] == "damaged")
        return listed + (f"\n\n{STOPPED}" if any(r["status"] == "stopped" for r in rows) else "")
    parts = []
    if "status" in found:
        took = f", {clock(found['seconds'])}" if found["status"] == "done" else ""
        parts.append(f"{found['path']}: {found['stage']}, {found['status']}{took}")
        parts += [STOPPED] if found["status"] == "stopped" else []
        parts += [found["error"]] if found["error"] else []
        parts.append(_render_lineage(found["lineage"]))
    if config:
        taken = found.get("taken")
        parent = model_config(taken["against"]) if taken else None
        full, half, quarter = (config.kv_bytes_per_token(size) for size in (4, 2, 1))
        parts.append(
            f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, "
            f"{config.num_params():,} parameters, {full:,.0f} KV bytes a token in float32 "
            f"({half:,.0f} in bfloat16, {quarter:,.0f} in FP8)\n{mosaic(config, parent)}"
        )
    if found.get("taken"):
        parts.append(f"{headline(found['taken'])}\n{render_changes(found['taken'])}")
    if "dependency" in found:
        parts.append(dependency_map(found["dependency"]))
    parts += [render_named(name, rows) for name, rows in found.get("tables", {}).items()]
    return "\n\n".join(parts)


def render_named(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """A table of a run under its name, as wide as the terminal allows."""
    if rows and all("told" in row for row in rows):  # rows that say themselves what they mean
        return "\n".join([name, *(f"  {row['told']}" for row in rows)])
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


def largest(blocks: Sequence[BlockConfig]) -> tuple[int, int]:
    """The most KV heads, and the widest FFN; at least 1."""
    heads = [b.attention.num_key_value_heads for b in blocks if isinstance(b.attention, GQA)]
    widths = [b.ffn.intermediate_size for b in blocks if isinstance(b.ffn, SwiGLU)]
    return max(heads, default=1), max(widths, default=1)


def mosaic(config: ModelConfig, parent: ModelConfig | None = None) -> str:
    """One line a layer: its words, and a bar for each; what was taken from the parent is shaded."""
    heads, wide = largest([*config.blocks, *(parent.blocks if parent else ())])
    first = max(len(words[0]) for words in [*config.words, ("attention", "")])
    second = max(len(words[1]) for words in config.words)
    lines = [f"layer  {'attention':{first + 2 + ATTENTION_BAR}}  ffn"]
    for layer, block in enumerate(config.blocks):
        own = parent.blocks[layer] if parent and layer < len(parent.blocks) else block
        left = _bar(block.attention, own.attention, heads, ATTENTION_BAR)
        right = _bar(block.ffn, own.ffn, wide, FFN_BAR)
        attention, ffn = block.words
        tiles = f"{attention:{first}}  {left:{ATTENTION_BAR}}  {ffn:{second}}  {right}"
        lines.append(f"{layer:5}  {tiles}".rstrip())
    return "\n".join(lines)


def _bar(variant: Attention | FFN, parent: Attention | FFN, full: int, width: int) -> str:
    bar = _solid(variant, full, width)
    taken = len(_solid(parent, full, width)) - len(bar)
    if isinstance(variant, NoOp) and not isinstance(parent, NoOp):
        return "░" * (taken + len(bar))  # nothing is left to draw
    return bar + "░" * taken


def dependency_map(matrix: Sequence[Sequence[float]]) -> str:
    """How much each block reads each earlier one (FFN Fusion §3.2), shaded by powers of two.

    Line i, column j: the cosine distance that removing block i makes to what block j adds.
    """

    def shade(value: float) -> str:
        if value < 2.0**_LEAST:
            return _SHADES[0]
        return _SHADES[min(len(_SHADES) - 1, 1 + int(math.log2(value) - _LEAST) // 2)]

    legend = [f"{_SHADES[0]} below 2^{_LEAST}"]
    legend += [f"{s} from 2^{_LEAST + 2 * i}" for i, s in enumerate(_SHADES[1:])]
    lines = [f"dependency of later blocks on each: {', '.join(legend)}"]
    tens = "".join(f"{j:<10}" for j in range(0, len(matrix), 10))
    lines.append(f"layer  {tens}".rstrip())
    for i, row in enumerate(matrix):
        cells = "".join(shade(value) if j > i else " " for j, value in enumerate(row))
        lines.append(f"{i:5}  {cells}".rstrip())
    return "\n".join(lines)


def _solid(variant: Attention | FFN, full: int, width: int) -> str:
    match variant:
        case GQA(size) | SwiGLU(size):
            eighths = max(1, round(8 * width * size / full))
            return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        case Chain():
            return "─"
        case _:
            return "·"


def answers_of(path: Path) -> Path | None:
    """The file of answers that `eval` or `profile` keeps in a directory, or that a path names."""
    names = [path] if path.name in ANSWERS else [path / name for name in ANSWERS]
    return next((name for name in names if name.is_file()), None)


def samples(path: Path) -> list[dict[str, Any]]:
    """The answers that a run keeps, with what was found of them. Raises RunError for none.

    Of a policy those of its first rollout and of its last, of `eval` and `profile` all.
    """
    if file := answers_of(path):
        return _judged(file)
    files = sorted((path / "samples").glob("*.jsonl"))
    if not files:
        raise RunError(
            f"{path} keeps no samples; runs of grpo, rloo, gkd, rpo, eval and profile do"
        )
    ends = [files[0], *files[-1:]] if len(files) > 1 else files
    return [row for file in ends for row in _lines(file)]


def _lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a file that may still be written: half a line at its end is left out."""
    return whole_lines(file)[0]


def _judged(file: Path) -> list[dict[str, Any]]:
    """Answers with their `outcomes`, a verdict and its reason by the name of what found it."""
    verdicts = file.with_name("verdicts.jsonl")
    found = {}
    for row in _lines(verdicts) if verdicts.is_file() else ():
        own = {"verdict": {key: row.get(key) for key in ("verdict", "reason")}}
        found[row["key"].split("-")[0]] = row.get("outcomes", own)
    return [row | {"outcomes": found.get(row["key"], {})} for row in _lines(file)]


def render_samples(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was asked, what was said, what it was worth and why."""
    return "\n\n".join(_answer(row) if "outcomes" in row else _sample(row) for row in rows)


def _sample(row: Mapping[str, Any]) -> str:
    parts = ", ".join(
        f"{name} {'could not be judged' if score is None else format(score, '.3g')}"
        for name, score in row["parts"].items()
    )
    worth = "left out" if row["reward"] is None else f"reward {row['reward']:.3g}"
    worth = f"{worth} ({parts}), " if parts else ""  # of `gkd` nothing is judged
    head = f"rollout {row['rollout']}, {row['kind']}: {worth}{row['tokens']} tokens"
    mode = f", thinking {row['mode']}" if row["mode"] else ""
    return f"{head}{mode}\n> {row['prompt']}\n{row['text']}"


def _answer(row: Mapping[str, Any]) -> str:
    name = row.get("prompt_id") or f"{row['task']} {row['item']}"
    said = [
        f"{key} {one['verdict']}" + (f" ({one['reason']})" if one["reason"] else "")
        for key, one in row["outcomes"].items()
    ]
    cut = ", cut at max_tokens" if row["finish_reason"] == "length" else ""
    head = f"{name}, sample {row['sample']}: {', '.join(said) or 'not judged yet'}"
    asked = row["prompt"] or row["messages"][-1]["content"]
    thought = f"<think>{row['thought']}</think>" if row.get("thought") else ""
    return f"{head}, {row['tokens']} tokens{cut}\n> {asked}\n{thought}{row['text']}"
