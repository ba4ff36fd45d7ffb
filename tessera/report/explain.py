"""What was taken from a parent, layer by layer, and what each word cost and saved; torch-free.

KL is a word's replace-one score, bytes and seconds are those of the scenario that was priced: both
where the lineage holds the tables. Parameters and KV bytes a token are always counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.model.config import KINDS, ModelConfig, parse_kind
from tessera.model.source import ancestors, holder, model_config, origin
from tessera.puzzle.cost_table import CostTable, read_costs
from tessera.puzzle.space import Unit
from tessera.runs.files import RunError
from tessera.runs.run import read_table
from tessera.table import VIEWS, count, render_table, seconds, size, terminal_width

COUNTED = ("parameters", "kv_bytes_per_token")
PRICED = ("bytes", "seconds")
Row = dict[str, Any]


@dataclass(frozen=True)
class Prices:
    """What words of one parent cost: scores by (layer, kind, word), and a cost table."""

    scores: Mapping[tuple[int, str, str], float]
    costs: CostTable | None

    def kl(self, parent: ModelConfig, layer: int, kind: str, word: str) -> float | None:
        """The replace-one score of a word; 0 for the parent's own, None for one not scored."""
        if layer < len(parent.words) and word == parent.words[layer][KINDS.index(kind)]:
            return 0.0
        return self.scores.get((layer, kind, word))

    def layer_kl(self, parent: ModelConfig, layer: int, words: tuple[str, str]) -> float | None:
        """The score of a layer's two words, as a pair where they were trained together."""
        pair = self.scores.get(Unit.pair(layer, *words))
        if pair is not None:
            return pair
        apart = [self.kl(parent, layer, *one) for one in zip(KINDS, words, strict=True)]
        return _sum(apart)

    def cost(self, column: str, kind: str, word: str) -> float | None:
        """One column of a word; None for one that was not priced."""
        words = self.costs.words if self.costs else {}
        return words.get((kind, word), {}).get(column)


def prices_of(runs: Sequence[Path]) -> Prices:
    """From the nearest of these runs that hold scores and costs; either may be missing."""
    scores: dict[tuple[int, str, str], float] = {}
    costs = None
    for run in runs:  # the nearest stands last
        if (run / "tables" / "scores.jsonl").is_file():
            rows = read_table(run, "scores")
            scores = {(r["layer"], r["kind"], r["word"]): r["kl"] for r in rows}
        if (run / "tables" / "scenarios.json").is_file():
            costs = read_costs(run).first
    return Prices(scores, costs)


def explain(path: str | Path) -> Row | None:
    """What the architecture of a run lost against its parent; None where there are not both."""
    path, parent = Path(path), origin(Path(path))
    try:
        if parent is None or parent.resolve() == path.resolve():
            return None
        before, after = model_config(parent), model_config(path)
    except RunError:
        return None
    if before.words == after.words:
        return None
    return {
        "against": str(parent),
        **changes(before, after, before, prices_of(list(ancestors(path)))),
    }


def diff(a: str | Path, b: str | Path) -> Row:
    """Where two architectures differ, layer by layer, and by how much in size and in price.

    Prices are those of the lineage that both share, or that one has and the other is the root of.
    """
    before, after = model_config(a), model_config(b)
    homes = [holder(a), holder(b)]
    roots = [(origin(home) or home).resolve() for home in homes]
    parent, prices = before, Prices({}, None)
    if roots[0] == roots[1]:
        parent = model_config(roots[0])
        prices = prices_of([run for home in homes for run in ancestors(home)])
    sizes = [
        ("parameters", before.num_params(), after.num_params()),
        ("KV bytes a token", before.kv_bytes_per_token(4), after.kv_bytes_per_token(4)),
    ]
    for field in ("num_hidden_layers", "hidden_size", "vocab_size"):
        own, other = getattr(before, field), getattr(after, field)
        sizes += [(field, own, other)] if own != other else []
    rows = [
        {"": what, "A": int(a), "B": int(b), "B - A": int(b - a), "B / A": b / a if a else None}
        for what, a, b in sizes
    ]
    return {**changes(before, after, parent, prices), "sizes": rows}


def changes(before: ModelConfig, after: ModelConfig, parent: ModelConfig, prices: Prices) -> Row:
    """{layers: a row for each layer that differs, total, of: the sums of `before`, scenario}.

    A row holds `attention` and `ffn` as "before -> after", and for each that changed the KL it
    added and the parameters, KV bytes, bytes and seconds it saved; `pair_kl` for two words trained
    together. A total is None where one of its words has no price.
    """
    rows = []
    for layer in range(max(len(before.words), len(after.words))):
        old, new = _words(before, layer), _words(after, layer)
        if old == new:
            continue
        row: Row = {"layer": layer}
        together = any(Unit.pair(layer, *pair) in prices.scores for pair in (old, new))
        for kind, was, now in zip(KINDS, old, new, strict=True):
            row[kind] = was if was == now else f"{was} -> {now}"
            if was == now:
                continue
            for column in COUNTED:
                saved = _counted(before, column, kind, was) - _counted(after, column, kind, now)
                row[f"{kind}_{column}"] = int(saved)
            for column in PRICED if prices.costs else ():
                costs = [prices.cost(column, kind, word) for word in (was, now)]
                row[f"{kind}_{column}"] = _less(costs[0], costs[1])
            if prices.scores and not together:
                harm = [prices.kl(parent, layer, kind, word) for word in (was, now)]
                row[f"{kind}_kl"] = _less(harm[1], harm[0])
        if together:  # the words' own scores are those of words trained apart
            harm = [prices.layer_kl(parent, layer, pair) for pair in (old, new)]
            row["pair_kl"] = _less(harm[1], harm[0])
        rows.append(row)
    columns = dict.fromkeys(key for row in rows for key in row if "_" in key)
    scenario = prices.costs.scenario if prices.costs else None
    whole: Row = {"parameters": before.num_params()}
    whole["kv_bytes_per_token"] = int(before.kv_bytes_per_token(4))
    places = [place for pair in before.words for place in zip(KINDS, pair, strict=True)]
    if prices.costs and all(place in prices.costs.words for place in places):
        total = prices.costs.total(before.words)
        whole |= {column: total[column] for column in PRICED if column in total}
    return {
        "layers": rows,
        "total": {key: _sum([row[key] for row in rows if key in row]) for key in columns},
        "of": whole,
        "scenario": scenario.model_dump() if scenario else None,
    }


def _words(config: ModelConfig, layer: int) -> tuple[str, str]:
    return config.words[layer] if layer < len(config.words) else ("absent", "absent")


def _counted(config: ModelConfig, column: str, kind: str, word: str) -> float:
    if word == "absent":
        return 0.0
    variant = parse_kind(kind, word)
    if column == "parameters":
        return config.subblock_params(kind, variant)
    return config.kv_bytes(variant)  # type: ignore[arg-type]


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _sum(values: Sequence[float | None]) -> float | None:
    """The sum; None where it would leave something out, and where there is nothing to add."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def render_changes(found: Row) -> str:
    """The table of `changes` with its totals, as text."""
    rows = found["layers"]
    if not rows:
        return "the words are the same"
    dropped = COUNTED if found["scenario"] else ()
    shown = [
        {key: value for key, value in row.items() if not key.endswith(dropped)}
        for row in [*rows, {"layer": "all", "attention": "", "ffn": "", **found["total"]}]
    ]
    return render_table(shown, view=VIEWS["taken"], width=terminal_width())


def headline(found: Row) -> str:
    """`taken (batch 8, 64 + 128 tokens): 41 of 120 KiB, 3.1 of 9.7 ms, for a summed KL of 0.32`."""
    total, whole, one = found["total"], found["of"], found["scenario"]
    columns = {"parameters": count, "bytes": size, "seconds": seconds}
    if not one:
        columns = {"parameters": count, "kv_bytes_per_token": size}
    units = {"parameters": " parameters", "kv_bytes_per_token": " of KV cache a token"}
    parts = []
    for column, text in columns.items():
        saved = _sum([total[key] for kind in KINDS if (key := f"{kind}_{column}") in total])
        if saved is not None and whole.get(column):
            parts.append(f"{text(saved)} of {text(whole[column])}{units.get(column, '')}")
    harm = _sum([value for key, value in total.items() if key.endswith("_kl")])
    parts += [f"for a summed KL of {harm:.4f}"] if harm is not None else []
    where = f" (batch {one['batch']}, {one['prompt']} + {one['new']} tokens)" if one else ""
    return f"taken{where}: {', '.join(parts)}"


def render_diff(found: Row) -> str:
    """`diff`'s answer as text."""
    head = f"{headline(found)}\n" if found["layers"] else ""
    return f"{head}{render_changes(found)}\n\n{render_table(found['sizes'])}"
