"""Which layers of the parent a process holds when units are trained, and who holds the others.

    rank = r · ranges + s        range s: neighbouring layers of the parent, their units and moments
                                 r: reads rows of its own; the r share each unit's moments (FSDP)

A unit needs the parent's activations at its own layer alone. So a batch passes through all layers
once, forward: each process sends what leaves its last layer on and trains its units meanwhile.
Nothing comes back, and memory of parent, units and moments falls with the number of ranges.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tessera import dist
from tessera.model.config import GQA, Chain, ModelConfig, SwiGLU, Variant, parse
from tessera.model.placement import LayoutError, ParallelConfig
from tessera.puzzle.space import Unit
from tessera.train.flops import Cost, block_cost, subblock_cost


@dataclass(frozen=True)
class Held:
    """The layers of one process. before, after: the ranks that hold the layers next to them."""

    layers: range
    before: int | None = None
    after: int | None = None

    def until(self, depth: int) -> Held:
        """Those of the first `depth` layers: the others do not run."""
        stop = min(self.layers.stop, depth)
        return replace(
            self,
            layers=range(self.layers.start, stop),
            after=None if self.layers.stop >= depth else self.after,
        )


def units_cost(parent: ModelConfig, units: Iterable[Unit]) -> Cost:
    """Operations of training: three times a unit's own, but no gradient of what enters, and for an
    attention the FFN behind it, forward and for the gradient of what enters that."""
    costs: list[Cost] = []
    for unit in units:
        costs += 3 * [subblock_cost(parent, parse(word)) for _, word in unit.parts]
        costs.append(Cost(-_entered(parent, parse(unit.parts[0][1]))))
        if unit.kind == "attention":
            costs += 2 * [subblock_cost(parent, parent.blocks[unit.layer].ffn)]
    return sum(costs, Cost())


def _entered(parent: ModelConfig, variant: Variant) -> int:
    """Operations of a token in the matrices that its normalised state enters."""
    hidden = parent.hidden_size
    match variant:
        case GQA(num_key_value_heads=kv):
            return 2 * hidden * (parent.num_attention_heads + 2 * kv) * parent.head_dim
        case SwiGLU(intermediate_size=width):
            return 4 * hidden * width
        case Chain():
            rows, columns = variant.shapes(hidden)[0]
            return 2 * rows * columns
        case _:
            return 0


def layer_ranges(
    parent: ModelConfig, units: Sequence[Unit], parallel: ParallelConfig, processes: int
) -> list[range]:
    """The ranges of layers that processes hold, of about equal work.

    As many as `parallel.shard` says; else the most that take hardly longer than the fastest number.
    Raises LayoutError for a number that does not divide the processes, or for tensor parallelism.
    """
    if max(parallel.tensor, parallel.context, parallel.pipeline) > 1:
        raise LayoutError(
            "parallel.tensor, parallel.context and parallel.pipeline do not apply to block-wise "
            "distillation, whose processes hold whole layers; leave them at 1"
        )
    count = len(parent.blocks)
    work = [block_cost(parent, layer).token for layer in range(count)]
    for unit in units:
        work[unit.layer] += units_cost(parent, [unit]).token
    possible = [n for n in range(1, min(count, processes) + 1) if processes % n == 0]
    if parallel.shard is not None and parallel.shard not in possible:
        raise LayoutError(
            f"parallel.shard = {parallel.shard}: {processes} processes can hold the {count} layers "
            f"in {', '.join(map(str, possible))} parts"
        )
    chosen = possible if parallel.shard is None else [parallel.shard]
    found = [_ranges(work, number) for number in chosen]
    seconds = [max(sum(work[r.start : r.stop]) for r in one) * len(one) for one in found]
    return [one for one, s in zip(found, seconds, strict=True) if s <= SLOWER * min(seconds)][-1]


SLOWER = 1.25  # than the fastest number of ranges: what less memory may cost


def _ranges(work: Sequence[float], count: int) -> list[range]:
    """`count` neighbouring ranges, none empty, that end where their share of the work is done."""
    done = list(itertools.accumulate(work, initial=0))
    ends = [0]
    for number in range(1, count):
        wanted = done[-1] * number / count
        near = bisect.bisect_left(done, wanted)
        near -= near > 0 and wanted - done[near - 1] < done[near] - wanted
        ends.append(min(max(near, ends[-1] + 1), len(work) - (count - number)))
    return [range(a, b) for a, b in itertools.pairwise([*ends, len(work)])]


def held_here(ranges: Sequence[range]) -> Held:
    """The part of this process."""
    rank, last = dist.rank(), len(ranges) - 1
    number = rank % len(ranges)
    return Held(
        ranges[number],
        rank - 1 if number > 0 else None,
        rank + 1 if number < last else None,
    )


def passes(
    units: Sequence[Unit], ranges: Sequence[range], layers_at_once: int | None
) -> list[list[Unit]]:
    """The units of each pass over the data: `layers_at_once` layers of every range, or all."""
    groups = [layer_groups(own, layers_at_once) for own in by_range(units, ranges)]
    return [list(itertools.chain(*one)) for one in itertools.zip_longest(*groups, fillvalue=())]


def by_range(units: Iterable[Unit], ranges: Sequence[range]) -> list[list[Unit]]:
    """The units of each range."""
    number = {layer: i for i, layers in enumerate(ranges) for layer in layers}
    found: list[list[Unit]] = [[] for _ in ranges]
    for unit in units:
        found[number[unit.layer]].append(unit)
    return found


def layer_groups(units: Sequence[Unit], layers_at_once: int | None) -> list[list[Unit]]:
    """Units by layer, `layers_at_once` layers that have any together; all of them for None."""
    layers = sorted({unit.layer for unit in units})
    step = layers_at_once or max(1, len(layers))
    number = {layer: place // step for place, layer in enumerate(layers)}
    groups: list[list[Unit]] = [[] for _ in range(-(-len(layers) // step))]
    for unit in units:
        groups[number[unit.layer]].append(unit)
    return groups
