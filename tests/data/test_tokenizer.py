from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data.tokenizer import (
    Tokenizer,
    TokenizerError,
    byte_tokenizer,
    load_tokenizer,
    train_bpe,
)

BYTES = byte_tokenizer()
quick = settings(max_examples=200, deadline=None, database=None, derandomize=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
SAMPLES = [
    "Once upon a time",
    "",
    " two  spaces ",
    "naïve café",
    "日本語 🙂",
    "a\nb\r\n\tc",
    "1234567",
]


def stories(shared: Path) -> list[str]:
    text = (shared / "data/tinystories/train_head_2316_stories.txt").read_text()
    return [story.strip() for story in text.split("<|endoftext|>")[:300]]


@quick
@given(texts)
def test_bytes_round_trip_and_are_their_own_ids(text: str) -> None:
    ids = BYTES.encode(text)
    assert ids == [byte + 3 for byte in text.encode()]
    assert BYTES.decode(ids) == text


def test_half_a_surrogate_pair_is_refused_in_words() -> None:
    for tokenizer in (BYTES, TRAINED):
        with pytest.raises(TokenizerError, match=r"'caf.udce9' ends with half a surrogate pair"):
            tokenizer.encode("caf\udce9 au lait")


@quick
@given(texts)
def test_trained_bpe_round_trips(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text)) == text


TRAINED = train_bpe(["the cat sat on the mat", "start 6 m+3 n*3 mod 10"] * 5, 300)


@pytest.mark.parametrize("text", ["<bos>", "a<eos>b", "<pad><pad>"])
def test_the_names_of_specials_in_a_text_are_text(text: str) -> None:
    assert BYTES.encode(text) == [byte + 3 for byte in text.encode()]
    assert BYTES.decode(BYTES.encode(text)) == text
    assert set(BYTES.encode(text, special=True)) & {0, 1, 2}
    assert BYTES.encode(text) == [byte + 3 for byte in text.encode()], "asking once changes nothing"


def test_bos_comes_only_when_asked_for() -> None:
    assert BYTES.encode("a", bos=True) == [1, *BYTES.encode("a")]
    assert BYTES.encode("") == []
    assert BYTES.decode([1, 100, 2]) == "a"
    assert BYTES.decode([1, 100, 2], special=True) == "<bos>a<eos>"


@pytest.mark.parametrize(
    "name",
    [
        "minimind_6400/tokenizer.json",
        "torchtune_2k/tokenizer.json",
        "torchtune_2k/tiktoken_small.model",
        "gpt2/vocab.json",
        "llama3/tokenizer.model",
    ],
)
def test_published_vectors(shared: Path, name: str) -> None:
    file = shared / "data/tokenizers" / name
    vectors = json.loads((file.parent / "reference_vectors.json").read_text())
    tokenizer = load_tokenizer(file)
    for row in vectors["plain"]:
        assert tokenizer.encode(row["text"]) == row["ids"]
        assert tokenizer.decode(row["ids"]) == row["text"]
    for row in vectors.get("chat", []) + vectors.get("with_special", []):
        assert tokenizer.encode(row["text"], special=True) == row["ids"]
    for token, index in vectors.get("special_tokens", {}).items():
        assert tokenizer.token_id(token) == index and tokenizer.token(index) == token
    assert tokenizer.vocab_size == vectors.get("n_vocab", tokenizer.vocab_size)


@pytest.mark.parametrize("name", ["stories260k", "tinystories-char-940k"])
def test_both_files_of_a_checkpoint_give_the_same_ids(shared: Path, name: str) -> None:
    home = shared / "models" / name
    fast, pieces = load_tokenizer(home), load_tokenizer(home / "tokenizer.model")
    some = [*stories(shared), *SAMPLES, "a <s> b"]
    assert fast.encode_batch(some, bos=True) == pieces.encode_batch(some, bos=True)
    for ids in fast.encode_batch(some[:20], bos=True):
        assert fast.decode(ids) == pieces.decode(ids)
    assert (pieces.bos_id, pieces.eos_ids) == (fast.bos_id, fast.eos_ids) == (1, (2, 1))
    assert fast.pad_id == 2 and fast.vocab_size == pieces.vocab_size


def test_prompts_of_the_real_checkpoint(shared: Path) -> None:
    home = shared / "models/stories260k"
    tokenizer = load_tokenizer(home)
    for row in json.loads((home / "expected_outputs.json").read_text())["greedy"]:
        assert tokenizer.encode(row["prompt"], bos=True) == row["prompt_ids"]
        assert tokenizer.decode(row["greedy_ids"]) == row["greedy_text"]


def test_a_sentencepiece_file_alone_knows_its_specials(shared: Path, tmp_path: Path) -> None:
    home = shared / "models/stories260k"
    (tmp_path / "tokenizer.model").write_bytes((home / "tokenizer.model").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert tokenizer.decode([1, 403, 2], special=True) == "<s> Once</s>", "as transformers says"
    assert tokenizer.decode([1, 403, 999_999]) == "Once", "ids of a padded head say nothing"
    assert tokenizer.encode("<s>Once</s>", special=True) == [1, 403, 2]


def same(a: Tokenizer, b: Tokenizer) -> bool:
    return a.encode_batch(SAMPLES) == b.encode_batch(SAMPLES) and (
        (a.bos_id, a.eos_ids, a.pad_id, a.vocab_size)
        == (b.bos_id, b.eos_ids, b.pad_id, b.vocab_size)
    )


@pytest.mark.parametrize("tokenizer", [BYTES, TRAINED], ids=["byte", "bpe"])
def test_what_is_saved_is_loaded_and_stock_software_reads_it(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    assert same(load_tokenizer(tmp_path), tokenizer)
    load_tokenizer(tmp_path).save(tmp_path / "again")
    assert same(load_tokenizer(tmp_path / "again"), tokenizer)

    transformers = pytest.importorskip("transformers")
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in SAMPLES:
        assert stock(text)["input_ids"] == tokenizer.encode(text, bos=True)
        assert stock.decode(tokenizer.encode(text)) == text
    assert (stock.bos_token_id, stock.eos_token_id, stock.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize(
    "name",
    [
        "models/stories260k",
        "models/tinystories-char-940k",
        "data/tokenizers/minimind_6400",
        "data/tokenizers/gpt2",
        "data/tokenizers/torchtune_2k/tiktoken_small.model",
        "data/tokenizers/tiny_llama3_style",
    ],
)
def test_saving_a_foreign_tokenizer_keeps_its_ids(shared: Path, tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(shared / name)
    tokenizer.save(tmp_path)
    assert same(load_tokenizer(tmp_path), tokenizer)


def test_saving_keeps_a_generation_config(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7]}')
    BYTES.save(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [7]}
    assert load_tokenizer(tmp_path).eos_ids == (2, 7)


def test_a_run_directory_is_enough(tmp_path: Path) -> None:
    for inside in ("tokenizer", "model"):
        BYTES.save(tmp_path / inside / inside)
        assert same(load_tokenizer(tmp_path / inside), BYTES)


def test_truncation_in_a_file_is_ignored(tmp_path: Path) -> None:
    BYTES.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    table = json.loads(file.read_text())
    table["truncation"] = {
        "max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right",
    }  # fmt: skip
    file.write_text(json.dumps(table))
    assert len(load_tokenizer(tmp_path).encode("longer than three")) == 17


def test_training_is_the_same_in_every_process() -> None:
    code = (
        "from tessera.data.tokenizer import train_bpe; from tessera.data.problems import document;"
        "t = train_bpe((document(n, 0, i) for n in ('calc', 'sort') for i in range(300)), 400);"
        "print([t.token(i) for i in range(t.vocab_size)])"
    )
    root = Path(__file__).parents[2]
    printed = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert printed[0] == printed[1] and "'start'" in printed[0]


def test_training_stops_where_there_is_nothing_to_merge() -> None:
    assert train_bpe(["ab"], 1000).vocab_size == 260
    with pytest.raises(TokenizerError, match="bpe = 100 is below 259"):
        train_bpe(["ab"], 100)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "not a readable tokenizer.json"),
        ("tokenizer.model", b"no protobuf", "neither a SentencePiece model nor"),
        ("tokenizer.model", b"", "neither a SentencePiece model nor"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("tokenizer.model", b"aGk= 0\nnot base64 1\n", "not a list of tiktoken ranks"),
        ("vocab.json", b"{}", "no merges.txt beside it"),
        ("words.txt", b"a b", "not a tokenizer file"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as error:
        load_tokenizer(tmp_path / name)
    assert name in str(error.value)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="looked for tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="no such file or directory"):
        load_tokenizer(tmp_path / "nowhere")


def test_no_bos(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "data/tokenizers/torchtune_2k")
    assert tokenizer.bos_id is None and tokenizer.eos_ids == () and tokenizer.pad_id == 0
    assert tokenizer.encode("a", bos=True) == tokenizer.encode("a")
    with pytest.raises(TokenizerError, match="set bos = false"):
        tokenizer.beginning(True)
