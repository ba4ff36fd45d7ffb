"""A roofline is a sum over words, and grows with what it should and with nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.roofline import device_bytes, largest_batch, predict
from tessera.devices import DEVICES
from tessera.model.checkpoint import save_model
from tessera.model.config import GQA, KINDS, Linear, NoOp, SwiGLU, uniform
from tessera.puzzle import cost
from tessera.puzzle.cost import CostConfig, price
from tessera.puzzle.cost_table import CostTable, Scenario, read_costs
from tessera.puzzle.roofline import (
    Serving,
    base_seconds,
    probe_cpu,
    roofline_seconds,
    word_seconds,
)
from tessera.puzzle.search import SearchConfig, find
from tessera.puzzle.space import write_space
from tessera.runs.recipe import loads, validate
from tessera.runs.run import Run, read_json
from tests.searching import LAYERS, SPACE, scores
from tests.toy import toy_config, toy_model

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
    words = roofline_seconds(CHILD, WORDS, CHAT, serving)
    whole = predict(CHILD, "H100", dtype, CHAT, parallel)
    for column, name in enumerate(("prefill_seconds", "decode_seconds")):
        total = words["base", ""][column] + sum(
            words[kind, word][column]
            for pair in CHILD.words
            for kind, word in zip(KINDS, pair, strict=True)
        )
        assert whole[name] == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("parallel", [1, 4])
def test_the_cost_tables_totals_are_the_whole_models(parallel: int):
    settings = CostConfig(
        source="roofline", device="H100", dtype="fp8", tensor_parallel=parallel, scenario=CHAT
    )
    rows = price(LLAMA, WORDS, settings, "cost")[0]
    total = CostTable.from_rows(rows, CHAT).total(CHILD.words)
    whole = predict(CHILD, "H100", "fp8", CHAT, parallel)
    for column in ("prefill_seconds", "decode_seconds", "seconds", "throughput"):
        assert total[column] == pytest.approx(whole[column], rel=1e-9)
    on_one = predict(CHILD, "H100", "fp8", CHAT)["bytes"]  # a table counts bytes of the model
    assert total["bytes"] == pytest.approx(on_one, rel=1e-9)


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
    assert word_seconds(LLAMA, NoOp(), CHAT, Serving(DEVICES["H100"], "fp8")) == (0, 0)
    alone = Serving(replace(DEVICES["H100"], link=1.0, hop=1.0), "fp8")
    assert alone.exchange(4096, 4096) == 0 == alone.gather(4096, 4096)
    assert base_seconds(LLAMA, CHAT, alone) == base_seconds(
        LLAMA, CHAT, Serving(DEVICES["H100"], "fp8")
    )


def test_a_split_vocabulary_is_summed_at_the_embedding_and_gathered_at_the_head():
    far = Serving(replace(DEVICES["H100"], hop=1.0), "fp8", 4)
    assert base_seconds(LLAMA, CHAT, far) == pytest.approx((2, 2), rel=0.01)


def test_an_all_reduce_takes_the_faster_way_and_a_gather_has_one():
    four = Serving(replace(DEVICES["H100"], hop=1e-6, link=1e9), "fp8", 4)
    size = 2 * 8 * 4096  # bf16
    assert four.exchange(1, 8) == pytest.approx(1e-6 + 3 * 16 / 1e9)  # one hop, all peers read
    assert four.exchange(8, 4096) == pytest.approx(2e-6 + 1.5 * size / 1e9)
    assert four.gather(8, 4096) == pytest.approx(1e-6 + 3 * size / 1e9)  # nothing to sum


def test_all_reduces_on_h100s_are_near_published_ones():
    """SGLang, pull request 2904: 8 devices, two kernels of one table, microseconds."""
    eight = Serving(DEVICES["H100"], "bf16", 8)
    for size, fast, slow in ((512, 5.9, 10.1), (32768, 7.8, 11.8)):
        assert fast < 1e6 * eight.exchange(1, size // 2) < slow


def test_a_linear_subblock_needs_no_exchange():
    far = replace(DEVICES["H100"], hop=1.0)
    near, slow = (Serving(device, "fp8", 8) for device in (DEVICES["H100"], far))
    linear = [word_seconds(LLAMA, Linear(), CHAT, one) for one in (near, slow)]
    assert linear[0] == linear[1]
    assert word_seconds(LLAMA, SwiGLU(7168), CHAT, slow)[1] > 1.0


@pytest.mark.parametrize("parallel", [1, 8])
def test_seconds_grow_with_width_heads_and_batch(parallel: int):
    serving = Serving(DEVICES["H200"], "bf16", parallel)
    wide = [word_seconds(LLAMA, SwiGLU(w), CHAT, serving) for w in (1792, 7168, 14336)]
    heads = [word_seconds(LLAMA, GQA(k), CHAT, serving) for k in (8, 16, 32)]
    batches = [CHAT.model_copy(update={"batch": b}) for b in (1, 64, 512)]
    more = [
        [word_seconds(LLAMA, variant, one, serving) for one in batches]
        for variant in (GQA(8), SwiGLU(7168), Linear())
    ]
    base = [base_seconds(LLAMA, one, serving) for one in batches]
    for grown in (wide, heads, base, *more):
        for column in range(2):
            values = [pair[column] for pair in grown]
            assert values == sorted(values) and values[0] < values[-1]


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
        word_seconds(LLAMA, GQA(8), Scenario(batch=1, prompt=p, new=2), serving)[0]
        for p in (2**20, 2**21)
    )
    assert full / half == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("of_free", [False, True])
def test_the_largest_batch_fits_and_one_more_does_not(of_free: bool):
    serving = Serving(DEVICES["L40S"], "fp8")
    most = largest_batch(LLAMA, CHAT, serving, 0.9, of_free)
    assert most is not None
    kept = 0.1 * (LLAMA.num_params() if of_free else 0)  # 0.9 of the rest is 0.9 of all and this
    used = [
        device_bytes(LLAMA, CHAT.model_copy(update={"batch": most + more}), serving)
        for more in (0, 1)
    ]
    assert used[0] <= 0.9 * serving.device.memory + kept < used[1]


def test_no_batch_fits_where_weights_do_not_and_any_where_nothing_is_cached():
    serving = Serving(replace(DEVICES["L40S"], memory=1e9), "fp8")
    assert largest_batch(LLAMA, CHAT, serving) == 0
    bare = replace(LLAMA, blocks=uniform("noop", "swiglu-14336", 32))
    assert largest_batch(bare, CHAT, serving) is None


RECIPE = """
[cost]
source = "roofline"
device = "H100"
dtype = "fp8"
tensor_parallel = 4
scenario = { batch = 4, prompt = 64, new = 32 }
"""


def _priced(folder: Path, table: dict) -> Path:
    """The cost stage over a tiny parent and the space of `tests.searching`."""
    save_model(toy_model(layers=LAYERS), folder / "parent")
    with Run.open(folder / "library", stage="bld", config={}, inputs={}, seed=0) as run:
        write_space(SPACE, run)
        run.finish()
    config = validate(CostConfig, table, "cost")
    dump = config.model_dump(mode="json")
    with Run.open(folder / "cost", stage="cost", config=dump, inputs={}, seed=0, quiet=True) as run:
        cost.stage(config, run, {name: folder / name for name in ("parent", "library")})
        run.finish()
    return folder / "cost"


def _scored(folder: Path) -> Path:
    """What a score stage would have left."""
    with Run.open(folder / "score", stage="score", config={}, inputs={}, seed=0) as run:
        extra = {"lm_loss": 0.0, "agreement": 0.0, "tokens": 1}
        run.write_table("scores", [row | extra for row in scores(0)])
        write_space(SPACE, run)
        run.write_json("block_influence", [0.1] * LAYERS)
        run.finish()
    return folder / "score"


def test_a_recipe_is_priced_for_four_h100s_and_searched(tmp_path: Path):
    path = _priced(tmp_path, loads(RECIPE).stages[0].table)
    costs = read_costs(path)
    table = costs.first
    assert (costs.source, costs.device, costs.bytes_per_kv) == ("roofline", "H100", 1)
    assert read_json(path, "scenarios")["tensor_parallel"] == 4
    for words in ([("gqa-4", "swiglu-48")] * LAYERS, [("noop", "swiglu-12"), ("gqa-1", "noop")]):
        own = toy_config(layers=LAYERS).with_words(words)
        whole = predict(own, "H100", "fp8", table.scenario, 4)
        assert table.total(words)["seconds"] == pytest.approx(whole["seconds"])
    settings = SearchConfig(constraints={"latency": "0.9x"})
    inputs = {
        "parent": tmp_path / "parent", "scores": _scored(tmp_path), "costs": path,
        "library": None, "data": None,
    }  # fmt: skip
    rows, *_ = find(settings, inputs, lambda _: None)
    assert rows
    for row in rows:
        assert row["predicted"]["latency"] <= 0.9 * row["parent"]["latency"]


def test_the_machine_at_hand_is_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cost, "probe_cpu", lambda: probe_cpu(seconds=0.01))
    costs = read_costs(_priced(tmp_path, {"source": "roofline", "device": "cpu"}))
    assert (costs.source, costs.device, costs.bytes_per_parameter) == ("roofline", "cpu", 4)
    words = costs.first.words
    assert words["attention", "noop"]["seconds"] == 0 < words["attention", "gqa-4"]["seconds"]
