"""Knowledge distillation of a child from its parent (Puzzle §2.7).

    ℓ_t = KL(p_parent ‖ p_child) + α Σ_l (1 - cos(h_child^l, h_parent^l))

The cosine runs over the residual stream leaving each layer. No LM loss by default: in the paper's
ablation it hurts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tessera.data.batch import Batch
from tessera.model.checkpoint import save_model
from tessera.model.source import load_config, resolve
from tessera.model.transformer import Transformer
from tessera.objectives.lm import LM, Heldout, training_documents
from tessera.runs.files import RunError
from tessera.runs.plan import Step
from tessera.runs.recipe import Config
from tessera.runs.run import Run, is_done, read_json
from tessera.train.engine import Objective, Passed, Stats, Trainer, context_of
from tessera.train.losses import cross_entropy, hidden_cosine, kl_divergence
from tessera.train.optim import DocumentTrainConfig, TrainConfig


class KDConfig(Config):
    """cosine: α, on the sum over layers. lm: weight of the LM loss. lr_from = "race": the learning
    rate with which the model's architecture won its race replaces train.lr."""

    train: DocumentTrainConfig
    cosine: float = Field(default=1.0, ge=0)
    lm: float = Field(default=0.0, ge=0)
    lr_from: Literal["race"] | None = None

    def notes(self, step: Step) -> list[str]:
        model = step.inputs["model"]
        if self.lr_from is None or not isinstance(model, Path):
            return []
        try:
            lr = f"lr {raced(self, model).train.lr:g}" if is_done(model) else "lr"
        except RunError as error:
            return [str(error)]
        return [f"{lr}, from {self.lr_from}; train.lr = {self.train.lr:g} is not used"]


class KD(Objective):
    """The child learns the distribution of `parent`, which is frozen and a load of its own."""

    pipelined = True

    def __init__(self, parent: Transformer, config: KDConfig) -> None:
        self.parent = self.frozen = parent
        self.config = config

    def losses(self, module: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Stats]]:
        assert isinstance(module, Transformer)
        hidden, parent, cosine = self._compared(module, batch)
        hidden, flat = hidden.flatten(0, 1), batch.weight.flatten()
        kl = kl_divergence(hidden, module.head, parent.flatten(0, 1), self.parent.head, flat)
        loss, stats = kl + self.config.cosine * cosine, {"kl": kl.detach()}
        if self.config.cosine:
            stats["cosine"] = cosine.detach()
        if self.config.lm:
            lm = cross_entropy(hidden, module.head, batch.labels.flatten(), flat)
            loss, stats["lm"] = loss + self.config.lm * lm, lm.detach()
        yield loss, stats

    def passed_on(self, module: Transformer, batch: Batch) -> Passed:
        hidden, parent, cosine = self._compared(module, batch)
        states = [hidden, parent]
        if not self.config.cosine:
            return states, None, {}
        return states, self.config.cosine * cosine, {"cosine": cosine.detach()}

    def _compared(self, module: Transformer, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What the layers that are here give of child and parent, and Σ w·(1 - cos) over them."""
        with torch.no_grad():
            parent, theirs = self.parent(batch.tokens, context_of(batch), output_hidden_states=True)
        hidden, ours = module(batch.tokens, context_of(batch), output_hidden_states=True)
        cosine = batch.weight.new_zeros(())
        if self.config.cosine:
            for state, target in zip(ours[1:], theirs[1:], strict=True):
                cosine = cosine + hidden_cosine(state, target, batch.weight)
        return hidden, parent, cosine


def load_teacher(source: Path, train: TrainConfig, child: Transformer) -> Transformer:
    """A frozen teacher, beside the child. Raises RunError where their vocabularies differ."""
    ours, theirs = child.config.vocab_size, load_config(source).vocab_size
    if ours != theirs:
        raise RunError(
            f"{source} has a vocabulary of {theirs:,} tokens and the model one of {ours:,}: "
            "distributions are compared token by token; give a teacher with the same tokenizer"
        )
    return train.placement.load(source, frozen=True, beside=child)


def raced(config: KDConfig, model: Path) -> KDConfig:
    """The config, with `lr_from` at the rate of the race that chose `model`, else RunError."""
    if config.lr_from is None:
        return config
    table = model / "tables" / "architecture.json"
    lr = read_json(model, "architecture").get("lr") if table.is_file() else None
    if lr is None:
        raise RunError(
            f'lr_from = "race": no race chose the architecture of {model}; set train.lr, or build '
            'the child of a race: [child] architecture = "race"'
        )
    return config.model_copy(update={"train": config.train.model_copy(update={"lr": lr})})


def stage(config: KDConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `kd`: distil `teacher` into `model` on `data`."""
    own, config = config.train.lr, raced(config, inputs["model"])
    if config.lr_from:
        run.say(f"lr {config.train.lr:g}, from {config.lr_from}; train.lr = {own:g} is not used")
    child = config.train.placement.load(inputs["model"])
    parent = load_teacher(inputs["teacher"], config.train, child)
    source = training_documents(inputs["data"], config.train, run)
    heldout = Heldout(LM(), child, inputs["data"], config.train, run.seed)
    Trainer(child, KD(parent, config), source, config.train, run, heldout).fit()
    save_model(child, run.model_path, tokenizer_from=resolve(inputs["model"]))
    run.inherit(inputs["model"], "architecture")
