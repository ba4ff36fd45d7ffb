"""Documents out of files: .txt, .jsonl, .json and .parquet, all but the last packed as well.

A reader streams `Record` and `Bad`; what concerns a whole file is a DataError. Documents of a text
file are stripped of the white space around them; those of JSONL and Parquet are taken as they are.
The first bytes say whether a file is packed by gzip, bzip2, xz, zstd or lz4, and whether its JSON
is one list or lines: names promise the wrong thing too often.
"""

from __future__ import annotations

import bz2
import difflib
import functools
import glob
import gzip
import hashlib
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

from tessera.data.conversation import Chat, present

Kind = TypeVar("Kind")
Content = TypeVar("Content", bound=str | tuple[str, str] | Chat, covariant=True)
Format = Literal["auto", "text", "jsonl", "parquet", "chat", "completion"]
SUFFIXES: dict[str, Format] = {".txt": "text", ".text": "text"}
SUFFIXES |= {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
TABLE = b"PAR1"  # how a Parquet file begins
ARCHIVES = {b"PK\x03\x04": "zip", b"7z\xbc\xaf\x27\x1c": "7z"}  # by their first bytes
BLOCK = 1 << 20
EXCERPT = 200
CHATS = "chats"  # in `paths`: the rows of the run of `curate` that the stage's `chats` names


class DataError(ValueError):
    """Data that cannot be read, or settings that do not fit it; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Record(Generic[Content]):
    """One document: a text, a prompt with its completion, or a conversation.

    key: decides with which others it is held out; a text's is the text. line: its line or row.
    """

    content: Content
    key: str | None = None
    line: int = 0


@dataclass(frozen=True, slots=True)
class Bad:
    """One record that is no document."""

    file: str
    line: int
    reason: str
    excerpt: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def expand(patterns: str | Sequence[str]) -> list[Path]:
    """The files of one or several paths and globs, in the order given, each once."""
    found: dict[Path, None] = {}
    nothing = []
    for pattern in _listed(patterns):
        path = Path(pattern).expanduser()
        hits = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        files = [hit for hit in hits if hit.is_file()]
        found.update(dict.fromkeys(files))
        if not files:
            nothing.append(f'"{pattern}" ({_why_nothing(path)})')
    if nothing:
        raise DataError(f"no data files at {'; '.join(nothing)}; correct `paths`")
    return list(found)


def with_chats(paths: str | Sequence[str], run: Path | None) -> list[str]:
    """`paths` with the files of a run of `curate` for "chats". Raises DataError without a run."""
    if told := no_chats(paths, run):
        raise DataError(told[0])
    files = [str(Path(glob.escape(str(run))) / CHATS / "part-*")]
    return [one for path in _listed(paths) for one in (files if path == CHATS else [path])]


def without_chats(paths: str | Sequence[str]) -> list[str]:
    """`paths` without "chats", whose files may have yet to be made."""
    return [one for one in _listed(paths) if one != CHATS]


def no_chats(paths: str | Sequence[str], run: Any) -> list[str]:
    """What to say where "chats" is among the paths and no run is named."""
    if run is not None or CHATS not in _listed(paths):
        return []
    return ['paths = "chats" reads what a stage `curate` has made: say which, chats = "RUN"']


def _listed(paths: str | Sequence[str]) -> Sequence[str]:
    return [paths] if isinstance(paths, str) else paths


def _why_nothing(path: Path) -> str:
    if path.is_dir():
        return "a directory: name its files, for example " + str(path / "*.jsonl")
    if glob.has_magic(str(path)):
        return "the pattern matches no file"
    if not path.parent.is_dir():
        return f"there is no directory {path.parent}"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f'no such file; nearest there: "{near[0]}"' if near else "no such file"


def format_of(path: Path) -> Format:
    """The format a file's name tells."""
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in PACKED]
    if not suffixes or suffixes[-1] not in SUFFIXES:
        raise DataError(
            f"{path}: the name does not tell the format (known: {', '.join(SUFFIXES)}, and behind "
            f"all but .parquet {', '.join(PACKED)}); rename it, unpack what is packed otherwise, "
            'or set format = "text", "jsonl" or "parquet"'
        )
    return SUFFIXES[suffixes[-1]]


def content_hash(path: Path) -> str:
    """The hash of all bytes of a file, unlike the sampled one of a run's fingerprint."""
    with _opened(path, packed=False) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def read(
    path: Path, *, format: Format = "auto", field: str = "text", separator: str = "<|endoftext|>"
) -> Iterator[Record[str] | Bad]:
    """The documents of one file, and its broken records."""
    kind = format_of(path) if format == "auto" else format
    if kind == "parquet":
        return read_parquet(path, field)
    return read_jsonl(path, field) if kind == "jsonl" else read_text(path, separator)


@contextmanager
def _opened(path: Path, packed: bool = True) -> Iterator[BufferedReader]:
    """The bytes of a file, unpacked; whatever is said against it is a DataError."""
    try:
        with path.open("rb") as file:
            head = file.peek(8)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path} is UTF-16; save it as UTF-8: iconv -f UTF-16 -t UTF-8")
        tar = "tar" if {".tar", ".tgz"} & {one.lower() for one in path.suffixes} else None
        if archive := _by_magic(head, ARCHIVES) or tar:
            raise DataError(f"{path} is a {archive} archive; unpack it and name its files")
        unpack = _by_magic(head, _UNPACKERS) if packed else None
        with (unpack or _plain)(path) as file:
            yield cast(BufferedReader, file)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _by_magic(head: bytes, known: Mapping[bytes, Kind]) -> Kind | None:
    """What the first bytes of a file stand for."""
    return next((what for magic, what in known.items() if head.startswith(magic)), None)


def _plain(path: Path) -> Any:
    return path.open("rb")


def _by_arrow(codec: str, path: Path) -> Any:
    import pyarrow

    return BufferedReader(pyarrow.input_stream(str(path), compression=codec))


_UNPACKERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": functools.partial(_by_arrow, "zstd"),
    b"\x04\x22\x4d\x18": functools.partial(_by_arrow, "lz4"),
}


def read_text(path: Path, separator: str) -> Iterator[Record[str] | Bad]:
    """The stretches between separators; an empty separator makes the file one document."""
    line = 1
    for data in _stretches(path, separator.encode()):
        try:
            if text := _text(data).strip():
                yield Record(text)
        except UnicodeDecodeError as error:
            at = line + data.count(b"\n", 0, error.start)
            yield Bad(str(path), at, f"not UTF-8 ({error.reason})", _excerpt(data[error.start :]))
        line += data.count(b"\n")


def _stretches(path: Path, separator: bytes) -> Iterator[bytes]:
    buffer = bytearray()
    with _opened(path) as file:
        while block := file.read(BLOCK):
            searched = max(0, len(buffer) - len(separator) + 1)
            buffer += block
            while separator and (at := buffer.find(separator, searched)) >= 0:
                yield bytes(buffer[:at])
                del buffer[: at + len(separator)]
                searched = 0
    yield bytes(buffer)


def _text(data: bytes) -> str:
    """UTF-8 without the mark that Windows' editors put before it."""
    return data.decode().removeprefix("\ufeff")


def read_jsonl(path: Path, field: str) -> Iterator[Record[str] | Bad]:
    """The string under `field` of each line's object."""
    found = False
    for number, line, row in _json_lines(path):
        if isinstance(row, Bad):
            yield row
        elif isinstance(row, dict) and field not in row and not found:
            raise DataError(
                f'{path}:{number} has no field "{field}"; it has: {", ".join(row) or "none"}. '
                "Set `field` to the one that holds the text"
            )
        elif reason := _no_text(row, field):
            yield Bad(str(path), number, reason, _excerpt(line))
        else:
            found = True
            yield Record(row[field])


def _json_lines(
    path: Path, start: int = 0, stop: int | None = None, first: int = 1
) -> Iterator[tuple[int, bytes, Any]]:
    """(number, line, value) of each line that is not blank, or of each value of one list.

    `Bad` for a line that is no JSON.
    """
    if start == 0 and stop is None and (rows := _json_list(path)) is not None:
        for number, row in enumerate(rows, 1):
            yield number, json.dumps(row).encode(), row
        return
    with _opened(path) as file:
        if start:
            file.seek(start)
        for number, line in enumerate(file, first):
            if _stripped(line):
                try:
                    yield number, line, json.loads(_text(line))
                except (ValueError, RecursionError) as error:
                    yield number, line, Bad(str(path), number, _reason(error), _excerpt(line))
            start += len(line)
            if stop is not None and start >= stop:
                return


def is_lines(path: Path) -> bool:
    """Whether a file of rows can be cut between two lines."""
    with _opened(path, packed=False) as file:
        head = file.peek(8)
    other = head.startswith(TABLE) or _by_magic(head, _UNPACKERS)
    return not other and _json_list(path) is None


def _json_list(path: Path) -> list[Any] | None:
    """The values of a file that is one JSON list; None for lines."""
    with _opened(path) as file:
        begin = next(filter(None, map(_stripped, file)), b"")
    if not begin.startswith(b"[") and begin != b"{":
        return None
    with _opened(path) as file:
        try:
            found = json.loads(_text(file.read()))
        except (ValueError, RecursionError) as error:
            if _is_json(begin):
                return None  # each line is a list, or should be
            line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise DataError(f"{path}{line} is {_reason(error)}") from None
    if not isinstance(found, list):
        keys = ", ".join(map(str, found))
        raise DataError(f"{path} holds one object, not a list or lines of rows; it has: {keys}")
    return found


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _stripped(line: bytes) -> bytes:
    return line.removeprefix(b"\xef\xbb\xbf").strip()


def _no_text(row: Any, field: str) -> str | None:
    if not isinstance(row, dict):
        return f"a {type(row).__name__}, not an object"
    if field not in row:
        return f'no field "{field}"'
    if not isinstance(row[field], str):
        return f'"{field}" is a {type(row[field]).__name__}, not text'
    try:
        row[field].encode()
    except UnicodeEncodeError:
        return f'"{field}" holds half a surrogate pair, which is no character'
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 ({error.reason})"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
    return str(error)


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        yield parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


def read_parquet(path: Path, field: str) -> Iterator[Record[str] | Bad]:
    """The string column `field`, row group by row group."""
    with _parquet(path) as file:
        names = file.schema_arrow.names
        if field not in names:
            raise DataError(
                f'{path} has no column "{field}"; it has: {", ".join(names)}. '
                "Set `field` to the one that holds the text"
            )
        kind = str(file.schema_arrow.field(field).type)
        if kind not in ("string", "large_string"):
            raise DataError(f'{path}: column "{field}" holds {kind}, not text; choose another')
        batches = file.iter_batches(batch_size=1024, columns=[field])
        values = (value for batch in batches for value in batch.column(0).to_pylist())
        for number, value in enumerate(values, 1):
            yield Bad(str(path), number, "null", "") if value is None else Record(value)


def read_rows(
    path: Path, start: int = 0, stop: int | None = None, first: int = 1
) -> Iterator[tuple[int, Any]]:
    """The values of JSON lines, of one JSON list or of Parquet rows, numbered from 1.

    start, stop: of JSON lines, those from byte to byte, numbered from `first`. A line that is no
    JSON is `Bad`. Raises DataError for a file that cannot be read.
    """
    with _opened(path, packed=False) as file:
        table = file.peek(4).startswith(TABLE)
    if table:
        with _parquet(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024))
            yield from enumerate(map(present, itertools.chain.from_iterable(batches)), 1)
    else:
        yield from ((number, row) for number, _, row in _json_lines(path, start, stop, first))


def _excerpt(data: bytes) -> str:
    return data[:EXCERPT].decode(errors="backslashreplace").rstrip("\n")
