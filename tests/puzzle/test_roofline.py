"""A roofline is a sum over words, and grows with what it should and with nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tessera.model.config import GQA, KINDS, Linear, NoOp, SwiGLU, uniform
from tessera.puzzle.cost import CostConfig, cost_rows
from tessera.puzzle.cost_table import CostTable, Scenario
from tessera.puzzle.devices import DEVICES, DeviceError, find_device
from tessera.puzzle.roofline import (
    Serving,
    base_seconds,
    device_bytes,
    largest_batch,
    predict,
    seconds_of,
    word_seconds,
)
from tests.toy import toy_config

LLAMA = toy_config(
    vocab_size=128_256,
    hidden_size=4096,
    num_attention_heads=32,
    head_dim=128,
    blocks=uniform("gqa-8", "swiglu-14336", 32),
)
CHILD = LLAMA.with_words(
    [("gqa-8", "swiglu-14336"), ("noop", "swiglu-7168"), ("linear", "noop"), ("gqa-2", "linear")]
    * 8
)
CHAT = Scenario(batch=8, prompt=512, new=256)
WORDS = sorted({(k, w) for pair in CHILD.words for k, w in zip(KINDS, pair, strict=True)})


@pytest.mark.parametrize("parallel", [1, 4, 16])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_whole_model_is_its_words_and_the_base(dtype: str, parallel: int):
    serving = Serving(DEVICES["H100"], dtype, parallel)
    words = seconds_of(CHILD, WORDS, CHAT, serving)
    whole = predict(CHILD, "H100", dtype, CHAT, parallel)
    for column, name in enumerate(("prefill_seconds", "decode_seconds")):
        total = words["base", ""][column] + sum(
            words[kind, word][column]
            for pair in CHILD.words
            for kind, word in zip(KINDS, pair, strict=True)
        )
        assert whole[name] == pytest.approx(total, rel=1e-12)


def test_the_cost_tables_totals_are_the_whole_models():
    settings = CostConfig(source="roofline", device="H100", dtype="fp8", scenario=CHAT)
    rows = cost_rows(LLAMA, WORDS, settings, "cost")
    total = CostTable.from_rows(rows, CHAT).total(CHILD.words)
    whole = predict(CHILD, "H100", "fp8", CHAT)
    for column in ("prefill_seconds", "decode_seconds", "seconds", "throughput", "bytes"):
        assert total[column] == pytest.approx(whole[column], rel=1e-9)


def test_bytes_are_counted_and_split():
    serving = Serving(DEVICES["H100"], "fp8")
    cached = CHAT.cached_tokens * CHILD.kv_bytes_per_token(1)
    assert device_bytes(CHILD, CHAT, serving) == CHILD.num_params() + cached
    on_four = device_bytes(LLAMA, CHAT, Serving(DEVICES["H100"], "fp8", 4))
    assert 4 * on_four == pytest.approx(device_bytes(LLAMA, CHAT, serving))


def test_kv_heads_are_copied_where_there_are_fewer_than_devices():
    eight, sixteen = (
        device_bytes(LLAMA, CHAT, Serving(DEVICES["H100"], "fp8", n)) - LLAMA.num_params() / n
        for n in (8, 16)
    )
    assert eight == pytest.approx(sixteen)


def test_what_is_absent_costs_nothing_and_one_device_exchanges_nothing():
    assert word_seconds(LLAMA, "attention", NoOp(), CHAT, Serving(DEVICES["H100"], "fp8")) == (0, 0)
    assert Serving(DEVICES["H100"], "fp8").exchange(4096, 4096) == 0
    four = Serving(DEVICES["H100"], "fp8", 4)
    assert 0 < four.exchange(1, 4096) < four.exchange(4096, 4096)


def test_a_linear_subblock_needs_no_exchange():
    far = replace(DEVICES["H100"], hop=1.0)
    near, slow = (Serving(device, "fp8", 8) for device in (DEVICES["H100"], far))
    linear = [word_seconds(LLAMA, "ffn", Linear(), CHAT, one) for one in (near, slow)]
    assert linear[0] == linear[1]
    assert word_seconds(LLAMA, "ffn", SwiGLU(7168), CHAT, slow)[1] > 1.0


@pytest.mark.parametrize("parallel", [1, 8])
def test_seconds_grow_with_width_heads_and_batch(parallel: int):
    serving = Serving(DEVICES["H200"], "bf16", parallel)
    wide = [word_seconds(LLAMA, "ffn", SwiGLU(w), CHAT, serving) for w in (1792, 7168, 14336)]
    heads = [word_seconds(LLAMA, "attention", GQA(k), CHAT, serving) for k in (8, 16, 32)]
    more = [
        base_seconds(LLAMA, CHAT.model_copy(update={"batch": b}), serving) for b in (1, 64, 512)
    ]
    for grown in (wide, heads, more):
        for column in range(2):
            values = [pair[column] for pair in grown]
            assert values == sorted(values)


def test_one_users_decoding_reads_the_weights_at_the_bandwidth():
    one = Scenario(batch=1, prompt=1, new=2)
    config = replace(LLAMA, blocks=uniform("noop", "swiglu-14336", 32))
    device = replace(DEVICES["H100"], kernel=0.0)
    read = 32 * 3 * 4096 * 14336 + 4096 * 128_256  # products, and the head
    found = predict(config, device, "fp8", one)["decode_seconds"]
    assert found == pytest.approx(read / device.rate(), rel=0.01)


def test_prefill_of_attention_is_quadratic_in_the_prompt():
    serving = Serving(replace(DEVICES["H100"], kernel=0.0), "bf16")
    half, full = (
        word_seconds(LLAMA, "attention", GQA(8), Scenario(batch=1, prompt=p, new=2), serving)[0]
        for p in (2**20, 2**21)
    )
    assert full / half == pytest.approx(4, rel=0.05)


def test_the_largest_batch_fits_and_one_more_does_not():
    serving = Serving(DEVICES["L40S"], "fp8")
    most = largest_batch(LLAMA, CHAT, serving)
    room = 0.9 * serving.device.memory
    used = [
        device_bytes(LLAMA, CHAT.model_copy(update={"batch": most + more}), serving)
        for more in (0, 1)
    ]
    assert used[0] <= room < used[1]


def test_names_are_plain_and_what_is_unknown_is_told():
    assert find_device("rtx4090") is find_device("RTX 4090")
    with pytest.raises(DeviceError, match="unknown device 'H10'; did you mean 'H100'"):
        find_device("H10")
    with pytest.raises(DeviceError, match="A100 has no 'fp8'"):
        Serving(DEVICES["A100"], "fp8")
