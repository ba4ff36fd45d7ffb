"""What the export tests share: random models, greedy decoding without a cache, llama.cpp."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tessera.model.config import ModelConfig, RopeScaling
from tessera.model.transformer import Transformer

LLAMA3 = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=64)
HETEROGENEOUS = (
    ("gqa-2", "swiglu-512"),
    ("noop", "swiglu-256"),
    ("gqa-8", "swiglu-768"),
    ("noop", "noop"),
    ("gqa-1", "swiglu-128"),
    ("gqa-4", "swiglu-300"),
)
EQUAL = (("gqa-4", "swiglu-512"),) * 3
PROMPTS = [[1, 5, 9, 20, 33, 7], [1, 250, 100], [1, 44, 45, 46, 47, 48, 49, 50, 51], [1, 2]]


def random_model(
    words: Sequence[Sequence[str]] = HETEROGENEOUS, seed: int = 0, **changes: Any
) -> Transformer:
    """A model with weights so large (std 0.3 / sqrt fan-in times 4) that no token is a near tie."""
    fields: dict[str, Any] = dict(
        vocab_size=320,
        hidden_size=256,
        num_attention_heads=8,
        head_dim=32,
        rope_theta=10_000.0,
        rope_scaling=LLAMA3,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=(2,),
        blocks=(),
    )
    config = ModelConfig(**(fields | changes)).with_words(words)
    module = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, 2.0 * weight.shape[1] ** -0.5, generator=generator)
            else:
                weight.uniform_(0.5, 1.5, generator=generator)
    return module.requires_grad_(False)


@torch.no_grad()
def greedy(module: Transformer, prompt: Sequence[int], new: int) -> tuple[list[int], list[float]]:
    """Greedy tokens, an end token included, and their log-probabilities; a forward a token."""
    tokens, logprobs = list(prompt), []
    for _ in range(new):
        row = module.logits(module(torch.tensor([tokens]))[0, -1]).log_softmax(-1)
        tokens.append(int(row.argmax()))
        logprobs.append(float(row.max()))
        if tokens[-1] in module.config.eos_token_id:
            break
    return tokens[len(prompt) :], logprobs


def write_byte_tokenizer(directory: Path, vocab_size: int = 320) -> None:
    """A byte-level BPE `tokenizer.json` with `<s>` and `</s>`, trained on nothing: 258 tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True) for t in ("<unk>", "<s>", "<end>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["Once upon a time there was a little girl named Lily.", "the dog ran to the park"]
    tokenizer.train_from_iterator(texts * 4, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    settings |= {"unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


_SERVER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
params.hostnames, params.port = ["127.0.0.1"], int(sys.argv[2])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
print("ready", flush=True)
time.sleep(600)
"""


def _aligned(tokens: list[int], entries: list[dict[str, Any]]) -> list[float | None]:
    """The server leaves out tokens that end inside a character: entries by token, None there."""
    logprobs: list[float | None] = []
    rest = list(entries)
    for token in tokens:
        given = bool(rest) and rest[0]["id"] == token
        logprobs.append(rest.pop(0)["logprob"] if given else None)
    return logprobs


class LlamaCpp:
    """A llama-server of the xllamacpp wheel, in a process of its own because it may abort."""

    def __init__(
        self, path: Path, log: Path, script: str = _SERVER, more: Sequence[str] = ()
    ) -> None:
        """script: what it runs, given path, port and `more`."""
        self.port = free_port()
        self.log = log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", script, str(path), str(self.port), *more],
                stdout=errors,
                stderr=errors,
            )

    def post(self, route: str, body: dict[str, Any], seconds: float = 60) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{route}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=seconds) as response:
            return json.load(response)

    def wait(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError, urllib.error.URLError):
                self.post("/tokenize", {"content": "a"})
                return
            time.sleep(0.1)
        raise RuntimeError(f"llama.cpp did not start:\n{self.log.read_text()[-2000:]}")

    def complete(self, prompt: Sequence[int], new: int) -> tuple[list[int], list[float | None]]:
        """Greedy tokens and their log-probabilities (None where not given) after token ids."""
        answer = self.post(
            "/completion",
            {
                "prompt": list(prompt),
                "n_predict": new,
                "temperature": 0,
                "samplers": ["top_k"],
                "top_k": 1,
                "n_probs": 1,
                "return_tokens": True,
                "cache_prompt": False,
            },
        )
        return answer["tokens"], _aligned(answer["tokens"], answer["completion_probabilities"])

    def tokenize(self, text: str) -> list[int]:
        return self.post("/tokenize", {"content": text, "add_special": True})["tokens"]


@contextlib.contextmanager
def llama_cpp(path: Path, log: Path) -> Iterator[LlamaCpp]:
    server = LlamaCpp(path, log)
    try:
        server.wait()
        yield server
    finally:
        server.process.kill()
        server.process.wait()
