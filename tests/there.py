"""What runs on the pretended device besides the stages: models, engine, server, `make gpu`.

python -m tests.there RECIPE RUNS     the recipe's stages, then those; prints the operations of each
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tessera import dist, pipeline
from tessera.generate.engine import SamplingParams, Thinking
from tessera.generate.torch_engine import EngineThread, TorchEngine
from tessera.model.context import Context
from tessera.model.transformer import Transformer
from tessera.runs.recipe import load
from tests import pretend, tiny
from tests.toy import toy_batch

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "qwen3": {"qk_norm": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 5},
}
SAMPLINGS = (
    SamplingParams(9, temperature=0, logprobs=3),
    SamplingParams(9, temperature=0.8, n=2),
    SamplingParams(9, temperature=1.5, top_k=5, top_p=0.9, min_p=0.1),
    SamplingParams(9, temperature=0, repetition_penalty=1.5, frequency_penalty=0.2),
    SamplingParams(9, temperature=1.0, presence_penalty=0.5, logit_bias=((3, 2.0),)),
    SamplingParams(9, temperature=0.9, thinking=Thinking(2, ((5, 6),), ((7,),))),
)


class Every:
    """A grammar that allows all but the first token."""

    def fill(self, bits: Any, row: int) -> None:
        bits[row] = -2

    def push(self, token: int) -> bool:
        return False


def placed(dtype: torch.dtype, **changes: Any) -> Transformer:
    return tiny.model(vocab_size=40, **changes).to(dist.device(), dtype)


def models(dtype: torch.dtype) -> None:
    """Every family forward and backward over packed rows and rows with a shared prefix."""
    for changes in FAMILIES.values():
        module, batch = placed(dtype, **changes), toy_batch(0).to(dist.device())
        hidden = module(batch.tokens, Context(batch.positions, batch.segments))
        module.logits(hidden).float().logsumexp(-1).sum().backward()
        assert all(weight.grad is not None for weight in module.parameters())


def engine(dtype: torch.dtype) -> None:
    """Sampling in all its options, prompts in chunks, the prefix cache, scores, a sync amidst."""
    prompts = [list(range(3, 3 + length)) for length in (30, 32, 17, 5, 4, 3)]
    for changes in FAMILIES.values():
        module = placed(dtype, **changes)
        one = TorchEngine(module, max_batch_size=4, chunk_tokens=8, prefix_cache_tokens=64)
        for prompt, params in zip(prompts, SAMPLINGS, strict=True):
            one.submit(prompt, params, grammar=Every if params.logprobs else None)
        for _ in range(6):
            one.step()
        one.sync(module, 1)
        while one.step():
            pass
        one.score(prompts)
        one.score_top(prompts, 2)
        one.close()
    with EngineThread(TorchEngine(module)) as thread:
        handle = thread.engine.submit(prompts[3], SAMPLINGS[1])
        assert len(handle.result(60)) == 2


def served(model: Path) -> None:
    """The server's own threads answer requests of every kind."""
    from fastapi.testclient import TestClient

    from tessera.serve.app import ServeConfig, build, serving

    with (
        serving(str(model), ServeConfig(prefix_cache=64)) as one,
        TestClient(build(one), base_url="http://127.0.0.1") as client,
    ):
        own = {"model": one.name, "max_tokens": 3}
        text = {**own, "prompt": "start 6", "logprobs": 2, "echo": True}
        chat = {**own, "messages": [{"role": "user", "content": "start 6"}]}
        form = {"type": "json_object"}
        for path, body in (
            ("completions", text),
            ("completions", {**text, "max_tokens": 0}),
            ("chat/completions", {**chat, "stream": True}),
            ("chat/completions", {**chat, "response_format": form, "top_p": 0.9, "n": 2}),
        ):
            found = client.post(f"/v1/{path}", json=body)
            assert found.status_code == 200 and "error" not in found.text, found.text
        assert one.thread.error is None


def kit() -> None:
    """The parts of `make gpu` that this device can run."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import gpu  # pyright: ignore[reportMissingImports]

    for part in (gpu.parity, gpu.training, gpu.engine):
        part()


def main(recipe: str, runs: str) -> None:
    pretend.device()  # before the first backward, which counts the devices there are
    counts: dict[str, int] = {}

    def counted(name: str, function: Any, *given: Any) -> Any:
        before = pretend.OPERATIONS[0]
        found = function(*given)
        counts[name] = pretend.OPERATIONS[0] - before
        return found

    work = pipeline._bring_about
    pipeline._bring_about = lambda step, *rest: counted(step.name, work, step, *rest)
    with pretend.pretended(float64=False):
        pipeline.run_recipe(load(Path(recipe), ()), Path(runs), quiet=True)
        counted("served", served, Path(runs) / "pretend" / "sft")
    with pretend.pretended():
        for dtype in (torch.float32, torch.bfloat16):
            counted(f"models {dtype}", models, dtype)
            counted(f"engine {dtype}", engine, dtype)
        counted("make gpu", kit)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
