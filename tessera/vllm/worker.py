"""Run by the Python of vLLM's environment, which need not hold tessera: imports nothing of it.

    python worker.py < questions > answers          an engine that is asked through a pipe
    python worker.py serve --model DIRECTORY …      vLLM's own API server

A question is a line of JSON whose `do` names a method of `Worker`; its answer is another, with
`{"error": …}` where it went wrong. Completions come first, in lines with a `number`, as they end.
"""

# vllm is not installed here, and pyright takes this package for it.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KEYS = "VLLM_API_KEY"


class Worker:
    """The verbs; each takes the keys of a question and gives those of its answer."""

    def __init__(self, out: Any) -> None:
        self.out = out
        self.llm: Any = None

    def tell(self, **answer: Any) -> None:
        """Write one line to the process that asks."""
        self.out.write(json.dumps(answer) + "\n")
        self.out.flush()

    def open(
        self, model: str, checksums: dict[str, int], arguments: dict[str, Any], plugin: str = ""
    ) -> dict:
        """Start vLLM on a model directory. plugin: a file whose `register` is called before."""
        import torch
        import vllm  # pyright: ignore[reportMissingImports]

        _check(Path(model), checksums)
        if plugin:
            runpy.run_path(plugin)["register"]()
        self.llm = vllm.LLM(model=model, **arguments)
        cuda = torch.cuda.is_available()
        return {
            "engine": f"vLLM {vllm.__version__}",
            "device": torch.cuda.get_device_name() if cuda else "cpu",
        }

    def load(self, model: str, checksums: dict[str, int]) -> dict:
        """Put other weights of the same shapes in the place of those that are there."""
        _check(Path(model), checksums)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
        self.llm.reset_prefix_cache()  # the keys and values of other weights
        return {}

    def generate(
        self, prompts: list[list[int]], samplings: list[dict], requests: list[list[int]]
    ) -> dict:
        """Tells `[ids, log-probs, finish reason, likeliest]` of each request as it ends.

        requests: (number, prompt, seed, sampling) of each; the latter two are places in the lists.
        """
        told = [number for number, *_ in requests]
        asked = [
            (prompts[prompt], self._params(seed=seed, **samplings[sampling]))
            for _, prompt, seed, sampling in requests
        ]
        for place, output in self._run(asked):
            self.tell(number=told[place], completion=_sample(output.outputs[0]))
        return {}

    def score(self, sequences: list[list[int]]) -> dict:
        """The log-prob of each token but the first."""
        params = self._params(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        outputs = dict(self._run([(ids, params) for ids in sequences]))
        found = [outputs[place].prompt_logprobs[1:] for place in range(len(sequences))]
        pairs = zip(sequences, found, strict=True)
        return {"scores": [_logprobs(ids[1:], rows) for ids, rows in pairs]}

    def sleep(self) -> dict:
        """Give the memory of weights and cache back."""
        self.llm.sleep(level=2)
        return {}

    def wake(self) -> dict:
        """Take it again; the weights must be loaded after."""
        self.llm.wake_up()
        return {}

    def measure(self, scenarios: list[dict[str, int]], rounds: int, vocab_size: int) -> dict:
        """seconds[scenario][round] of (one new token, all new tokens), after a warm-up round.

        scenarios: {batch, prompt, new}. On a CPU with one thread they are the process's own.
        """
        import torch

        alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
        clock = time.process_time if alone else time.perf_counter
        seconds: list[list[tuple[float, float]]] = [[] for _ in scenarios]
        generator = random.Random(0)
        for number in range(rounds + 1):
            for found, scenario in zip(seconds, scenarios, strict=True):
                ids = range(vocab_size)
                prompts = [
                    {"prompt_token_ids": generator.choices(ids, k=scenario["prompt"])}
                    for _ in range(scenario["batch"])
                ]
                first, last = (self._timed(prompts, new, clock) for new in (1, scenario["new"]))
                if number:
                    found.append((first, last))
        cache = self.llm.llm_engine.vllm_config.cache_config
        return {
            "cache_tokens": getattr(cache, "kv_cache_size_tokens", None),  # unknown to older ones
            "clock": "process" if alone else "wall",
            "seconds": seconds,
        }

    def _timed(self, prompts: list, new: int, clock: Any) -> float:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        greedy = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
        sampling = SamplingParams(max_tokens=new, **greedy)
        begun = clock()
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        spent = clock() - begun
        assert all(len(output.outputs[0].token_ids) == new for output in outputs), "cut short"
        return spent

    def _params(self, **keys: Any) -> Any:
        from vllm import sampling_params  # pyright: ignore[reportMissingImports]

        keys["logit_bias"] = dict(keys.get("logit_bias") or ()) or None
        keys["output_kind"] = sampling_params.RequestOutputKind.FINAL_ONLY
        return sampling_params.SamplingParams(ignore_eos=True, detokenize=False, **keys)

    def _run(self, asked: list[tuple[list[int], Any]]) -> Iterator[tuple[int, Any]]:
        """The place and the output of each prompt with its sampling, as they end."""
        engine = self.llm.llm_engine
        for place, (prompt, params) in enumerate(asked):
            engine.add_request(str(place), {"prompt_token_ids": prompt}, params)
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        yield int(output.request_id.split("-")[0]), output
        except BaseException:
            engine.abort_request([str(place) for place in range(len(asked))])
            raise


def _sample(output: Any) -> list:
    ids = list(output.token_ids)
    rows = output.logprobs or []
    likeliest = [[[i, one.logprob] for i, one in row.items()] for row in rows]
    return [ids, _logprobs(ids, rows), output.finish_reason, likeliest]


def _logprobs(ids: list[int], rows: list[dict]) -> list[float]:
    return [row[token].logprob for token, row in zip(ids, rows, strict=True)]


def _check(directory: Path, checksums: dict[str, int]) -> None:
    for name, expected in checksums.items():
        found = checksum(directory / name)
        if found != expected:
            raise ValueError(f"{name} has checksum {found:08x}; {expected:08x} was written")


def checksum(file: Path) -> int:
    """CRC-32, block by block."""
    found = 0
    with file.open("rb") as handle:
        while block := handle.read(2**24):
            found = zlib.crc32(block, found)
    return found


def _end_with(parent: int) -> None:
    """Not by PR_SET_PDEATHSIG: that is sent when the thread that started this process ends."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def answer() -> None:
    """Answer questions until standard input ends, or, mid-queue too, the process that asks."""
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the asking process's to handle
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM prints goes to standard error
    worker = Worker(out)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            found = getattr(worker, question.pop("do"))(**question)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        worker.tell(**found)


def serve() -> None:
    """Run vLLM's API server until it ends, with a key a line of VLLM_API_KEY.

    vLLM takes several keys from its command line alone, which every user of a machine can list, so
    they are put there in this process. The program `vllm serve` asks for the version of a
    distribution named `vllm`, which the CPU build's is not.
    """
    keys = os.environ.pop(KEYS, "").splitlines()
    sys.argv[1:] = sys.argv[2:] + (["--api-key", *keys] if keys else [])
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.path[:] = [place for place in sys.path if Path(place) != HERE]  # whose names vLLM imports
    serve() if sys.argv[1:2] == ["serve"] else answer()
