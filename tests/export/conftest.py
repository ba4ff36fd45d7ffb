"""The child that export tests write."""

from __future__ import annotations

from pathlib import Path

import pytest

from tessera.model.checkpoint import save_model
from tests.export.interop import random_model, write_byte_tokenizer


@pytest.fixture
def child(tmp_path: Path) -> Path:
    """A model directory with a tokenizer, as a run writes it."""
    source = tmp_path / "child"
    save_model(random_model(), source)
    write_byte_tokenizer(source)
    return source
