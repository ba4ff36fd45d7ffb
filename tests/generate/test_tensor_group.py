"""Processes that hold one engine together are one engine: the same tokens, the same log-probs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tessera import dist
from tessera.generate.engine import SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tessera.model.checkpoint import load_model
from tessera.model.placement import ParallelConfig, Placement
from tests import tiny
from tests.test_dist import run_ranks

CODE = "from tests.generate.test_tensor_group import main; main()"
# Words that divide by two and, gqa-1 and swiglu-7, that do not.
WORDS = (*tiny.MOSAIC, ("gqa-4", "swiglu-7"), ("gqa-2", "noop"))
FAMILIES = {
    "llama": {},
    "biased": {
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "sliding_window": 5,
        "tie_word_embeddings": True,
    },
    "normed": {"qk_norm": True, "head_dim": 6},
}
GREEDY = SamplingParams(max_tokens=8, temperature=0, logprobs=3)
SAMPLED = SamplingParams(max_tokens=8, top_k=20, n=2, seed=5, repetition_penalty=1.2)
LAYOUTS = ParallelConfig(), ParallelConfig(tensor=2)  # of training
TOGETHER = Placement(ParallelConfig(tensor=2), shards=False)


def answers(engine: TorchEngine) -> list[Any]:
    """Tokens and log-probs of prompts of which one goes on from another, and scores."""
    prompts = [tiny.tokens(29, n, seed=i).tolist() for i, n in enumerate((5, 20, 2))]
    prompts.append(prompts[1] + [3, 4])
    found: list[Any] = [engine.generate(prompts, params) for params in (GREEDY, SAMPLED)]
    rows = [[(o.token_ids, o.logprobs, o.top_logprobs) for o in sum(one, [])] for one in found]
    return [*rows, engine.score(prompts), engine.stats.cached_tokens]


def main() -> None:
    """Prints the answers of a module that is split, of one in training, and of one it syncs."""
    found = {}
    with dist.processes():
        for name in FAMILIES:
            directory = Path(sys.argv[1]) / name
            split = TOGETHER.load(directory, frozen=True)
            policies = [Placement(one).load(directory) for one in LAYOUTS]
            other = Placement().transformer(tiny.randomise(load_model(directory), seed=9))
            synced = TorchEngine(other, prefix_cache_tokens=64, placement=TOGETHER)
            synced.sync(policies[0], 1)
            engines = [TorchEngine(split, prefix_cache_tokens=64), synced]
            engines.append(TorchEngine(policies[1], prefix_cache_tokens=64, placement=TOGETHER))
            found[name] = [answers(engine) for engine in engines]
            held = sum(one.nbytes for pair in engines[0].slots.caches.values() for one in pair)
            found[name].append(held)
    print(json.dumps(found))


def test_a_tensor_group_is_one_engine(tmp_path: Path):
    for name, changes in FAMILIES.items():
        tiny.saved(tmp_path / name, WORDS, **changes)
    first, second = (json.loads(one) for one in run_ranks(CODE, str(tmp_path)))
    assert first == second
    for name in FAMILIES:
        engine = TorchEngine(load_model(tmp_path / name, frozen=True), prefix_cache_tokens=64)
        expected = json.loads(json.dumps(answers(engine)))
        assert expected[-1] > 0
        *several, held = first[name]
        for found in several:
            assert_close(found, expected)
        whole = sum(one.nbytes for pair in engine.slots.caches.values() for one in pair)
        assert name == "normed" or held < 0.7 * whole


def assert_close(found: Any, expected: Any) -> None:
    """Equal tokens and near numbers, in lists of lists."""
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_close(*pair)
    else:
        assert type(found) is type(expected) and found == pytest.approx(expected, abs=2e-5)
