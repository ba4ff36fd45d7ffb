"""Budgets: what they mean in words, and made linear over scenarios and batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.devices import DEVICES
from tessera.puzzle.constraints import (
    UNITS,
    BatchChoice,
    Budgets,
    ConstraintError,
    Fits,
    batch_choices,
    read_amount,
    read_fits,
)
from tessera.puzzle.cost_table import CostTable, Scenario
from tests.searching import PARENT, choices_of, priced, table


@pytest.mark.parametrize(
    ("words", "dimension", "value"),
    [
        ("30 ms", "time", 0.03),
        ("30ms", "time", 0.03),
        ("0.5 s", "time", 0.5),
        (0.5, "time", 0.5),
        ("2 min", "time", 120),
        ("60 GiB", "bytes", 60 * 2**30),
        ("200 B", "bytes", 200),
        ("80 GB", "bytes", 80e9),
        ("80 gb", "bytes", 80e9),
        ("49B", "count", 49e9),
        ("8.03B", "count", 8.03e9),
        ("350 M", "count", 350e6),
        ("500 tokens/s", "rate", 500),
        ("12,400", "count", 12_400),
        (1e9, "count", 1e9),
        ("1.5e3", "rate", 1500),
        ("0.7x", "bytes", 0.7),
    ],
)
def test_amounts(words, dimension, value):
    amount = read_amount("name", words, dimension)
    assert amount.value == pytest.approx(value)
    assert amount.relative == str(words).endswith("x")


@given(st.sampled_from(sorted(UNITS)), st.data(), st.integers(1, 99_999))
def test_what_an_amount_tells_reads_back(dimension, data, number):
    unit = data.draw(st.sampled_from(["", "x", *UNITS[dimension]]))
    amount = read_amount("name", f"{number} {unit}", dimension)
    again = read_amount("name", amount.text(amount.number).strip('"'), dimension)
    assert again == amount


@pytest.mark.parametrize(
    ("words", "dimension", "told"),
    [
        ("30 mz", "time", "'mz' is no unit of it; Allowed: us, ms, s, min, x"),
        ("60 GiBs", "bytes", "did you mean 'GiB'"),
        ("500 token/s", "rate", "did you mean 'tokens/s'"),
        ("fast", "time", 'an amount such as "30 ms"'),
        ("-3 ms", "time", "positive number"),
        ("0x", "rate", 'a share of the parent such as "1.5x"'),
        ("inf", "time", "positive number"),
    ],
)
def test_amounts_that_mean_nothing(words, dimension, told):
    with pytest.raises(ConstraintError) as error:
        read_amount("it", words, dimension)
    assert told in str(error.value) and f"it = {words!r}" in str(error.value)


def test_what_fits_says():
    fits = read_fits("1x H100, 32k context, 16 sequences")
    assert fits == Fits(1, DEVICES["H100"], 32_768, 16)
    assert fits.tokens(Scenario()) == 32_768 * 16 and fits.memory == 0.9 * 80e9
    scenario = Scenario(batch=3, prompt=5, new=7)
    assert read_fits("2xrtx-4090") == Fits(2, DEVICES["RTX 4090"])
    assert read_fits("H200").tokens(scenario) == 36
    assert read_fits("H200, 1k context").tokens(scenario) == 3 * 1024
    assert read_fits("4 x H200, 1 sequence").tokens(scenario) == 12
    assert read_fits("1x H100, 300k cached tokens").tokens(scenario) == 300 * 1024
    assert read_fits("1x H100, 32,768 context, 16 sequences").context == 32_768


@given(
    st.integers(1, 64),
    st.sampled_from(sorted(DEVICES)),
    st.none() | st.integers(1, 10**6),
    st.none() | st.integers(1, 10**4),
    st.integers(1, 10**7),
)
def test_what_fits_tells_reads_back(count, device, context, sequences, cached):
    for fits in (
        Fits(count, DEVICES[device], context, sequences),
        Fits(count, DEVICES[device], cached=cached),
    ):
        assert read_fits(_written(fits)) == fits


def _written(fits: Fits) -> str:
    loads = {"context": fits.context, "sequences": fits.sequences, "cached tokens": fits.cached}
    parts = [f"{number} {load}" for load, number in loads.items() if number is not None]
    return ", ".join([f"{fits.count}x {fits.device.name}", *parts])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("1x H10", "unknown device 'H10'; did you mean 'H100'"),
        ("32k context", "names no device"),
        ("0x H100", "names no device"),
        ("1x H100, 1x A100", "second kind of device"),
        ("1x H100, 16 seqs", "'16 seqs' is neither a device nor a load"),
        ("1x H100, 32k contxt", "did you mean 'context'"),
        ("1x H100, 32k context, 8k context", "said twice"),
        ("1x H100, 32k context, 300k cached tokens", "one or the other"),
        ("1x H100, 0 sequences", "above 0"),
        (80e9, "neither a device nor a load"),
        ("", "neither a device nor a load"),
    ],
)
def test_what_fits_nothing(words, told):
    with pytest.raises(ConstraintError) as error:
        read_fits(words)
    assert told in str(error.value)
    assert 'For example "1x H100, 32k context, 16 sequences"' in str(error.value)


CHAT, LONG = Scenario(batch=2, prompt=4, new=10), Scenario(batch=3, prompt=40, new=5)
ONE = priced(table(1, CHAT, measured=True))
TWO = priced(table(1, CHAT, True), table(2, LONG, True), names=("chat", "long"))
WORDS = [("gqa-1", "swiglu-48"), ("noop", "swiglu-12")]


def _only(**constraints: float | str) -> BatchChoice:
    (case,) = choices_of(constraints, ONE)
    return case


def _own(costs: CostTable = ONE.tables["default", 2]) -> dict[str, float]:
    return costs.total(PARENT.words)


def test_a_relative_budget_of_one_is_the_parent():
    for name in ("parameters", "bytes", "latency", "throughput", "inter_token_latency",
                 "time_to_first_token"):  # fmt: skip
        assert _only(**{name: "1x"}).excess(PARENT.words) == pytest.approx(1)


def test_throughput_and_latency_are_one_constraint():
    work = CHAT.batch * CHAT.new
    for rate, time in (("10 tokens/s", f"{work / 10} s"), (10.0, work / 10), ("2x", "0.5x")):
        by_rate, by_time = _only(throughput=rate), _only(latency=time)
        assert by_rate.excess(WORDS) == pytest.approx(by_time.excess(WORDS))


def test_what_fits_is_weights_and_the_cache_of_the_tokens():
    case = _only(fits="2x L40S, 1k context, 4 sequences")
    total = ONE.tables["default", 2].total(WORDS)
    memory = total["parameters"] * 1.0 + total["kv_bytes_per_token"] * 4096
    assert case.excess(WORDS) == pytest.approx(memory / (2 * 48e9 * 0.9))
    own = _only(fits="1x L40S")  # the scenario's own tokens
    cached = total["kv_bytes_per_token"] * CHAT.cached_tokens
    assert own.excess(WORDS) == pytest.approx((total["parameters"] + cached) / (48e9 * 0.9))


def test_shares_of_time_are_mixed_by_weight_and_all_else_holds_everywhere():
    asked = {"throughput": "1.5x", "latency": "90 s", "parameters": 30, "bytes": "0.8x"}
    (case,) = choices_of(asked, TWO, chat=2.0)
    assert {one.key for one in case.constraints} == {
        "throughput", "latency in chat", "latency in long", "parameters",
        "bytes in chat", "bytes in long"}  # fmt: skip
    totals, own = case.totals(WORDS), case.totals(PARENT.words)
    chat, long = (totals[s]["seconds"] / own[s]["seconds"] for s in ("chat", "long"))
    (mixed,) = (one for one in case.constraints if one.key == "throughput")
    assert mixed.total(totals) / mixed.bound == pytest.approx(1.5 * (2 * chat + long) / 3)
    assert mixed.in_unit(mixed.bound) == pytest.approx(1.5)


def test_a_scenario_has_budgets_of_its_own():
    own = {"long": {"throughput": "2x"}}
    (case,) = choices_of({"throughput": "1.5x", "bytes": "0.8x"}, TWO, own)
    totals, parent = case.totals(WORDS), case.totals(PARENT.words)
    shares = {one.key: one.total(totals) / one.bound for one in case.constraints}
    assert set(shares) == {"throughput", "throughput in long", "bytes in chat", "bytes in long"}
    chat, long = (totals[s]["seconds"] / parent[s]["seconds"] for s in ("chat", "long"))
    assert shares["throughput"] == pytest.approx(1.5 * chat)
    assert shares["throughput in long"] == pytest.approx(2 * long)


def _swept(memory: float | str) -> Budgets:
    return Budgets({"throughput": "1.5x", "bytes": memory}, {}, {})


def test_the_parent_is_taken_at_its_best_batch_that_meets_the_memory():
    """Batches 1, 2 and 4, the same seconds each: the parent's best is the largest that fits."""
    tables = [table(3, Scenario(batch=b, prompt=4, new=10), True) for b in (1, 2, 4)]
    for number, one in enumerate(tables, 1):
        one.base["bytes"] += 100.0 * number  # type: ignore[index]
    costs = priced(*tables, batches=(1, 2, 4))
    bytes_at = [one.total(PARENT.words)["bytes"] for one in tables]
    for allowed, best in ((bytes_at[0], 1), (bytes_at[1], 2), (bytes_at[2] + 9, 4), ("1x", 4)):
        found = batch_choices(_swept(allowed), costs, PARENT.words)
        assert [case.tables["default"].scenario.batch for case in found] == [1, 2, 4]
        for case in found:
            batch = case.tables["default"].scenario.batch
            assert case.reference["default"] is tables[(1, 2, 4).index(best)]
            # Equal seconds, so a batch is worth as much as it is larger than the parent's.
            (rate,) = (one for one in case.constraints if one.name == "throughput")
            own = rate.total(case.totals(PARENT.words)) / rate.bound
            assert own == pytest.approx(1.5 * best / batch)
    with pytest.raises(ConstraintError, match="at none of the batches"):
        batch_choices(_swept(bytes_at[0] - 1), costs, PARENT.words)
    alone = Budgets({"parameters": "0.8x", "bytes": bytes_at[0] - 1}, {}, {})
    assert batch_choices(
        alone, costs, PARENT.words
    )  # a share of what no batch changes still means one


def test_scenarios_are_served_at_batches_of_their_own():
    tables = [
        table(3, scenario.model_copy(update={"batch": b}), True)
        for scenario in (CHAT, LONG)
        for b in (1, 8)
    ]
    found = choices_of({"bytes": "1x"}, priced(*tables, names=("chat", "long"), batches=(1, 8)))
    assert [str(case) for case in found] == [
        f"batches chat {a}, long {b}" for a in (1, 8) for b in (1, 8)
    ]


@pytest.mark.parametrize(
    ("constraints", "text"),
    [
        ({"latency": 1.0}, 'cost.source = "measured"'),
        ({"throughput": "1.5x"}, 'cost.source = "measured"'),
    ],
)
def test_seconds_must_be_measured(constraints, text):
    with pytest.raises(ConstraintError, match=text):
        choices_of(constraints, priced(table(1)))


def test_a_scenario_that_was_not_priced_is_named():
    with pytest.raises(ConstraintError, match="search.scenarios.chatt: .*did you mean 'chat'"):
        choices_of({"bytes": "1x"}, TWO, {"chatt": {"latency": "1 s"}})
    with pytest.raises(ConstraintError, match="Allowed: chat, long"):
        choices_of({"bytes": "1x"}, TWO, short=2.0)
