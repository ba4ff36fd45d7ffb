from __future__ import annotations

import bz2
import functools
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tessera.data import readers
from tessera.data.readers import Bad, DataError, Record, expand, read


def texts(path: Path, **options: str) -> list[str]:
    return [r.content for r in read(path, **options) if isinstance(r, Record)]  # type: ignore[arg-type]


def bad(path: Path, **options: str) -> list[str]:
    return [str(r) for r in read(path, **options) if isinstance(r, Bad)]  # type: ignore[arg-type]


DOCUMENTS = ["one\ntwo", "three", "naïve 🙂"]


def test_the_same_documents_from_every_format(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("\ufeff" + "\n<|endoftext|>\n".join(DOCUMENTS) + "\n<|endoftext|>\n")
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps({"id": 1, "text": d}) for d in DOCUMENTS) + "\n\n")
    table = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": DOCUMENTS, "id": [1, 2, 3]}), table)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    windows = tmp_path / "windows.jsonl"
    windows.write_bytes(b"\xef\xbb\xbf" + lines.read_bytes().replace(b"\n", b"\r\n"))
    odd = tmp_path / "odd.data"
    odd.write_bytes(lines.read_bytes())
    for path in (text, lines, table, packed, windows):
        assert texts(path) == DOCUMENTS
    assert texts(odd, format="jsonl") == DOCUMENTS
    with pytest.raises(DataError, match='set format = "text"'):
        texts(odd)


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_separators_are_found_wherever_blocks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(readers, "BLOCK", block)
    file = tmp_path / "a.txt"
    file.write_text("ab<sep>cd<sep><sep> <sepe<sep>\nlast")
    assert texts(file, separator="<sep>") == ["ab", "cd", "<sepe", "last"]
    assert texts(file, separator="") == ["ab<sep>cd<sep><sep> <sepe<sep>\nlast"]


def test_bad_utf8_is_located(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"good\nlines\n<|endoftext|>\nfine\nbad \xff here<|endoftext|>after")
    assert texts(file) == ["good\nlines", "after"]
    assert bad(file) == [f"{file}:5: not UTF-8 (invalid start byte)"]


def test_broken_json_lines_are_located(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        b'{"text": "a"}\n{"text": "b"\n[1]\n{"text": 3}\n{"other": 1}\n'
        b'{"text": "\xff"}\n{"text": "c"}\n{"text": "e\\ud83d"}\n{"text": "d'
    )
    assert texts(file) == ["a", "c"]
    assert bad(file) == [
        f"{file}:2: not JSON (Expecting ',' delimiter at column 1)",
        f"{file}:3: a list, not an object",
        f'{file}:4: "text" is a int, not text',
        f'{file}:5: no field "text"',
        f"{file}:6: not UTF-8 (invalid start byte)",
        f'{file}:8: "text" holds half a surrogate pair, which is no character',
        f"{file}:9: not JSON (Unterminated string starting at column 10)",
    ]


def test_rows_of_a_file_from_windows(tmp_path: Path) -> None:
    for name, rows in (
        ("a.jsonl", b'{"a": 1}\r\n{"a": 2}\r\n'),
        ("a.json", b'[{"a": 1}, {"a": 2}]'),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + rows)
        assert list(readers.read_rows(tmp_path / name)) == [(1, {"a": 1}), (2, {"a": 2})]


def _by_arrow(codec: str, data: bytes) -> bytes:
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, codec) as stream:
        stream.write(data)
    return buffer.getvalue().to_pybytes()


ROWS = [{"text": f"{n} é"} for n in range(500)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    **{".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress},
    **{f".{one[:3]}": functools.partial(_by_arrow, one) for one in ("zstd", "lz4")},
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files_are_known_by_their_first_bytes(tmp_path: Path, suffix: str) -> None:
    pack, listed = PACKERS[suffix], json.dumps(ROWS, indent=1).encode()
    files = {
        f"a.jsonl{suffix}": pack(LINES),
        f"b.jsonl{suffix}": pack(LINES[:900]) + pack(LINES[900:]),  # as `cat` joins two
        f"c.jsonl{suffix}": LINES,
        "d.jsonl": pack(LINES),
        f"e.json{suffix}": pack(listed),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert texts(tmp_path / name) == [row["text"] for row in ROWS], name
        assert [row for _, row in readers.read_rows(tmp_path / name)] == ROWS, name
        assert readers.is_lines(tmp_path / name) is (data == LINES)
    (tmp_path / f"cut.jsonl{suffix}").write_bytes(pack(LINES)[:-40])
    with pytest.raises(DataError, match="cannot read .*cut.jsonl"):
        texts(tmp_path / f"cut.jsonl{suffix}")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_list_is_a_list_and_lines_are_lines_whatever_the_name(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    mark, windows = b"\xef\xbb\xbf", LINES.replace(b"\n", b"\r\n\r\n")
    for data in (json.dumps(ROWS).encode(), json.dumps(ROWS, indent=2).encode(), LINES, windows):
        for whole in (data, mark + data, mark + b"\r\n" + data):
            file.write_bytes(whole)
            assert texts(file) == [row["text"] for row in ROWS]
            assert [row for _, row in readers.read_rows(file)] == ROWS
    file.write_bytes(b"[1]\n[2]\n")
    assert [row for _, row in readers.read_rows(file)] == [[1], [2]]
    (tmp_path / "rows.tar.gz").write_bytes(gzip.compress(LINES))
    with pytest.raises(DataError, match="is a tar archive; unpack it"):
        list(readers.read_rows(tmp_path / "rows.tar.gz"))
    file.write_bytes(b"[]")
    assert list(readers.read_rows(file)) == []
    for data, says in (
        (json.dumps(ROWS, indent=1).encode()[:-2], ":1501 is not JSON"),
        (json.dumps({"version": 1, "data": ROWS}, indent=1).encode(), "it has: version, data"),
        (LINES.decode().encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"PK\x03\x04", "is a zip archive; unpack it"),
    ):
        file.write_bytes(data)
        with pytest.raises(DataError, match=says):
            list(readers.read_rows(file))


def test_a_missing_field_names_those_there_are(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"story": "a", "id": 1}\n')
    with pytest.raises(DataError, match=r'no field "text"; it has: story, id\. Set `field`'):
        texts(lines)
    assert texts(lines, field="story") == ["a"]
    table = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"story": ["a", None], "id": [1, 2]}), table)
    with pytest.raises(DataError, match='no column "text"; it has: story, id'):
        texts(table)
    with pytest.raises(DataError, match='"id" holds int64, not text'):
        texts(table, field="id")
    assert texts(table, field="story") == ["a"] and bad(table, field="story") == [
        f"{table}:2: null"
    ]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(b"long enough to be cut" * 50)[:-12])
    with pytest.raises(DataError, match="cannot read .*a.txt.gz"):
        texts(packed)
    table = tmp_path / "a.parquet"
    table.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="a.parquet is not a readable Parquet file"):
        texts(table)


def test_globs_are_sorted_and_each_file_comes_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.jsonl"):
        (tmp_path / name).write_text("x")
    found = expand([str(tmp_path / "c.jsonl"), str(tmp_path / "*.txt"), str(tmp_path / "a.txt")])
    assert [path.name for path in found] == ["c.jsonl", "a.txt", "b.txt"]


def test_paths_that_match_nothing_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("x")
    wanted = [str(tmp_path / n) for n in ("trian.txt", "*.parquet", "none/a.txt", "train.txt")]
    with pytest.raises(DataError) as error:
        expand([*wanted, str(tmp_path)])
    for part in ('nearest there: "train.txt"', "matches no file", "no directory", "a directory:"):
        assert part in str(error.value)
    assert f'"{wanted[3]}"' not in str(error.value)
