"""An engine over stock vLLM, in a process and an environment of its own.

    module --sync--> a directory in memory, with checksums --> vLLM reads it in place
    generate, score: token ids through a pipe

The directory is what `tessera export` writes: a stock one where the layers are equal, DeciLM where
they differ. What vLLM cannot load is refused before anything starts. Log-probs are the model's
own, before temperature and filters, as every engine's are.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, field_validator

from tessera.disk import writing
from tessera.generate.engine import (
    ClosedError,
    Completion,
    GenerationError,
    Progress,
    SamplingParams,
    check_sequences,
)
from tessera.generate.vllm_process import DiedError, Process, find_python
from tessera.model import decilm
from tessera.model.padding import widen
from tessera.model.saving import write_model
from tessera.model.servable import refusals
from tessera.model.transformer import Transformer
from tessera.recipe import Config

OURS = {"model", "dtype", "quantization", "enforce_eager", "max_model_len", "max_num_seqs"}
MEMORY = Path("/dev/shm")
PREFIX = "tessera-vllm-"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class VLLMConfig(Config):
    """How vLLM is run.

    python: that of an environment with vLLM; without, this one's or `.venv-vllm`'s. dtype: "auto"
    is float32 on a CPU and bfloat16 on a GPU. quantization: "fp8" rounds weights as they are
    loaded, on GPUs that have it. memory: share of the GPU for weights and cache; on a CPU,
    `cache_gib` says how large the cache is, and left out it fits the queue up to 4 GiB.
    arguments: further ones of `vllm.LLM`, such as tensor_parallel_size.
    """

    python: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["fp8"] | None = None
    enforce_eager: bool = False
    memory: float = Field(default=0.5, gt=0, le=1)
    cache_gib: PositiveInt | None = None
    max_model_len: PositiveInt | None = None
    sleep: bool = True
    arguments: dict[str, bool | int | float | str] = {}

    @field_validator("arguments")
    @classmethod
    def _ours(cls, value: dict) -> dict:
        if taken := OURS & value.keys():
            raise ValueError(f"{', '.join(sorted(taken))}: this table has a key of its own for it")
        return value


class VLLMEngine:
    """An `Engine` that stock vLLM computes; see the module's docstring.

    batch: samples decoded together. Raises GenerationError for a model that vLLM cannot load,
    RunError where there is no vLLM. A process that dies is started once more with the weights of
    the last `sync`; a question that kills it twice raises DiedError (a FailureError) with its last
    words. A thinking budget is not among vLLM's own options: GenerationError.
    """

    def __init__(
        self, module: Transformer, config: VLLMConfig | None = None, *, batch: int = 256
    ) -> None:
        config = config or VLLMConfig()
        self.settings, self.batch, self.version = config, batch, 0
        self.python = find_python(config.python)
        self.config, self.cuda = module.config, torch.cuda.is_available()
        if reasons := refusals(module.config, "vllm" if self.cuda else "vllm-cpu"):
            raise GenerationError(f"vLLM cannot load this model: {'; '.join(reasons)}")
        self.room = config.max_model_len or module.config.max_position_embeddings
        self._place = _folder()
        self._files: dict[str, int] = {}
        self._process: Process | None = None
        self._closed = False
        self.info: dict[str, str] = {}
        self.sync(module, 0)

    @property
    def dtype(self) -> torch.dtype:
        """What vLLM computes in."""
        chosen = self.settings.dtype
        if chosen == "auto":
            return torch.bfloat16 if self.cuda else torch.float32
        return DTYPES[chosen]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        keys: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`. Seeds are vLLM's: the samples are not those of another engine."""
        check_sequences(prompts, "prompt", self.config.vocab_size, self.room - 1)
        if params.thinking is not None:
            raise GenerationError(
                "vLLM's engine takes no thinking budget; use tessera's own, or max_tokens"
            )
        keys = range(len(prompts)) if keys is None else keys
        if len(keys) != len(prompts):
            raise GenerationError(f"{len(prompts)} prompts, but {len(keys)} keys: give one each")
        told, total = None, len(prompts) * params.n
        if progress is not None:
            told = lambda done: progress(done, total)  # noqa: E731
        answer = self._ask(
            "generate",
            told,
            prompts=[list(prompt) for prompt in prompts],
            seeds=[seed_of(params.seed, key) for key in keys],
            sampling=_sampling(params),
        )
        return [
            [self._completion(one, params.logprobs) for one in of_prompt]
            for of_prompt in answer["completions"]
        ]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Engine.score`."""
        check_sequences(sequences, "sequence", self.config.vocab_size, self.room - 1)
        return self._ask("score", sequences=[list(one) for one in sequences])["scores"]

    def sync(self, module: Transformer, version: int) -> None:
        """See `Engine.sync`: written to memory, summed, read by vLLM in place."""
        if module.config != self.config:
            raise GenerationError("sync takes weights of the model that the engine was made for")
        self._files = publish(module, self._place / "model", self.dtype)
        if self._process is None:
            self._start()
        else:
            self._ask("load", **self._where())
        self.version = version

    def sleep(self) -> None:
        """Give the GPU's memory to the trainer until `wake`; on a CPU this does nothing."""
        if self._can_sleep:
            self._ask("sleep")

    def wake(self) -> None:
        """Take the memory back, with the weights of the last `sync`."""
        if self._can_sleep:
            self._ask("wake")
            self._ask("load", **self._where())

    def close(self) -> None:
        """End vLLM's process and free the memory."""
        if self._process is not None:
            self._process.close()
        self._process, self._closed = None, True
        shutil.rmtree(self._place, ignore_errors=True)

    @property
    def _can_sleep(self) -> bool:
        return self.cuda and self.settings.sleep

    def _where(self) -> dict[str, Any]:
        return {"model": str(self._place / "model"), "checksums": self._files}

    def _start(self) -> None:
        self._process = Process(self.python, self._environment())
        self.info = self._process.ask("open", arguments=self._arguments(), **self._where())

    def _ask(self, do: str, told: Callable[[int], None] | None = None, **keys: Any) -> dict:
        """An answer, from a second process where the first dies over it."""
        if self._closed:
            raise ClosedError("the engine is closed: make another")
        try:
            if self._process is None:
                self._start()
            assert self._process is not None
            return self._process.ask(do, told, **keys)
        except DiedError:
            self._bury()
        self._start()
        try:
            assert self._process is not None
            return self._process.ask(do, told, **keys)
        except DiedError:
            self._bury()
            raise

    def _bury(self) -> None:
        if self._process is not None:
            self._process.close()
        self._process = None

    def _arguments(self) -> dict[str, Any]:
        told: dict[str, Any] = {
            "trust_remote_code": True,  # ours: the code that reads the exported config
            "skip_tokenizer_init": True,
            "dtype": str(self.dtype).removeprefix("torch."),
            "enforce_eager": self.settings.enforce_eager or not self.cuda,
            "max_model_len": self.room,
            "max_num_seqs": self.batch,
            "max_logprobs": -1,
            "enable_prefix_caching": True,  # the samples of one prompt share it
        }
        if self.cuda:
            told |= {"gpu_memory_utilization": self.settings.memory}
            told |= {"enable_sleep_mode": self.settings.sleep}
        if self.settings.quantization:
            told["quantization"] = self.settings.quantization
        return told | self.settings.arguments

    def _environment(self) -> dict[str, str]:
        if self.cuda:
            given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            seen = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
            return {"CUDA_VISIBLE_DEVICES": seen[torch.cuda.current_device()]}
        return {
            "VLLM_CPU_KVCACHE_SPACE": str(self.settings.cache_gib or self._cache_gib()),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }

    def _cache_gib(self) -> int:
        """Whole GiB that hold every sample at full length, at most 4."""
        needed = self.batch * self.room * self.config.kv_bytes_per_token(self.dtype.itemsize)
        return min(4, 1 + int(needed // 2**30))

    def _completion(self, sample: Sequence[Any], likeliest: int) -> Completion:
        ids, logprobs, reason, rows = sample
        top = [[(int(i), p) for i, p in row] for row in rows] if likeliest else []
        for row in top:
            row.sort(key=lambda pair: -pair[1])
        return Completion(
            ids,
            logprobs,
            "stop" if reason == "stop" else "length",
            self.version,
            [row[:likeliest] for row in top],
        )


def seed_of(seed: int, key: int) -> int:
    """vLLM's seed of a prompt: a hash of ours, for its own are added to and so would meet."""
    digest = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def _sampling(params: SamplingParams) -> dict[str, Any]:
    return {
        "n": params.n,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "stop_token_ids": list(params.stop_token_ids),
        "logprobs": params.logprobs,
    }


def publish(module: Transformer, directory: Path, dtype: torch.dtype) -> dict[str, int]:
    """Writes a model for vLLM; CRC-32 of each file of weights by its name.

    Raises WriteError where the memory is full.
    """
    stock = module.config.homogeneous
    with writing(directory):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        shown = untied(module if stock else widen(module))
        write_model(shown, directory, dtype=dtype)
        if not stock:
            decilm.write_config(shown.config, directory, str(dtype).removeprefix("torch."))
    return {file.name: checksum(file) for file in sorted(directory.glob("*.safetensors"))}


def untied(module: Transformer) -> Transformer:
    """The same function with a head of its own: vLLM loads tied weights anew into one of the two
    places only (0.32, `model_loader/reload`)."""
    if not module.config.tie_word_embeddings:
        return module
    with torch.device("meta"):
        copy = Transformer(replace(module.config, tie_word_embeddings=False))
    state = {**module.state_dict(), "lm_head.weight": module.head.detach().clone()}
    copy.load_state_dict(state, assign=True)
    return copy.requires_grad_(False)


def checksum(file: Path) -> int:
    """CRC-32, block by block."""
    found = 0
    with file.open("rb") as handle:
        while block := handle.read(2**24):
            found = zlib.crc32(block, found)
    return found


def _folder() -> Path:
    """A directory in memory where there is one; what killed processes left is removed."""
    parent = MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    for left in parent.glob(f"{PREFIX}*-*"):
        owner = left.name.removeprefix(PREFIX).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))
