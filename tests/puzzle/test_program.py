"""The integer program is brute force on random instances, pairs trained together included."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.puzzle.cost_table import CostTable, Scenario
from tessera.puzzle.program import Infeasible, Option, solve
from tessera.puzzle.search import SearchConfig, options_of, search
from tessera.puzzle.space import Space, join
from tests.toy import toy_config

ATTENTION, FFN = ("gqa-4", "gqa-1", "noop"), ("swiglu-48", "swiglu-12", "noop")
PAIRS = ((0, "gqa-1", "swiglu-12"), (1, "noop", "swiglu-12"), (1, "noop", "swiglu-48"))
LAYERS = 2
SPACE = Space(((ATTENTION, FFN),) * LAYERS, PAIRS)


def _tables(seed: int) -> tuple[list[dict], CostTable]:
    """Random scores of every word and pair; random whole-number costs, the parent's the largest."""
    rng = np.random.default_rng(seed)
    scores = [
        {"layer": layer, "kind": kind, "word": word, "kl": float(rng.uniform(0, 5))}
        for layer, kind, word in SPACE.replacements()
    ]
    scores += [
        {"layer": layer, "kind": "block", "word": join(a, f), "kl": float(rng.uniform(0, 5))}
        for layer, a, f in PAIRS
    ]
    columns = ("parameters", "bytes", "kv_bytes_per_token")
    rows = [{"kind": "base", "word": "", **{c: 1.0 for c in columns}}]
    for kind, words in (("attention", ATTENTION), ("ffn", FFN)):
        for i, word in enumerate(words):
            top = (9, 5, 0)[i]
            costs = {c: float(rng.integers(0, top + 1) + top) for c in columns}
            rows.append({"kind": kind, "word": word, **costs})
    return scores, CostTable.from_rows(rows, Scenario())


def _score(scores: list[dict], words) -> float:
    """What an architecture scores: a coupled pair as one, else each word by itself."""
    table = {(r["layer"], r["kind"], r["word"]): r["kl"] for r in scores}
    total = 0.0
    for layer, (a, f) in enumerate(words):
        if (layer, a, f) in PAIRS:
            total += table[layer, "block", join(a, f)]
        else:
            total += table.get((layer, "attention", a), 0.0) + table.get((layer, "ffn", f), 0.0)
    return total


def _brute_force(scores, costs: CostTable, budgets: dict[str, float]) -> float | None:
    best = None
    for words in itertools.product(itertools.product(ATTENTION, FFN), repeat=LAYERS):
        if all(a == "noop" for a, _ in words) or all(f == "noop" for _, f in words):
            continue
        total = costs.total(words)
        if all(total[c] <= b for c, b in budgets.items()):
            score = _score(scores, words)
            best = score if best is None else min(best, score)
    return best


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(2, 60))
def test_search_with_pairs_is_brute_force(seed: int, parameters: int, memory: int):
    scores, costs = _tables(seed)
    budgets = {"parameters": parameters + 0.5, "bytes": memory + 0.5}
    config, parent = SearchConfig(constraints={**budgets}), toy_config(layers=LAYERS)
    best = _brute_force(scores, costs, budgets)
    if best is None:
        with pytest.raises(Infeasible):
            search(config, parent, SPACE, scores, costs)
        return
    ((words, solution),) = search(config, parent, SPACE, scores, costs)
    assert solution.score == pytest.approx(best, abs=1e-9)
    assert _score(scores, words) == pytest.approx(best, abs=1e-9)
    assert solution.gap < 1e-6
    assert all(costs.total(words)[c] <= b for c, b in budgets.items())


def test_an_architecture_without_attention_is_refused_however_cheap():
    scores, costs = _tables(0)
    least = costs.total([("noop", "noop")] * LAYERS)["parameters"]
    config = SearchConfig(constraints={"parameters": least + 0.5})
    with pytest.raises(Infeasible, match="One attention and one FFN always stay"):
        search(config, toy_config(layers=LAYERS), SPACE, scores, costs)


def test_a_pair_covers_both_places_of_its_layer():
    scores, costs = _tables(1)
    options = options_of(SPACE, scores, costs, "kl")
    blocks = [o for o in options if o.kind == "block"]
    assert [o.places for o in blocks] == [
        ((o.layer, "attention"), (o.layer, "ffn")) for o in blocks
    ]
    cheap = [Option(o.layer, o.kind, o.word, -1.0 if o in blocks else 9.0, {}) for o in options]
    chosen = solve(cheap, {}).options
    assert [o.kind for o in chosen] == ["block"] * LAYERS
