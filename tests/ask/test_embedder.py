"""A local encoder: a text's vector is its own, whatever stands beside it; what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tessera.ask.ask import AskError, Reply, Request
from tessera.ask.local import Embedder, EmbedderConfig
from tessera.model.source import CheckpointError
from tests import encoder

MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
CLS = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
TEXTS = [
    "red car",
    "red",
    "two three five nine red green blue car tree",
    "apple pear apple pear",
    "tree house two unheard of",
    "blue",
    "a car",
]


def teacher(directory: Path, **more: Any) -> Embedder:
    return Embedder(EmbedderConfig(kind="embedder", model=str(directory), **more))


def replies(asked: Embedder, texts: list[str]) -> list[Reply]:
    found: dict[int, Reply] = {}
    requests = [
        Request("e", [{"role": "user", "content": t}], sample=i, embed=True)
        for i, t in enumerate(texts)
    ]
    asked.ask(iter(requests), lambda request, reply: found.update({request.sample: reply}))
    return [found[index] for index in range(len(texts))]


def vectors(asked: Embedder, texts: list[str]) -> np.ndarray:
    return np.array([one.vector for one in replies(asked, texts)])


@pytest.mark.parametrize("pooling", [MEAN, CLS], ids=["mean", "cls"])
def test_a_batch_gives_what_each_text_gives_alone(tmp_path: Path, pooling: dict[str, Any]):
    directory = encoder.saved(tmp_path, pooling=pooling)
    alone = vectors(teacher(directory, batch=1), TEXTS)
    for batch in (2, 3, 64):
        np.testing.assert_allclose(
            vectors(teacher(directory, batch=batch), TEXTS), alone, atol=1e-6
        )
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("pooling", [MEAN, CLS], ids=["mean", "cls"])
def test_a_vector_is_that_of_the_plain_model(tmp_path: Path, pooling: dict[str, Any]):
    from transformers import AutoModel

    directory = encoder.saved(tmp_path, pooling=pooling)
    ids = torch.tensor([[2, 4, 7, 3]])  # [CLS] red car [SEP]
    with torch.no_grad():
        states = AutoModel.from_pretrained(directory).eval()(input_ids=ids).last_hidden_state[0]
    expected = states.mean(0) if pooling is MEAN else states[0]
    found = vectors(teacher(directory), ["red car"])[0]
    np.testing.assert_allclose(found, (expected / expected.norm()).numpy(), atol=1e-6)


def test_texts_with_more_words_in_common_are_nearer(tmp_path: Path):
    asked = teacher(encoder.saved(tmp_path))
    one, *others = vectors(
        asked,
        [
            "red car buys tree",
            "red car buys tree",
            "red car buys house",
            "red pear nine house",
            "apple eats five two",
        ],
    )
    cosines = [float(one @ other) for other in others]
    assert cosines[0] == pytest.approx(1, abs=1e-6)
    assert cosines == sorted(cosines, reverse=True)


def test_the_prefix_is_the_tables_or_the_models(tmp_path: Path):
    directory = encoder.saved(tmp_path, pooling=MEAN)
    plain = vectors(teacher(directory), ["two red car"])
    prefixed = teacher(directory, prefix="two ")
    np.testing.assert_allclose(vectors(prefixed, ["red car"]), plain, atol=1e-6)
    said = {"prompts": {"query": "two "}, "default_prompt_name": "query"}
    encoder.write(directory / "config_sentence_transformers.json", said)
    np.testing.assert_allclose(vectors(teacher(directory), ["red car"]), plain, atol=1e-6)
    np.testing.assert_allclose(
        vectors(teacher(directory, prefix=""), ["two red car"]), plain, atol=1e-6
    )


def test_a_teacher_is_known_by_all_that_its_vectors_follow_from(tmp_path: Path):
    directory = encoder.saved(tmp_path, pooling=MEAN)
    names = [teacher(directory, **more).model for more in ({}, {"pooling": "cls"}, {"prefix": "a"})]
    assert len(set(names)) == 3
    assert teacher(directory, batch=3).model == names[0]
    config = json.loads((directory / "config.json").read_text())
    encoder.write(directory / "config.json", {**config, "layer_norm_eps": 1e-3})
    assert teacher(directory).model != names[0]


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = teacher(encoder.saved(tmp_path))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(AskError, match=r"pip install 'tessera\[embed\]'"):
        vectors(asked, ["red"])


def test_an_answer_is_not_to_be_had(tmp_path: Path):
    asked = teacher(encoder.saved(tmp_path))
    request = Request("e", [{"role": "user", "content": "red"}])
    with pytest.raises(AskError, match="embedder"):
        asked.ask([request], lambda *_: None)


def test_a_text_is_cut_where_the_model_says_or_the_table(tmp_path: Path):
    directory = encoder.saved(tmp_path, pooling=MEAN, longest=12)
    text, *cut = (" ".join(encoder.WORDS[:n]) for n in (99, 10, 4))  # [CLS] and [SEP] count
    for short, most in zip(cut, ({}, {"max_tokens": 6}), strict=True):
        np.testing.assert_allclose(*vectors(teacher(directory, **most), [text, short]), atol=1e-6)
    with pytest.raises(AskError, match="30.* 24 tokens"):
        vectors(teacher(directory, max_tokens=30), ["red"])


@pytest.mark.parametrize("pooling", [MEAN, {"pooling_mode": "max"}], ids=["mean", "max"])
def test_the_tables_pooling_comes_before_the_models(tmp_path: Path, pooling: dict[str, Any]):
    own = vectors(teacher(encoder.saved(tmp_path / "cls", pooling=CLS)), TEXTS)
    other = encoder.saved(tmp_path / "other", pooling=pooling)
    assert not np.allclose(vectors(teacher(other), TEXTS), own, atol=1e-3)
    np.testing.assert_allclose(vectors(teacher(other, pooling="cls"), TEXTS), own, atol=1e-6)


def test_weights_that_are_not_whole_are_refused(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    directory = encoder.saved(tmp_path)
    file = directory / "model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, file, {"format": "pt"})
    assert vectors(teacher(directory), ["red"]).shape == (1, 32)
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(AskError, match="encoder.layer.1.output.dense.weight"):
        vectors(teacher(directory), ["red"])
    file.unlink()
    with pytest.raises(AskError, match="safetensors"):
        vectors(teacher(directory), ["red"])


def test_code_of_a_model_is_not_run(tmp_path: Path):
    directory = encoder.saved(tmp_path, pooling=MEAN)
    own = {"idx": 3, "name": "3", "type": "own.Own", "path": ""}
    (directory / "own.py").write_text("raise SystemExit('it ran')\n")
    modules = json.loads((directory / "modules.json").read_text())
    encoder.write(directory / "modules.json", [*modules, own])
    with pytest.raises(AskError, match="own"):
        vectors(teacher(directory), ["red"])


def test_what_is_no_model_is_said(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no config.json"):
        teacher(tmp_path)
    directory = encoder.saved(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    encoder.write(directory / "config.json", {**config, "model_type": "unheard-of"})
    with pytest.raises(AskError, match="unheard-of"):
        vectors(teacher(directory), ["red"])
    encoder.write(directory / "config.json", config)
    (directory / "modules.json").write_text("{")
    with pytest.raises(AskError, match=str(directory)):
        vectors(teacher(directory), ["red"])
