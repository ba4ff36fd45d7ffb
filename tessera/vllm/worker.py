"""Run by the Python of vLLM's environment: an engine that is asked through a pipe.

    python vllm_worker.py < questions > answers

A line of JSON in, a line of JSON out: `open`, `load`, `generate`, `score`, `sleep`, `wake`. What
goes wrong is answered as `{"error": …}`; while a queue is worked off, `{"done": N}` lines come
before the answer. vLLM prints much: all that is not an answer goes to standard error. It ends when
its standard input does, or the process that started it. Imports nothing of tessera, which that
environment need not hold.
"""

# vllm is not installed here, and pyright takes this package for it.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

CHUNK = 2**24  # bytes of a file summed at once
HERE = Path(__file__).resolve().parent


class Worker:
    """The verbs; each takes the keys of a question and gives those of its answer."""

    def __init__(self, out: Any) -> None:
        self.out = out
        self.llm: Any = None

    def tell(self, **answer: Any) -> None:
        """One line to the process that asks."""
        self.out.write(json.dumps(answer) + "\n")
        self.out.flush()

    def open(
        self, model: str, checksums: dict[str, int], arguments: dict[str, Any], plugin: str = ""
    ) -> dict:
        """Starts vLLM on a model directory. plugin: a file whose `register` is called before."""
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
        """Puts other weights of the same shapes in the place of those that are there."""
        _check(Path(model), checksums)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
        self.llm.reset_prefix_cache()  # the keys and values of other weights
        return {}

    def generate(self, prompts: list[list[int]], seeds: list[int], sampling: dict) -> dict:
        """`[ids, log-probs, finish reason, likeliest]` of every sample of every prompt."""
        params = [self._params(seed=seed, **sampling) for seed in seeds]
        outputs = self._run(prompts, params, sampling["n"])
        return {"completions": [[_sample(one) for one in output.outputs] for output in outputs]}

    def score(self, sequences: list[list[int]]) -> dict:
        """The log-prob of each token but the first."""
        params = self._params(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        outputs = self._run(sequences, [params] * len(sequences), 1)
        pairs = zip(sequences, outputs, strict=True)
        return {"scores": [_logprobs(ids[1:], one.prompt_logprobs[1:]) for ids, one in pairs]}

    def sleep(self) -> dict:
        """Gives the memory of weights and cache back."""
        self.llm.sleep(level=2)
        return {}

    def wake(self) -> dict:
        """Takes it again; the weights must be loaded after."""
        self.llm.wake_up()
        return {}

    def _params(self, **keys: Any) -> Any:
        import vllm  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import (  # pyright: ignore[reportMissingImports]
            RequestOutputKind,
        )

        final = RequestOutputKind.FINAL_ONLY
        return vllm.SamplingParams(ignore_eos=True, detokenize=False, output_kind=final, **keys)

    def _run(self, prompts: list[list[int]], params: list, samples: int) -> list:
        """The outputs in the order of the prompts; tells how many samples are done."""
        engine, found = self.llm.llm_engine, {}
        for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, one)
        try:
            while engine.has_unfinished_requests():
                finished = [output for output in engine.step() if output.finished]
                found |= {output.request_id.split("-")[0]: output for output in finished}
                if finished:
                    self.tell(done=len(found) * samples)
        except BaseException:
            engine.abort_request([str(number) for number in range(len(prompts))])
            raise
        return [found[str(number)] for number in range(len(prompts))]


def _sample(output: Any) -> list:
    ids = list(output.token_ids)
    rows = output.logprobs or []
    likeliest = [[[i, one.logprob] for i, one in row.items()] for row in rows]
    return [ids, _logprobs(ids, rows), output.finish_reason, likeliest]


def _logprobs(ids: list[int], rows: list[dict]) -> list[float]:
    return [row[token].logprob for token, row in zip(ids, rows, strict=True)]


def _check(directory: Path, checksums: dict[str, int]) -> None:
    """Raises ValueError where a file is not what was written."""
    for name, expected in checksums.items():
        found = 0
        with (directory / name).open("rb") as file:
            while block := file.read(CHUNK):
                found = zlib.crc32(block, found)
        if found != expected:
            raise ValueError(f"{name} has checksum {found:08x}; {expected:08x} was written")


def _end_with_parent(parent: int) -> None:
    """Ends this process, mid-queue too, when the one that started it is gone.

    Not by PR_SET_PDEATHSIG: that is sent when the thread that started it ends.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Answers until standard input ends."""
    sys.path[:] = [place for place in sys.path if Path(place) != HERE]  # whose names vLLM imports
    _end_with_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the asking process's to handle
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(out)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = getattr(worker, question.pop("do"))(**question)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        worker.tell(**answer)


if __name__ == "__main__":
    main()
