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
from tessera.model.checkpoint import save_model
from tessera.model.context import Context
from tessera.model.source import resolve
from tessera.model.transformer import Transformer
from tessera.objectives.lm import Heldout, training_documents
from tessera.runs.files import RunError
from tessera.runs.plan import Step
from tessera.runs.run import Run, is_done, read_json
from tessera.train.engine import Stats, Trainer, one_group
from tessera.train.flops import Work, model_cost
from tessera.train.losses import cross_entropy, hidden_cosine, kl_divergence
from tessera.train.optim import DocumentTrainConfig


class KDConfig(BaseModel):
    """Weights of the three parts, and how to train.

    lr_from = "race": at the learning rate that the model's architecture won its race with,
    whatever train.lr says.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: DocumentTrainConfig
    cosine: float = Field(default=1.0, ge=0)  # α, on the sum over layers
    lm: float = Field(default=0.0, ge=0)  # weight of the LM loss
    lr_from: Literal["race"] | None = None  # instead of train.lr

    def notes(self, step: Step) -> list[str]:
        """Where the learning rate comes from, if not from this table."""
        model = step.inputs["model"]
        if self.lr_from is None or not isinstance(model, Path):
            return []
        try:
            lr = f"lr {raced(self, model).train.lr:g}" if is_done(model) else "lr"
        except RunError as error:
            return [str(error)]
        return [f"{lr}, from {self.lr_from}; train.lr = {self.train.lr:g} is not used"]


class KD:
    """The child learns the parent's distribution. The parent is frozen and a load of its own."""

    def __init__(self, parent: Transformer, config: KDConfig) -> None:
        self.parent, self.config = parent, config

    def losses(self, module: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Stats]]:
        assert isinstance(module, Transformer)
        with torch.no_grad():
            parent, theirs = self.parent(batch.tokens, _context(batch), output_hidden_states=True)
        hidden, ours = module(batch.tokens, _context(batch), output_hidden_states=True)
        weight = batch.weight
        cosine = weight.new_zeros(())
        if self.config.cosine:
            for state, target in zip(ours[1:], theirs[1:], strict=True):
                cosine = cosine + hidden_cosine(state, target, weight)
        del ours, theirs
        hidden, flat = hidden.flatten(0, 1), weight.flatten()
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

    def flops(self, module: nn.Module, batch: Batch) -> int:
        assert isinstance(module, Transformer)
        work = Work.of(batch, module.config.sliding_window)
        parent = model_cost(self.parent.config).forward(work)
        return parent + model_cost(module.config).training(work)


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
    own, config = config.train.lr, raced(config, inputs["model"])
    if config.lr_from:
        run.say(f"lr {config.train.lr:g}, from {config.lr_from}; train.lr = {own:g} is not used")
    child = config.train.spread.load(inputs["model"])
    parent = config.train.spread.load(inputs["teacher"], frozen=True)
    source = training_documents(inputs["data"], config.train, run)
    heldout = Heldout(child, inputs["data"], config.train, run.seed)
    Trainer(child, KD(parent, config), source, config.train, run, heldout).fit()
    save_model(child, run.model_path, tokenizer_from=resolve(inputs["model"]))
    run.inherit(inputs["model"], "architecture")
