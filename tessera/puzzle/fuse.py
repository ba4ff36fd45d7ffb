"""Which blocks of a model read what which others wrote (FFN Fusion §3.2).

    h_j(X) = f_j(X) - X            what block j adds
    M_ij   = 1 - cos(h_j, h_j without block i)      mean over tokens, for j > i

A small M_ij says that block j hardly reads block i, so the two may run on the same input. The
states below block i are the model's own, computed once a batch: M costs L²/2 blocks, not L².

FFN Fusion: a run of FFNs with no attention between them becomes one wide FFN (§3.1).

    x + FFN_1(x) + FFN_2(x + FFN_1(x)) + …   ≈   x + Σ_i FFN_i(x)
    Σ_i FFN_i(norm_i(x)) = FFN(norm(x))      rows of gate and up, columns of down side by side

The second line is exact: each layer's norm gain is folded into its own gate and up, which the
paper, taking the last layer's norm for all, leaves as an approximation. What remains is that FFN i
does not see what the earlier ones of its run wrote. The freed layers become no-ops in their
places, so that depth slots, and distillation from the parent's layers, stay as they were.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tessera.data.batch import Batch
from tessera.data.documents import heldout
from tessera.generate.torch_engine import TorchEngine
from tessera.model.checkpoint import load_model, save_model
from tessera.model.config import ModelConfig, NoOp, SwiGLU
from tessera.model.context import Context
from tessera.model.layers import FeedForward, Subblock
from tessera.model.source import resolve
from tessera.model.transformer import Transformer
from tessera.progress import Progress
from tessera.puzzle.cost import generation_seconds
from tessera.puzzle.cost_table import Scenario
from tessera.runs.run import Run
from tessera.train.losses import token_statistics


@torch.no_grad()
def dependency_matrix(
    module: Transformer, batches: Sequence[Batch], tell: Callable[[], None] = lambda: None
) -> Tensor:
    """M `(L, L)`, zero on and below the diagonal and where either block is empty.

    `tell` is called after each removed block of each batch.
    """
    depth = len(module.blocks)
    sums, total = torch.zeros(depth, depth), 0.0
    for batch in batches:
        context = module.prepare(Context(batch.positions, batch.segments))
        states = list(module.hidden_states(batch.tokens, context))
        real = (batch.segments >= 0).float()
        total += float(real.sum())
        for removed in range(depth):
            sums[removed] += _change(module, removed, states, context, real)
            tell()
    return sums / max(1.0, total)


def _change(
    module: Transformer, removed: int, states: Sequence[Tensor], context: Context, real: Tensor
) -> Tensor:
    """Row `removed` of M, summed over tokens `(L,)`."""
    row = torch.zeros(len(module.blocks))
    if torch.equal(states[removed], states[removed + 1]):
        return row
    x = states[removed]
    for layer in range(removed + 1, len(module.blocks)):
        out = module.blocks[layer](x, context)
        own = states[layer + 1] - states[layer]
        if own.any():
            distance = 1 - F.cosine_similarity(out - x, own, dim=-1)
            row[layer] = float((distance * real).sum())
        x = out
    return row


class FuseError(ValueError):
    """A model with nothing to fuse; the text says what fusion needs."""


class FuseConfig(BaseModel):
    """How far a run may reach, on what its harm is measured, and what is timed.

    `max_width` bounds a fused FFN (the paper splits runs by a GPU's memory). `threshold` bounds
    M_ij between any two FFNs that are fused together; the paper has none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_width: int | None = Field(default=None, ge=1)
    threshold: float | None = Field(default=None, gt=0)
    keep_last: bool = True  # the last FFN of a run is sensitive: the paper leaves it alone
    tokens: int = Field(default=16_384, ge=1)
    microbatch_tokens: int = Field(default=2048, ge=1)
    sequence_length: int = Field(default=256, ge=2)
    scenario: Scenario = Scenario()
    rounds: int = Field(default=9, ge=3)


def fusable_runs(
    config: ModelConfig,
    max_width: int | None = None,
    dependency: Tensor | None = None,
    threshold: float | None = None,
    keep_last: bool = True,
) -> list[list[int]]:
    """Layers whose FFNs become one, run by run; every run has at least two.

    A run is broken by attention, linear or not. Empty layers inside of it are stepped over.
    """
    runs = []
    for stretch in _stretches(config):
        run: list[int] = []
        for layer in stretch[:-1] if keep_last else stretch:
            if run and not _joins(config, run, layer, max_width, dependency, threshold):
                runs.append(run)
                run = []
            run.append(layer)
        runs.append(run)
    return [run for run in runs if len(run) > 1]


def _stretches(config: ModelConfig) -> list[list[int]]:
    """Maximal runs of SwiGLUs with no attention and no linear map between them."""
    found: list[list[int]] = [[]]
    for layer, block in enumerate(config.blocks):
        if not isinstance(block.attention, NoOp):
            found.append([])
            continue  # its own FFN follows an attention that reads all before it
        if isinstance(block.ffn, SwiGLU):
            found[-1].append(layer)
        elif not isinstance(block.ffn, NoOp):
            found.append([])
    return [stretch for stretch in found if stretch]


def _joins(
    config: ModelConfig,
    run: Sequence[int],
    layer: int,
    max_width: int | None,
    dependency: Tensor | None,
    threshold: float | None,
) -> bool:
    if max_width is not None and sum(_width(config, i) for i in (*run, layer)) > max_width:
        return False
    if threshold is None or dependency is None:
        return True
    return all(float(dependency[i, layer]) <= threshold for i in run)


def _width(config: ModelConfig, layer: int) -> int:
    variant = config.blocks[layer].ffn
    assert isinstance(variant, SwiGLU)
    return variant.intermediate_size


@torch.no_grad()
def fuse_ffns(subblocks: Sequence[Subblock], config: ModelConfig) -> Subblock:
    """One SwiGLU subblock that returns the sum of these, exactly, of any input `(B,T,C)`."""
    ops = [subblock.op for subblock in subblocks]
    width = sum(op.gate_proj.out_features for op in ops if isinstance(op, FeedForward))
    fused = Subblock(config, SwiGLU(width))
    target = fused.op
    assert isinstance(target, FeedForward)
    for key in ("gate_proj", "up_proj"):
        parts = [
            getattr(op, key).weight * subblock.norm.weight
            for op, subblock in zip(ops, subblocks, strict=True)
        ]
        getattr(target, key).weight.copy_(torch.cat(parts))
        if getattr(target, key).bias is not None:
            getattr(target, key).bias.copy_(torch.cat([getattr(op, key).bias for op in ops]))
    downs = [op.down_proj for op in ops if isinstance(op, FeedForward)]
    target.down_proj.weight.copy_(torch.cat([down.weight for down in downs], dim=1))
    if target.down_proj.bias is not None:
        target.down_proj.bias.copy_(torch.stack([down.bias for down in downs]).sum(0))
    return fused  # its norm's gain is one: the gains are in the weights


def fuse(module: Transformer, runs: Sequence[Sequence[int]]) -> Transformer:
    """`module` itself, every run fused in the place of its first layer, the others empty."""
    for run in runs:
        wide = fuse_ffns([module.blocks[layer].ffn for layer in run], module.config)
        module.replace(run[0], "ffn", wide)
        for layer in run[1:]:
            module.replace(layer, "ffn", Subblock(module.config, NoOp()))
    return module


@torch.no_grad()
def kl_between(before: Transformer, after: Transformer, batches: Sequence[Batch]) -> float:
    """Mean held-out KL(before ‖ after), nats a token."""
    total = weight = 0.0
    for batch in batches:
        old, new = (
            m(batch.tokens, Context(batch.positions, batch.segments)).flatten(0, 1)
            for m in (before, after)
        )
        logits = before.logits(old)
        found = token_statistics(new, after.head, logits.__getitem__, batch.labels.flatten())
        total += float(found["kl"] @ batch.weight.flatten())
        weight += float(batch.weight.sum())
    return total / weight


def seconds_apart(
    before: Transformer, after: Transformer, config: FuseConfig
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Median seconds of (prefill, one decode step), before and after, in rounds that alternate."""
    engines = (TorchEngine(before), TorchEngine(after))
    samples: tuple[list, list] = ([], [])
    for index in range(config.rounds + 1):
        for engine, found in zip(engines, samples, strict=True):
            pair = generation_seconds(engine, before.config.vocab_size, config.scenario)
            if index:  # the first round warms up
                found.append(pair)
    old, new = (tuple(map(statistics.median, zip(*found, strict=True))) for found in samples)
    return old, new  # type: ignore[return-value]


def stage(config: FuseConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `fuse`: write the fused model, `tables/dependency.json` and `tables/fuse.jsonl`."""
    before = load_model(inputs["model"], frozen=True)
    batches = heldout(
        inputs["data"],
        sequence_length=config.sequence_length,
        microbatch_tokens=config.microbatch_tokens,
        tokens=config.tokens,
    )
    with Progress(run.name, len(batches) * len(before.blocks), "removals", quiet=run.quiet) as bar:
        dependency = dependency_matrix(before, batches, bar.advance)
    shape = before.config
    runs = fusable_runs(shape, config.max_width, dependency, config.threshold, config.keep_last)
    if not runs:
        raise FuseError(_nothing(shape, config))
    after = fuse(copy.deepcopy(before), runs)
    kl = kl_between(before, after, batches)
    old, new = seconds_apart(before, after, config)
    for layers in runs:
        run.say(f"layers {layers} -> one FFN of {_width(after.config, layers[0]):,} channels")
    run.say(
        f"KL to the model before: {kl:.4f}; prefill {old[0] * 1e3:.2f} -> {new[0] * 1e3:.2f} ms, "
        f"a decode step {old[1] * 1e3:.3f} -> {new[1] * 1e3:.3f} ms"
    )
    run.write_json("dependency", dependency.tolist())
    common = {
        "kl": kl,
        "prefill_ms_before": old[0] * 1e3,
        "prefill_ms": new[0] * 1e3,
        "decode_ms_before": old[1] * 1e3,
        "decode_ms": new[1] * 1e3,
    }
    rows = [
        {
            "layers": ", ".join(map(str, layers)),
            "widths": ", ".join(str(_width(shape, i)) for i in layers),
            "width": _width(after.config, layers[0]),
            "dependency": max(float(dependency[i, j]) for i in layers for j in layers if i < j),
            **common,
        }
        for layers in runs
    ]
    run.write_table("fuse", rows)
    save_model(after, run.model_path, tokenizer_from=resolve(inputs["model"]))


def _nothing(shape: ModelConfig, config: FuseConfig) -> str:
    longest = max((len(stretch) for stretch in _stretches(shape)), default=0)
    needed = 3 if config.keep_last else 2
    return (
        f"nothing to fuse: the longest run of FFNs without attention has {longest} layers and "
        f"{needed} are needed, within max_width and threshold where those are given. Search with "
        'attention = ["noop"] in the space, or set keep_last = false'
    )
