"""Rows of preference sets as people have them: the ids of both answers, or why there is no pair."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tessera.cli.main import app
from tessera.data.audit import audit
from tessera.data.preferences import encode_preferences, read_pairs
from tessera.data.readers import Bad, DataError
from tessera.model.checkpoint import save_model
from tessera.rl.preference import Pair, of_files
from tessera.runs.run import Run
from tests import tiny
from tests.cases.chat_tokenizers import made
from tests.data.test_schema import mutated
from tests.toy import toy_config


def line(case: dict[str, Any]) -> str:
    return case.get("text") or json.dumps(case["row"])


HOME = Path(__file__).parent
CASES = [json.loads(line) for line in (HOME / "preferences.jsonl").read_text("utf-8").splitlines()]
TEMPLATES = ["builtin", "chatml", "opening"]
GOOD = '{"prompt": "q", "chosen": "good", "rejected": "bad"}'


def pair_of(text: str, template: str, tmp_path: Path) -> Pair | Bad:
    (tmp_path / "pairs.jsonl").write_text(f"{GOOD}\n{text}\n", "utf-8")
    encoder = made(template).encoder()
    if template == "opening":
        encoder = made(template).encoder(switch="thinks")
    (_, (number, found)) = read_pairs(tmp_path / "pairs.jsonl", encoder)
    assert number == 2
    return found


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["why"])
def test_what_a_preference_row_becomes(case: dict[str, Any], template: str, tmp_path: Path) -> None:
    tokenizer, found = made(template), pair_of(line(case), template, tmp_path)
    wanted = case | case.get(template, {})
    if "refused" in wanted:
        assert isinstance(found, Bad), case["why"]
        assert wanted["refused"] in found.reason
        return
    assert isinstance(found, Pair), found
    thinks = {"thinks": "</think>" in wanted["chosen"]} if template == "opening" else {}
    assert found.prompt == tokenizer.asked(wanted["asked"], wanted.get("tools"), **thinks)
    assert found.chosen == tokenizer.ids(wanted["chosen"] + tokenizer.end)
    assert found.rejected == tokenizer.ids(wanted["rejected"] + tokenizer.end)
    assert found.margin == wanted["margin"]
    if not {"<", "tools"} & {*wanted["chosen"], *wanted["rejected"], *wanted} and not thinks.get(
        "thinks"
    ):
        for text, ids in ((wanted["chosen"], found.chosen), (wanted["rejected"], found.rejected)):
            answered = [*wanted["asked"], {"role": "assistant", "content": text}]
            whole = tokenizer.peer.apply_chat_template(answered, tokenize=True, return_dict=False)
            assert whole[: len(found.prompt) + len(ids)] == found.prompt + ids


def test_the_switch_of_the_system_prompt_stands_in_the_prompt(tmp_path: Path) -> None:
    system = {"role": "system", "content": "detailed thinking on"}
    row = {"messages": [system, {"role": "user", "content": "q"}]}
    row |= {"chosen": "<think>h</think>good", "rejected": "bad"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    tokenizer = made("chatml")
    encoder = tokenizer.encoder(switch="detailed thinking")
    ((_, found),) = read_pairs(tmp_path / "pairs.jsonl", encoder)
    assert isinstance(found, Pair) and found.prompt == tokenizer.asked(row["messages"])


def test_rows_that_are_no_pairs_are_counted_named_and_left_out(tmp_path: Path) -> None:
    file, told = tmp_path / "pairs.jsonl", []
    file.write_text("".join(line(case) + "\n" for case in CASES), "utf-8")
    kept = [case for case in CASES if "refused" not in case | case.get("chatml", {})]
    encoder = made("chatml").encoder()
    pairs = of_files([str(file)], encoder, told.append)
    assert len(pairs) == len(kept) and len(told) > 10
    (same,) = [one for one in told if "both answers are the same" in one]
    numbers = [n for n, case in enumerate(CASES, 1) if "answers are the same" in str(case)]
    assert same.endswith(f"[2: rows {', '.join(map(str, numbers))}]")
    report = audit(file, encoder)
    assert sum(report.rows.values()) == len(kept) and report.documents == 2 * len(kept)
    assert not report.violations and not report.clean
    assert sum(map(len, report.refused.values())) == len(CASES) - len(kept)


def test_a_file_of_something_else_is_told_at_its_first_row(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "q", "chosn": "good", "rejectd": "bad"}\n')
    with pytest.raises(DataError, match='pairs.jsonl:1 .*"chosn" is near "chosen"'):
        of_files([str(file)], made("chatml").encoder(), print)


def test_a_file_without_a_pair_stops_the_stage(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "q", "chosen": "a", "rejected": "a"}\n')
    with pytest.raises(DataError, match="pairs.jsonl:1: no pair: both answers are the same"):
        of_files([str(file)], made("chatml").encoder(), print)


def test_rows_with_something_broken_are_pairs_or_told_why() -> None:
    rng, encoder = random.Random(0), made("chatml").encoder()
    seeds = [case["row"] for case in CASES if "row" in case]
    rows = [mutated(rng, mutated(rng, rng.choice(seeds))) for _ in range(3000)]
    found = [one for _, one in encode_preferences("rows", enumerate(rows, 2), encoder)]
    bad = [one for one in found if isinstance(one, Bad)]
    assert len(found) == 3000 and 300 < len(bad) < 2900 and all(one.reason for one in bad)


def test_check_reads_the_first_pairs(tmp_path: Path) -> None:
    home = tmp_path / "parent"
    with Run.open(home, stage="parent", config={}, inputs={}, seed=0, quiet=True) as run:
        tokenizer = made("chatml").tokenizer
        save_model(tiny.model(toy_config(1, vocab_size=tokenizer.vocab_size)), run.model_path)
        tokenizer.save(run.model_path)
        run.finish()
    (tmp_path / "pairs.jsonl").write_text("".join(line(case) + "\n" for case in CASES))
    (tmp_path / "recipe.toml").write_text(
        f'[rpo]\nmodel = "{home}"\npaths = ["{tmp_path}/pairs.jsonl"]\ntrain = {{ steps = 1 }}\n'
    )
    found = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.toml"), "--json"])
    assert found.exit_code == 0, found.output
    (step,) = json.loads(found.stdout)
    assert any("both answers are the same; refused" in one for one in step["warnings"])
