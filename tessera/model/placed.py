"""What a stage that runs models and trains none says of where they are. Torch-free until loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tessera.runs.recipe import Config

if TYPE_CHECKING:
    from tessera.model.placement import Placement

DtypeName = Literal["auto", "float32", "bfloat16"]


class PlacedConfig(Config):
    """dtype: "auto" is bfloat16 on an accelerator and float32 on a CPU. tensor: processes that hold
    one model together, each some of its heads and channels: the fewest whose memory it fits,
    unless given. The groups share the stage's work.
    """

    EXECUTION: ClassVar = frozenset({"tensor"})

    dtype: DtypeName = "auto"
    tensor: int | None = Field(default=None, ge=1)

    def placement(self, *models: str | Path) -> Placement:
        """For running these models, all of them in memory at once. Raises LayoutError."""
        from tessera.model.placement import for_inference

        return for_inference(*models, dtype=self.dtype, tensor=self.tensor)
