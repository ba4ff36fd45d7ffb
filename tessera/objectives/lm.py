"""Next-token prediction: on documents (stage `cpt`), and on what the assistant writes in chats
(stage `sft`, paper §4), whose loss is logged apart for reasoning on and off.

    ℓ_t = -log π(y_t | tokens up to t)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from tessera import dist
from tessera.data.batch import OFF, ON, Batch
from tessera.data.config import no_chat_template
from tessera.data.documents import Documents
from tessera.data.switch import record_switch, recorded_switch
from tessera.data.template import template_of
from tessera.data.tokenizer import load_tokenizer
from tessera.model.checkpoint import save_model
from tessera.model.parallel import gathered
from tessera.model.source import resolve
from tessera.model.transformer import Transformer
from tessera.progress import Progress
from tessera.runs.files import RunError
from tessera.runs.plan import Step
from tessera.runs.recipe import Config
from tessera.runs.run import Run
from tessera.train.engine import Objective, Stats, Trainer, context_of, losses_here
from tessera.train.flops import Cost, Work, model_cost
from tessera.train.losses import cross_entropy
from tessera.train.optim import DocumentTrainConfig, TrainConfig

MODES = {"on": ON, "off": OFF}


class LM(Objective):
    pipelined = True

    def losses(self, module: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Stats]]:
        assert isinstance(module, Transformer)
        hidden = module(batch.tokens, context_of(batch)).flatten(0, 1)
        yield cross_entropy(hidden, module.head, batch.labels.flatten(), batch.weight.flatten()), {}


class SFT(Objective):
    """Cross-entropy of the trained tokens; the others never meet the output head."""

    pipelined = True

    def losses(self, module: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Stats]]:
        assert isinstance(module, Transformer)
        hidden = module(batch.tokens, context_of(batch)).flatten(0, 1)
        labels, weight = batch.labels.flatten(), batch.weight.flatten()
        total, stats = hidden.new_zeros((), dtype=torch.float32), {}
        for name, chosen in by_mode(batch).items():
            # Also for no token: every process of a job needs the same backward pass.
            loss = cross_entropy(hidden[chosen], module.head, labels[chosen], weight[chosen])
            total = total + loss
            if name in MODES:
                stats[f"loss_{name}"] = loss.detach()
                stats[f"loss_{name}/weight"] = weight[chosen].sum()
        yield total, stats

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


def documents(
    data: Path, config: TrainConfig, seed: int, split: str = "train", *, alike: bool = False
) -> Documents:
    """Prepared documents, cut to a stage's settings. alike: every process reads all rows."""
    layout = config.placement.layout
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
    """The mean loss on held-out documents over the rows of all processes, nats a token: `heldout`,
    of SFT also by mode, of the others `heldout/NAME` of each of several sources."""

    def __init__(
        self, objective: Objective, module: Transformer, data: Path, config: TrainConfig, seed: int
    ) -> None:
        self.objective, self.module, self.layout = objective, module, config.placement.layout
        source = documents(data, config, seed, "heldout")
        self.batches = {
            p.name: [b.shared(self.layout) for b in source.heldout_batches(source=p.name)]
            for p in source.parts
        }

    def __call__(self) -> dict[str, float]:
        sums = [loss_sums(self.objective, self.module, b) for b in self.batches.values()]
        loss, weight = self.layout.sum(torch.stack(sums)).unbind(-1)  # (sources, 1 + modes)
        found = {"heldout": float(loss[:, 0].sum() / weight[:, 0].sum())}
        if isinstance(self.objective, SFT):
            by_mode = zip(MODES, loss.sum(0)[1:], weight.sum(0)[1:], strict=True)
            found |= {f"heldout_{name}": float(lo / w) for name, lo, w in by_mode if w}
        elif len(self.batches) > 1:
            by_source = zip(self.batches, loss[:, 0] / weight[:, 0], strict=True)
            found |= {f"heldout/{name}": float(mean) for name, mean in by_source}
        return found


@torch.no_grad()
def loss_sums(objective: Objective, module: Transformer, batches: Sequence[Batch]) -> Tensor:
    """(Σ w·ℓ, Σ w) over the batches, `(3, 2)`: of all tokens, and by mode if known."""
    wide = dist.widest_float(module.device)
    sums = torch.zeros(1 + len(MODES), 2, dtype=wide, device=module.device)
    with gathered(module), Progress("held-out text", len(batches), "tokens") as bar:
        for batch in (batch.to(module.device) for batch in batches):
            bar.advance(1, int((batch.segments >= 0).sum()))
            for loss, stats in losses_here(objective, module, batch):
                sums[0] += torch.stack([loss.to(wide), objective.weight(batch).to(wide)])
                for row, name in enumerate(MODES, 1):
                    if f"loss_{name}" in stats:
                        keys = (f"loss_{name}", f"loss_{name}/weight")
                        sums[row] += torch.stack([stats[key].to(wide) for key in keys])
    return sums


class CPTConfig(Config):
    train: DocumentTrainConfig


class SFTConfig(Config):
    """evaluate_every: steps between evaluations on held-out chats; 0: only at the end."""

    train: DocumentTrainConfig
    evaluate_every: int = Field(default=0, ge=0)

    def warnings(self, step: Step, steps: Sequence[Step]) -> list[str]:
        return no_chat_template(step, steps)


def pretrain(
    module: Transformer, config: TrainConfig, run: Run, data: Path, tokenizer: Path
) -> None:
    """Trains on the documents of `data`, and saves the model with the tokenizer of a directory."""
    source = training_documents(data, config, run)
    heldout = Heldout(LM(), module, data, config, run.seed)
    Trainer(module, LM(), source, config, run, heldout).fit()
    save_model(module, run.model_path, tokenizer_from=tokenizer)


def cpt(config: CPTConfig, run: Run, inputs: dict[str, Path]) -> None:
    model = inputs["model"]
    pretrain(config.train.placement.load(model), config.train, run, inputs["data"], resolve(model))


def sft(config: SFTConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `sft`: train `model` on the chats of `data`. Raises RunError for data without chats, or
    of another tokenizer."""
    data, model = inputs["data"], inputs["model"]
    module = config.train.placement.load(model)
    source = training_documents(data, config.train, run)
    if all(part.trained is None for part in source.parts):
        raise RunError(
            f"{data} holds no chats, so nothing says which tokens are answers: give a source of it "
            'format = "chat", or continue pretraining with a [cpt] table'
        )
    highest, vocab_size = max(int(p.ids.max()) for p in source.parts), module.config.vocab_size
    if highest >= vocab_size:
        raise RunError(
            f"{data} holds token {highest} and the model has {vocab_size}: tokenise the chats with "
            'the model\'s own tokenizer ([data] model = "…")'
        )
    total = sum(part.num_documents for part in source.parts)
    if left := sum(part.num_left_out for part in source.parts):
        length = config.train.sequence_length
        run.say(f"{left:,} of {total:,} chats are longer than {length} tokens and left out")
    heldout = Heldout(SFT(), module, data, config.train, run.seed)
    Trainer(module, SFT(), source, config.train, run, heldout, config.evaluate_every).fit()
    save_model(module, run.model_path, tokenizer_from=resolve(model))
    if dist.is_main():  # later stages have to ask with the template and the switch that was trained
        template_of(load_tokenizer(data)).save(run.model_path)
        record_switch(run.model_path, recorded_switch(data / "tokenizer"))
