"""Next-token prediction on documents: a parent from scratch, or continued pretraining.

    ℓ_t = -log π(y_t | tokens up to t),   w_t = 1 on every token of a document

Stage `parent` imports a checkpoint or trains a small one; stage `cpt` continues any model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from tessera import dist
from tessera.data.batch import Batch
from tessera.data.documents import Documents
from tessera.data.tokenizer import load_tokenizer
from tessera.model.checkpoint import find_tensors, load_model, save_model
from tessera.model.config import ModelConfig, uniform
from tessera.model.context import Context
from tessera.model.source import is_hub_id, load_config, resolve
from tessera.model.transformer import Transformer
from tessera.runs.files import RunError
from tessera.runs.run import Run
from tessera.train.engine import Stats, Trainer, one_group
from tessera.train.flops import Work, model_cost
from tessera.train.losses import cross_entropy
from tessera.train.optim import DocumentTrainConfig, TrainConfig
from tessera.train.parallel import gathered


class LM:
    """Cross-entropy of the next token."""

    def losses(self, module: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Stats]]:
        assert isinstance(module, Transformer)
        hidden = module(batch.tokens, Context(batch.positions, batch.segments))
        flat = hidden.flatten(0, 1), module.head, batch.labels.flatten(), batch.weight.flatten()
        yield cross_entropy(*flat), {}

    def weight(self, batch: Batch) -> Tensor:
        return batch.weight.sum()

    def groups(self, module: nn.Module) -> Mapping[str, Sequence[nn.Parameter]]:
        return one_group(module)

    def flops(self, module: nn.Module, batch: Batch) -> int:
        assert isinstance(module, Transformer)
        work = Work.of(batch, module.config.sliding_window)
        return model_cost(module.config).training(work)


def documents(
    data: Path, config: TrainConfig, seed: int, split: str = "train", *, alike: bool = False
) -> Documents:
    """The prepared documents of a data run, cut to a stage's training settings.

    alike: every process reads all rows, for what each has to know whole; otherwise its share.
    """
    layout = config.spread.layout
    return Documents(
        data,
        split=split,
        sequence_length=config.sequence_length,
        row_length=config.microbatch_tokens,
        tokens_per_step=config.tokens_per_step,
        microbatch_tokens=config.microbatch_tokens,
        seed=seed,
        shard=(0, 1) if alike else (layout.data_rank, layout.data_world),
    )


def training_documents(data: Path, config: TrainConfig, run: Run) -> Documents:
    """The documents a stage trains on; of several sources, their shares go to tables/mix.jsonl."""
    source = documents(data, config, run.seed)
    if len(source.parts) > 1:
        run.write_table("mix", source.summary(config.steps))
    return source


class Heldout:
    """The mean loss on held-out documents, over the rows of all processes, in nats a token."""

    def __init__(self, module: Transformer, data: Path, config: TrainConfig, seed: int) -> None:
        self.module, self.layout = module, config.spread.layout
        source = documents(data, config, seed, "heldout")
        self.batches = {p.name: source.heldout_batches(source=p.name) for p in source.parts}

    def __call__(self) -> dict[str, float]:
        """`heldout`, and `heldout/NAME` of each source where there are several."""
        sums = {name: loss_sums(self.module, batches) for name, batches in self.batches.items()}
        total = torch.stack(list(sums.values()))
        loss, weight = self.layout.sum(total).unbind(1)
        found = {"heldout": float(loss.sum() / weight.sum())}
        if len(sums) > 1:
            found |= {f"heldout/{k}": float(v) for k, v in zip(sums, loss / weight, strict=True)}
        return found


@torch.no_grad()
def loss_sums(module: Transformer, batches: Sequence[Batch]) -> Tensor:
    """(Σ w·(-log π(y_t)), Σ w) over the batches, float64."""
    objective, sums = LM(), torch.zeros(2, dtype=torch.float64, device=module.device)
    with gathered(module):
        for batch in (batch.to(module.device) for batch in batches):
            for loss, _ in objective.losses(module, batch):
                sums[0] += loss.double()
            sums[1] += objective.weight(batch).double()
    return sums


class ArchitectureConfig(BaseModel):
    """A homogeneous Llama to train from scratch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
        """The ModelConfig of this shape for a tokenizer's vocabulary."""
        words = f"gqa-{self.num_key_value_heads}", f"swiglu-{self.intermediate_size}"
        return ModelConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
            blocks=uniform(*words, self.num_hidden_layers),
            max_position_embeddings=self.max_position_embeddings,
            rope_theta=self.rope_theta,
            tie_word_embeddings=self.tie_word_embeddings,
            bos_token_id=bos,
            eos_token_id=eos,
        )


class ParentConfig(BaseModel):
    """Either `path` (Hugging Face directory, run or hub id), or `architecture` and `train`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = None
    architecture: ArchitectureConfig | None = None
    train: DocumentTrainConfig | None = None

    @field_validator("path")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        """What can be known before anything runs: config and weights' headers, unless far away."""
        if value is not None and not is_hub_id(value):
            load_config(value)
            find_tensors(resolve(value))
        return value

    @model_validator(mode="after")
    def _one_of(self) -> ParentConfig:
        scratch = self.architecture is not None and self.train is not None
        if (self.path is None) != scratch:
            raise ValueError(
                'a parent is imported with `path = "…"` (on the command line: '
                "parent.path=MODEL), or trained with both `architecture` and `train`"
            )
        return self


class CPTConfig(BaseModel):
    """Continued pretraining: the LM loss on more documents."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: DocumentTrainConfig


def stage(config: ParentConfig, run: Run, inputs: dict[str, Path | None]) -> None:
    """Stage `parent`: import a checkpoint, or train one from scratch."""
    if config.path is not None:
        if dist.is_main():
            save_model(load_model(config.path), run.model_path, tokenizer_from=resolve(config.path))
        return
    assert config.architecture is not None and config.train is not None
    data = inputs["data"]
    if data is None:
        raise RunError("a parent trained from scratch needs a [data] table before [parent]")
    tokenizer = load_tokenizer(data)
    shape = config.architecture.model(tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids)
    module = Transformer(shape).init_weights(run.seed).to(dist.device())
    _train(config.train.spread.transformer(module), config.train, run, data, data / "tokenizer")


def cpt(config: CPTConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `cpt`: continue `model` on `data`."""
    model = inputs["model"]
    module = config.train.spread.load(model)
    _train(module, config.train, run, inputs["data"], resolve(model))


def _train(module: Transformer, config: TrainConfig, run: Run, data: Path, tokenizer: Path) -> None:
    source = training_documents(data, config, run)
    heldout = Heldout(module, data, config, run.seed)
    Trainer(module, LM(), source, config, run, heldout).fit()
    save_model(module, run.model_path, tokenizer_from=tokenizer)
