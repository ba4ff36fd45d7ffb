"""A small random BERT with a vocabulary of words, as a directory that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = "red green blue car tree apple pear house two three five nine buys sells eats has".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def saved(directory: Path, *, pooling: dict[str, Any] | None = None, longest: int = 12) -> Path:
    """Writes the encoder, and sentence-transformers' files beside it where `pooling` is given."""
    _tokenizer(directory)
    _encoder(directory)
    if pooling is not None:
        names = ("Transformer", "Pooling", "Normalize")
        kinds = [f"sentence_transformers.models.{name}" for name in names]
        folders = ("", "1_Pooling", "2_Normalize")
        modules = [
            {"idx": i, "name": str(i), "type": kind, "path": folder}
            for i, (kind, folder) in enumerate(zip(kinds, folders, strict=True))
        ]
        write(directory / "modules.json", modules)
        write(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **pooling})
        write(directory / "sentence_bert_config.json", {"max_seq_length": longest})
    return directory


def write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def _tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    # What some checkpoints carry: a filling and a cut of their own, which must not come through.
    tokenizer.enable_padding(length=32)
    tokenizer.enable_truncation(5)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=24
    )
    fast.save_pretrained(directory)


def _encoder(directory: Path) -> None:
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(SPECIAL) + len(WORDS),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=24,
            initializer_range=0.2,
        )
        BertModel(config).save_pretrained(directory)
