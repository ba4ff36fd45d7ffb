"""An engine over stock vLLM, in a process and an environment of its own.

module --sync--> a directory in memory, with checksums --> vLLM reads it in place
generate, score: token ids through a pipe
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from tessera import dist
from tessera.export import decilm
from tessera.export.engines import Format, refusals
from tessera.export.padding import widen
from tessera.generate.engine import (
    ClosedError,
    Completed,
    Completion,
    GenerationError,
    GenerationRequest,
    SamplingParams,
    Working,
    check_sequences,
    generate,
)
from tessera.model.checkpoint import Checkpoint, write_model
from tessera.model.config import ModelConfig
from tessera.model.parallel import tensor_group
from tessera.model.placement import Placement
from tessera.model.transformer import Transformer
from tessera.runs.files import FailureError, RunError, writing
from tessera.vllm.config import VLLMConfig
from tessera.vllm.worker import checksum

T = TypeVar("T")
WORKER = Path(__file__).with_name("worker.py")
ENVIRONMENT = Path(".venv-vllm/bin/python")  # what `make venv-vllm` builds
# Scheduling in the same process: a spawned one starts later, and helps no offline queue.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
MEMORY = Path("/dev/shm")
PLUGIN = Path(__file__).with_name("plugin.py")
PREFIX = "tessera-vllm-"
BATCHED_TOKENS = 8192  # of prompts, that vLLM reads at once on a CPU
SAMPLING = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "stop_token_ids", "logprobs", "frequency_penalty", "presence_penalty", "logit_bias",
)  # fmt: skip


def find_python(given: str | None) -> str:
    """The Python that has vLLM. Raises RunError, with the way to get one."""
    if given is not None:
        if shutil.which(given) is None:
            raise RunError(f"python = {given!r} is no program; `make venv-vllm` builds one")
        return given
    if importlib.util.find_spec("vllm"):
        return sys.executable
    if ENVIRONMENT.is_file():
        return str(ENVIRONMENT)
    raise RunError(
        f"no vLLM beside tessera or in {ENVIRONMENT}: `make venv-vllm` builds that environment, "
        'python = "PATH" names the Python of another'
    )


class DiedError(FailureError):
    """The process ended without an answer; the text ends with its last lines of standard error."""


class Process:
    """A started worker. environment: variables beside this process's own."""

    def __init__(self, python: str, environment: Mapping[str, str], script: Path = WORKER) -> None:
        self.python = python
        self.log = tempfile.NamedTemporaryFile("w+b", prefix="tessera-vllm-", suffix=".log")  # noqa: SIM115
        self.child = subprocess.Popen(
            [python, str(script)],
            env={**os.environ, **QUIET, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            encoding="utf-8",
        )

    def ask(self, do: str, **keys: Any) -> dict:
        """The worker's answer to one question; raises as `lines` does."""
        *_, answer = self.lines(do, **keys)
        return answer

    def lines(self, do: str, **keys: Any) -> Iterator[dict]:
        """The lines that answer one question: any that have a `number`, then one without.

        Raises GenerationError with what the worker refused, DiedError where it has ended.
        """
        assert self.child.stdin is not None and self.child.stdout is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # ended: then it answers nothing
            self.child.stdin.write(json.dumps({"do": do, **keys}) + "\n")
            self.child.stdin.flush()
        for line in self.child.stdout:
            if not line.endswith("\n"):
                break  # killed while it wrote
            answer = json.loads(line)
            if "error" in answer:
                raise GenerationError(f"vLLM: {answer['error']}")
            yield answer
            if "number" not in answer:
                return
        code = self.child.wait()
        self.log.seek(0)
        lines = self.log.read().decode("utf-8", "replace").splitlines()
        raise DiedError(
            f"vLLM's process ({self.python}) ended with code {code}; its last lines:\n"
            + "\n".join(lines[-12:])
        )

    def close(self, patience: float = 5.0) -> None:
        """Close its standard input, then kill it; an `ask` that waits raises DiedError."""
        assert self.child.stdin is not None and self.child.stdout is not None
        with contextlib.suppress(OSError):
            self.child.stdin.close()
        try:
            self.child.wait(patience)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()
        self.log.close()


class VLLMEngine:
    """An `Engine` that stock vLLM computes.

    batch: samples decoded together. placement: as in `TorchEngine`; the first process of a tensor
    group runs vLLM on the devices of all, and the others get what it says. Raises GenerationError
    for a model that vLLM cannot load, RunError where there is no vLLM. A process that dies is
    started once more with the weights of the last `sync`; a question that kills it twice raises
    DiedError (a FailureError).
    """

    def __init__(
        self,
        module: Transformer,
        config: VLLMConfig | None = None,
        *,
        batch: int = 256,
        placement: Placement | None = None,
    ) -> None:
        self.settings = config = config or VLLMConfig()
        self.config, self.batch, self.version = module.config, batch, 0
        self.python = find_python(config.python)
        kind = dist.device().type
        if kind not in ("cuda", "cpu"):
            raise GenerationError(f'vLLM is not run on {kind} here; say engine = "tessera"')
        self.cuda = kind == "cuda"
        self.dtype = placement.dtype if placement else module.head.dtype
        self.mesh = placement.tensor_mesh if placement else tensor_group(module)
        self.leads = self.mesh is None or self.mesh.get_local_rank() == 0
        self.ways = 1 if self.mesh is None else self.mesh.size()
        stock = "vllm" if self.cuda else "vllm-cpu"
        self.form: Format = _form(module.config, "vllm-plugin" if config.plugin else stock)
        self.room = config.max_model_len or module.config.max_position_embeddings
        self._place = _directory_in_memory()
        weakref.finalize(self, shutil.rmtree, self._place, ignore_errors=True)
        self._files: dict[str, int] = {}
        self._process: Process | None = None
        self._closed = self._asleep = False
        self.sync(module, 0)

    def as_completed(
        self, requests: Iterable[GenerationRequest], working: Working | None = None
    ) -> Generator[Completed, None, None]:
        """See `Engine.as_completed`. Seeds are vLLM's: samples are not those of another engine.

        All requests are read at the beginning: vLLM has a queue of its own.
        """
        if self.mesh is None:
            yield from self._completed(requests, working)
            return
        asked = list(requests)
        place = {id(request): number for number, request in enumerate(asked)}

        def told() -> list[tuple[int, int, Completion]]:
            return [(place[id(one)], n, said) for one, n, said in self._completed(asked, working)]

        for number, sample, completion in self._led(told):
            yield asked[number], sample, completion

    def _led(self, compute: Callable[[], T]) -> T:
        """What the process that runs vLLM computes, in all of its tensor group."""
        return compute() if self.mesh is None else dist.on_main(compute, self.mesh.get_group())

    def _completed(
        self, requests: Iterable[GenerationRequest], working: Working | None
    ) -> Generator[Completed, None, None]:
        left: dict[int, tuple[GenerationRequest, int]] = {}
        for request in requests:
            self.check([request])
            left |= {len(left) + place: (request, n) for place, n in enumerate(request.numbers)}
        try:
            for line in self._lines("generate", lambda: _question(left)) if left else ():
                if "number" in line:
                    request, number = left.pop(line["number"])
                    if working is not None:
                        working(0, min(self.batch, len(left)))
                    yield request, number, self._completion(line["completion"], request.params)
        except (GeneratorExit, KeyboardInterrupt):  # it would go on, and answer the next question
            self._end_process()
            raise

    def check(self, requests: Sequence[GenerationRequest]) -> None:
        """See `Engine.check`."""
        prompts = [request.prompt for request in requests]
        check_sequences(prompts, "prompt", self.config.vocab_size, self.room - 1)
        for what, refused in (
            ("thinking budget", any(one.params.thinking is not None for one in requests)),
            ("stopping criterion", any(one.stopping is not None for one in requests)),
        ):
            if refused:
                raise GenerationError(f"vLLM takes no {what}; use tessera's engine")

    def _completion(self, sample: list, params: SamplingParams) -> Completion:
        ids, logprobs, reason, rows = sample
        top = [[(int(i), p) for i, p in row] for row in rows] if params.logprobs else []
        top = [sorted(row, key=lambda pair: -pair[1])[: params.logprobs] for row in top]
        ended = "stop" if reason == "stop" else "length"
        return Completion(ids, logprobs, ended, self.version, top)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        keys: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`."""
        return generate(self, prompts, params, keys)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Engine.score`."""
        check_sequences(sequences, "sequence", self.config.vocab_size, self.room - 1)
        rows = [list(one) for one in sequences]
        return self._led(lambda: self._ask("score", sequences=rows)["scores"])

    def sync(self, module: Transformer, version: int) -> None:
        """See `Engine.sync`."""
        if module.config != self.config:
            raise GenerationError("sync takes weights of the model that the engine was made for")
        self._files = publish(module, self._place / "model", self.form, self.dtype, self.leads)
        self._led(self._load)
        self._asleep, self.version = False, version

    def _load(self) -> None:
        if self._process is None:
            self._start()
            return
        if self._asleep:
            self._ask("wake")
        self._ask("load", **self._weights())

    def sleep(self) -> None:
        """See `Engine.sleep`; vLLM's CPU build keeps what it has."""
        if self.cuda and self.settings.sleep:
            self._led(lambda: self._ask("sleep"))
            self._asleep = True

    def close(self) -> None:
        """End vLLM's process and free the memory."""
        self._closed = True
        self._end_process()
        shutil.rmtree(self._place, ignore_errors=True)

    def _weights(self) -> dict[str, Any]:
        return {"model": str(self._place / "model"), "checksums": self._files}

    def _start(self) -> Process:
        self._process = process = Process(self.python, self._environment())
        plugin = {"plugin": str(PLUGIN)} if self.settings.plugin else {}
        try:
            process.ask("open", arguments=self._arguments(), **plugin, **self._weights())
        except BaseException:
            self._end_process()
            raise
        return process

    def _ask(self, do: str, **keys: Any) -> dict:
        *_, answer = self._lines(do, lambda: keys)
        return answer

    def _lines(self, do: str, question: Callable[[], Mapping[str, Any]]) -> Iterator[dict]:
        """The lines of an answer, from another process where one dies over the question.

        question: asks for what is missing by then. Raises DiedError where a second process dies
        without a line.
        """
        failures = 0
        while not self._closed:
            try:
                process = self._process or self._start()
                for line in process.lines(do, **question()):
                    failures = 0
                    yield line
                return
            except DiedError:
                self._end_process()
                failures += 1
                if failures == 2 and not self._closed:
                    raise
        raise ClosedError("the engine is closed: make another")

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.close()
        self._process = None

    def _arguments(self) -> dict[str, Any]:
        settings = self.settings
        arguments: dict[str, Any] = {
            "trust_remote_code": True,  # ours: the code that reads the exported config
            "skip_tokenizer_init": True,
            "dtype": str(self.dtype).removeprefix("torch."),
            "enforce_eager": settings.enforce_eager or not self.cuda,
            "max_model_len": self.room,
            "max_num_seqs": self.batch,
            "max_logprobs": -1,
            "enable_prefix_caching": True,  # the samples of one prompt share it
        }
        if self.cuda:
            arguments["gpu_memory_utilization"] = settings.memory
            arguments["enable_sleep_mode"] = settings.sleep
        else:  # a prompt read in pieces and a seed: "CPU Generator does not use offset" (0.32)
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(self.room, BATCHED_TOKENS)
        if self.ways > 1:
            arguments["tensor_parallel_size"] = self.ways
        if settings.quantization:
            arguments["quantization"] = settings.quantization
        return arguments | settings.arguments

    def _environment(self) -> dict[str, str]:
        if self.cuda:
            first, given = torch.cuda.current_device(), os.environ.get("CUDA_VISIBLE_DEVICES")
            known = given.split(",") if given else [str(i) for i in range(first + self.ways)]
            return {"CUDA_VISIBLE_DEVICES": ",".join(known[first : first + self.ways])}
        # Left out, the cache holds every sample at full length, up to 4 GiB.
        token = self.config.kv_bytes_per_token(self.dtype.itemsize)
        gib = min(4, 1 + int(self.batch * self.room * token // 2**30))
        return {
            "VLLM_CPU_KVCACHE_SPACE": str(self.settings.cache_gib or gib),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }


def _question(left: Mapping[int, tuple[GenerationRequest, int]]) -> dict[str, Any]:
    """What `Worker.generate` takes, prompts and sampling said once each."""
    prompts: dict[int, Sequence[int]] = {}  # by the identity of their lists
    samplings: dict[SamplingParams, int] = {}
    rows = []
    for number, (request, sample) in left.items():
        prompts.setdefault(id(request.prompt), request.prompt)
        sampling = samplings.setdefault(replace(request.params, n=1, seed=0), len(samplings))
        seed = seed_of(request.params.seed, request.key) + sample  # what vLLM does with n samples
        rows.append([number, id(request.prompt), seed, sampling])
    place = {one: index for index, one in enumerate(prompts)}
    return {
        "prompts": [list(prompt) for prompt in prompts.values()],
        "samplings": [{name: getattr(one, name) for name in SAMPLING} for one in samplings],
        "requests": [[number, place[prompt], *rest] for number, prompt, *rest in rows],
    }


def seed_of(seed: int, key: int) -> int:
    """The seed of a prompt's first sample: a hash, because the next one's is one more."""
    digest = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def _form(config: ModelConfig, engine: str) -> Format:
    forms: list[Format] = ["hf", "decilm"] if config.homogeneous else ["decilm"]
    for form in forms:
        if not refusals(config, engine, form):
            return form
    reasons = refusals(config, engine, forms[0])
    hint = "" if refusals(config, "vllm-plugin", "decilm") else "; vllm.plugin = true can"
    raise GenerationError(f"vLLM cannot load this model: {'; '.join(reasons)}{hint}")


def publish(
    module: Transformer, directory: Path, form: Format, dtype: torch.dtype, writes: bool = True
) -> dict[str, int]:
    """Write a model for vLLM; returns the CRC-32 of each file of weights by its name.

    The parameters of a model that is spread over processes are gathered one at a time, which every
    process takes part in; writes: whether this one keeps them.
    """
    with writing(directory):
        if writes:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        shown = Checkpoint.of(module)
        shown = shown if form == "hf" else widen(shown)
        if shown.config.tie_word_embeddings:
            # vLLM reloads tied weights into one of the two places only (0.32, model_loader/reload).
            head = {"lm_head.weight": shown.tensors["embed_tokens.weight"]}
            config = replace(shown.config, tie_word_embeddings=False)
            shown = Checkpoint(config, {**shown.tensors, **head})
        write_model(shown, directory if writes else None, dtype=dtype)
        if writes and form != "hf":
            decilm.write_config(shown.config, directory, str(dtype).removeprefix("torch."))
    return {file.name: checksum(file) for file in sorted(directory.glob("*.safetensors"))}


def _directory_in_memory() -> Path:
    """On disk where there is no such place; what killed processes left is removed."""
    parent = MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    for left in parent.glob(f"{PREFIX}*-*"):
        owner = left.name.removeprefix(PREFIX).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))
