"""What a training takes on each device, by part, under a layout.

    weights, gradients, moments   4, 4 and 8 bytes a trained parameter, split over shards: exact
    teacher                       a frozen model in the arithmetic's type, split over shards
    gathered                      two blocks and the root group whole, their gradients, and one
                                  group in float32 on its way into the reduction
    activations                   what the layers keep of one microbatch (model/layers.py, fused.py)
    loss                          chunks of logits (train/losses.py)
    engine                        whole weights in float32 on each device, of a policy that answers
    reserve                       CUDA context, NCCL, and what an allocator cannot fill

Splits follow `train/parallel.py`: what tensor parallelism leaves whole is whole here. Units are
built whole on each process before they are sharded (`puzzle/bld.py`): the part `units whole`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from tessera.devices import GB
from tessera.model.config import BlockConfig, ModelConfig, Variant
from tessera.planning.work import Job
from tessera.puzzle.library import Key, layer_groups
from tessera.puzzle.memory import kept_numbers, unit_params
from tessera.train.activations import kept, working
from tessera.train.losses import PORTIONS
from tessera.train.parallel import splits

BYTES = {"float32": 4, "bfloat16": 2}
# Our own assumption: nothing was run on a GPU yet. Half a gigabyte of context, NCCL's buffers, and
# a twentieth of the device that an allocator splits off.
CONTEXT, SPLIT = 2 * GB, 0.05


@dataclass(frozen=True)
class Layout:
    """A point of the search: `ParallelConfig` on a cluster."""

    replicate: int
    shard: int
    tensor: int
    gradient_checkpointing: bool

    @property
    def data(self) -> int:
        return self.replicate * self.shard

    def told(self) -> str:
        """The recipe's words for it."""
        words = f"tensor = {self.tensor}, shard = {self.shard}"
        return f"{{ {words}, gradient_checkpointing = {str(self.gradient_checkpointing).lower()} }}"


@dataclass(frozen=True)
class Parts:
    """Bytes on the fullest device."""

    weights: float = 0.0
    gradients: float = 0.0
    moments: float = 0.0
    teacher: float = 0.0
    gathered: float = 0.0
    activations: float = 0.0
    loss: float = 0.0
    engine: float = 0.0
    units_whole: float = 0.0
    reserve: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def memory(job: Job, layout: Layout, device_memory: float, accelerator: bool = True) -> Parts:
    """The parts of a job. accelerator: False leaves the reserve out and takes a CPU's chunks."""
    parts = _units(job, layout) if job.student is None else _model(job, layout, accelerator)
    reserve = CONTEXT + SPLIT * device_memory if accelerator else 0.0
    return Parts(**{**asdict(parts), "reserve": reserve})


def split_params(config: ModelConfig, block: BlockConfig, ways: int) -> int:
    """Parameters of a block on one of `ways` tensor-parallel processes (`parallel.py`)."""
    total = 0
    for kind, variant in (("attention", block.attention), ("ffn", block.ffn)):
        whole = config.subblock_params(kind, variant)
        if not splits(config, variant, ways):
            total += whole
            continue
        norm = config.hidden_size
        total += norm + -(-(whole - norm) // ways)
    return total


def root_params(config: ModelConfig) -> int:
    """Embedding, last norm and head."""
    return config.num_params() - sum(
        config.subblock_params(kind, variant)
        for block in config.blocks
        for kind, variant in (("attention", block.attention), ("ffn", block.ffn))
    )


def held_params(config: ModelConfig, tensor: int) -> int:
    """Parameters of a model on one tensor-parallel process, before shards."""
    return root_params(config) + sum(split_params(config, b, tensor) for b in config.blocks)


def _variants(config: ModelConfig) -> list[Variant]:
    return [variant for block in config.blocks for variant in (block.attention, block.ffn)]


def _model(job: Job, layout: Layout, accelerator: bool) -> Parts:
    student, train = job.student, job.train
    assert student is not None
    size, n = BYTES[train.dtype], train.microbatch_tokens
    held = held_params(student, layout.tensor) / layout.shard
    ways = layout.tensor
    blocks = [kept(student, b.attention, ways) + kept(student, b.ffn, ways) for b in student.blocks]
    inputs = student.hidden_size * sum(1 for numbers in blocks if numbers)
    numbers = inputs + max(blocks) if layout.gradient_checkpointing else sum(blocks)
    states = job.teacher.hidden_size * (len(job.teacher.blocks) + 1) if job.teacher else 0
    numbers += working(student, _variants(student), ways) + (states if job.states else 0)
    sharded = layout.data > 1 or train.dtype != "float32"
    return Parts(
        weights=4 * held,
        gradients=4 * held,
        moments=8 * held,
        teacher=_teacher(job, layout, size, sharded),
        gathered=_gathered(student, layout.tensor, size) if sharded else 0.0,
        activations=size * n * numbers,
        # A reference's log-probs are taken before the policy's: its logits are gone by then.
        loss=loss_bytes(student, n, size, bool(job.teacher and not job.experience), accelerator),
        engine=4 * student.num_params() if job.experience and job.experience.engine else 0.0,
    )


def _teacher(job: Job, layout: Layout, size: int, sharded: bool) -> float:
    if job.teacher is None:
        return 0.0
    own = size * held_params(job.teacher, layout.tensor) / layout.shard
    return own + (_whole_groups(job.teacher, layout.tensor, size) if sharded else 0.0)


def _largest_block(config: ModelConfig, tensor: int) -> int:
    return max(split_params(config, block, tensor) for block in config.blocks)


def _whole_groups(config: ModelConfig, tensor: int, size: int) -> float:
    """Two blocks, one at work and one on its way, and the root group."""
    return size * (2 * _largest_block(config, tensor) + root_params(config))


def _gathered(config: ModelConfig, tensor: int, size: int) -> float:
    block, root = _largest_block(config, tensor), root_params(config)
    gradients, reducing = size * (block + root), 4 * max(block, root)
    return _whole_groups(config, tensor, size) + gradients + reducing


def loss_bytes(config: ModelConfig, tokens: int, size: int, two: bool, accelerator: bool) -> float:
    """Hidden states and their gradient, and the chunks of logits of one model or two.

    A model's logits are made in the arithmetic's type and copied to float32, unless they are;
    slopes are kept a slab, and probabilities of the parent a tile.
    """
    portions = PORTIONS["cuda" if accelerator else "cpu"]
    rows = max(1, min(tokens, portions.chunk // config.vocab_size))
    slab = min(tokens, max(rows, portions.slab))
    logits = (4 + (size if size < 4 else 0)) * rows * config.vocab_size
    slopes = (4 + (size if size < 4 else 0)) * slab * config.vocab_size
    tile = 4 * min(portions.tile, rows * config.vocab_size) if two else 0
    hidden = 2 * size * tokens * config.hidden_size
    return hidden + logits * (2 if two else 1) + slopes + tile


def _units(job: Job, layout: Layout) -> Parts:
    """Block-wise distillation: float32, units of the largest group of layers, sharded parent."""
    parent, train = job.config, job.train
    groups = list(_groups(job))
    units = max(sum(unit_params(parent, kind, word) for _, kind, word in g) for g in groups)
    sharded = layout.data > 1
    return Parts(
        weights=4 * units / layout.shard,
        gradients=4 * units / layout.shard,
        moments=8 * units / layout.shard,
        teacher=4 * parent.num_params() / layout.shard
        + (_whole_groups(parent, 1, 4) if sharded else 0.0),
        activations=4 * train.microbatch_tokens * kept_numbers(parent, job.units),
        units_whole=4 * units if sharded else 0.0,
    )


def _groups(job: Job) -> Iterable[list[Key]]:
    layers = len({layer for layer, _, _ in job.units})
    return layer_groups(job.units, -(-layers // job.passes))
