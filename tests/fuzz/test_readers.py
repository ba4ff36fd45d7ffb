"""Damaged and hostile files, for every reader: an answer or one of tessera's own errors, soon.

Run by `make fuzz` for long; here each reader meets a few. FUZZ is the examples for each.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessera.ask import endpoint
from tessera.model import gguf
from tessera.model.checkpoint import load_model, open_model, save_model
from tessera.model.families import read_config
from tessera.model.tensors import INDEX, find_tensors
from tessera.runs import recipe
from tessera.runs.files import Journal
from tessera.runs.run import Run, read_json, read_manifest, read_metrics, read_table, verify
from tests import tiny

SECONDS = 5.0  # that one file may take
ODD: list[Any] = [
    *(None, True, -1, 0, 1e308, float("nan"), float("inf"), 2**63, 10**30, 1e9, int(1e9)),
    *("", "\ud800", "\0", "../../x", "9" * 400, [], {}, [[]], {"a": {}}, [None] * 50),
]


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything in a JSON value."""
    if not isinstance(value, dict | list):
        return [at]
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [at, *(place for key, one in inner for place in places(one, (*at, key)))]


def put(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    copy = value.copy()
    copy[at[0]] = put(value[at[0]], at[1:], new)
    return copy


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Some bytes changed, cut out or repeated; of JSON also a value replaced by an odd one."""
    if whole[:1] == b"{" and draw(st.booleans()):
        value = json.loads(whole.split(b"\n")[0] if whole.count(b"\n{") else whole)
        for _ in range(draw(st.integers(1, 3))):
            value = put(value, draw(st.sampled_from(places(value))), draw(st.sampled_from(ODD)))
        return json.dumps(value).encode() + b"\n"
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, min(len(data), 4096)))
        cut = draw(st.integers(0, 16))
        data[start : start + cut] = draw(st.binary(max_size=16)) * draw(
            st.sampled_from((1, 1, 500))
        )
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


def a_run(home: Path, done: bool) -> Path:
    """A run; the checksums of one that is done would let no change through to a reader."""
    run = Run.open(home / "kd", stage="kd", config={}, inputs={}, seed=0, quiet=True)
    with run:
        run.write_table("t", [{"layer": 0, "kl": 0.5}])
        run.write_json("j", {"words": [["gqa-2", "noop"]]})
        run.log(1, loss=1.0)
        if done:
            run.finish()
    return run.path


def a_model(home: Path, words: Any = tiny.MOSAIC) -> Path:
    save_model(tiny.model(words), home / "m")
    return home / "m"


def a_file(name: str) -> Callable[[Path], Path]:
    def make(home: Path) -> Path:
        if name.endswith((".toml", ".reply")):
            file = home / name
            file.write_bytes(RECIPE if name.endswith(".toml") else REPLY)
            return file
        if name in ("config.json", "model.safetensors"):
            return a_model(home) / name
        if name == "stock":
            return a_model(home, tiny.PARENT) / "config.json"
        if name == INDEX:
            folder = a_model(home)
            tensors = find_tensors(folder)
            (folder / "model.safetensors").rename(folder / "a.safetensors")
            index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
            (folder / INDEX).write_text(json.dumps(index))
            return folder / INDEX
        return a_run(home, done=name == "run.json") / name

    return make


RECIPE = (Path(__file__).parents[2] / "recipes" / "quickstart.toml").read_bytes()
REPLY = (
    b'{"choices": [{"message": {"content": "4", "reasoning": "2"}, "finish_reason": "stop"}], '
    b'"usage": {"completion_tokens": 3}}'
)


def a_journal(home: Path) -> Path:
    with Journal(home / "j.jsonl") as journal:
        for number in range(3):
            journal.add(str(number), {"reply": {"text": "4"}})
    return home / "j.jsonl"


def read_journal(file: Path) -> None:
    with Journal(file) as journal:
        for key in list(journal):
            journal.get(key)
        journal.add("new", {"n": 1})


def a_gguf(home: Path) -> Path:
    from gguf import GGUFWriter

    file, config = home / "m.gguf", tiny.config(tiny.PARENT)
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(3)
    writer.add_embedding_length(16)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_feed_forward_length(24)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{n}" for n in range(config.vocab_size)])
    writer.add_token_merges([])
    for name, tensor in tiny.model(config).state_dict().items():
        if name.startswith(("embed", "norm")):
            known = {
                "embed_tokens.weight": "token_embd.weight",
                "norm.weight": "output_norm.weight",
            }
            writer.add_tensor(known[name], tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def read_gguf(file: Path) -> None:
    gguf.tensors(gguf.directory_of(file))


READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "manifest": (a_file("run.json"), lambda f: (verify(f.parent), read_manifest(f.parent))),
    "table": (a_file("tables/t.jsonl"), lambda f: read_table(f.parents[1], "t")),
    "value": (a_file("tables/j.json"), lambda f: read_json(f.parents[1], "j")),
    "metrics": (a_file("metrics.jsonl"), lambda f: read_metrics(f.parent)),
    "journal": (a_journal, read_journal),
    "recipe": (a_file("r.toml"), recipe.load),
    "config": (a_file("config.json"), lambda f: (read_config(f), open_model(f.parent))),
    "stock config": (a_file("stock"), lambda f: (read_config(f), open_model(f.parent))),
    "index": (a_file(INDEX), lambda f: open_model(f.parent)),
    "safetensors": (a_file("model.safetensors"), lambda f: load_model(f.parent)),
    "gguf": (a_gguf, read_gguf),
    "reply": (a_file("x.reply"), lambda f: endpoint._parse(f.read_bytes(), 1)),
}
EXAMPLES = int(os.environ.get("FUZZ") or "0")
tried: Counter[str] = Counter()
refused: Counter[str] = Counter()


def fuzz(name: str, home: Path, examples: int) -> None:
    make, read = READERS[name]
    file = make(home)
    whole = file.read_bytes()
    read(file)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=not EXAMPLES,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(damaged(whole))
    def meets(data: bytes) -> None:
        file.write_bytes(data)
        begun = time.monotonic()
        try:
            read(file)
        except Exception as error:
            if not type(error).__module__.startswith("tessera."):
                raise
            assert str(error)
            refused[name] += 1
        assert time.monotonic() - begun < SECONDS
        tried[name] += 1

    meets()
    print(f"{name}: {tried[name]} files, {refused[name]} refused, the others read")


@pytest.mark.parametrize("name", READERS)
def test_a_reader_says_what_is_wrong(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fuzz(name, tmp_path, 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_reader_says_what_is_wrong_for_long(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fuzz(name, tmp_path, EXAMPLES or 10_000)
