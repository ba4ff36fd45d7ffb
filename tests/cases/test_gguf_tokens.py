"""An exported GGUF's vocabulary, read by llama.cpp to the ids that transformers gives."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tessera.cli.main import app
from tessera.data.tokenizer import load_tokenizer
from tessera.export.engines import ExportError
from tessera.model.checkpoint import save_model
from tessera.model.source import resolve
from tests import tiny
from tests.cases.odd import (
    PLAIN,
    added,
    byte_level,
    odd_strings,
    sentencepiece_model,
    write,
    write_merges,
)
from tests.cases.test_tokenizers import around
from tests.export.interop import llama_cpp

gguf = pytest.importorskip("gguf", reason="needs the GGUF writer: pip install gguf")
transformers = pytest.importorskip("transformers")

from tessera.export.gguf_vocabulary import read_vocabulary  # noqa: E402
from tessera.export.write import GGUF_FILE, Report, export_model  # noqa: E402
from tessera.model.pre_tokenizers import PRE_TOKENIZERS  # noqa: E402

ODD = odd_strings(150, seed=77)
SHAPE: dict[str, Any] = {"hidden_size": 32, "head_dim": 8}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def export(directory: Path, **options: Any) -> Report:
    """The GGUF of a small model whose tokenizer lies in `directory`, into `directory`/out."""
    from tessera.data.tokenizer import load_tokenizer

    size = options.pop("rows", None) or load_tokenizer(directory).vocab_size
    config = json.loads(text.read_text()) if (text := directory / "config.json").is_file() else {}
    kept = {name.name: name.read_bytes() for name in directory.iterdir() if name.is_file()}
    for file in kept:
        (directory / file).unlink()
    save_model(tiny.model(tiny.PARENT[:1], vocab_size=size, **SHAPE), directory)
    written = json.loads((directory / "config.json").read_text())
    for file, data in kept.items():
        (directory / file).write_bytes(data)
    written |= {k: v for k, v in config.items() if k in ("eos_token_id", "pad_token_id")}
    write(directory, config=written)
    out = directory.parent / f"{directory.name}-out"
    return export_model(directory, out, "gguf", check=False, **options)


def fields(directory: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(directory.parent / f"{directory.name}-out" / GGUF_FILE)
    names = [name for name in reader.fields if name.startswith("tokenizer.")]
    return {n.removeprefix("tokenizer.ggml."): reader.fields[n].contents() for n in names}


def assert_llama_cpp_agrees(directory: Path, texts: Sequence[str] = ODD) -> None:
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    out = directory.parent / f"{directory.name}-out"
    with llama_cpp(out / GGUF_FILE, directory.parent / "log") as server:
        for add, parse in ((True, True), (False, True), (False, False)):
            asked = {"add_special": add, "parse_special": parse}
            wanted = theirs(texts, add_special_tokens=add, split_special_tokens=not parse)
            for text, ids in zip(texts, wanted["input_ids"], strict=True):
                found = server.post("/tokenize", {"content": text, **asked})["tokens"]
                assert found == ids, (text, asked)


def fast(directory: Path, spec: dict[str, Any], **settings: Any) -> Path:
    write(directory, tokenizer=spec)
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>"}
    return write(directory, tokenizer_config=told | {"eos_token": "<eos>"} | settings)


# Text splits, written as a tokenizer.json has them.

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ALONE = {"type": "Digits", "individual_digits": True}


def split(pattern: str) -> dict[str, Any]:
    how = {"behavior": "Isolated", "invert": False}
    return {"type": "Split", "pattern": {"Regex": pattern}, **how}


def pre(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def steps(name: str) -> list[dict[str, Any]]:
    """The pre-tokenizer of models that llama.cpp reads as `name`."""
    patterns = PRE_TOKENIZERS[name]
    if name in ("gpt-2", "smollm"):
        return [BYTES] if name == "gpt-2" else [ALONE, BYTES]
    if name == "falcon":
        runs = {"type": "Punctuation", "behavior": "Contiguous"}
        digits = {"type": "Digits", "individual_digits": False}
        return [runs, BYTES, digits, split(patterns[-1])]
    found = [ALONE if p == r"\p{N}" and len(patterns) > 1 else split(p) for p in patterns]
    return [*found, BYTES | {"use_regex": False}]


# llama.cpp tells cases apart in ASCII alone for two of them, and of one the pattern is abridged.
NEARLY = ("tekken", "gpt-4o", "deepseek-llm")
EVERY = [name for name in PRE_TOKENIZERS if name not in NEARLY]
OFTEN = ("gpt-2", "llama-bpe", "qwen2", "smollm", "deepseek-v3", "falcon")
WHOLE = ("llama-bpe", "tekken", "minicpm5", "youtu")


def of_split(directory: Path, name: str, whole: bool) -> Path:
    return fast(directory, json.loads(byte_level(json.dumps(pre(*steps(name))), whole=whole)))


@pytest.mark.parametrize(
    "name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in EVERY]
)
def test_a_split_that_llama_cpp_has_a_name_for(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = of_split(tmp_path / "m", name, name in WHOLE)
    export(directory)
    assert fields(directory)["pre"] == name
    assert_llama_cpp_agrees(directory)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    back = load_tokenizer(resolve(tmp_path / "m-out" / GGUF_FILE))
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    plain = [unicodedata.normalize("NFC", text) for text in ODD]  # read back, Qwen2's has NFC
    found = back.encode_batch(plain, special=True)
    assert found == theirs(plain, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_split_is_known_by_its_structure(tmp_path: Path, name: str) -> None:
    if name == "deepseek-llm":
        pytest.skip("the pattern is known by its beginning alone")
    vocabulary = read_vocabulary(of_split(tmp_path, name, name in WHOLE))
    assert vocabulary.pre == name
    assert bool(vocabulary.notes) == (name in NEARLY)


@pytest.mark.parametrize(
    "changed",
    [
        [split(PRE_TOKENIZERS["llama-bpe"][0].replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)",
               "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"))],
        [split(PRE_TOKENIZERS["llama-bpe"][0]) | {"behavior": "Removed", "invert": True}],
        [{"type": "Sequence", "pretokenizers": [split(PRE_TOKENIZERS["llama-bpe"][0])]}],
    ],
)  # fmt: skip
def test_other_spellings_of_a_split(tmp_path: Path, changed: list[dict[str, Any]]) -> None:
    spelled = json.dumps(pre(*changed, BYTES | {"use_regex": False}))
    vocabulary = read_vocabulary(fast(tmp_path, json.loads(byte_level(spelled, whole=True))))
    assert vocabulary.pre == "llama-bpe"


def test_llama_3s_split_without_its_rule_of_whole_words(tmp_path: Path) -> None:
    """A token that the merges do not make is taken whole by llama-bpe, and not by this name."""
    spec = json.loads(byte_level(json.dumps(pre(*steps("llama-bpe")))))
    spec["model"]["vocab"]["zqxj"] = len(spec["model"]["vocab"])
    export(fast(tmp_path / "m", spec))
    assert fields(tmp_path / "m")["pre"] == "smaug-bpe"
    assert_llama_cpp_agrees(tmp_path / "m", ["zqxj zqxj", *ODD[:40]])
    spec["model"]["ignore_merges"] = True
    assert read_vocabulary(fast(tmp_path / "whole", spec)).pre == "llama-bpe"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pre_tokenizer": pre(split(r"\w+|\W"), BYTES)}, r"\w+"),
        ({"pre_tokenizer": BYTES | {"add_prefix_space": True}}, "add_prefix_space"),
        ({"pre_tokenizer": pre({"type": "Whitespace"}, BYTES)}, "Whitespace"),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"normalizer": {"type": "NFKC"}}, "NFKC"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFD"}]}},
         "NFD"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "`"}, "content": "'"}},
         "Replace"),
        ({"post_processor": around("<bos>", "<eos>", "$A")}, "<bos> <eos>"),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_do_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    directory = fast(tmp_path / "m", json.loads(byte_level()) | change)
    with pytest.raises(ExportError) as error:
        export(directory)
    assert named in str(error.value) and "--engine none" in str(error.value)
    assert any(named in note for note in export(directory, engines=()).notes)


def test_marks_that_take_spaces_with_them_are_refused(tmp_path: Path) -> None:
    spec = json.loads(byte_level())
    spec["added_tokens"][1]["rstrip"] = True
    with pytest.raises(ExportError, match="spaces beside <eos>"):
        read_vocabulary(fast(tmp_path, spec))


def test_nfc_is_a_note(tmp_path: Path) -> None:
    spec = json.loads(byte_level()) | {"normalizer": {"type": "NFC"}}
    assert any("NFC" in note for note in export(fast(tmp_path / "m", spec)).notes)


# What stands around a text.


@pytest.mark.parametrize(
    ("post", "settings", "bos", "eos"),
    [
        (around("<bos>", "$A"), {}, True, False),
        (around("<bos>", "$A"), {"add_bos_token": False}, True, False),
        (around("$A", "<eos>"), {}, False, True),
        (around("<bos>", "$A", "<eos>"), {}, True, True),
        (around("$A"), {"add_bos_token": True}, False, False),
        (None, {}, False, False),
    ],
)
def test_the_rule_of_bos_and_eos_is_the_post_processors(
    tmp_path: Path, post: Any, settings: dict[str, Any], bos: bool, eos: bool
) -> None:
    spec = json.loads(byte_level()) | {"post_processor": post}
    export(fast(tmp_path / "m", spec, **settings))
    told = fields(tmp_path / "m")
    assert (told["add_bos_token"], told["add_eos_token"]) == (bos, eos)
    assert (told["bos_token_id"], told["eos_token_id"]) == (0, 1)


def test_bos_and_eos_are_put_where_transformers_puts_them(tmp_path: Path) -> None:
    spec = json.loads(byte_level()) | {"post_processor": around("<bos>", "$A", "<eos>")}
    export(fast(tmp_path / "m", spec))
    assert_llama_cpp_agrees(tmp_path / "m", ODD[:60])


def test_what_only_the_config_names_is_a_control_token(tmp_path: Path) -> None:
    spec = json.loads(byte_level())
    spec["added_tokens"] = []
    named = {"additional_special_tokens": ["<bos>", "zq"], "eos_token": "<eos>", "bos_token": None}
    export(fast(tmp_path / "m", spec, **named))
    told = fields(tmp_path / "m")
    types = dict(zip(told["tokens"], told["token_type"], strict=True))
    assert [types[t] for t in ("<bos>", "<eos>", "zq")] == [CONTROL] * 3
    assert_llama_cpp_agrees(tmp_path / "m", ["a<bos>b zq<eos>", *ODD[:40]])


def test_both_ends_are_written_and_minus_one_is_no_pad(tmp_path: Path) -> None:
    directory = fast(tmp_path / "m", json.loads(byte_level()))
    config = {"model_type": "llama", "eos_token_id": [7, 1, 9], "pad_token_id": -1}
    export(write(directory, config=config))
    told = fields(directory)
    assert [told[f"{role}_token_id"] for role in ("eos", "eot", "eom")] == [1, 7, 9]
    assert "padding_token_id" not in told


def test_a_pad_that_the_model_has_no_row_for_is_left_out(tmp_path: Path) -> None:
    directory = fast(tmp_path / "m", json.loads(byte_level()), pad_token="[PAD]")
    report = export(directory, rows=700)
    assert "padding_token_id" not in fields(directory) and len(fields(directory)["tokens"]) == 700
    assert any("[PAD]" in note for note in report.notes)


def test_rows_without_a_token_get_texts_of_their_own(tmp_path: Path) -> None:
    spec = json.loads(byte_level())
    spec["model"]["vocab"]["[PAD702]"] = 700
    export(fast(tmp_path / "m", spec), rows=704)
    told = fields(tmp_path / "m")["tokens"]
    assert len(set(told)) == 704, "llama.cpp refuses two tokens of one text"


# Other layouts.


def test_vocab_and_merges(tmp_path: Path) -> None:
    count = write_merges(write(tmp_path / "m"))
    listed = {str(count): added("<|im_start|>"), str(count + 1): added("<tool>", special=False)}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "<bos>"}
    write(tmp_path / "m", tokenizer_config=settings | {"added_tokens_decoder": listed})
    export(tmp_path / "m")
    told = fields(tmp_path / "m")
    assert told["add_bos_token"] and told["token_type"][count:] == [CONTROL, USER_DEFINED, CONTROL]
    assert told["tokens"][-1] == "<|endoftext|>", "GPT-2's own default, as in transformers"
    assert_llama_cpp_agrees(tmp_path / "m", ODD[:80])


def test_a_sentencepiece_model(tmp_path: Path) -> None:
    directory = tmp_path / "m"
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(sentencepiece_model(**PLAIN))
    settings = {"add_bos_token": True}
    export(write(directory, tokenizer_config=settings))
    assert fields(directory)["add_bos_token"] and fields(directory)["add_space_prefix"]
    assert_llama_cpp_agrees(directory)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "Precompiled"),
        ({**PLAIN, "user_defined_symbols": ("<sep>",)}, "<sep>"),
        ({"model_type": "unigram"}, "Unigram"),
    ],
)
def test_sentencepiece_models_that_llama_cpp_reads_otherwise(
    tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**options))
    with pytest.raises(ExportError, match=named):
        read_vocabulary(tmp_path)


def test_smollm_and_llama_3(shared: Path, tmp_path: Path) -> None:
    for name in ("tiny_llama3_style", "torchtune_2k"):
        home = shared / "data/tokenizers" / name
        files = [f for f in home.iterdir() if f.name.startswith(("tokenizer", "special_tokens"))]
        export(write(tmp_path / name, files))
        assert_llama_cpp_agrees(tmp_path / name)


def test_the_command_line_writes_without_an_engine(tmp_path: Path) -> None:
    change = {"normalizer": {"type": "Lowercase"}}
    directory = fast(tmp_path / "m", json.loads(byte_level()) | change)
    with pytest.raises(ExportError):
        export(directory)
    words = [str(directory), str(tmp_path / "out"), "--format", "gguf", "--engine", "none"]
    told = CliRunner().invoke(app, ["export", *words])
    assert told.exit_code == 0 and "Lowercase" in told.stdout, told.output
