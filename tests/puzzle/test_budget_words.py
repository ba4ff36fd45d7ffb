"""Budgets in words: what they mean, and what is said of those that mean nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.devices import DEVICES
from tessera.puzzle.constraints import UNITS, ConstraintError, Fits, read_amount, read_fits
from tessera.puzzle.cost_table import Scenario


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
