"""Servers of small random models, in this process, for tests that ask them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from tessera.data.tokenizer import Tokenizer, train_bpe
from tessera.model.checkpoint import save_model
from tests import tiny

TEXTS = [
    "plain words, and a second sentence.\n\nA paragraph with 東京タワー and 👩🏽‍🚀.",
    '{"name": "add", "arguments": {"a": 1, "b": [true, null]}}',
    "<think>\nhm.\n</think>\n\nyes <tool_call> naïve façade",
]


def saved(
    home: Path, template: str = "", tokenizer: Tokenizer | None = None, seed: int = 0
) -> Path:
    """A directory with a random model and its tokenizer. template: the built-in one if empty."""
    tokenizer = tokenizer or train_bpe(TEXTS * 8, 380, chat=True)
    shape = tiny.config(
        tiny.PARENT,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_ids,
        max_position_embeddings=4096,
    )
    save_model(tiny.model(shape, seed), home)
    tokenizer.save(home)
    if template:
        (home / "chat_template.jinja").write_text(template)
    return home


@contextlib.contextmanager
def answering(model: Path, **options: Any) -> Iterator[str]:
    """The address of a server, for as long as the body runs."""
    from tessera.serve.app import ServeConfig, build, serving

    with serving(str(model), ServeConfig(name="tiny", **options)) as one:
        config = uvicorn.Config(build(one), port=0, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            port = server.servers[0].sockets[0].getsockname()[1]
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.should_exit = True
            thread.join()
