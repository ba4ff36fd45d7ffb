from __future__ import annotations

import json
from pathlib import Path

import pytest

from tessera.model.config import ModelConfig, uniform
from tessera.model.families import config_dict, config_json
from tessera.model.source import ancestors, model_config
from tessera.report.show import (
    dependency_map,
    describe,
    mosaic,
    render,
    render_samples,
    samples,
)
from tessera.runs.files import RunError
from tessera.runs.run import Run
from tessera.table import VIEWS, Column, cell, count, render_table, seconds

PARENT = ModelConfig(
    vocab_size=100,
    hidden_size=64,
    num_attention_heads=8,
    head_dim=8,
    blocks=uniform("gqa-8", "swiglu-96", 4),
)
WORDS = [["gqa-8", "swiglu-96"], ["noop", "swiglu-48"], ["gqa-2", "noop"], ["linear", "linear"]]
CHILD = PARENT.with_words(WORDS)


def write_model(directory: Path, config: ModelConfig) -> None:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(config_json(config_dict(config)))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A parent imported from a checkpoint, a search and the child it chose."""
    home = tmp_path / "runs" / "nano"
    write_model(tmp_path / "checkpoint", PARENT)

    def make(name: str, inputs: dict[str, Path], config: ModelConfig | None = None) -> Path:
        with Run.open(home / name, stage=name, config={}, inputs=inputs, seed=0, quiet=True) as run:
            if config:
                write_model(run.model_path, config)
            else:
                run.write_json("architecture", {"words": WORDS})
                run.write_table("costs", [{"word": "gqa-8", "seconds": 0.25}] * 20)
            run.finish()
        return run.path

    parent = make("parent", {"path": tmp_path / "checkpoint"}, PARENT)
    search = make("search", {"parent": parent})
    make("child", {"parent": parent, "architecture": search}, CHILD)
    return home


def test_mosaic_has_a_bar_for_each_word():
    assert mosaic(CHILD).splitlines() == [
        "layer  attention            ffn",
        "    0  gqa-8      ████████  swiglu-96  ████████████████████████",
        "    1  noop       ·         swiglu-48  ████████████",
        "    2  gqa-2      ██        noop       ·",
        "    3  linear     ─         linear     ─",
    ]


def test_the_mosaic_shades_what_was_taken_from_the_parent():
    assert mosaic(CHILD, PARENT).splitlines() == [
        "layer  attention            ffn",
        "    0  gqa-8      ████████  swiglu-96  ████████████████████████",
        "    1  noop       ░░░░░░░░  swiglu-48  ████████████░░░░░░░░░░░░",
        "    2  gqa-2      ██░░░░░░  noop       ░░░░░░░░░░░░░░░░░░░░░░░░",
        "    3  linear     ─░░░░░░░  linear     ─░░░░░░░░░░░░░░░░░░░░░░░",
    ]
    assert mosaic(PARENT, PARENT) == mosaic(PARENT)


def test_dependency_is_shaded_by_powers_of_two(runs: Path):
    matrix = [[0.0, 2.0**-10, 2.0**-9, 0.03], [0, 0, 2.0**-5, 0.13], [0, 0, 0, 1.5], [0] * 4]
    lines = dependency_map(matrix).splitlines()
    assert "· below 2^-9, ░ from 2^-9, ▒ from 2^-7, ▓ from 2^-5, █ from 2^-3" in lines[0]
    assert lines[1:] == ["layer  0", "    0   ·░▒", "    1    ▓█", "    2     █", "    3"]
    fused = {"parent": runs / "parent"}
    with Run.open(runs / "fuse", stage="fuse", config={}, inputs=fused, seed=0, quiet=True) as run:
        write_model(run.model_path, CHILD)
        run.write_json("dependency", matrix)
        run.finish()
    found = describe(runs / "fuse")
    assert found["dependency"] == matrix and lines[2] in render(found, CHILD)


def test_any_place_that_holds_an_architecture_gives_the_same(runs: Path):
    for place in ("child", "child/model", "child/model/config.json", "search"):
        assert model_config(runs / place).words == CHILD.words


def test_lineage_goes_back_to_the_checkpoint(runs: Path):
    rows = list(ancestors(runs / "child").values())
    assert [Path(row["name"]).name for row in rows] == ["checkpoint", "parent", "search", "child"]
    assert rows[-1]["inputs"] == {"parent": "parent", "architecture": "search"}


def test_describe_is_json_and_render_says_it(runs: Path):
    found = json.loads(json.dumps(describe(runs / "search")))
    assert found["status"] == "done" and len(found["tables"]["costs"]) == 20
    assert found["model"]["num_params"] == CHILD.num_params()
    assert found["model"]["words"] == WORDS
    text = render(found, model_config(runs / "search"))
    assert f"{CHILD.num_params():,} parameters" in text
    assert "8 more rows" in text and "search" in text and mosaic(CHILD, PARENT) in text


def test_describe_of_a_recipe_lists_its_runs(runs: Path):
    found = describe(runs)
    assert [row["name"] for row in found["runs"]] == ["parent", "search", "child"]
    assert "child" in render(found, None)
    above = describe(runs.parent)
    assert [row["name"] for row in above["runs"]] == ["nano/parent", "nano/search", "nano/child"]


def test_what_no_process_works_on_is_stopped(runs: Path):
    def said() -> tuple[str, str, str]:
        found, home = describe(runs / "kd"), describe(runs)
        return found["status"], render(found, None), render(home, None)

    with Run.open(runs / "kd", stage="kd", config={}, inputs={}, seed=0, quiet=True) as run:
        status, one, listed = said()
        assert status == "running" and "stopped" not in one + listed
        run.close()  # as the kernel does for a process that is killed
        status, one, listed = said()
    assert status == "stopped" and "given again, goes on" in one
    assert "kd      kd      stopped  -" in listed and listed.endswith("goes on")


def test_what_is_not_ours_is_refused(tmp_path: Path):
    (tmp_path / "kd").mkdir()
    with pytest.raises(RunError, match="did you mean 'kd'"):
        describe(tmp_path / "kdd")
    with pytest.raises(RunError, match="is no run, no model directory"):
        describe(tmp_path / "kd")


def test_answers_are_shown_with_what_was_found_of_them(tmp_path: Path):
    answer = {"task": "gsm8k", "item": "7", "mode": "none", "sample": 0, "turn": 0}
    answer |= {"messages": [{"role": "user", "content": "1+1?"}], "prompt": "<user>1+1?"}
    answer |= {"thought": "easy", "text": "It is 3.", "tokens": 5, "finish_reason": "stop"}
    cut = answer | {"key": "b", "item": "8", "prompt": None, "thought": None, "text": "It"}
    lines = [{"key": "a", **answer}, cut | {"finish_reason": "length"}]
    said = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "records.jsonl").write_text(said + '{"key": "half of a li')
    outcome = {"verdict": "wrong", "score": 0.0, "reason": "3, not 2"}
    verdict = {"key": "a-0f-1e", "outcomes": {"accuracy": outcome}}
    (tmp_path / "verdicts.jsonl").write_text(json.dumps(verdict) + "\n")
    for path in (tmp_path, tmp_path / "records.jsonl"):
        assert render_samples(samples(path)) == (
            "gsm8k 7, sample 0: accuracy wrong (3, not 2), 5 tokens\n"
            "> <user>1+1?\n<think>easy</think>It is 3.\n\n"
            "gsm8k 8, sample 0: not judged yet, 5 tokens, cut at max_tokens\n> 1+1?\nIt"
        )
    (tmp_path / "records.jsonl").unlink()
    with pytest.raises(RunError, match="eval and profile"):
        samples(tmp_path)


def test_table_aligns_numbers_right_and_words_left():
    rows = [{"word": "gqa-8", "n": 1234567}, {"word": "noop", "n": None, "kl": 0.012345}]
    assert render_table(rows).splitlines() == [
        "word           n       kl",
        "-----  ---------  -------",
        "gqa-8  1,234,567        -",
        "noop           -  0.01235",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.6, "12,346"), (0.5, "0.5"), (True, "yes"), (["a", 1], "a 1"), (1e-9, "1e-09")],
)
def test_cells(value, text: str):
    assert cell(value) == text


def test_a_view_picks_orders_and_names_columns_and_a_narrow_page_drops_the_last():
    rows = [{"kl": 0.5, "model": "parent", "speedup": None}, {"kl": 0, "model": "kd", "n": 1}]
    view = (
        Column("model", ("model",), cell),
        Column("speedup", ("speed-", "up"), cell),
        Column("absent", ("absent",), cell),
        Column("kl", ("KL", "(nats)"), lambda kl: f"{kl:.3f}"),
    )
    assert render_table(rows, view=view).splitlines() == [
        "        speed-      KL",
        "model       up  (nats)  n",
        "------  ------  ------  -",
        "parent       -   0.500  -",
        "kd           -   0.000  1",
    ]
    narrow = render_table(rows, 1, view, width=15).splitlines()
    assert narrow[-2:] == [
        "parent       -",
        "... and KL (nats), 1 more row (--json prints all)",
    ]


def test_the_comparison_fits_a_terminal_of_100_columns():
    row = {
        "model": "child-uniform-125",
        "heldout_loss": 1.4861,
        "kl": 0.3609,
        "agreement": 0.6584,
        "parameters": 1_903_104,
        "kv_bytes_per_token": 1280.0,
        "prefill_tokens_per_second": 122740.0,
        "decode_tokens_per_second": 12194.0,
        "speedup": 1.2512,
        "promised": 1.2501,
    }
    lines = render_table([row], view=VIEWS["compare"]).splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert lines[-1].split()[:6] == [
        *("child-uniform-125", "1.486", "65.8%", "1.25x", "1.25x", "1,903,104")
    ]


def test_counts_and_times_are_short():
    assert [count(n) for n in (260_032, 8_030_261_248)] == ["260,032", "8.03 B"]
    assert [seconds(s) for s in (1.234e-5, 0.0456, 7.89)] == ["12.3 µs", "45.6 ms", "7.89 s"]
