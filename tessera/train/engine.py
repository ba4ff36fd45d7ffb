"""The one loop.

    loss of a step = Σ over microbatches and ranks of Σ_t w_t·ℓ_t, divided by Σ w_t

An objective returns sums and the division by the *global* weight happens here, so
accumulation and ranks change nothing (a mean of means is off by 9.5 % on ragged microbatches).
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tessera import dist
from tessera.data.batch import Batch, MeasuredSource, Source
from tessera.model.context import Context
from tessera.model.cpu import keep_freed_memory
from tessera.model.parallel import clip, sync_gradients
from tessera.model.pipelining import one_forward_one_backward, receive, send
from tessera.model.placement import PIPELINED, LayoutError, trainable
from tessera.model.transformer import Transformer
from tessera.progress import Progress
from tessera.runs.files import FailureError
from tessera.runs.run import Run
from tessera.train.checkpoint import Saver, States, load_state
from tessera.train.flops import Work, model_cost, peak
from tessera.train.optim import TrainConfig, build_optimizer, lr_factor, update
from tessera.train.sinks import Sinks
from tessera.train.watch import Watch

Stats = dict[str, Tensor]
# Hidden states of the model and of the frozen one, and a part of the loss if there is one here.
Passed = tuple[list[Tensor], Tensor | None, Stats]


class Objective:
    """What is learned: a loss of a microbatch. `frozen`: a model that is only run forward.
    `pipelined`: it can be learned in a pipeline. `apart`: processes of a tensor group train modules
    of their own on the same rows."""

    frozen: Transformer | None = None
    pipelined: bool = False
    apart: bool = False

    def losses(self, module: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Stats]]:
        """Parts of Σ w·ℓ of a microbatch (sums, never means) and statistics to log.

        A statistic is divided by the step's Σ w, or by `KEY/weight` where the objective gives that.
        Each part is backpropagated before the next is asked for, so an objective with many
        independent parts (block-wise distillation) never holds more than one graph.
        """
        raise NotImplementedError

    def passed_on(self, module: Transformer, batch: Batch) -> Passed:
        """What a pipeline's earlier stage makes of a microbatch."""
        return [module(batch.tokens, context_of(batch))], None, {}

    def weight(self, batch: Batch) -> Tensor:
        """Σ w of a microbatch."""
        return batch.weight.sum()

    def groups(self, module: nn.Module) -> Mapping[str, Sequence[nn.Parameter]]:
        """Parameters that are clipped together, by the name of their group."""
        return {"all": [p for p in module.parameters() if p.requires_grad]}

    def flops(self, module: nn.Module, batch: Batch) -> int:
        """Operations that the mathematics of a microbatch takes (`train/flops.py`)."""
        assert isinstance(module, Transformer)
        work = Work.of(batch, module.config.sliding_window)
        frozen = model_cost(self.frozen.config).forward(work) if self.frozen else 0
        return model_cost(module.config).training(work) + frozen


def context_of(batch: Batch) -> Context:
    """The context in which a model reads a batch."""
    return Context(batch.positions, batch.segments, prefix=batch.prefix, part=batch.part)


def losses_here(
    objective: Objective, module: Transformer, batch: Batch
) -> Iterator[tuple[Tensor, Stats]]:
    """Losses of one model without gradients: of a pipeline, in the last stage alone."""
    if (stage := module.stage) is None:
        yield from objective.losses(module, batch)
        return
    receive([module], batch.tokens)
    if stage.last:
        yield from objective.losses(module, batch)
    else:
        send([module], objective.passed_on(module, batch)[0])


class Trainer:
    """Runs `config.steps` optimizer steps of `objective` on `module` over `source`.

    evaluate: called every `evaluate_every` steps and at the end; its numbers join the step's line
    in metrics.jsonl. check: sees each step's metrics before the update, and may raise.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        source: Source,
        config: TrainConfig,
        run: Run,
        evaluate: Callable[[], dict[str, float]] | None = None,
        evaluate_every: int = 0,
        check: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        self.module, self.objective, self.source = module, objective, source
        self.config, self.run = config, run
        self.evaluate, self.evaluate_every, self.check = evaluate, evaluate_every, check
        self.before, self.steps_of_run = 0, config.steps
        self.states = self._states()
        self.layout = config.placement.layout
        self.stage = module.stage if isinstance(module, Transformer) else None
        if self.stage is not None and not objective.pipelined:
            raise LayoutError(PIPELINED)
        self.models = [m for m in (module, objective.frozen) if isinstance(m, Transformer)]
        self.stages = None if self.stage is None else self.layout.mesh()["pipeline"]
        self.trainable = trainable(module)
        plain = [key for key, p in self.trainable.items() if not isinstance(p, DTensor)]
        assert self.layout.data_world == 1 or not plain, f"not spread over the data: {plain[:3]}"
        self.groups = objective.groups(module)
        self.optimizer = build_optimizer(self.trainable.values(), config)
        self.watch = Watch(run, config.quiet_seconds)

    def as_part(self, number: int, count: int) -> Self:
        """The same as training `number` (from 0) of `count` in one run, with a state of its own."""
        self.before, self.steps_of_run = number * self.config.steps, count * self.config.steps
        if count > 1:
            self.states = self.states.part(number)
        return self

    def _states(self) -> States:
        """Those of the run's directory, or of a place on the storage that is this run's alone."""
        if self.config.state is None:
            return States(self.run.state_path)
        made = self.run.manifest
        name = f"{made.name}-{made.started[:19]}-{made.fingerprint[:8]}".replace(":", "")
        found = States(dist.broadcast(f"{self.config.state.rstrip('/')}/{name}"))
        self.run.afterwards(found.remove)
        return found

    def fit(self) -> None:
        """Train to the last step, from the last saved state if there is one.

        Ctrl-C and SIGTERM, in any process, finish the step, save, and raise KeyboardInterrupt.
        """
        keep_freed_memory()
        with self.watch:
            self.watch.at("reading the resume state")
            start = load_state(self.states, self)
            self.run.rewind(self.before + start)
            if start:
                self.run.say(f"resuming after step {self.before + start} of {self.steps_of_run}")
            self.module.train()
            self._steps_from(start)

    def _steps_from(self, start: int) -> None:
        bar = Progress(self.run.name, self.steps_of_run, "tokens", quiet=self.run.quiet)
        saver = Saver(self.states, self.config.save_total_limit, self.config.save_seconds)
        sinks = Sinks(self.config.report_to, self.run, self.before + start)
        begun = time.monotonic()
        with _stop_signal() as stopped, bar, sinks, saver:
            bar.advance(self.before + start, 0)
            for step in range(start, self.config.steps):
                metrics, tokens, flops = self.train_step(step)
                timing = self._timing(tokens, flops, time.monotonic() - begun)
                due = self.evaluate_every > 0 and (step + 1) % self.evaluate_every == 0
                if self.evaluate and (due or step + 1 == self.config.steps):
                    self.watch.at(f"step {step + 1}: evaluating")
                    metrics |= self.evaluate()
                number = self.before + step + 1
                self.run.log(number, **metrics)
                self.run.log_timing(number, **timing)
                sinks.log(number, metrics | timing)
                shown = {"mfu": timing["mfu"]} if "mfu" in timing else {}
                bar.advance(1, tokens, loss=metrics["loss"], **shown)
                self.watch.at(f"step {step + 1}: agreeing on what is next")
                begun = time.monotonic()
                signals = torch.tensor([stopped(), not saver.due()])
                if dist.world() > 1:  # all stop with one, and save with the last
                    signals = dist.max(signals.to(dist.device(), torch.int32))
                stop, early = signals.tolist()
                if stop or not early:
                    self.watch.at(f"step {step + 1}: saving")
                    saver.save(step + 1, self)
                if stop:
                    saver.wait()
                    raise KeyboardInterrupt

    def _timing(self, tokens: int, flops: float, seconds: float) -> dict[str, float]:
        """Seconds, tokens a second, and the share of what all devices could do, if known."""
        timing = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        if best := peak(self.config.placement.dtype):
            timing["mfu"] = flops / seconds / (best * dist.world())
        return timing | (self.source.timings() if isinstance(self.source, MeasuredSource) else {})

    def train_step(self, step: int) -> tuple[dict[str, float], int, float]:
        """One optimizer step: its metrics, and the tokens and operations of all processes."""
        here = f"step {step + 1}"
        self.watch.at(f"{here}: reading data")
        batches = self.source.batches(step)
        flops = sum(self.objective.flops(self.module, b) for b in batches) / self.layout.context
        batches = [batch.shared(self.layout).to(dist.device()) for batch in batches]
        self.watch.at(f"{here}: summing weights")
        wide = dist.widest_float()
        weights = [self.objective.weight(batch).to(wide) for batch in batches]
        weight = float(self.layout.sum(torch.stack(weights).sum()))
        if weight <= 0:
            raise FailureError(f"{here} has no trained token; check the data's weights")
        totals = {"flops": torch.tensor(flops, dtype=wide, device=dist.device())}
        for batch in batches:
            _add(totals, "tokens", (batch.segments >= 0).sum())
        self._backward(here, batches, weight, totals)
        self.watch.at(f"{here}: summing losses")
        sums = self._sums(totals)
        tokens, flops = round(sums.pop("tokens")), sums.pop("flops")
        own = {k: sums.pop(f"{k}/weight") for k in list(sums) if f"{k}/weight" in sums}
        # A part of a step may have no trained token: then its mean is not a number.
        shares = {key: own.get(key, weight) for key in sums}
        metrics = {k: sums[k] / share if share else math.nan for k, share in shares.items()}
        self.watch.at(f"{here}: clipping and updating")
        norms = [clip(group, self.config.clip, self.stages) for group in self.groups.values()]
        metrics["grad_norm"] = self._norm(norms)
        if isinstance(self.source, MeasuredSource):
            metrics |= self.source.metrics()
        self._check_finite(step, metrics)
        if self.check:
            self.check(step, metrics)
        metrics["lr"] = self._update(step)
        return metrics, tokens, flops

    def _backward(
        self, here: str, batches: Sequence[Batch], weight: float, totals: dict[str, Tensor]
    ) -> None:
        """Adds up gradients, and what the losses say in `totals`."""

        def learn(number: int) -> tuple[list[Tensor], Tensor | None]:
            batch, part = batches[number], f"{here}, microbatch {number + 1} of {len(batches)}"
            self.watch.at(f"{part}: loss")
            if self.stage is not None and not self.stage.last:
                states, loss, stats = self.objective.passed_on(self.models[0], batch)
                note(loss, stats)
                return states, None if loss is None else loss / weight
            for loss, stats in self.objective.losses(self.module, batch):
                self.watch.at(f"{part}: gradient")
                (loss / weight).backward()
                self.watch.at(f"{part}: loss")
                note(loss, stats)
            return [], None

        def note(loss: Tensor | None, stats: Stats) -> None:
            for key, value in ({} if loss is None else {"loss": loss, **stats}).items():
                _add(totals, key, value)

        if self.stage is None:
            for number in range(len(batches)):
                if self.layout.shard == 1 and isinstance(self.module, Transformer):
                    sync_gradients(self.module, number + 1 == len(batches))
                learn(number)
        else:
            one_forward_one_backward(self.models, [batch.tokens for batch in batches], learn)

    def _sums(self, totals: dict[str, Tensor]) -> dict[str, float]:
        """The totals of all processes; a pipeline's earlier stages know parts of the loss only."""
        if self.objective.apart:
            sums = Counter[str]()
            for own in dist.gather({name: float(total) for name, total in totals.items()}):
                sums.update(own)
            return {**sums, "tokens": sums["tokens"] / self.layout.tensor}
        zero = torch.zeros((), dtype=dist.widest_float(), device=dist.device())
        names = list(totals)
        if self.stage is not None:
            names = dist.broadcast(names, -1)
            if not self.stage.last:
                totals |= {"tokens": zero, "flops": zero}
        values = torch.stack([totals.get(name, zero) for name in names])
        summed = self.layout.sum(values, every_stage=True).tolist()
        return dict(zip(names, summed, strict=True))

    def _norm(self, norms: list[Tensor]) -> float:
        """Of all gradients, of the norms of their groups here."""
        total = torch.stack(norms).norm() if norms else torch.zeros((), device=dist.device())
        if self.objective.apart and dist.world() > 1:
            same = dist.world() / self.layout.tensor  # processes that train the same modules
            total = (dist.sum(total.square()) / same).sqrt()
        return float(total)

    def _check_finite(self, step: int, metrics: dict[str, float]) -> None:
        bad = {k: metrics[k] for k in ("loss", "grad_norm") if not math.isfinite(metrics[k])}
        if bad:
            raise FailureError(
                f"not finite at step {step + 1}: {bad}. No update was made. Lower `train.lr` (now "
                f"{self.config.lr}) or lengthen `train.warmup`, then run again."
            )

    def _update(self, step: int) -> float:
        lr = self.config.lr * lr_factor(self.config, step)
        update(self.optimizer, lr)
        return lr


def _add(totals: dict[str, Tensor], key: str, value: Tensor) -> None:
    """Sums in the widest float, where the value is: reading it here would wait for the device."""
    value = value.detach().to(dist.widest_float(value.device))
    totals[key] = totals[key] + value if key in totals else value


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM ask for a stop after the step; a second one interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    main = threading.current_thread() is threading.main_thread()  # others handle no signals
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    old = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
