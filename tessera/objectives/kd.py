"""Knowledge distillation of a child from its parent (Puzzle §2.7).

    ℓ_t = KL(p_parent ‖ p_child) + α Σ_l (1 - cos(h_child^l, h_parent^l))

The cosine runs over the residual stream leaving each layer: depth slots never change, so layer
l of the child stands where layer l of the parent stood. No LM loss by default: in the paper's
ablation it hurts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from tessera.data.batch import Batch
from tessera.model.context import Context
from tessera.model.transformer import Transformer
from tessera.model.weights import load_model, resolve, save_model
from tessera.objectives.lm import documents, heldout_loss
from tessera.run import Run, RunError, read_json
from tessera.train.engine import Stats, Trainer, one_group
from tessera.train.losses import cross_entropy, hidden_cosine, kl_divergence
from tessera.train.optim import TrainConfig


class KDConfig(BaseModel):
    """Weights of the three parts, and how to train.

    lr_from = "race": at the learning rate that the model's architecture won its race with.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: TrainConfig
    cosine: float = Field(default=1.0, ge=0)  # α, on the sum over layers
    lm: float = Field(default=0.0, ge=0)  # weight of the LM loss
    lr_from: Literal["race"] | None = None  # instead of train.lr


class KD:
    """The child learns the parent's distribution. The parent is frozen and a load of its own."""

    def __init__(self, parent: Transformer, config: KDConfig) -> None:
        self.parent, self.config = parent, config

    def losses(self, module: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Stats]]:
        assert isinstance(module, Transformer)
        with torch.no_grad():
            states = list(self.parent.hidden_states(batch.tokens, _context(batch)))
            parent = self.parent.norm(states[-1])
        weight = batch.weight
        cosine = weight.new_zeros(())
        for layer, child in enumerate(module.hidden_states(batch.tokens, _context(batch))):
            if layer and self.config.cosine:
                cosine = cosine + hidden_cosine(child, states[layer], weight)
        hidden, flat = module.norm(child).flatten(0, 1), weight.flatten()
        kl = kl_divergence(hidden, module.head, parent.flatten(0, 1), self.parent.head, flat)
        loss, stats = kl + self.config.cosine * cosine, {"kl": kl.detach()}
        if self.config.cosine:
            stats["cosine"] = cosine.detach()
        if self.config.lm:
            lm = cross_entropy(hidden, module.head, batch.labels.flatten(), flat)
            loss, stats["lm"] = loss + self.config.lm * lm, lm.detach()
        yield loss, stats

    def weight(self, batch: Batch) -> Tensor:
        return batch.weight.sum()

    def groups(self, module: nn.Module) -> Mapping[str, Sequence[nn.Parameter]]:
        return one_group(module)


def _context(batch: Batch) -> Context:
    return Context(batch.positions, batch.segments)


def raced(config: KDConfig, model: Path) -> KDConfig:
    """The config with the learning rate of the race that chose `model`, where it asks for that.

    Raises RunError where the model's lineage holds no race.
    """
    if config.lr_from is None:
        return config
    told = model / "tables" / "architecture.json"
    lr = read_json(model, "architecture").get("lr") if told.is_file() else None
    if lr is None:
        raise RunError(
            f'lr_from = "race": the architecture of {model} was chosen by no race; set train.lr, '
            'or build the child of one: [child] architecture = "race"'
        )
    return config.model_copy(update={"train": config.train.model_copy(update={"lr": lr})})


def stage(config: KDConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `kd`: distil `teacher` into `model` on `data`."""
    config = raced(config, inputs["model"])
    child = load_model(inputs["model"])
    parent = load_model(inputs["teacher"], frozen=True)
    source = documents(inputs["data"], config.train, run.seed)
    heldout = documents(inputs["data"], config.train, run.seed, "heldout").heldout_batches()

    def evaluate() -> dict[str, float]:
        return {"heldout": heldout_loss(child, heldout)}

    Trainer(child, KD(parent, config), source, config.train, run, evaluate).fit()
    save_model(child, run.model_path, tokenizer_from=resolve(inputs["model"]))
    run.inherit(inputs["model"], "architecture")
