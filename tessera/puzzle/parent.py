"""Stage `parent`: the model that everything begins with, imported or trained from scratch."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field, field_validator, model_validator

from tessera import dist
from tessera.data.tokenizer import load_tokenizer
from tessera.model.checkpoint import open_model, save_model
from tessera.model.config import ModelConfig, uniform
from tessera.model.source import is_hub_id, resolve
from tessera.model.tensors import FileDtype
from tessera.model.transformer import Transformer
from tessera.objectives.lm import pretrain
from tessera.runs.files import RunError
from tessera.runs.recipe import Config
from tessera.runs.run import Run
from tessera.train.optim import DocumentTrainConfig


class ArchitectureConfig(Config):
    """A homogeneous Llama to train from scratch."""

    hidden_size: int = Field(default=128, ge=2)
    num_hidden_layers: int = Field(default=6, ge=1)
    num_attention_heads: int = Field(default=4, ge=1)
    num_key_value_heads: int = Field(default=4, ge=1)
    intermediate_size: int = Field(default=384, ge=1)
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = False

    def model(self, vocab_size: int, bos: int | None, eos: tuple[int, ...]) -> ModelConfig:
        words = f"gqa-{self.num_key_value_heads}", f"swiglu-{self.intermediate_size}"
        own = {"num_hidden_layers", "num_key_value_heads", "intermediate_size", "head_dim"}
        return ModelConfig(
            vocab_size=vocab_size,
            head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
            blocks=uniform(*words, self.num_hidden_layers),
            bos_token_id=bos,
            eos_token_id=eos,
            **self.model_dump(exclude=own),
        )


class ParentConfig(Config):
    """Either `path` (Hugging Face directory, run or hub id), or `architecture` and `train`.

    dtype: of the imported files, each tensor's own unless given (float32 where it is quantized).
    """

    path: str | None = None
    dtype: FileDtype | None = None
    architecture: ArchitectureConfig | None = None
    train: DocumentTrainConfig | None = None

    @field_validator("path")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        if value is not None and not is_hub_id(value):
            open_model(value)
        return value

    @model_validator(mode="after")
    def _one_of(self) -> ParentConfig:
        scratch = self.architecture is not None and self.train is not None
        if (self.path is None) != scratch:
            raise ValueError(
                "give path (parent.path=MODEL), or both architecture and train to train one"
            )
        if self.dtype and scratch:
            raise ValueError("dtype is of an imported checkpoint; what is trained is in float32")
        return self


def stage(config: ParentConfig, run: Run, inputs: dict[str, Path | None]) -> None:
    """Stage `parent`: import a checkpoint, or train one from scratch."""
    if config.path is not None:
        source = resolve(config.path)
        dtype = config.dtype and getattr(torch, config.dtype)
        save_model(open_model(source), run.model_path, tokenizer_from=source, dtype=dtype)
        return
    assert config.architecture is not None and config.train is not None
    data = inputs["data"]
    if data is None:
        raise RunError("a parent trained from scratch needs a [data] table before [parent]")
    tokenizer = load_tokenizer(data)
    shape = config.architecture.model(tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids)
    module = Transformer(shape).init_weights(run.seed).to(dist.device())
    pretrain(
        config.train.placement.transformer(module), config.train, run, data, data / "tokenizer"
    )
