"""Which engine a stage generates with: tessera's own, or stock vLLM. Torch-free until opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt, field_validator

from tessera import dist
from tessera.model.placed import PlacedConfig
from tessera.runs.recipe import Config

if TYPE_CHECKING:
    from tessera.generate.engine import Engine
    from tessera.model.placement import Placement
    from tessera.model.transformer import Transformer

# Arguments of vllm.LLM that the engine sets itself.
OURS = {"model", "dtype", "quantization", "enforce_eager", "max_model_len", "max_num_seqs"}
OURS |= {"tensor_parallel_size"}  # the stage's `tensor`


class VLLMConfig(Config):
    """How vLLM is run."""

    python: str | None = None  # of an environment with vLLM; left out, this one's or .venv-vllm's
    quantization: Literal["fp8"] | None = None  # rounds weights as they are loaded, on GPUs
    enforce_eager: bool = False
    memory: float = Field(default=0.5, gt=0, le=1)  # share of a GPU for weights and cache
    cache_gib: PositiveInt | None = None  # of a CPU; left out, it fits the queue up to 4 GiB
    max_model_len: PositiveInt | None = None
    sleep: bool = True  # gives a GPU's memory to the trainer between rollouts
    plugin: bool = False  # tessera's classes for layers that stock vLLM does not build
    arguments: dict[str, bool | int | float | str] = {}  # further ones of vllm.LLM

    @field_validator("arguments")
    @classmethod
    def _ours(cls, value: dict) -> dict:
        if taken := OURS & value.keys():
            raise ValueError(f"{', '.join(sorted(taken))}: this table has a key of its own for it")
        return value


class EngineChoice(Config):
    """engine: tessera's own engine generates, or stock vLLM, run as `vllm` says."""

    engine: Literal["tessera", "vllm"] = "tessera"
    vllm: VLLMConfig = VLLMConfig()


class InferenceConfig(EngineChoice, PlacedConfig):
    """Of a stage that answers with a model that it does not train."""

    def open_engine(self, model: str | Path, batch: int) -> Engine:
        """`open_engine` on a model from disk, where and in the precision that the stage says."""
        placement = self.placement(model)
        if self.engine != "vllm":
            return open_engine(self, placement.load(model, frozen=True), batch)
        with dist.computing_on(dist.HOST):  # the device's memory is vLLM's, which reads files
            module = placement.load(model, frozen=True)
        return open_engine(self, module, batch)


def open_engine(
    config: EngineChoice, module: Transformer, batch: int, placement: Placement | None = None
) -> Engine:
    """The engine on these weights, `batch` samples at a time; `close` it.

    placement: of a copy for generation; that of the module unless given. Raises GenerationError
    and RunError where vLLM is chosen and cannot be had.
    """
    if config.engine == "vllm":
        from tessera.vllm.engine import VLLMEngine

        return VLLMEngine(module, config.vllm, batch=batch, placement=placement)
    from tessera.generate.torch_engine import TorchEngine

    return TorchEngine(module, max_batch_size=batch, placement=placement)
