"""What a model is, as data: a list of blocks, each two subblocks, each named by a word.

    gqa-8   swiglu-14336        attention with 8 KV heads, FFN 14,336 wide
    noop    swiglu-14336        no attention at all

The word is the key everywhere: search space, file name in the block library, row of the score
and cost tables, variable of the integer program, entry of `config.json`. A parent is the
architecture whose words are all equal. Sizes are answered from here, without building anything
and without torch. Names are Hugging Face's, letter for letter.
"""

from __future__ import annotations

import abc
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class ConfigError(ValueError):
    """A configuration that does not describe a model; the text says what to change."""


@dataclass(frozen=True, slots=True)
class GQA:
    """Grouped-query attention with this many key/value heads."""

    num_key_value_heads: int


@dataclass(frozen=True, slots=True)
class SwiGLU:
    """Gated FFN of this width: `down(silu(gate(x)) * up(x))`."""

    intermediate_size: int


@dataclass(frozen=True, slots=True)
class Chain(abc.ABC):
    """Matrices one after another in the place of a subblock's operation, in either kind's.

    Whatever counts (parameters, operations, bytes, seconds) asks for `shapes`, and whatever
    computes multiplies by them in turn, so a new chain is one class and one line of `WORDS`.
    """

    @abc.abstractmethod
    def shapes(self, hidden_size: int) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each matrix, the first applied first; from C to C."""

    @abc.abstractmethod
    def factors(self, matrix: Tensor) -> Sequence[Tensor]:
        """First weights of these shapes, for a chain that stands in for `matrix` `(C, C)`."""

    def inner(self, hidden_size: int) -> int:
        """Numbers a token between the matrices."""
        return sum(rows for rows, _ in self.shapes(hidden_size)[:-1])


@dataclass(frozen=True, slots=True)
class Linear(Chain):
    """One `hidden_size x hidden_size` matrix in the place of the subblock's operation."""

    def shapes(self, hidden_size: int) -> tuple[tuple[int, int], ...]:
        return ((hidden_size, hidden_size),)

    def factors(self, matrix: Tensor) -> Sequence[Tensor]:
        return (matrix,)


@dataclass(frozen=True, slots=True)
class NoOp:
    """Nothing: no operation, no norm, no parameters; the residual passes unchanged."""


Attention = GQA | Chain | NoOp
FFN = SwiGLU | Chain | NoOp
Variant = GQA | SwiGLU | Chain | NoOp
KINDS = ("attention", "ffn")

# What a word begins with; the number behind it is the class's one field, where it has one.
WORDS: dict[str, type[Variant]] = {"gqa": GQA, "swiglu": SwiGLU, "linear": Linear, "noop": NoOp}
_WORD = re.compile(r"([a-z]+)(?:-([1-9][0-9]{0,8}))?")


def name(variant: Variant) -> str:
    """The word of a variant; `parse` is its inverse."""
    stem = next(stem for stem, known in WORDS.items() if known is type(variant))
    return "-".join([stem, *(str(getattr(variant, field.name)) for field in fields(variant))])


def parse(word: str) -> Variant:
    """The variant a word names. Raises ConfigError for anything but the forms of `WORDS`."""
    if (match := _WORD.fullmatch(word)) and (known := WORDS.get(match[1])):
        sizes = [int(match[2])] if match[2] else []
        if len(sizes) == len(fields(known)):
            return known(*sizes)
    examples = [_form(stem).replace("N", "8" if stem == "gqa" else "256") for stem in WORDS]
    near = difflib.get_close_matches(word, examples, 1, 0.5)
    hint = f"; did you mean something like {near[0]!r}?" if near else ""
    raise ConfigError(f"{word!r} names no subblock ({_forms(WORDS)}){hint}")


def _form(stem: str) -> str:
    return f"{stem}-N" if fields(WORDS[stem]) else stem


def _forms(stems: Iterable[str]) -> str:
    *others, last = map(_form, stems)
    return f"{', '.join(others)} or {last}"


def parse_kind(kind: str, word: str) -> Variant:
    """`parse`, refusing a word of the other kind (an FFN's word in an attention's place)."""
    variant = parse(word)
    wrong = SwiGLU if kind == "attention" else GQA
    if isinstance(variant, wrong):
        allowed = _forms(stem for stem, known in WORDS.items() if known is not wrong)
        raise ConfigError(f"{word!r} cannot stand for {kind}: allowed are {allowed}")
    return variant


@dataclass(frozen=True, slots=True)
class BlockConfig:
    """One layer: which attention, which FFN."""

    attention: Attention
    ffn: FFN

    @classmethod
    def of(cls, attention: str, ffn: str) -> BlockConfig:
        """The block of these words. Raises ConfigError."""
        return cls(parse_kind("attention", attention), parse_kind("ffn", ffn))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[str, Variant]]:
        """("attention", its variant), then ("ffn", its variant)."""
        return zip(KINDS, (self.attention, self.ffn), strict=True)

    @property
    def words(self) -> tuple[str, str]:
        return name(self.attention), name(self.ffn)

    def with_(self, kind: str, variant: Variant) -> BlockConfig:
        return replace(self, **{kind: variant})


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Rotary frequencies stretched for long context: `linear` or Llama 3.x's `llama3`."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer of the Llama class, homogeneous or not.

    `family` is the Hugging Face `model_type` it came from; what differs between families is
    spelled out in fields (biases, QK norm, sliding window), so code asks for the property and
    never for the family.
    """

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    head_dim: int
    blocks: tuple[BlockConfig, ...]
    family: str = "llama"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary embeddings need an even one")
        for layer, block in enumerate(self.blocks):
            heads = getattr(block.attention, "num_key_value_heads", 1)
            if self.num_attention_heads % heads:
                raise ConfigError(
                    f"layer {layer}: {name(block.attention)} does not divide the "
                    f"{self.num_attention_heads} query heads; use a divisor of them"
                )

    @property
    def num_hidden_layers(self) -> int:
        return len(self.blocks)

    @property
    def words(self) -> tuple[tuple[str, str], ...]:
        return tuple(block.words for block in self.blocks)

    @property
    def homogeneous(self) -> bool:
        """True when every layer has the same words, an attention and an FFN."""
        if len(set(self.blocks)) != 1:
            return False
        return isinstance(self.blocks[0].attention, GQA) and isinstance(self.blocks[0].ffn, SwiGLU)

    def with_words(self, words: Iterable[Sequence[str]]) -> ModelConfig:
        """This config with another architecture: one (attention, ffn) pair of words a layer."""
        return replace(self, blocks=tuple(BlockConfig.of(*pair) for pair in words))

    def subblock_params(self, kind: str, variant: Variant) -> int:
        """Parameters of one subblock, its norm included; 0 for `noop`."""
        match variant:
            case NoOp():
                return 0
            case Chain():
                return self.hidden_size + sum(
                    rows * columns for rows, columns in variant.shapes(self.hidden_size)
                )
            case SwiGLU(width):
                bias = (2 * width + self.hidden_size) if self.mlp_bias else 0
                return 3 * width * self.hidden_size + self.hidden_size + bias
            case GQA(heads):
                return self._attention_params(heads)

    def _attention_params(self, num_key_value_heads: int) -> int:
        q = self.num_attention_heads * self.head_dim
        kv = num_key_value_heads * self.head_dim
        weights = self.hidden_size * (2 * q + 2 * kv) + self.hidden_size
        bias = (q + 2 * kv if self.qkv_bias else 0) + (self.hidden_size if self.o_bias else 0)
        return weights + bias + (2 * self.head_dim if self.qk_norm else 0)

    def num_params(self) -> int:
        """Parameters of the whole model; a tied embedding counts once."""
        tables = 1 if self.tie_word_embeddings else 2
        outside = tables * self.vocab_size * self.hidden_size + self.hidden_size
        return outside + sum(
            self.subblock_params(kind, variant) for block in self.blocks for kind, variant in block
        )

    def kv_bytes(self, variant: Variant, bytes_per_value: float = 4) -> float:
        """Bytes of KV cache one token adds in a layer with this attention."""
        heads = variant.num_key_value_heads if isinstance(variant, GQA) else 0
        return 2 * heads * self.head_dim * bytes_per_value

    def kv_bytes_per_token(self, bytes_per_value: float = 4) -> float:
        """Bytes of KV cache one token adds over all layers."""
        return sum(self.kv_bytes(block.attention, bytes_per_value) for block in self.blocks)


def uniform(attention: str, ffn: str, layers: int) -> tuple[BlockConfig, ...]:
    """`layers` equal blocks of these words."""
    return (BlockConfig.of(attention, ffn),) * layers
