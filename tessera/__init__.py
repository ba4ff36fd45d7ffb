"""tessera: an open Llama-class checkpoint goes in, a faster one comes out."""

from __future__ import annotations

__version__ = "0.1.0"
