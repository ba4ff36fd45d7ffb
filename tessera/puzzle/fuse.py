"""FFN Fusion: a run of FFNs with no attention between them becomes one wide FFN (§3.1).

    x + FFN_1(x) + FFN_2(x + FFN_1(x)) + …   ≈   x + Σ_i FFN_i(x)
    Σ_i FFN_i(norm_i(x)) = FFN(norm(x))      exactly: each gain is folded into its gate and up

The freed layers become no-ops in their places, so distillation by layers stays as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tessera import dist
from tessera.data.batch import Batch
from tessera.model.checkpoint import load_model, save_model, whole
from tessera.model.config import ModelConfig, NoOp, SwiGLU
from tessera.model.context import Context
from tessera.model.layers import Subblock
from tessera.model.placement import ALONE, HERE, Layout, Placement
from tessera.model.source import resolve
from tessera.model.transformer import Transformer
from tessera.progress import Progress
from tessera.puzzle.compare import TimingConfig, in_turn, median, quality
from tessera.puzzle.surgery import feed_forward
from tessera.runs.run import Run


@torch.no_grad()
def dependency_matrix(
    module: Transformer,
    batches: Sequence[Batch],
    advance: Callable[[], None] = lambda: None,
    layout: Layout = ALONE,
) -> Tensor:
    """Which blocks read what which others wrote (§3.2): M `(L, L)`, zero on and below the diagonal.

        h_j(X) = f_j(X) - X            what block j adds
        M_ij   = 1 - cos(h_j, h_j without block i)      mean over tokens, for j > i

    A small M_ij says that block j hardly reads block i, so the two may run on the same input. M is
    zero, too, where either block is empty.
    """
    depth = len(module.blocks)

    def sums(index: int) -> tuple[Tensor, float]:
        batch, found = batches[index], torch.zeros(depth, depth)
        context = module.prepare(Context(batch.positions, batch.segments))
        states = list(module.hidden_states(batch.tokens, context))
        real = (batch.segments >= 0).float()
        for removed in range(depth):
            x = states[removed]
            # An empty block changes nothing; the states below a removed one are known.
            rest = range(removed + 1, depth) if not torch.equal(x, states[removed + 1]) else ()
            for layer in rest:
                out = module.blocks[layer](x, context)
                own = states[layer + 1] - states[layer]
                if own.any():
                    distance = 1 - F.cosine_similarity(out - x, own, dim=-1)
                    found[removed, layer] = float((distance * real).sum())
                x = out
            advance()
        return found, float(real.sum())

    rows = layout.share(len(batches), sums)
    total = sum(weight for _, weight in rows)
    return sum((found for found, _ in rows), torch.zeros(depth, depth)) / max(1.0, total)


class FuseError(ValueError):
    """A model with nothing to fuse; the text says what fusion needs."""


class FuseConfig(TimingConfig):
    """max_width: of a fused FFN. threshold: of M_ij between any two FFNs fused together."""

    max_width: int | None = Field(default=None, ge=1)
    threshold: float | None = Field(default=None, gt=0)
    keep_last: bool = True  # the last FFN of a run is sensitive: the paper leaves it alone
    microbatch_tokens: int = Field(default=2048, ge=1)


def fusable_runs(
    config: ModelConfig,
    max_width: int | None = None,
    dependency: Tensor | None = None,
    threshold: float | None = None,
    keep_last: bool = True,
) -> list[list[int]]:
    """Layers whose FFNs become one, run by run, each of two at least; attention, linear or not,
    breaks a run, and empty layers inside of it are stepped over."""

    def joins(run: list[int], layer: int) -> bool:
        width = sum(_width(config, i) for i in (*run, layer))
        if max_width is not None and width > max_width:
            return False
        if threshold is None or dependency is None:
            return True
        return all(float(dependency[i, layer]) <= threshold for i in run)

    runs: list[list[int]] = []
    for stretch in _stretches(config):
        runs.append([])
        for layer in stretch[:-1] if keep_last else stretch:
            if runs[-1] and not joins(runs[-1], layer):
                runs.append([])
            runs[-1].append(layer)
    return [run for run in runs if len(run) > 1]


def _stretches(config: ModelConfig) -> list[list[int]]:
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


def _width(config: ModelConfig, layer: int) -> int:
    variant = config.blocks[layer].ffn
    assert isinstance(variant, SwiGLU)
    return variant.intermediate_size


@torch.no_grad()
def fuse_ffns(subblocks: Sequence[Subblock], config: ModelConfig) -> Subblock:
    """One SwiGLU subblock that returns the sum of these, exactly, of any input `(B,T,C)`."""
    ops = [feed_forward(subblock) for subblock in subblocks]
    fused = Subblock(config, SwiGLU(sum(op.gate_proj.out_features for op in ops)))
    target = feed_forward(fused)
    gains = [subblock.norm.weight for subblock in subblocks]
    for key in ("gate_proj", "up_proj"):
        wide, parts = getattr(target, key), [getattr(op, key) for op in ops]
        pairs = zip(parts, gains, strict=True)
        weights = [_whole(part.weight) * gain.float() for part, gain in pairs]
        wide.weight.copy_(torch.cat(weights))
        if wide.bias is not None:
            wide.bias.copy_(torch.cat([_whole(part.bias) for part in parts]))
    downs = [op.down_proj for op in ops]
    target.down_proj.weight.copy_(torch.cat([_whole(down.weight) for down in downs], dim=1))
    if target.down_proj.bias is not None:
        target.down_proj.bias.copy_(torch.stack([_whole(down.bias) for down in downs]).sum(0))
    return fused  # its norm's gain is one: the gains are in the weights


def _whole(tensor: Tensor) -> Tensor:
    return whole(tensor).float()  # so that it is rounded once


def fuse(
    module: Transformer, runs: Sequence[Sequence[int]], placement: Placement = HERE
) -> Transformer:
    """`module` itself, which stands as `placement` says, with every run fused in the place of its
    first layer and the others empty."""
    for run in runs:
        wide = fuse_ffns([module.blocks[layer].ffn for layer in run], module.config)
        module.replace(run[0], "ffn", wide)
        placement.split(wide, module.config)
        for layer in run[1:]:
            module.replace(layer, "ffn", Subblock(module.config, NoOp()))
    return module


def sharing(module: Transformer) -> Transformer:
    """Another model of the same subblocks, in whose blocks others can be put."""

    def own(one: nn.Module) -> nn.Module:
        copied = copy.copy(one)
        copied._modules = one._modules.copy()
        return copied

    after = own(module)
    after.layers = nn.ModuleList(own(block) for block in module.blocks)
    assert isinstance(after, Transformer)
    return after


def stage(config: FuseConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `fuse`: write the fused model, `tables/dependency.json` and `tables/fuse.jsonl`."""
    model = inputs["model"]
    placement = config.placement(model)
    layout, before = placement.layout, placement.load(model, frozen=True)
    batches, shape = config.heldout(inputs["data"]), before.config
    total, label = len(layout.mine(batches)) * len(before.blocks), layout.title(run.name)
    with Progress(label, total, "removals", quiet=run.quiet) as bar:
        dependency = dependency_matrix(before, batches, bar.advance, layout)
    runs = fusable_runs(shape, config.max_width, dependency, config.threshold, config.keep_last)
    if not runs:
        longest = max((len(stretch) for stretch in _stretches(shape)), default=0)
        needed = 3 if config.keep_last else 2
        raise FuseError(
            f"nothing to fuse: the longest run of FFNs without attention has {longest} layers and "
            f"{needed} are needed, within max_width and threshold. Search with attention = "
            '["noop"] in the space, or set keep_last = false'
        )
    after = fuse(sharing(before), runs, placement)
    kl = quality(before, after, batches, layout)["kl"]
    if layout.data_rank:
        return  # one tensor group measures alone
    old, new = map(median, in_turn([before, after], config))
    for layers in runs:
        run.say(f"layers {layers} -> one FFN of {_width(after.config, layers[0]):,} channels")
    run.say(
        f"KL to the model before: {kl:.4f}; prefill {old[0] * 1e3:.2f} -> {new[0] * 1e3:.2f} ms, "
        f"a decode step {old[1] * 1e3:.3f} -> {new[1] * 1e3:.3f} ms"
    )
    run.write_json("dependency", dependency.tolist())
    common: dict[str, Any] = {"kl": kl}
    for i, what in enumerate(("prefill_ms", "decode_ms")):
        common |= {f"{what}_before": old[i] * 1e3, what: new[i] * 1e3}
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
    if dist.is_main():
        with dist.computing_on(dist.HOST):  # in the precision that was stored
            fused = fuse(load_model(model, frozen=True, dtype=None), runs)
        save_model(fused, run.model_path, tokenizer_from=resolve(model))
