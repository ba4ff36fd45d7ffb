"""Supervised fine-tuning on chats: thoughts, answers and the switch between them (paper §4).

    ℓ_t = -log π(y_t | tokens up to t),   w_t = 1 on what the assistant writes, 0 on what it reads

Chats whose reasoning is on and off are mixed by the weights of their sources; the loss is that of
continued pretraining on the trained tokens alone, and it is told apart for the two. A recipe of
several `sft` stages, each on data of its own, is Nano's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from tessera import dist
from tessera.data.batch import OFF, ON, Batch
from tessera.data.config import no_chat_template
from tessera.data.documents import Documents
from tessera.data.template import FILE as TEMPLATE_FILE
from tessera.model.checkpoint import save_model
from tessera.model.context import Context
from tessera.model.source import resolve
from tessera.model.transformer import Transformer
from tessera.objectives.lm import documents, training_documents
from tessera.runs.files import RunError, atomic_write
from tessera.runs.plan import Step
from tessera.runs.run import Run
from tessera.train.engine import Stats, Trainer, one_group
from tessera.train.flops import Cost, Work, model_cost
from tessera.train.losses import cross_entropy
from tessera.train.optim import DocumentTrainConfig, TrainConfig
from tessera.train.parallel import gathered

MODES = {"on": ON, "off": OFF}


class SFTConfig(BaseModel):
    """How to train on chats, and how often to look at what is held out (0: at the end)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: DocumentTrainConfig
    evaluate_every: int = Field(default=0, ge=0)

    def warnings(self, step: Step, steps: Sequence[Step]) -> list[str]:
        return no_chat_template(step, steps)


class SFT:
    """Cross-entropy of the trained tokens; the others never meet the output head."""

    def losses(self, module: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Stats]]:
        assert isinstance(module, Transformer)
        hidden = module(batch.tokens, Context(batch.positions, batch.segments)).flatten(0, 1)
        labels, weight = batch.labels.flatten(), batch.weight.flatten()
        total, stats = hidden.new_zeros((), dtype=torch.float32), {}
        for name, chosen in by_mode(batch).items():
            # An empty choice too: every process of a job has to go the same way back.
            loss = cross_entropy(hidden[chosen], module.head, labels[chosen], weight[chosen])
            total = total + loss
            if name in MODES:
                stats[f"loss_{name}"] = loss.detach()
                stats[f"loss_{name}/weight"] = weight[chosen].sum()
        yield total, stats

    def weight(self, batch: Batch) -> Tensor:
        return batch.weight.sum()

    def groups(self, module: nn.Module) -> Mapping[str, Sequence[nn.Parameter]]:
        return one_group(module)

    def flops(self, module: nn.Module, batch: Batch) -> int:
        """Every token passes the layers; the trained ones meet the head."""
        assert isinstance(module, Transformer)
        work = Work.of(batch, module.config.sliding_window)
        layers = model_cost(module.config, head=False)
        head = Cost(2 * module.config.hidden_size * module.config.vocab_size)
        trained = Work(int((batch.weight > 0).sum()), 0)
        return layers.training(work) + head.training(trained)


def by_mode(batch: Batch) -> dict[str, Tensor]:
    """Indices (n,) into the flattened batch of the trained tokens: on, off, and of plain text."""
    trained = batch.weight.flatten() > 0
    mode = torch.zeros_like(batch.tokens) if batch.mode is None else batch.mode
    mode = mode.flatten()
    of_text = (mode != ON) & (mode != OFF)
    choices = {**{name: mode == value for name, value in MODES.items()}, "text": of_text}
    return {name: (trained & choice).nonzero().squeeze(1) for name, choice in choices.items()}


class HeldoutChats:
    """The mean loss on held-out chats over the rows of all processes, in nats a trained token.

    `heldout`, and of the modes that are there `heldout_on` and `heldout_off`.
    """

    def __init__(self, module: Transformer, data: Path, config: TrainConfig, seed: int) -> None:
        self.module, self.layout = module, config.spread.layout
        self.batches = documents(data, config, seed, "heldout").heldout_batches()

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        objective, training = SFT(), self.module.training
        sums = torch.zeros(3, 2, dtype=torch.float64, device=self.module.device)
        self.module.eval()
        with gathered(self.module):
            for batch in (batch.to(self.module.device) for batch in self.batches):
                for loss, stats in objective.losses(self.module, batch):
                    sums[0] += torch.stack([loss.double(), objective.weight(batch).double()])
                    for row, name in enumerate(MODES, 1):
                        keys = (f"loss_{name}", f"loss_{name}/weight")
                        sums[row] += torch.stack([stats[key].double() for key in keys])
        self.module.train(training)
        names = ("heldout", *(f"heldout_{name}" for name in MODES))
        found = dict(zip(names, self.layout.sum(sums).tolist(), strict=True))
        return {name: loss / weight for name, (loss, weight) in found.items() if weight}


def stage(config: SFTConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `sft`: train `model` on the chats of `data`."""
    data, model = inputs["data"], inputs["model"]
    module = config.train.spread.load(model)
    source = training_documents(data, config.train, run)
    _check_chats(source, data, module.config.vocab_size)
    _say_left_out(source, run, config.train.sequence_length)
    heldout = HeldoutChats(module, data, config.train, run.seed)
    Trainer(module, SFT(), source, config.train, run, heldout, config.evaluate_every).fit()
    save_model(module, run.model_path, tokenizer_from=resolve(model))
    if dist.is_main():  # what follows must ask in the words that were trained
        template = (data / "tokenizer" / TEMPLATE_FILE).read_text(encoding="utf-8")
        atomic_write(run.model_path / TEMPLATE_FILE, template)


def _check_chats(source: Documents, data: Path, vocab_size: int) -> None:
    """Raises RunError for data without chats, and of another tokenizer than the model's."""
    if all(part.trained is None for part in source.parts):
        raise RunError(
            f"{data} holds no chats, so nothing says which tokens are answers: give a source of it "
            'format = "chat", or continue pretraining with a [cpt] table'
        )
    highest = max(int(part.ids.max()) for part in source.parts)
    if highest >= vocab_size:
        raise RunError(
            f"{data} holds token {highest} and the model has {vocab_size}: tokenise the chats with "
            'the model\'s own tokenizer ([data] model = "…")'
        )


def _say_left_out(source: Documents, run: Run, length: int) -> None:
    left, total = (
        sum(getattr(part, name) for part in source.parts)
        for name in ("num_left_out", "num_documents")
    )
    if left:
        run.say(f"{left:,} of {total:,} chats are longer than {length} tokens and left out")
