"""Perplexity of a model on a text, in windows of its context with half of each as context.

    ppl = exp(-1/N Σ log p(t_i | t_<i))        bits a byte = Σ -log2 p / bytes of the text

Bits a byte compare models of different tokenizers; perplexities do not.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tessera.eval.task import EvalError

WINDOW = 4096


def perplexity(model: Path | None, place: str, limit: int | None = None) -> dict[str, Any]:
    """The row of the task `perplexity`; limit: documents. Raises EvalError without a text."""
    from tessera.data.readers import Text, expand, read
    from tessera.data.tokenizer import load_tokenizer
    from tessera.generate.torch_engine import TorchEngine
    from tessera.model.weights import load_model

    if model is None:
        raise EvalError(
            "perplexity needs the model itself; an endpoint gives no log-probs of a text"
        )
    if not place:
        raise EvalError(
            "perplexity: give its text, --data perplexity=FILE (.txt, .jsonl, .parquet)"
        )
    tokenizer, module = load_tokenizer(model), load_model(model, frozen=True)
    engine = TorchEngine(module)
    window = min(WINDOW, module.config.max_position_embeddings)
    total, tokens, size, documents = 0.0, 0, 0, 0
    for path in expand([place]):
        for one in read(path):
            if not isinstance(one, Text):
                continue
            if limit is not None and documents >= limit:
                break
            documents += 1
            ids = tokenizer.encode(one.text, bos=True)
            logprobs = _logprobs(engine, ids, window)
            total, tokens = total + math.fsum(logprobs), tokens + len(logprobs)
            size += len(one.text.encode())
    if not tokens:
        raise EvalError(f"perplexity: {place} holds no text")
    return {
        "task": "perplexity",
        "mode": "text",
        "metric": "perplexity",
        "value": math.exp(-total / tokens),
        "bits_per_byte": -total / math.log(2) / size,
        "items": documents,
        "tokens": tokens,
    }


def _logprobs(engine: Any, ids: list[int], window: int) -> list[float]:
    """Of every token but the first; each sees at least half a window before it where there is so
    much."""
    found = engine.score([ids[:window]])[0]
    stride, end = max(1, window // 2), window
    while end < len(ids):
        start = end - (window - stride)
        part = engine.score([ids[start : start + window]])[0]
        found += part[window - stride - 1 :]
        end = start + window
    return found
