"""The search: the best architectures under what serving them may cost (Puzzle §2.6).

The integer program is in `program.py`, what the user's constraints mean in `constraints.py`.
Throughput is linear by multiplying out: batch·new / seconds >= T  is  seconds <= batch·new / T.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tessera.model.config import KINDS, ModelConfig
from tessera.model.servable import ENGINES, known, refusals
from tessera.model.weights import load_config
from tessera.puzzle.baselines import Architecture, dropped_attention, dropped_layers, uniform_width
from tessera.puzzle.conditional import ConditionalConfig, Rescorer, tighten
from tessera.puzzle.constraints import NAMES, budgets, check
from tessera.puzzle.cost_table import CostTable, read_costs, unavailable
from tessera.puzzle.infeasible import explain
from tessera.puzzle.program import Infeasible, Option, SearchError, Solution, solve
from tessera.puzzle.space import Space, forbidden_pairs, join, read_space, split
from tessera.run import Run, read_json, read_table


class SearchConfig(BaseModel):
    """What to minimise, and what serving may cost.

    `method`: the integer program, or one of the baselines it is compared with, at the same budget:
    one FFN width everywhere, whole layers dropped by block influence, or attention dropped by the
    score of its removal.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    constraints: dict[str, float | str]
    minimize: Literal["kl", "lm_loss"] = "kl"
    servable: tuple[str, ...] = ()  # engines that must load the child: "vllm", "llama.cpp", …
    method: Literal["mip", "uniform", "dropped", "dropped-attention"] = "mip"
    conditional: ConditionalConfig | None = None  # one more architecture, by scores that follow it
    time_limit: float = Field(default=60.0, gt=0)
    solutions: int = Field(default=1, ge=1)  # how many diverse ones, for a race to choose from
    overlap: float = Field(default=0.8, gt=0, lt=1)  # share of places two of them may agree in

    @field_validator("constraints")
    @classmethod
    def _understood(cls, value: dict[str, float | str]) -> dict[str, float | str]:
        check(value)
        return value

    @field_validator("servable")
    @classmethod
    def _engines(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(known(engine, ENGINES, "engine") for engine in value)


# What a model cannot do without, as limits: at least one attention and one FFN must stay.
KEEP = {"attention left": -1.0, "FFNs left": -1.0}
_KEPT = {"attention left": ("attention", "gqa-"), "FFNs left": ("ffn", "swiglu-")}


def options_of(
    space: Space, scores: Sequence[Mapping], costs: CostTable, metric: str
) -> list[Option]:
    """Every word at every place, and every pair trained together.

    The parent's own words score 0 where `scores` have no row of theirs.
    """
    table = {(r["layer"], r["kind"], r["word"]): r[metric] for r in scores}
    found = []
    for layer in range(len(space.layers)):
        for kind in KINDS:
            for i, word in enumerate(space.words(layer, kind)):
                key = (layer, kind, word)
                score = float(table.get(key, 0.0) if i == 0 else table[key])
                found.append(Option(layer, kind, word, score, _costs(costs, {kind: word})))
    for layer, attention, ffn in space.pairs:
        word, both = join(attention, ffn), {"attention": attention, "ffn": ffn}
        score = float(table[layer, "block", word])
        found.append(Option(layer, "block", word, score, _costs(costs, both)))
    return found


def _costs(costs: CostTable, words: Mapping[str, str]) -> dict[str, float]:
    """Columns summed over a place's words, or a pair's; what `KEEP` counts is negative."""
    total: dict[str, float] = {}
    for key in words.items():
        for column, value in costs.words[key].items():
            total[column] = total.get(column, 0.0) + value
    for name, (kind, prefix) in _KEPT.items():
        total[name] = -1.0 if words.get(kind, "").startswith(prefix) else 0.0
    return total


def words_of(solution: Solution, layers: int) -> Architecture:
    """The (attention, FFN) words of every layer that a solution chose."""
    chosen: dict[tuple[int, str], str] = {}
    for option in solution.options:
        parts = split(option.word) if option.kind == "block" else (option.word,)
        chosen |= dict(zip(option.places, parts, strict=True))
    return [(chosen[i, "attention"], chosen[i, "ffn"]) for i in range(layers)]


def search(
    config: SearchConfig,
    parent: ModelConfig,
    space: Space,
    scores: Sequence[Mapping],
    costs: CostTable,
    share: float = 1.0,
) -> list[tuple[Architecture, Solution]]:
    """The best architectures, best first: words, and the solver's proof.

    Fewer than `config.solutions` where the space holds no more that differ enough. `share` below 1
    holds them only to limits that far on the way from the parent's own cost to what was asked.
    """
    limits = budgets(config.constraints, costs, parent.words)
    if share < 1:
        own = costs.total(parent.words)
        spent = {column: own[column] - costs.base[column] for column in limits}
        limits = {c: spent[c] + share * (most - spent[c]) for c, most in limits.items()}
    pairs = forbidden_pairs(space, parent, config.servable)
    refused_pairs = {(layer, a, f) for layer, found in enumerate(pairs) for a, f in found}
    # Two words that were trained together are never those two trained apart.
    forbidden = [*refused_pairs, *space.pairs]
    options = [
        option
        for option in options_of(space, scores, costs, config.minimize)
        if option.kind != "block" or (option.layer, *split(option.word)) not in refused_pairs
    ]
    found: list[tuple[Architecture, Solution]] = []
    while len(found) < config.solutions:
        earlier = [solution for _, solution in found]
        try:
            solution = solve(
                options, limits | KEEP, forbidden, config.time_limit, earlier, config.overlap
            )
        except Infeasible:
            if found:
                break
            least = functools.partial(_least, options, forbidden, config.time_limit)
            told = explain(config.constraints, limits, costs, parent.words, least)
            raise Infeasible(told) from None
        words = words_of(solution, len(space.layers))
        refused = _first_refused(parent.with_words(words), config.servable)
        if refused is None:
            found.append((words, solution))
        else:
            forbidden.append((refused, *words[refused]))
            whole = (refused, "block", join(*words[refused]))
            options = [o for o in options if (o.layer, o.kind, o.word) != whole]
    return found


def _least(
    options: Sequence[Option],
    forbidden: Sequence[tuple[int, str, str]],
    time_limit: float,
    column: str,
    budgets: Mapping[str, float],
) -> float | None:
    """The smallest sum of a column within the budgets; None where nothing is within them.

    An architecture that keeps no attention, or no FFN, is none.
    """
    unit = max(1e-30, *(option.costs[column] for option in options))
    priced = [replace(option, score=option.costs[column] / unit) for option in options]
    try:
        return solve(priced, {**budgets, **KEEP}, forbidden, time_limit).score * unit
    except SearchError:
        return None


def _first_refused(config: ModelConfig, engines: Sequence[str]) -> int | None:
    """Where to cut an architecture that an engine refuses as a whole, though no pair alone.

    The one such rule known: in vLLM a run of empty layers may not end in a bare FFN, since the
    residual starts in the first attention. Forbidding the first empty layer breaks the run.
    """
    reasons = [reason for engine in engines for reason in refusals(config, engine)]
    if not reasons:
        return None
    empty = [layer for layer, words in enumerate(config.words) if words[0] == "noop"]
    if not empty:
        raise Infeasible(f"{', '.join(engines)} cannot load any child here: {reasons[0]}")
    return empty[0]


def _told(own: Mapping[str, float], parent: Mapping[str, float], solution: Solution | None) -> str:
    """`1.29x throughput, 0.94x parameters promised; score 0.3189, gap 0.0e+00, 0.02 s`."""
    shares = {name: own[name] / parent[name] for name in NAMES if parent.get(name)}
    wanted = [f"{shares[k]:.2f}x {k}" for k in ("throughput", "parameters", "bytes") if k in shares]
    told = f"{', '.join(wanted)} promised"
    if solution is None:
        return told
    return f"{told}; score {solution.score:.4f}, gap {solution.gap:.1e}, {solution.seconds:.2f} s"


def conditional_search(
    config: SearchConfig, space: Space, scores: Sequence[Mapping], costs: CostTable, inputs: dict
) -> Architecture:
    """One architecture, by scores measured anew around what each step of it left."""
    assert config.conditional is not None
    for need in ("library", "data"):
        if inputs[need] is None:
            raise SearchError(f"search.conditional assembles what it scores: it needs a {need} run")
    rescore = Rescorer.load(
        config.conditional, inputs["parent"], inputs["library"], inputs["data"], space
    )
    single = config.model_copy(update={"solutions": 1})
    parent = rescore.parent.config

    def solve_at(rows: Sequence[Mapping], share: float) -> Architecture:
        return search(single, parent, space, rows, costs, share)[0][0]

    *_, words = tighten(config.conditional.rounds, scores, solve_at, rescore)
    return [(attention, ffn) for attention, ffn in words]


def removal_scores(scores: Sequence[Mapping], layers: int, metric: str) -> list[float]:
    """The score of removing each layer's attention; SearchError where the space has no `noop`."""
    found = {r["layer"]: float(r[metric]) for r in scores if r["kind"] == "attention"
             and r["word"] == "noop"}  # fmt: skip
    if len(found) < layers:
        raise SearchError(
            'method = "dropped-attention" needs the word noop for the attention of every layer; '
            "add it to the space of the [bld] table"
        )
    return [found[layer] for layer in range(layers)]


def find(
    config: SearchConfig, inputs: dict, say: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Every architecture that a search gives, best first, as rows of `tables/architectures.json`.

    inputs: paths of the runs parent, scores, costs, and library and data or None. A row has
    method, words, predicted and parent (every cost column, summed), scenario; score and gap
    where the integer program gave it.
    """
    parent = load_config(inputs["parent"])
    space = read_space(inputs["scores"]).without(unavailable(inputs["costs"]))
    scores = read_table(inputs["scores"], "scores")
    (costs,) = read_costs(inputs["costs"]).at(None).values()
    scenario = costs.scenario
    if config.method == "mip":
        found: list[tuple[Architecture, Solution | None]] = []
        found += search(config, parent, space, scores, costs)
        if config.conditional:
            found.append((conditional_search(config, space, scores, costs, inputs), None))
    elif config.method == "uniform":
        found = [(uniform_width(config.constraints, parent, space, costs), None)]
    elif config.method == "dropped-attention":
        damage = removal_scores(scores, len(space.layers), config.minimize)
        found = [(dropped_attention(config.constraints, parent, damage, costs), None)]
    else:
        influence = read_json(inputs["scores"], "block_influence")
        found = [(dropped_layers(config.constraints, parent, influence, costs), None)]
    for words, solution in found:
        say(_told(costs.total(words), costs.total(parent.words), solution))
    common = {"parent": costs.total(parent.words), "scenario": scenario.model_dump()}
    return [
        {
            "method": "conditional" if config.method == "mip" and not solution else config.method,
            "words": words,
            "predicted": costs.total(words),
            **({"score": solution.score, "gap": solution.gap} if solution else {}),
            **common,
        }
        for words, solution in found
    ]


def stage(config: SearchConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `search`: write `tables/architecture.json`, the child's words and what is promised."""
    results = find(config, inputs, run.say)
    run.write_json("architecture", results[0])
    run.write_json("architectures", results)
