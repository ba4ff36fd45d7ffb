"""What was taken, layer by layer: sums of its prices are those of the whole architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tessera.model.config import KINDS, parse_kind
from tessera.model.families import config_dict, config_json
from tessera.puzzle.cost_table import read_costs
from tessera.report.explain import (
    changes,
    diff,
    explain,
    headline,
    prices_of,
    render_changes,
    render_diff,
)
from tessera.report.show import describe, render
from tessera.runs.run import Run
from tests.report.test_show import CHILD, PARENT, WORDS, write_model

SCENARIO = {"batch": 2, "prompt": 4, "new": 11}


def scores(pairs: bool) -> list[dict[str, Any]]:
    """Layer l's words score l + 1 thousandths for attention, ten times that for the FFN."""
    rows = [
        {"layer": i, "kind": kind, "word": word, "kl": (i + 1) * 1e-3 * (1 if k == 0 else 10)}
        for i, words in enumerate(WORDS)
        for k, (kind, word) in enumerate(zip(KINDS, words, strict=True))
        if word != PARENT.words[i][k]
    ]
    if pairs:
        rows.append({"layer": 1, "kind": "block", "word": "noop+swiglu-48", "kl": 0.5})
    return rows


def costs() -> list[dict[str, Any]]:
    """A word costs its parameters four times in bytes, and a microsecond each a step."""
    rows = []
    for kind, words in zip(KINDS, zip(*(*WORDS, *PARENT.words), strict=True), strict=True):
        for word in sorted(set(words)):
            count = PARENT.subblock_params(kind, parse_kind(kind, word))
            rows.append(_cost(kind, word, count))
    return [*rows, _cost("base", "", 1000)]


def _cost(kind: str, word: str, count: int) -> dict[str, Any]:
    return {
        "scenario": "default",
        "batch": 2,
        "kind": kind,
        "word": word,
        "parameters": count,
        "kv_bytes_per_token": 0,
        "bytes": 4 * count,
        "prefill_seconds": 0.0,
        "decode_seconds": 1e-6 * count,
    }


@pytest.fixture(params=[False, True], ids=["apart", "pairs"])
def home(request, tmp_path: Path) -> Path:
    """A parent, its scores and costs, a search, its child, and the child distilled."""
    home = tmp_path / "nano"

    def make(name: str, inputs: dict[str, Path], write=lambda run: None) -> Path:
        with Run.open(home / name, stage=name, config={}, inputs=inputs, seed=0, quiet=True) as run:
            write(run)
            run.finish()
        return run.path

    def priced(run: Run) -> None:
        run.write_table("costs", costs())
        told = {"scenarios": {"default": SCENARIO}, "batches": [], "source": "counted"}
        told |= {"bytes_per_parameter": 4.0, "bytes_per_kv": 4.0}
        run.write_json("scenarios", {**told, "device": None})

    parent = make("parent", {}, lambda run: write_model(run.model_path, PARENT))
    score = make(
        "score", {"parent": parent}, lambda run: run.write_table("scores", scores(request.param))
    )
    cost = make("cost", {"parent": parent}, priced)
    search = make(
        "search",
        {"parent": parent, "scores": score, "costs": cost},
        lambda run: run.write_json("architecture", {"words": WORDS}),
    )
    child = make(
        "child",
        {"parent": parent, "architecture": search},
        lambda run: write_model(run.model_path, CHILD),
    )
    make(
        "kd",
        {"model": child, "teacher": parent},
        lambda run: write_model(run.model_path, CHILD),
    )
    return home


def test_what_was_taken_adds_up_to_the_difference_of_the_whole(home: Path):
    found = explain(home / "search")
    assert found is not None
    total = found["total"]
    table = read_costs(home / "cost").first
    before, after = (table.total(config.words) for config in (PARENT, CHILD))
    for column in ("bytes", "seconds"):
        saved = sum(total[f"{kind}_{column}"] for kind in KINDS)
        assert saved == pytest.approx(before[column] - after[column])
        assert found["of"][column] == pytest.approx(before[column])
    saved = sum(total[f"{kind}_parameters"] for kind in KINDS)
    assert saved == PARENT.num_params() - CHILD.num_params()
    rows = {row["layer"]: row for row in found["layers"]}
    assert list(rows) == [1, 2, 3]
    assert rows[2]["attention"] == "gqa-8 -> gqa-2" and rows[2]["ffn_kl"] == pytest.approx(0.03)
    if "pair_kl" in total:
        assert rows[1]["pair_kl"] == 0.5 and "attention_kl" not in rows[1]
    else:
        assert rows[1]["attention_kl"] == pytest.approx(0.002)
        assert total["ffn_kl"] == pytest.approx(0.02 + 0.03 + 0.04)


def test_every_run_of_a_lineage_tells_the_same(home: Path):
    told = [explain(home / name) for name in ("search", "child", "kd")]
    for one in told:
        assert one is not None and one["layers"] == told[0]["layers"]  # type: ignore[index]
    for name in ("parent", "score", "cost"):
        assert explain(home / name) is None
    found = json.loads(json.dumps(describe(home / "kd")))
    assert found["taken"]["total"] == told[0]["total"]  # type: ignore[index]
    text = render(found, CHILD)
    assert "gqa-8 -> noop" in text and "for a summed KL of" in text and "2, 4 + 11 tokens" in text
    assert "██░░░░░░" in text


def test_a_diff_of_relatives_is_priced_and_turns_around(home: Path):
    there, back = diff(home / "parent", home / "kd"), diff(home / "kd", home / "parent")
    assert there["layers"] == explain(home / "kd")["layers"]  # type: ignore[index]
    for key, value in there["total"].items():
        assert back["total"][key] == pytest.approx(-value)
    assert diff(home / "kd" / "model", home / "parent" / "model")["total"] == back["total"]
    same = diff(home / "child", home / "kd")
    assert same["layers"] == [] and "the words are the same" in render_diff(same)


def test_a_diff_of_plain_models_counts_what_can_be_counted(tmp_path: Path):
    for name, config in (("a", PARENT), ("b", CHILD)):
        (tmp_path / f"{name}.json").write_text(config_json(config_dict(config)))
    found = diff(tmp_path / "a.json", tmp_path / "b.json")
    assert [row["layer"] for row in found["layers"]] == [1, 2, 3]
    assert found["layers"][0]["attention"] == "gqa-8 -> noop"
    assert found["layers"][0]["attention_kv_bytes_per_token"] == PARENT.kv_bytes_per_token() / 4
    assert found["scenario"] is None and "ffn_kl" not in found["layers"][0]
    assert found["sizes"][0]["B - A"] == CHILD.num_params() - PARENT.num_params()
    text = render_diff(found)
    assert "swiglu-96 -> swiglu-48" in text and "of KV cache a token" in text


def test_a_word_that_has_no_price_is_left_open(home: Path):
    wide = PARENT.with_words([("gqa-8", "swiglu-192"), *PARENT.words[1:]])
    found = changes(PARENT, wide, PARENT, prices_of([home / "score", home / "cost"]))
    (row,) = found["layers"]
    assert row["ffn_kl"] is None and row["ffn_bytes"] is None and row["ffn_parameters"] < 0
    assert found["total"]["ffn_kl"] is None and "summed KL" not in headline(found)
    assert "swiglu-96 -> swiglu-192" in render_changes(found) and "taken" in headline(found)
