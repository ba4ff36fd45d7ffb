"""What every exporter raises."""

from __future__ import annotations


class ExportError(ValueError):
    """A model that cannot be exported as asked; the text says why and what to do instead."""
