"""Ids are those of transformers' AutoTokenizer, for each layout that people have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessera.data.chat import ChatEncoder
from tessera.data.tokenizer import Tokenizer, TokenizerError, byte_tokenizer, load_tokenizer
from tests.cases.odd import (
    PLAIN,
    added,
    byte_level,
    odd_strings,
    sentencepiece_model,
    write,
    write_merges,
)

transformers = pytest.importorskip("transformers")
ODD = odd_strings(500)
LLAMA, QWEN = {"model_type": "llama"}, {"model_type": "qwen2"}
MERGES_ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def hugging_face(directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(directory)


def assert_equal(directory: Path, texts: list[str] = ODD) -> tuple[Tokenizer, Any]:
    """Ids with and without special tokens read, and the text of ids, equal transformers'."""
    ours, theirs = load_tokenizer(directory), hugging_face(directory)
    for special in (True, False):
        wanted = theirs(texts, add_special_tokens=False, split_special_tokens=not special)
        found = ours.encode_batch(texts, special=special)
        unequal = [t for t, a, b in zip(texts, found, wanted["input_ids"], strict=True) if a != b]
        assert not unequal, (len(unequal), unequal[:3])
    ids = wanted["input_ids"]
    assert [ours.decode(one, special=True) for one in ids] == theirs.batch_decode(ids)
    return ours, theirs


def assert_begins_alike(ours: Tokenizer, theirs: Any) -> None:
    for text in ("a", "Hello world", "12 don'T"):
        assert [*ours.encode(text, bos=True), *ours.end] == theirs(text)["input_ids"]


def merges(directory: Path, name: str | None, model_type: str = "llama", **settings: Any) -> Path:
    """vocab.json and merges.txt with added tokens, of a class."""
    write(directory, config={"model_type": model_type})
    count = write_merges(directory)
    marks = [added(t) for t in MERGES_ADDED]
    marks += [added("<tool_call>", special=False), added("<nörm>", special=False, normalized=True)]
    listed = {str(i): one for i, one in enumerate(marks, count)}
    told = {"tokenizer_class": name} if name else {}
    told |= {"added_tokens_decoder": listed, "eos_token": "<|im_end|>", **settings}
    return write(directory, tokenizer_config=told)


@pytest.mark.parametrize(
    ("name", "model_type", "settings"),
    [
        ("Qwen2Tokenizer", "qwen2", {"pad_token": "<|endoftext|>", "bos_token": None}),
        ("Qwen2TokenizerFast", "llama", {}),
        ("Qwen2Tokenizer", "qwen3", {"add_prefix_space": True}),
        (None, "qwen2", {}),
        ("GPT2Tokenizer", "llama", {}),
        ("GPT2Tokenizer", "llama", {"add_bos_token": True}),
        ("GPT2Tokenizer", "gpt2", {"add_prefix_space": True}),
        ("GPTNeoXTokenizerFast", "llama", {"add_bos_token": True, "add_eos_token": True}),
        ("CodeGenTokenizer", "llama", {}),
    ],
)
def test_vocab_and_merges_split_as_their_class_does(
    tmp_path: Path, name: str | None, model_type: str, settings: dict[str, Any]
) -> None:
    ours, theirs = assert_equal(merges(tmp_path, name, model_type, **settings))
    assert_begins_alike(ours, theirs)
    assert ours.eos_ids[0] == theirs.eos_token_id == ours.token_id("<|im_end|>")
    assert ours.encode("<|im_start|>", special=True) == [ours.token_id("<|im_start|>")]


def test_added_tokens_json_and_the_map_of_special_tokens(tmp_path: Path) -> None:
    count = write_merges(write(tmp_path, config=QWEN))
    numbered = {token: count + i for i, token in enumerate([*MERGES_ADDED, "<extra>"])}
    write(
        tmp_path,
        added_tokens=numbered,
        special_tokens_map={
            "additional_special_tokens": MERGES_ADDED[1:],
            "eos_token": "<|im_end|>",
        },
        tokenizer_config={"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>"},
    )
    ours, theirs = assert_equal(tmp_path)
    assert ours.eos_ids == (theirs.eos_token_id,) == (numbered["<|im_end|>"],)
    assert ours.begin == () and ours.own_pad_id == theirs.pad_token_id


@pytest.mark.parametrize("name", ["CLIPTokenizer", "FalconTokenizer", "LlamaTokenizer", None])
def test_a_class_whose_split_is_not_known_is_refused_by_name(
    tmp_path: Path, name: str | None
) -> None:
    with pytest.raises(TokenizerError, match=f"{name or 'llama'}.*GPT2Tokenizer.*Qwen2Tokenizer"):
        load_tokenizer(merges(tmp_path, name))


def test_merges_without_any_config_are_gpt2s(tmp_path: Path) -> None:
    write_merges(tmp_path)
    ours = load_tokenizer(tmp_path)
    write(tmp_path, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    assert ours.encode_batch(ODD[:200]) == load_tokenizer(tmp_path).encode_batch(ODD[:200])


PIECES: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "user-defined": {**PLAIN, "user_defined_symbols": ["<think>", "</think>", "▁▁"]},
    "normalised": {},
    "no prefix": {**PLAIN, "add_dummy_prefix": False},
    "no bytes": {**PLAIN, "byte_fallback": False},
    "unigram": {"model_type": "unigram"},
}
CLASSES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "alone": (LLAMA, None),
    "llama": (LLAMA, {"tokenizer_class": "LlamaTokenizer"}),
    "legacy": (LLAMA, {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
    "no prefix": (LLAMA, {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False}),
    "code": (LLAMA, {"tokenizer_class": "CodeLlamaTokenizer"}),
    "mistral": ({"model_type": "mistral"}, {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
}


def pieces(directory: Path, options: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True, parents=True)
    key = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    (directory / "tokenizer.model").write_bytes(sentencepiece_model(**key))
    return directory


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("model", PIECES)
def test_a_sentencepiece_model(tmp_path: Path, model: str, kind: str) -> None:
    config, settings = CLASSES[kind]
    write(pieces(tmp_path, PIECES[model]), config=config)
    if settings is not None:
        write(tmp_path, tokenizer_config={**settings, "add_bos_token": True})
    texts = ODD[:250]
    ours, theirs = assert_equal(tmp_path, texts)
    if settings is not None:
        assert_begins_alike(ours, theirs)


def test_added_tokens_beside_a_sentencepiece_model(tmp_path: Path) -> None:
    write(pieces(tmp_path, PLAIN), config=LLAMA)
    count = load_tokenizer(tmp_path).vocab_size
    write(
        tmp_path,
        added_tokens={"<|im_start|>": count, "<|im_end|>": count + 1},
        tokenizer_config={"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>"},
    )
    ours, theirs = assert_equal(tmp_path)
    assert ours.eos_ids == (theirs.eos_token_id,) == (count + 1,)
    assert ours.encode("<|im_start|>a<|im_end|>", special=True)[0] == count


TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_chat_with_a_sentencepiece_model(tmp_path: Path) -> None:
    write(pieces(tmp_path, PLAIN), config=LLAMA)
    count = load_tokenizer(tmp_path).vocab_size
    marks = {"<|im_start|>": count, "<|im_end|>": count + 1}
    settings = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>"}
    write(tmp_path, added_tokens=marks, tokenizer_config=settings | {"chat_template": TEMPLATE})
    ours, theirs = load_tokenizer(tmp_path), hugging_face(tmp_path)
    text = ChatEncoder.of(ours).template.render(
        [{"role": "user", "content": " two  spaces, <s> and 日本"}], add_generation_prompt=True
    )
    wanted = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text, special=True) == wanted
    assert {count, count + 1} <= set(wanted)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "LlamaTokenizer", "legacy", "CodeLlamaTokenizer"]
)
def test_a_tokenizer_json_of_sentencepiece(tmp_path: Path, name: str) -> None:
    made = load_tokenizer(pieces(tmp_path / "pieces", PLAIN))
    made.home = None
    made.save(tmp_path / "json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    if name != "tokenizer.json":
        kind = "LlamaTokenizer" if name == "legacy" else name
        settings |= {"tokenizer_class": kind, "legacy": name == "legacy"}
    write(tmp_path / "json", config=LLAMA, tokenizer_config=settings)
    assert_begins_alike(*assert_equal(tmp_path / "json"))


def whole(directory: Path, change: Callable[[dict[str, Any]], object], **settings: Any) -> Path:
    """A tokenizer.json, changed."""
    spec = json.loads(byte_level())
    change(spec)
    write(directory, config=LLAMA, tokenizer=spec)
    return write(
        directory, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    )


def around(*tokens: str) -> dict[str, Any]:
    """A post-processor; "$A" stands for the text."""
    ids = {"<bos>": 0, "<eos>": 1}
    steps = [
        {"Sequence": {"id": "A", "type_id": 0}} if t == "$A" else
        {"SpecialToken": {"id": t, "type_id": 0}} for t in tokens
    ]  # fmt: skip
    special = {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in ids.items() if t in tokens}
    pair = [*steps, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": steps, "pair": pair, "special_tokens": special}


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


@pytest.mark.parametrize(
    ("post", "settings", "begin", "end"),
    [
        (None, {"bos_token": "<bos>"}, (), ()),
        (None, {"bos_token": "<bos>", "add_bos_token": True}, (), ()),
        (around("<bos>", "$A"), {}, (0,), ()),
        (around("<bos>", "$A"), {"bos_token": "<bos>", "add_bos_token": False}, (0,), ()),
        (around("$A", "<eos>"), {"bos_token": "<bos>"}, (), (1,)),
        (around("<bos>", "$A", "<eos>"), {}, (0,), (1,)),
        (BYTES, {"bos_token": "<bos>"}, (), ()),
        ({"type": "Sequence", "processors": [BYTES, around("<bos>", "$A")]}, {}, (0,), ()),
        (around("$A"), {"bos_token": "<bos>"}, (), ()),
    ],
)
def test_what_stands_before_a_raw_text_follows_from_the_post_processor(
    tmp_path: Path, post: Any, settings: dict[str, Any], begin: Any, end: Any
) -> None:
    directory = whole(tmp_path, lambda spec: spec.update(post_processor=post), **settings)
    ours = load_tokenizer(directory)
    assert (ours.begin, ours.end) == (begin, end)
    assert_begins_alike(ours, hugging_face(directory))


@pytest.mark.parametrize("name", ["GPTNeoXTokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer"])
def test_a_tokenizer_json_of_a_class_that_is_built_anew(tmp_path: Path, name: str) -> None:
    def change(spec: dict[str, Any]) -> None:
        digits = {"type": "Digits", "individual_digits": True}
        steps = {"type": "Sequence", "pretokenizers": [digits, spec["pre_tokenizer"]]}
        spec.update(pre_tokenizer=steps, post_processor=around("<bos>", "$A"))

    directory = whole(tmp_path, change, tokenizer_class=name, bos_token="<bos>", eos_token="<eos>")
    assert_begins_alike(*assert_equal(directory))


def test_llamas_sentencepiece_begins_with_bos_unless_told_otherwise(tmp_path: Path) -> None:
    pieces(tmp_path, PLAIN)
    settings = {"tokenizer_class": "LlamaTokenizer"}
    assert load_tokenizer(write(tmp_path, tokenizer_config=settings)).begin == (1,)
    write(tmp_path, tokenizer_config=settings | {"add_bos_token": False, "add_eos_token": True})
    ours = load_tokenizer(tmp_path)
    assert (ours.begin, ours.end, ours.bos_id) == ((), (2,), 1)


def test_bos_can_be_forced_where_the_rule_says_none(tmp_path: Path) -> None:
    ours = load_tokenizer(whole(tmp_path, dict, bos_token="<bos>"))
    assert ours.beginning() == ours.beginning(False) == () and ours.beginning(True) == (0,)
    assert byte_tokenizer().beginning() == (1,) and byte_tokenizer().beginning(False) == ()


def test_names_that_are_null_are_no_names(tmp_path: Path) -> None:
    directory = whole(tmp_path, dict, bos_token=None, eos_token="<eos>", pad_token=None)
    (directory / "config.json").write_text('{"model_type": "llama", "bos_token_id": 0}')
    ours, theirs = load_tokenizer(directory), hugging_face(directory)
    assert ours.special_names() == theirs.special_tokens_map == {"eos_token": "<eos>"}
    assert ours.bos_id is theirs.bos_token_id is None


def test_both_ends_are_known_and_minus_one_is_no_token(tmp_path: Path) -> None:
    directory = whole(tmp_path, dict, eos_token="<eos>")
    config = {"eos_token_id": [7, 1, 9], "pad_token_id": -1, "bos_token_id": -1}
    ours = load_tokenizer(write(directory, config=LLAMA | config))
    assert ours.eos_ids == (1, 7, 9) and ours.own_pad_id is None and ours.bos_id is None
    ours = load_tokenizer(write(directory, generation_config={"eos_token_id": 8}))
    assert ours.eos_ids == (1, 8), "generation_config decides, as in transformers' generate"


def test_a_token_that_the_model_has_no_row_for_is_not_used(tmp_path: Path) -> None:
    names = {"bos_token": "[BOS]", "eos_token": "<eos>", "pad_token": "[PAD]"}
    directory = whole(tmp_path, dict, **names)
    ours, theirs = assert_equal(directory)
    assert (ours.bos_id, ours.own_pad_id) == (theirs.bos_token_id, theirs.pad_token_id)
    write(directory, config=LLAMA | {"vocab_size": 700, "pad_token_id": 5})
    ours = load_tokenizer(directory)
    assert (ours.bos_id, ours.eos_ids, ours.own_pad_id) == (None, (1,), 5)


def test_a_token_that_only_the_config_names_is_special(tmp_path: Path) -> None:
    def unmark(spec: dict[str, Any]) -> None:
        spec["added_tokens"] = []

    directory = whole(tmp_path, unmark, eos_token="<eos>", additional_special_tokens=["<bos>"])
    ours, _ = assert_equal(directory)
    assert set(ours.special_tokens) == {"<eos>", "<bos>"}


@pytest.mark.parametrize("kind", ["merges", "pieces", "added pieces"])
def test_a_saved_tokenizer_gives_the_same_ids_here_and_in_transformers(
    tmp_path: Path, kind: str
) -> None:
    home = tmp_path / "home"
    if kind == "merges":
        merges(home, None, "qwen2")
    else:
        write(pieces(home, PLAIN), config={"model_type": "mistral"})
    if kind == "added pieces":
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
        listed = {str(load_tokenizer(home).vocab_size): added("<|im_end|>")}
        write(home, tokenizer_config=settings | {"added_tokens_decoder": listed})
    made = load_tokenizer(home)
    made.save(tmp_path / "saved")
    ours, theirs = assert_equal(tmp_path / "saved")
    assert ours.encode_batch(ODD, special=True) == made.encode_batch(ODD, special=True)
    assert ours.begin == made.begin
    assert_begins_alike(ours, theirs)


# Real vocabularies.


@pytest.mark.parametrize("name", ["stories260k", "tinystories-char-940k"])
@pytest.mark.parametrize("files", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("kind", ["alone", "llama"])
def test_real_sentencepiece_models(
    shared: Path, tmp_path: Path, name: str, files: str, kind: str
) -> None:
    config, settings = CLASSES[kind]
    write(tmp_path, [shared / "models" / name / files], config=config)
    if settings is not None:
        write(tmp_path, tokenizer_config=settings)
    assert_equal(tmp_path)


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_gpt2s_merges(shared: Path, tmp_path: Path, name: str) -> None:
    home = shared / "data/tokenizers/gpt2"
    write(tmp_path, [home / "vocab.json", home / "merges.txt"], config=LLAMA)
    assert_equal(write(tmp_path, tokenizer_config={"tokenizer_class": name}))


def test_tiktoken_ranks_with_added_tokens(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("tiktoken", reason="transformers reads ranks with tiktoken")
    home = shared / "data/tokenizers/torchtune_2k"
    (tmp_path / "tokenizer.model").write_bytes((home / "tiktoken_small.model").read_bytes())
    listed = {"2000": added("<|begin_of_text|>"), "2003": added("<|eot_id|>")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": listed}
    write(tmp_path, config=LLAMA, tokenizer_config=settings | {"bos_token": "<|begin_of_text|>"})
    ours, theirs = assert_equal(tmp_path)
    assert_begins_alike(ours, theirs)
    assert ours.token(2001) == "<|reserved_token_2001|>"
