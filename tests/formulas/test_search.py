"""The integer program and its budgets, by hand (Puzzle §2.6)."""

from __future__ import annotations

import itertools
import math

import pytest

from tessera.devices import DEVICES
from tessera.puzzle.candidates import Candidates, greedy
from tessera.puzzle.constraints import Budgets, Constraint, batch_choices, read_amount
from tessera.puzzle.cost_table import Costs, CostTable, Scenario
from tessera.puzzle.program import Infeasible, Option, Solution, divisible, relax, solve
from tessera.puzzle.race import RaceConfig
from tests import searching

# Two layers, each an attention and an FFN; score, seconds and bytes of each word.
TABLE = {
    (0, "attention"): {"full": (0.0, 4.0, 3.0), "none": (2.0, 0.0, 0.0)},
    (0, "ffn"): {"wide": (0.0, 5.0, 6.0), "half": (1.0, 2.5, 3.0), "none": (4.0, 0.0, 0.0)},
    (1, "attention"): {"full": (0.0, 4.0, 3.0), "none": (0.5, 0.0, 0.0)},
    (1, "ffn"): {"wide": (0.0, 5.0, 6.0), "half": (3.0, 2.5, 3.0), "none": (9.0, 0.0, 0.0)},
}
OPTIONS = [
    Option(layer, kind, word, score, {"seconds": seconds, "bytes": size})
    for (layer, kind), words in TABLE.items()
    for word, (score, seconds, size) in words.items()
]


def choices(limits: dict[str, float], forbidden=()) -> list[tuple[float, tuple[str, ...]]]:
    """(score, words) of every choice of a word a place within the limits, best first."""
    found = []
    for words in itertools.product(*TABLE.values()):
        rows = [TABLE[place][word] for place, word in zip(TABLE, words, strict=True)]
        score, seconds, size = (sum(column) for column in zip(*rows, strict=True))
        within = seconds <= limits.get("seconds", 99) and size <= limits.get("bytes", 99)
        pairs = [(0, *words[:2]), (1, *words[2:])]
        if within and not set(pairs) & set(forbidden):
            found.append((score, words))
    return sorted(found)


@pytest.mark.parametrize(
    ("limits", "forbidden"),
    [
        ({}, ()),
        ({"seconds": 14.0}, ()),
        ({"seconds": 13.9}, ()),
        ({"seconds": 11.5, "bytes": 12.0}, ()),
        ({"seconds": 9.0, "bytes": 9.0}, [(0, "none", "wide"), (1, "none", "wide")]),
        ({"bytes": 0.0}, ()),
    ],
)
def test_the_program_takes_the_least_sum_of_scores_within_every_limit(limits, forbidden):
    best, words = choices(limits, forbidden)[0]
    found = solve(OPTIONS, limits, forbidden)
    assert found.score == pytest.approx(best)
    assert tuple(option.word for option in found.options) == words
    assert found.bound == pytest.approx(best, abs=1e-6) and found.gap < 1e-6


def test_nothing_is_found_where_no_choice_is_within_the_limits():
    for limits in ({"seconds": -0.1}, {"bytes": -1.0, "seconds": 99.0}):
        with pytest.raises(Infeasible):
            solve(OPTIONS, limits)


@pytest.mark.parametrize(("overlap", "most"), [(0.8, 3), (0.75, 3), (0.74, 2), (0.5, 2), (0.0, 0)])
def test_a_further_solution_shares_at_most_its_part_of_the_places(overlap: float, most: int):
    """Σ x·y <= α·places of four: 0.8 of them are 3, and 0.74 of them 2."""
    first = solve(OPTIONS, {"seconds": 14.0})
    chosen = tuple(option.word for option in first.options)
    apart = [
        (score, words)
        for score, words in choices({"seconds": 14.0})
        if sum(a == b for a, b in zip(chosen, words, strict=True)) <= most
    ]
    second = solve(OPTIONS, {"seconds": 14.0}, earlier=[first], overlap=overlap)
    assert second.score == pytest.approx(apart[0][0])
    assert solve(OPTIONS, {"seconds": 14.0}, earlier=[first]).score == pytest.approx(
        choices({"seconds": 14.0})[1][0]
    )  # Puzzle's α of 0.8, unless another is given


def test_a_pair_counts_for_both_of_its_places():
    pair = Option(0, "block", "full+wide", -1.0, {"seconds": 9.0, "bytes": 9.0})
    assert pair.places == ((0, "attention"), (0, "ffn"))
    options = [pair, *OPTIONS]
    first = solve(options, {})
    assert first.score == -1.0 and [o.word for o in first.options][0] == "full+wide"
    second = solve(options, {}, earlier=[first], overlap=0.75)  # 3 of 4: not the pair and both
    assert second.score == pytest.approx(-0.5)
    third = solve(options, {}, earlier=[first], overlap=0.25)  # the pair alone is more
    assert all(option.kind != "block" for option in third.options)
    assert third.score == pytest.approx(0.5 + 0.0 + 0.0 + 0.0)


def test_divisible_words_give_the_bound_and_what_a_second_is_worth():
    """One place, a score of 10 saves 4 seconds: of 1 second allowed, a quarter is the slow one."""
    options = [
        Option(0, "ffn", "slow", 0.0, {"seconds": 4.0}),
        Option(0, "ffn", "fast", 10.0, {"seconds": 0.0}),
    ]
    score, prices = divisible(options, {"seconds": 1.0})
    assert score == pytest.approx(7.5) and prices == {"seconds": pytest.approx(2.5)}
    assert solve(options, {"seconds": 1.0}).score == 10.0
    assert divisible(options, {"seconds": 9.0}) == (0.0, {"seconds": 0.0})
    with pytest.raises(Infeasible):
        divisible(options, {"seconds": -1.0})


def test_limits_give_way_by_the_least_in_their_scales():
    """Everything costs 3 seconds or 5 bytes too much; a second weighs as much as two bytes."""
    options = [
        Option(0, "ffn", "a", 0.0, {"seconds": 5.0, "bytes": 1.0}),
        Option(0, "ffn", "b", 9.0, {"seconds": 1.0, "bytes": 6.0}),
    ]
    limits = {"seconds": 2.0, "bytes": 1.0}
    assert relax(options, limits, {"seconds": 1.0, "bytes": 2.0}, {}) == pytest.approx(
        {"seconds": 0.0, "bytes": 5.0}
    )
    assert relax(options, limits, {"seconds": 2.0, "bytes": 1.0}, {}) == pytest.approx(
        {"seconds": 3.0, "bytes": 0.0}
    )
    assert relax(options, {"seconds": 9.0}, {"seconds": 1.0}, {"bytes": 1.0}) == {"seconds": 0.0}
    forbidden = [(0, "x", "a")]
    options.append(Option(0, "attention", "x", 0.0, {"seconds": 0.0, "bytes": 0.0}))
    assert relax(options, limits, {"seconds": 2.0, "bytes": 1.0}, {}, forbidden) == pytest.approx(
        {"seconds": 0.0, "bytes": 5.0}
    )


def test_the_gap_is_a_share_of_the_score():
    assert Solution((), 4.0, 3.0, 0.0).gap == pytest.approx(0.25)
    assert Solution((), -4.0, -5.0, 0.0).gap == pytest.approx(0.25)
    assert Solution((), 0.0, 0.0, 0.0).gap == 0.0


# Budgets made linear: Σ coefficient · column <= bound.

CHAT = Scenario(batch=2, prompt=4, new=10)
PARENT = [("full", "wide")] * 2
CHILD = [("none", "wide"), ("full", "half")]


def table(scenario: Scenario = CHAT, slower: float = 1.0) -> CostTable:
    columns = ("parameters", "bytes", "kv_bytes_per_token", "prefill_seconds", "decode_seconds")
    words = {
        ("base", ""): (10, 20, 0, 1.0, 0.5),
        ("attention", "full"): (5, 40, 3, 2.0, 0.25),
        ("attention", "none"): (0, 0, 0, 0.0, 0.0),
        ("ffn", "wide"): (8, 16, 0, 3.0, 0.5),
        ("ffn", "half"): (4, 8, 0, 1.5, 0.25),
    }
    rows = []
    for (kind, word), values in words.items():
        timed = [*values[:3], *(slower * one for one in values[3:])]
        rows.append({"kind": kind, "word": word, **dict(zip(columns, timed, strict=True))})
    return CostTable.from_rows(rows, scenario)


def seconds(words: list[tuple[str, str]], slower: float = 1.0, new: int = 10) -> float:
    prefill = {"full": 2.0, "none": 0.0, "wide": 3.0, "half": 1.5}
    decode = {"full": 0.25, "none": 0.0, "wide": 0.5, "half": 0.25}
    flat = [word for pair in words for word in pair]
    whole = 1.0 + sum(map(prefill.__getitem__, flat))
    return slower * (whole + (new - 1) * (0.5 + sum(map(decode.__getitem__, flat))))


def constraint(budgets: dict, costs: Costs | None = None, **weights: float) -> Constraint:
    costs = costs or Costs({("chat", 2): table()}, {"chat": CHAT}, (), "measured", None, 2.0, 1.0)
    (case,) = batch_choices(Budgets(budgets, {}, weights), costs, PARENT)
    (found,) = case.constraints
    return found


def spent(found: Constraint, words: list[tuple[str, str]], **tables: CostTable) -> float:
    tables = tables or {"chat": table()}
    return found.total({name: one.total(words) for name, one in tables.items()})


@pytest.mark.parametrize(
    ("budget", "given", "most"),
    [
        ("parameters", 30, 30),
        ("parameters", "0.5x", 0.5 * (10 + 2 * 13)),
        ("bytes", "1 KiB", 1024),
        ("bytes", "0.25x", 0.25 * (20 + 2 * 56)),
        ("kv_bytes_per_token", "0.5x", 3.0),
        ("time_to_first_token", "500 ms", 0.5),
        ("inter_token_latency", "0.5x", 0.5 * 2.0),
        ("latency", "2 min", 120.0),
        ("latency", "0.8x", 0.8 * seconds(PARENT)),
        ("throughput", "4 tokens/s", 2 * 10 / 4),  # batch · new tokens over the least rate
        ("throughput", "1.25x", seconds(PARENT) / 1.25),
    ],
)
def test_a_budget_bounds_the_sum_of_its_column(budget: str, given: float | str, most: float):
    column = {
        "parameters": 10 + 8 + 5 + 4,
        "bytes": 20 + 16 + 40 + 8,
        "kv_bytes_per_token": 3,
        "time_to_first_token": 1.0 + 3.0 + 2.0 + 1.5,
        "inter_token_latency": 0.5 + 0.5 + 0.25 + 0.25,
        "latency": seconds(CHILD),
        "throughput": seconds(CHILD),
    }[budget]
    found = constraint({budget: given})
    assert found.bound == pytest.approx(most)
    assert spent(found, CHILD) == pytest.approx(column)
    if isinstance(given, str) and given.endswith("x"):
        assert found.in_unit(found.bound) == pytest.approx(float(given[:-1]))


def test_what_fits_is_nine_tenths_of_the_devices_memory():
    """Bytes a parameter times parameters, and the cache of 8 sequences of 1024 tokens."""
    found = constraint({"fits": "2x H100, 1k context, 8 sequences"})
    assert found.bound == 0.9 * 2 * DEVICES["H100"].memory == 0.9 * 160e9
    assert spent(found, CHILD) == 2.0 * 27 + 8 * 1024 * 3
    assert spent(constraint({"fits": "H100"}), CHILD) == 2.0 * 27 + 2 * (4 + 10) * 3


def test_shares_of_the_parents_time_are_weighed_over_scenarios():
    """Σ w · seconds / seconds(parent) / Σ w <= 1/1.5."""
    long = Scenario(batch=1, prompt=9, new=3)
    tables = {"chat": table(), "long": table(long, 2.0)}
    costs = Costs(
        {("chat", 2): tables["chat"], ("long", 1): tables["long"]},
        {"chat": CHAT, "long": long}, (), "measured", None, 2.0, 1.0)  # fmt: skip
    found = constraint({"throughput": "1.5x"}, costs, chat=3.0)
    shares = [
        seconds(CHILD, slower, new) / seconds(PARENT, slower, new)
        for slower, new in ((1.0, 10), (2.0, 3))
    ]
    mixed = (3 * shares[0] + shares[1]) / 4
    ratio = spent(found, CHILD, **tables) / found.bound
    assert ratio == pytest.approx(1.5 * mixed)
    assert found.in_unit(spent(found, CHILD, **tables)) == pytest.approx(1 / mixed)


def test_the_solvers_bounds_are_without_the_base():
    costs = Costs({("chat", 2): table()}, {"chat": CHAT}, (), "measured", None, 2.0, 1.0)
    budgets = Budgets({"latency": "0.8x", "parameters": 30}, {}, {})
    (case,) = batch_choices(budgets, costs, PARENT)
    base = 1.0 + 9 * 0.5
    assert case.bounds() == pytest.approx(
        {"latency": 0.8 * seconds(PARENT) - base, "parameters": 30 - 10}
    )
    assert case.costs({"attention": "full"}) == pytest.approx(
        {"latency": 2.0 + 9 * 0.25, "parameters": 5}
    )
    assert case.excess(CHILD) == pytest.approx(max(seconds(CHILD) / (0.8 * seconds(PARENT)), 0.9))
    assert case.seconds_per_token(CHILD) == pytest.approx(seconds(CHILD) / 20)
    looser = case.scaled("parameters", 1.5).constraints
    assert [one.bound for one in looser] == pytest.approx([0.8 * seconds(PARENT), 45.0])
    half = case.towards(0.5).constraints  # from the parent's own cost half of the way
    assert [one.bound for one in half] == pytest.approx([0.9 * seconds(PARENT), 33.0])


def test_a_share_is_of_the_parent_at_its_best_batch_that_memory_allows():
    """At batch 4 the parent is faster, but its cache is too large for the bytes asked for."""
    tables = {("chat", batch): table(CHAT.model_copy(update={"batch": batch})) for batch in (1, 2)}
    tables["chat", 4] = table(CHAT.model_copy(update={"batch": 4}))
    tables["chat", 4].words["attention", "full"]["bytes"] = 1000.0  # type: ignore[index]
    costs = Costs(tables, {"chat": CHAT}, (4, 1, 2), "measured", None, 2.0, 1.0)
    cases = batch_choices(Budgets({"throughput": "2x", "bytes": 150}, {}, {}), costs, PARENT)
    assert [str(one) for one in cases] == ["batch 1", "batch 2", "batch 4"]
    rate = 2 * 10 / seconds(PARENT)
    for batch, case in zip((1, 2, 4), cases, strict=True):
        asked = next(one for one in case.constraints if one.name == "throughput")
        assert asked.bound == pytest.approx(batch * 10 / (2 * rate))
    free = batch_choices(Budgets({"throughput": "2x"}, {}, {}), costs, PARENT)[0]
    assert free.constraints[0].bound == pytest.approx(1 * 10 / (2 * 2 * rate))
    assert math.isfinite(free.excess(CHILD))


@pytest.mark.parametrize(
    ("given", "dimension", "told"),
    [
        ("1.5x", "rate", '"12.5x"'),
        ("30 ms", "time", '"12.5 ms"'),
        ("2 min", "time", '"12.5 min"'),
        ("49B", "count", '"12.5B"'),
        ("3 T", "count", '"12.5T"'),
        ("200 B", "bytes", '"12.5 B"'),
        ("1 GiB", "bytes", '"12.5 GiB"'),
        ("500 tokens/s", "rate", '"12.5 tokens/s"'),
        (1000, "count", "12.5"),
    ],
)
def test_an_amount_is_told_in_the_unit_it_was_given_in(given, dimension: str, told: str):
    assert read_amount("it", given, dimension).text(12.5) == told
    assert read_amount("it", 1000, "count").text(12345678.0) == "1.23457e+07"
    assert read_amount("it", 1000, "count").text(12345.0) == "12,345"


# The paper's own baseline, and the race.


@pytest.mark.parametrize(
    ("limit", "first", "second"),
    [
        (29, ("gqa-4", "swiglu-48"), ("gqa-4", "swiglu-48")),  # 14 a layer hold all of it
        (27, ("gqa-1", "swiglu-48"), ("gqa-4", "swiglu-48")),  # 11 of 13, so 15 for the second
        (25, ("gqa-1", "swiglu-48"), ("gqa-1", "swiglu-48")),  # 11 of 12, so 13
        (19, ("gqa-1", "swiglu-12"), ("gqa-1", "swiglu-48")),  # 7 of 9, so 11
    ],
)
def test_greedy_gives_each_layer_an_equal_part_and_rolls_over_what_it_leaves(limit, first, second):
    """Layers by ascending mean score; the best-scoring block within the part and the rest."""
    sizes = {"gqa-4": 6.0, "gqa-1": 3.0, "noop": 0.0, "swiglu-48": 8.0, "swiglu-12": 4.0}
    own = {"gqa-1": (1.0, 0.5), "noop": (3.5, 6.0), "swiglu-12": (2.0, 1.0)}
    words = {"attention": ("gqa-4", "gqa-1", "noop"), "ffn": ("swiglu-48", "swiglu-12", "noop")}
    rows = [{"kind": "base", "word": "", "parameters": 1.0}]
    rows += [
        {"kind": kind, "word": word, "parameters": sizes[word]}
        for kind in words
        for word in words[kind]
    ]
    scores = [
        {"layer": layer, "kind": kind, "word": word, "kl": own[word][layer]}
        for layer in (0, 1)
        for kind in words
        for word in words[kind][1:]
    ]
    space = searching.Space(((words["attention"], words["ffn"]),) * 2)
    found = greedy(
        Candidates.of(searching.PARENT, space, (), scores, "kl"),
        searching.choices_of(
            {"parameters": limit}, searching.priced(CostTable.from_rows(rows, CHAT))
        ),
    )
    assert found.words == [first, second] and found.meets


def test_a_rung_of_the_race_takes_grow_times_the_steps_of_the_one_before():
    config = RaceConfig(train={"steps": 10, "lr": 1e-3}, grow=1.5, rungs=3)  # type: ignore[arg-type]
    heats = [config.heat(rung, 0.25) for rung in (1, 2, 3)]
    assert [heat.train.steps for heat in heats] == [10, 15, 22]
    assert {heat.train.lr for heat in heats} == {0.25}
