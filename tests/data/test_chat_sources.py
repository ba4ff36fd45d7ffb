"""Chats through the data stage: a mask stays with its ids through cache, split, packing and mix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessera.data.batch import OFF, ON
from tessera.data.chat import ChatEncoder
from tessera.data.config import DataConfig
from tessera.data.conversation import Chat
from tessera.data.dialects import read_row, write_row
from tessera.data.documents import Documents
from tessera.data.problems import problem_chat
from tessera.data.readers import DataError
from tessera.data.store import open_tokens
from tessera.data.template import LLAMA3
from tessera.data.tokenizer import load_tokenizer
from tessera.runs.recipe import RecipeError, validate
from tessera.runs.run import read_json, read_table
from tests.data.conftest import Prepare

TOKENIZER: dict[str, Any] = {"bpe": 300, "chat": True}
SIZES: dict[str, Any] = {
    "sequence_length": 160,
    "row_length": 320,
    "tokens_per_step": 1280,
    "microbatch_tokens": 640,
    "seed": 0,
}


def variants(count: int) -> list[Chat]:
    """Both variants of each question."""
    chats = [problem_chat("calc", 0, i, mode=mode) for i in range(count) for mode in ("on", "off")]
    return chats  # type: ignore[return-value]


def rows(path: Path, chats: list[Any], name: str = "rows.jsonl") -> str:
    lines = [json.dumps(write_row(c, "nemotron") if isinstance(c, Chat) else c) for c in chats]
    (path / name).write_text("\n".join(lines))
    return str(path / name)


def chats_of(run: Path, split: str, source: str = "") -> list[tuple[list[int], list[int]]]:
    """(ids, what is trained) of each document of a split."""
    home = run / "tokens" / source
    ids, offsets = open_tokens(home, split)
    trained, again = open_tokens(home, f"{split}.trained")
    assert np.array_equal(offsets, again) and trained.dtype == np.uint8
    spans = zip(offsets[:-1], offsets[1:], strict=True)
    return [(ids[a:b].tolist(), trained[a:b].tolist()) for a, b in spans]


def test_the_stage_writes_what_the_encoder_gives(prepare: Prepare, tmp_path: Path) -> None:
    chats = variants(20)
    run = prepare(paths=rows(tmp_path, chats), format="chat", tokenizer=TOKENIZER, heldout=0)
    made = ChatEncoder.of(load_tokenizer(run))
    want = [
        (one.ids, [(ON if chat.mode == "on" else OFF) * t for t in one.trained])
        for chat in chats
        for one in made.encode(read_row(write_row(chat)))
    ]
    assert chats_of(run, "train") == want
    (train, heldout) = read_table(run, "summary")
    assert train["trained"] == sum(sum(map(bool, t)) for _, t in want) and "bytes" not in train
    assert heldout["documents"] == 0
    again = prepare("again", paths=rows(tmp_path, chats), format="chat", tokenizer=TOKENIZER)
    assert len(chats_of(again, "train")) + len(chats_of(again, "heldout")) == 40


def test_the_template_goes_with_the_tokens(prepare: Prepare) -> None:
    """So that no later stage asks in other words than those that were trained."""
    run = prepare(tasks={"calc": 10}, format="chat", tokenizer=TOKENIZER)
    assert (run / "tokenizer" / "chat_template.jinja").read_text() == LLAMA3
    assert (run / "tokenizer" / "chat_template.jinja").read_text() == LLAMA3


def test_both_variants_of_a_question_are_held_out_together(
    prepare: Prepare, tmp_path: Path
) -> None:
    file = rows(tmp_path, variants(60))
    sources = {
        mode: {"paths": file, "format": "chat", "reasoning": mode, "heldout": 12}
        for mode in ("on", "off")
    }
    run = prepare(sources=sources, tokenizer=TOKENIZER)
    tokenizer = load_tokenizer(run)
    asked: dict[tuple[str, str], set[str]] = {}
    for mode in sources:
        for split in ("train", "heldout"):
            texts = [tokenizer.decode(ids) for ids, _ in chats_of(run, split, mode)]
            asked[mode, split] = {text[text.index("start") : text.index("mod")] for text in texts}
    for split, count in (("train", 48), ("heldout", 12)):
        assert asked["on", split] == asked["off", split] and len(asked["on", split]) == count
    assert read_json(run, "data")["heldout_seen_in_train"] == 0


def test_what_no_chat_is_made_of_is_quarantined_with_its_row(
    prepare: Prepare, tmp_path: Path
) -> None:
    good = variants(10)
    late = write_row(good[0], "nemotron") | {"input": [{"role": "user", "content": "<|eot_id|>"}]}
    off = write_row(good[1], "nemotron") | {"output": "<think>x</think>1"}
    file = rows(tmp_path, [*good, {"input": []}, off, late, {"input": good[0].messages[:1]}])
    with pytest.raises(DataError, match=r"3 of 24 records are broken.*\n.*rows.jsonl:21: no mess"):
        prepare(paths=file, format="chat", tokenizer=TOKENIZER, heldout=0)
    run = prepare("some", paths=file, format="chat", tokenizer=TOKENIZER, heldout=0, max_bad=0.2)
    told = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"][:35]) for row in told] == [
        (21, "no messages"),
        (22, "a thought although reasoning is off"),
        (24, "no answer to train on"),
        (23, "message 0 holds <|eot_id|>, which t"),
    ]
    assert read_json(run, "data")["quarantined"] == 4 and len(chats_of(run, "train")) == 20
    with pytest.raises(DataError, match=r"4 of 24 records are broken"):
        prepare("few", paths=file, format="chat", tokenizer=TOKENIZER, heldout=0, max_bad=0.13)


def test_a_hugging_face_dataset_gives_the_chats_of_its_files(
    prepare: Prepare, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra `datasets`")
    table = [write_row(chat, "nemotron") for chat in variants(30)]
    file = rows(tmp_path, table)
    datasets.Dataset.from_list([*table, {**table[0], "input": []}]).save_to_disk(tmp_path / "saved")
    keys = {"format": "chat", "tokenizer": TOKENIZER, "heldout": 0, "max_bad": 0.1}
    a = prepare("a", paths=file, **keys)
    b = prepare("b", dataset=str(tmp_path / "saved"), **keys)
    assert chats_of(a, "train") == chats_of(b, "train")
    assert "no messages" in (b / "quarantine.jsonl").read_text()


def test_turns_with_thoughts_become_documents_of_their_own(
    prepare: Prepare, tmp_path: Path
) -> None:
    """And are held out with their chat."""
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"One {i}?"},
                {"role": "assistant", "content": "<think>a</think>1"},
                {"role": "user", "content": "Two?"},
                {"role": "assistant", "content": "<think>b</think>2"},
            ]
        }
        for i in range(10)
    ]
    file = rows(tmp_path, talks)
    run = prepare(paths=file, format="chat", tokenizer=TOKENIZER, heldout=3)
    assert (len(chats_of(run, "train")), len(chats_of(run, "heldout"))) == (14, 6)
    last = prepare("last", paths=file, format="chat", turns="last", tokenizer=TOKENIZER, heldout=3)
    assert (len(chats_of(last, "train")), len(chats_of(last, "heldout"))) == (7, 3)


def test_batches_hold_the_mask_and_the_mode_of_each_chat(prepare: Prepare) -> None:
    run = prepare(tasks={"calc": 60}, format="chat", tokenizer=TOKENIZER)
    known = {tuple(ids[:-1]): trained[1:] for ids, trained in chats_of(run, "train")}
    seen = 0
    for batch in Documents(run, **SIZES).batches(0):
        assert batch.mode is not None
        for row in range(len(batch.tokens)):
            for segment in range(int(batch.segments[row].max()) + 1):
                here = batch.segments[row] == segment
                want = known[tuple(batch.tokens[row, here].tolist())]
                assert (batch.weight[row, here] > 0).tolist() == [bool(t) for t in want]
                assert set(batch.mode[row, here].tolist()) == {max(want)}
                seen += 1
    assert seen > 10


def test_weights_are_shares_of_the_trained_tokens(prepare: Prepare) -> None:
    """An off-row has three trained tokens and an on-row twenty: many more rows of it are taken."""
    sources = {
        mode: {"tasks": {"calc": 300}, "format": "chat", "reasoning": mode, "weight": weight}
        for mode, weight in (("on", 0.7), ("off", 0.3))
    }
    run = prepare(sources=sources, tokenizer=TOKENIZER)
    source = Documents(run, **SIZES)
    sums = {ON: 0.0, OFF: 0.0}
    for step in range(60):
        for batch in source.batches(step):
            assert batch.mode is not None
            for mode in sums:
                sums[mode] += float(batch.weight[batch.mode == mode].sum())
    assert sums[ON] / sum(sums.values()) == pytest.approx(0.7, abs=0.03)
    told = {row["source"]: row["share"] for row in source.summary(60)}
    assert told["on"] == pytest.approx(0.7, abs=0.03)


def test_chats_longer_than_a_sequence_are_left_out_whole(prepare: Prepare) -> None:
    run = prepare(tasks={"calc": 200}, format="chat", tokenizer=TOKENIZER, heldout=20)
    lengths = np.array([len(ids) - 1 for ids, _ in chats_of(run, "train")])
    cut = int(np.median(lengths))
    source = Documents(run, **(SIZES | {"sequence_length": cut}))
    (part,) = source.parts
    assert part.num_left_out == int((lengths > cut).sum()) > 0
    for batch in source.batches(0):
        ends = batch.labels[batch.weight > 0].tolist()
        assert ends.count(load_tokenizer(run).token_id("<|eot_id|>")) == len(
            {
                (row, int(s))
                for row in range(len(batch.tokens))
                for s in batch.segments[row]
                if s >= 0
            }
        )
    assert all(batch.weight.sum() > 0 for batch in source.batches(40)), "it repeats"
    with pytest.raises(DataError, match=r"no chat .* fits into sequence_length = 8; the shortest"):
        Documents(run, **(SIZES | {"sequence_length": 8}))


def test_chats_and_documents_mix(prepare: Prepare, stories: Path) -> None:
    sources = {
        "chats": {"tasks": {"calc": 60}, "format": "chat"},
        "stories": {"paths": str(stories), "heldout": 5},
    }
    source = Documents(prepare(sources=sources, tokenizer=TOKENIZER), **SIZES)
    batches = [batch for step in range(8) for batch in source.batches(step)]
    modes = {int(m) for b in batches for m in (b.mode[b.weight > 0] if b.mode is not None else [0])}
    assert modes == {0, ON, OFF}


def test_the_cache_serves_chats_and_forgets_nothing(prepare: Prepare, tmp_path: Path) -> None:
    file = rows(tmp_path, [*variants(30), {"input": []}])
    table = {"paths": file, "format": "chat", "tokenizer": TOKENIZER, "max_bad": 0.1}
    first, second = prepare("first", **table), prepare("second", **table)
    for name in ("train.npy", "train.trained.npy", "heldout.trained.npy"):
        assert (first / "tokens" / name).read_bytes() == (second / "tokens" / name).read_bytes()
    assert (first / "quarantine.jsonl").read_text() == (second / "quarantine.jsonl").read_text()
    assert "tokenised before" in (second / "log.txt").read_text()
    on = prepare("on", **table, reasoning="on")
    assert {max(trained) for _, trained in chats_of(on, "train")} == {ON}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"reasoning": "on"}, '`reasoning` is about chats; set format = "chat"'),
        ({"turns": "last"}, "`turns` is about chats"),
        ({"format": "chat", "switch": "two words"}, "'two words' names no switch"),
        ({"format": "chat", "reasoning": "yes"}, "data.reasoning"),
        ({"tokenizer": {"bpe": 300, "tokens": [""]}}, "tokens"),
    ],
)
def test_tables_that_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        validate(DataConfig, {"tasks": {"calc": 5}, **table}, "data")
    assert message in str(error.value)
