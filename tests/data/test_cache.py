"""The cache of what was read and tokenised: exact, whole after a crash, shared, bounded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessera.data import encode
from tessera.data.readers import DataError
from tessera.data.store import GIB, TokenCache, open_tokens
from tessera.data.tokenizer import byte_tokenizer, train_bpe
from tessera.runs.files import RunError
from tests.data.conftest import kill_stage
from tests.data.test_prepare import decoded, written

TOKENS = ("tokens/train.npy", "tokens/train.offsets.npy", "tokens/heldout.npy")


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The units that are read and tokenised, not taken from the cache."""
    done: dict[str, list[str]] = {"hashed": [], "tokenised": []}
    read = encode._read

    def reading(unit: Any, limit: Any, encoder: Any, *rest: Any) -> None:
        done["tokenised" if encoder else "hashed"].append(Path(unit.label).name)
        read(unit, limit, encoder, *rest)

    monkeypatch.setattr(encode, "_read", reading)
    return done


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    names = [str(tmp_path / f"{letter}.txt") for letter in "abc"]
    for name in names:
        letter = Path(name).stem
        texts = [f"{letter}{i} " * (i + 1) for i in range(20)]
        Path(name).write_text("<|endoftext|>".join(texts))
    return names


def fill(path: Path) -> None:
    (path / "x").write_bytes(b"1" * 1000)


def test_only_what_is_new_is_tokenised(
    prepare: Any, work: dict[str, list[str]], files: list[str]
) -> None:
    prepare("first", paths=files[:2], tokenizer="byte")
    assert work == {"hashed": [], "tokenised": ["a.txt", "b.txt"]}
    prepare("one-more", paths=files, tokenizer="byte", heldout=7, seed=4)
    mix = {"x": {"paths": files[2:], "weight": 3.0}, "y": {"paths": files[:2]}}
    prepare("mixed", sources=mix, tokenizer="byte", max_bad=0.5)
    assert work == {"hashed": [], "tokenised": ["a.txt", "b.txt", "c.txt"]}
    prepare("other-end", paths=files[:1], tokenizer="byte", end="bos")
    prepare("other-tokenizer", paths=files[:1], tokenizer={"bpe": 270})
    assert work["hashed"] == ["a.txt"] and work["tokenised"][3:] == ["a.txt", "a.txt"]
    prepare("same-tokenizer", paths=files[:1], tokenizer={"bpe": 270}, seed=1)
    assert work["hashed"] == ["a.txt"] and work["tokenised"][5:] == []
    prepare("other-separator", paths=files[:1], tokenizer="byte", separator="0")
    prepare("first-ten", paths=files[:1], tokenizer="byte", limit=10)
    assert work["hashed"] == ["a.txt"] and work["tokenised"][5:] == ["a.txt", "a.txt"]


def test_a_hit_and_a_miss_give_the_same_bytes(prepare: Any, files: list[str]) -> None:
    """Also under another name, in another order of tables, from a file copied elsewhere."""
    cold = prepare("cold", paths=files, tokenizer="byte", heldout=5)
    warm = prepare("warm", paths=files, tokenizer="byte", heldout=5, max_bad=0.02)
    own = {"directory": str(cold / "nothing"), "gib": 1.0}
    again = prepare("again", paths=files, tokenizer="byte", heldout=5, cache=own)
    for name in TOKENS:
        assert (cold / name).read_bytes() == (warm / name).read_bytes()
        assert (cold / name).read_bytes() == (again / name).read_bytes()


def test_a_change_in_the_middle_is_seen(
    prepare: Any, work: dict[str, list[str]], files: list[str]
) -> None:
    """Name, size and time are the same; only the content tells."""
    file = Path(files[0])
    stamp = file.stat()
    prepare("before", paths=files[:1], tokenizer="byte", heldout=0)
    file.write_text(file.read_text().replace("a7 ", "A7 "))
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = prepare("after", paths=files[:1], tokenizer="byte", heldout=0)
    assert decoded(after, "train") == written(file) and work["tokenised"] == ["a.txt"] * 2
    file.rename(file.with_name("d.txt"))
    prepare("moved", paths=str(file.with_name("d.txt")), tokenizer="byte")
    assert work["tokenised"] == ["a.txt"] * 2, "a name is no content"


def test_broken_records_are_told_under_the_name_of_today(
    prepare: Any, work: dict[str, list[str]], tmp_path: Path
) -> None:
    lines = ['{"text": "fine"}'] * 9 + ["{"]
    (tmp_path / "old.jsonl").write_text("\n".join(lines))
    table: dict[str, Any] = {"tokenizer": "byte", "heldout": 0}
    with pytest.raises(DataError, match=r"old\.jsonl:10: not JSON"):
        prepare("old", paths=str(tmp_path / "old.jsonl"), **table)
    (tmp_path / "old.jsonl").rename(tmp_path / "new.jsonl")
    with pytest.raises(DataError, match=r"new\.jsonl:10: not JSON"):
        prepare("new", paths=str(tmp_path / "new.jsonl"), **table)
    assert work["tokenised"] == ["old.jsonl"]


def test_a_file_that_grows_meanwhile_is_refused(
    prepare: Any, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = encode._read

    def reading(unit: Any, *rest: Any) -> None:
        read(unit, *rest)
        with Path(unit.label).open("a") as file:
            file.write("<|endoftext|>more")

    monkeypatch.setattr(encode, "_read", reading)
    with pytest.raises(DataError, match=r"a\.txt changed while it was read; run the recipe again"):
        prepare(paths=files[:1], tokenizer="byte")


def test_an_entry_is_whole_or_absent(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        fill(path)
        raise DataError("no")

    with TokenCache(tmp_path, 1.0) as cache:
        with pytest.raises(DataError, match="no"):
            cache.entry("a", half)
        assert [p for p in tmp_path.iterdir() if p.name != ".lock"] == []
        assert (cache.entry("a", fill) / "x").stat().st_size == 1000
        assert cache.entry("a", half) == cache.entry("a", half), "not built again"
        assert (cache.hits, cache.misses) == (2, 2)


def test_what_a_killed_process_left_is_tidied_away(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tessera.data.store import TokenCache\n"
        "def build(path):\n"
        "    (path / 'x').write_bytes(b'1'); print('ready', flush=True); time.sleep(60)\n"
        f"with TokenCache(Path({str(tmp_path)!r}), 1.0) as cache: cache.entry('a', build)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    process.stdout.readline()
    with TokenCache(tmp_path, 1.0) as cache:
        cache.entry("b", fill)
    assert len(list(tmp_path.glob(".building-*"))) == 1, "its owner lives, and is left alone"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with TokenCache(tmp_path, 1.0) as cache:
        assert (cache.entry("a", fill) / "x").stat().st_size == 1000
    assert not list(tmp_path.glob(".building-*"))


def test_two_processes_build_the_same_entry(tmp_path: Path) -> None:
    """The second to finish finds the first one's and drops its own."""
    with TokenCache(tmp_path, 1.0) as one, TokenCache(tmp_path, 1.0) as other:

        def slower(path: Path) -> None:
            fill(path)
            faster = other.entry("a", fill)
            os.utime(faster, (1, 1))

        assert one.entry("a", slower).stat().st_mtime == 1
    assert len(list(tmp_path.iterdir())) == 2, "the entry and the lock"


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    with TokenCache(tmp_path, 1.0) as cache:
        paths = [cache.entry(name, fill) for name in "abcd"]
        for age, path in enumerate(paths):
            os.utime(path, (100 - age, 100 - age))
        cache.entry("d", fill)  # used now
    with TokenCache(tmp_path, 2500 / GIB) as cache:
        cache.entry("a", fill)
    assert [path.is_dir() for path in paths] == [True, False, False, True]
    with TokenCache(tmp_path, 0.0), TokenCache(tmp_path, 0.0):
        pass
    assert not any(path.is_dir() for path in paths), "0 GiB keep nothing"


def test_nothing_is_deleted_under_another_reader(tmp_path: Path) -> None:
    with TokenCache(tmp_path, 1.0) as reader:
        path = reader.entry("a", fill)
        with TokenCache(tmp_path, 0.0):
            pass
        assert path.is_dir()


def test_a_recipes_cache_is_beside_all_recipes(
    prepare: Any, files: list[str], tmp_path: Path
) -> None:
    prepare("alone", paths=files[:1], tokenizer="byte")
    assert (tmp_path / "runs/.tokens").is_dir()
    own = tmp_path / "elsewhere"
    prepare("own", paths=files[:1], tokenizer="byte", cache={"directory": str(own)})
    assert any(own.iterdir())


def test_a_cache_that_cannot_be_written_is_named(prepare: Any, files: list[str]) -> None:
    with pytest.raises(RunError, match=r"could not write .*a\.txt"):
        prepare(paths=files[:1], tokenizer="byte", cache={"directory": files[0]})


def test_tokenizers_are_told_apart_by_what_they_do(shared: Path) -> None:
    from tessera.data.tokenizer import load_tokenizer

    trained = train_bpe(["the cat sat on the mat"] * 5, 270)
    pieces = load_tokenizer(shared / "models/stories260k/tokenizer.model")
    prints = [byte_tokenizer().fingerprint(), trained.fingerprint(), pieces.fingerprint()]
    assert len(set(prints)) == 3
    assert trained.fingerprint() == train_bpe(["the cat sat on the mat"] * 5, 270).fingerprint()
    trained.encode("the <s>", special=True)
    assert trained.fingerprint() == prints[1], "asking for something changes nothing"


def test_killed_while_tokenising_and_started_again(
    prepare: Any, tmp_path: Path, files: list[str]
) -> None:
    big = tmp_path / "big.txt"
    big.write_text("<|endoftext|>".join(f"story {i} " * (5 + i % 100) for i in range(1500)))
    table: dict[str, Any] = {"paths": [*files, str(big)], "tokenizer": "byte"}
    where = tmp_path / "cache"
    kill_stage(tmp_path / "runs/killed", {**table, "cache": {"directory": str(where)}}, (0.1, 0.4))
    whole = prepare("whole", **table)
    ours = prepare("again", **table, cache={"directory": str(where)})
    for name in TOKENS:
        assert (ours / name).read_bytes() == (whole / name).read_bytes()
    ids, offsets = open_tokens(ours / "tokens", "train")
    assert len(ids) == offsets[-1] and np.diff(offsets).min() > 1
    assert not list(where.glob(".building-*"))
