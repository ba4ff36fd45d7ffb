"""AdamW and the learning-rate schedules.

A schedule is a pure function of the step, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Annotated, Any, ClassVar, Literal

import torch
from fsspec import get_filesystem_class
from pydantic import AfterValidator, Field, field_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from tessera import dist
from tessera.data.documents import check_sizes
from tessera.model.parallel import mesh_of
from tessera.model.placement import DTYPES, PIPELINED, ParallelConfig, Placement
from tessera.runs.recipe import Config
from tessera.train.sinks import SinkName, check_installed

Schedule = Literal["cosine", "wsd", "constant"]


class TrainConfig(Config):
    """How long, how fast, in what portions."""

    EXECUTION: ClassVar = frozenset(  # no part of a run's fingerprint
        {"parallel", "save_seconds", "state", "save_total_limit", "report_to", "quiet_seconds"}
    )

    steps: int = Field(ge=1)
    tokens_per_step: int = Field(default=8192, ge=1)  # positions an optimizer step, over all ranks
    microbatch_tokens: int = Field(default=4096, ge=1)  # positions of one packed row
    sequence_length: int = Field(default=256, ge=2)  # longest piece of a document
    lr: float = Field(default=1e-3, gt=0)
    schedule: Schedule = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)  # share of the steps
    decay: float = Field(default=0.2, gt=0, le=1)  # wsd: share of the steps spent decaying
    min_lr: float = Field(default=0.1, ge=0, le=1)  # the schedule's floor, as a share of lr
    optimizer: Literal["adamw", "adamw-8bit"] = (
        "adamw"  # moments in float32, or in blocks of 8 bits
    )
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)  # on matrices only
    clip: float = Field(default=1.0, gt=0)  # of each group's gradient norm
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the arithmetic; weights stay float32
    parallel: ParallelConfig = ParallelConfig()
    save_seconds: float | None = Field(default=None, gt=0)  # between resume states; by their cost
    state: str | None = None  # where they are, as s3://bucket/prefix; the run's own directory
    save_total_limit: int = Field(default=1, ge=1)  # resume states kept
    report_to: tuple[SinkName, ...] = ()  # besides metrics.jsonl
    quiet_seconds: float = Field(default=120.0, gt=0)  # then a line says what is waited for

    @field_validator("report_to")
    @classmethod
    def _check_installed(cls, value: tuple[SinkName, ...]) -> tuple[SinkName, ...]:
        check_installed(value)
        return value

    @field_validator("optimizer")
    @classmethod
    def _check_torchao(cls, value: str) -> str:
        check_installed(("torchao",) if value == "adamw-8bit" else ())
        return value

    @field_validator("state")
    @classmethod
    def _check_storage(cls, value: str | None) -> str | None:
        kind, found, _ = (value or "").partition("://")
        if value is not None and not found:
            raise ValueError(
                f"{value!r} is no address of storage; give one like s3://bucket/prefix"
            )
        if value is not None:
            try:
                get_filesystem_class(kind)
            except (ValueError, ImportError) as error:
                raise ValueError(f"{value}: {error}; for s3, pip install 'tessera[s3]'") from None
        return value

    @property
    def placement(self) -> Placement:
        """How modules are spread over the processes, and in what they compute."""
        return Placement(self.parallel, DTYPES[self.dtype])


def _check_rows(config: TrainConfig) -> TrainConfig:
    row = config.microbatch_tokens
    check_sizes(config.sequence_length, row, config.tokens_per_step, row)
    return config


# Of stages that read documents. Checked with the recipe, before anything runs.
DocumentTrainConfig = Annotated[TrainConfig, AfterValidator(_check_rows)]


def _check_pipeline(config: TrainConfig) -> TrainConfig:
    if config.parallel.pipeline > 1:
        raise ValueError(PIPELINED)
    return config


# Of a stage that needs all layers in every process.
AllLayers = AfterValidator(_check_pipeline)


def lr_factor(config: TrainConfig, step: int) -> float:
    """Share of `lr` at 0-based `step`: linear warm-up, then the schedule, down to `min_lr`.

    `wsd` (warm-up, stable, decay) stays at 1 and falls linearly over the last `decay` of the steps.
    """
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        done = (step - warmup) / max(1, config.steps - warmup)
        return config.min_lr + (1 - config.min_lr) * (1 + math.cos(math.pi * done)) / 2
    start = config.steps - round(config.decay * config.steps)
    done = max(0, step - start) / max(1, config.steps - start)
    return 1 - (1 - config.min_lr) * done


def build_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> Optimizer:
    """AdamW with weight decay on matrices only; one fused kernel a step, or moments of 8 bits."""
    groups: dict[tuple[Any, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            # One kernel takes the tensors of one grid of processes.
            groups.setdefault((mesh_of(parameter), decay), []).append(parameter)
    listed = [{"params": params, "weight_decay": decay} for (_, decay), params in groups.items()]
    listed = listed or [{"params": []}]  # a process may hold nothing that is trained
    if config.optimizer == "adamw-8bit":
        from torchao.optim import AdamW8bit

        return AdamW8bit(listed, lr=torch.tensor(config.lr), betas=config.betas)  # type: ignore[arg-type]
    return torch.optim.AdamW(listed, lr=config.lr, betas=config.betas, fused=True)


def empty_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Room for what the optimizer remembers of a parameter."""
    if isinstance(optimizer, torch.optim.AdamW):
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        moments = torch.zeros_like(parameter), torch.zeros_like(parameter)
    else:
        step = torch.tensor(0.0)
        moments = (optimizer._new_buffer(parameter, signed) for signed in (True, False))  # type: ignore[attr-defined]
    return dict(zip(("step", "exp_avg", "exp_avg_sq"), (step, *moments), strict=True))


def update(optimizer: Optimizer, lr: float) -> None:
    """One step with this learning rate; gradients are gone afterwards."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    if not optimizer.param_groups[0]["params"]:
        return
    first = optimizer.param_groups[0]["params"][0]
    # torchao compiles its step a shape, which takes a CPU longer than it saves.
    eager = not isinstance(optimizer, torch.optim.AdamW) and first.device.type == dist.HOST
    with torch.compiler.set_stance("force_eager") if eager else nullcontext():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
