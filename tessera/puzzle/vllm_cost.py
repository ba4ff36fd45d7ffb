"""What each word costs in stock vLLM: seconds measured there, the rest counted (Puzzle §2.5).

A word costs what it costs in the exported directory, where narrow ones are padded with zeros. Words
that pad to the same share a probe; `bytes` are of the padded word, `parameters` of its own. A word
that vLLM cannot load has no row, so no search offers it; `scenarios.json` says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, PositiveInt, field_validator

from tessera.export.decilm import write_config
from tessera.export.engines import refusals
from tessera.export.padding import expressible
from tessera.generate.engine import GenerationError
from tessera.model.config import GQA, KINDS, BlockConfig, ModelConfig, NoOp, name, parse_kind
from tessera.model.source import load_config
from tessera.progress import Progress
from tessera.puzzle.cost import BASE, Key, Seconds, base_row, count, monotone, offered_words
from tessera.puzzle.cost_table import PricedConfig
from tessera.puzzle.space import read_space
from tessera.runs.files import FailureError, RunError, resumable
from tessera.runs.run import Run
from tessera.vllm.engine import Process, find_python

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
OURS = {"model", "load_format", "dtype", "enforce_eager", "enable_prefix_caching"}


class VLLMCostConfig(PricedConfig):
    rounds: int = Field(default=10, ge=3)  # of one start
    starts: int = Field(default=1, ge=1)  # of each probe, in turn: more where the machine is shared
    depth: int = Field(default=10, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    enforce_eager: bool = False  # true: neither compiled nor CUDA graphs; a start takes half
    threads: PositiveInt | None = None  # of the CPU build; left out: its own choice
    arguments: dict[str, bool | int | float | str] = {}  # of vllm.LLM, as tensor_parallel_size
    python: str | None = None  # with vLLM; without, this one's or `.venv-vllm`'s

    @field_validator("arguments")
    @classmethod
    def _ours(cls, value: dict) -> dict:
        if taken := OURS & value.keys():
            raise ValueError(f"{', '.join(sorted(taken))}: the stage sets this itself")
        return value


def served(config: ModelConfig, key: Key) -> Key:
    (block,) = expressible(replace(config, blocks=(_alone(key),))).blocks
    return key[0], name(getattr(block, key[0]))


def base_word(words: Sequence[Key]) -> Key:
    found = [v for k, w in words if isinstance(v := parse_kind(k, w), GQA)]
    if not found:
        raise RunError("no word of the space is attention, and vLLM loads no model without any")
    return "attention", name(min(found, key=lambda variant: variant.num_key_value_heads))


def probe(config: ModelConfig, first: Key, key: Key, depth: int) -> ModelConfig:
    """The padded model that a word is measured in: a first layer, and `depth` layers of the word;
    the probe of `BASE` is the first layer alone."""
    repeated = () if key == BASE else (_alone(key),) * depth
    return expressible(replace(config, blocks=(_alone(first), *repeated)))


def _alone(key: Key) -> BlockConfig:
    return BlockConfig(NoOp(), NoOp()).with_(key[0], parse_kind(*key))


def unloadable(config: ModelConfig, words: Sequence[Key]) -> dict[Key, str]:
    """The words that vLLM cannot load, with its reason. Raises RunError where that is the parent's
    family, or one of its own words."""
    first = base_word(words)
    if reasons := refusals(probe(config, first, BASE, 0), "vllm", "decilm"):
        raise RunError(f"vLLM can load no child of this parent: {'; '.join(reasons)}")
    found = {key: refusals(probe(config, first, key, 1), "vllm", "decilm") for key in words}
    # Without its place, which is that in the probe: "layer 1 has linear attention: REASON".
    dropped = {key: r[0].partition(": ")[2] or r[0] for key, r in found.items() if r}
    for layer, pair in enumerate(config.words):
        for key in zip(KINDS, pair, strict=True):
            if key in dropped:
                raise RunError(
                    f"vLLM cannot load layer {layer} of the parent, {key[1]}: {dropped[key]}"
                )
    return dropped


def prefill_and_step(rounds: Sequence[Seconds], new: int) -> Seconds:
    """(prefill, one decode step) of rounds of (seconds to the first token, to all `new`), by lower
    quartiles of both: noise only ever adds to a time."""
    first, whole = np.quantile(np.array(rounds), 0.25, axis=0)
    return float(first), float((whole - first) / (new - 1))


def job(config: VLLMCostConfig, model: Path, vocab_size: int) -> dict:
    priced = [scenario for _, scenario in config.priced()]
    return {
        "model": str(model),
        "vocab_size": vocab_size,
        "rounds": config.rounds,
        "scenarios": [scenario.model_dump() for scenario in priced],
        "arguments": {
            "trust_remote_code": True,
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,  # rounds repeat: cached prompts would cost nothing
            "dtype": config.dtype,
            "enforce_eager": config.enforce_eager,
            "max_model_len": max(one.prompt + one.new for one in priced),
            "max_num_seqs": max(one.batch for one in priced),
            **config.arguments,
        },
    }


def drive(python: str, job: dict, threads: int | None, kv_bytes: float = 0.0) -> dict:
    """vLLM's answer to a job, from a process of its own. kv_bytes: of the cache that the largest
    scenario fills, for the CPU build. Raises FailureError."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": str(1 + int(1.25 * kv_bytes / 2**30))}
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    process = Process(python, environment)
    try:
        opened = {key: job[key] for key in ("model", "arguments", "plugin") if key in job}
        timed = {key: job[key] for key in ("scenarios", "rounds", "vocab_size")}
        answer = process.ask("open", checksums={}, **opened) | process.ask("measure", **timed)
    except GenerationError as error:
        raise FailureError(f"{error} ({python})") from error
    finally:
        process.close()
    needed = max(one["batch"] * (one["prompt"] + one["new"]) for one in job["scenarios"])
    if (answer["cache_tokens"] or needed) < needed:
        raise FailureError(
            f"vLLM's KV cache holds {answer['cache_tokens']:,} tokens and a scenario needs "
            f"{needed:,}; raise arguments.gpu_memory_utilization, or give it a smaller batch"
        )
    return answer


def cache_bytes(config: VLLMCostConfig, model: ModelConfig) -> float:
    tokens = max(scenario.cached_tokens for _, scenario in config.priced())
    return tokens * model.kv_bytes_per_token(BYTES[config.dtype])


def measure(
    config: VLLMCostConfig, run: Run, parent: ModelConfig, words: Sequence[Key], python: str
) -> dict[Key, list[dict]]:
    """The worker's answers for the base and every distinct padded word, one a start; those of an
    interrupted run are kept. A start takes too long for probes to alternate round by round."""
    longest = max(scenario.prompt + scenario.new for _, scenario in config.priced())
    # vLLM refuses requests beyond the model's context, and a longer one costs nothing.
    roomy = max(parent.max_position_embeddings, longest)
    parent, first = replace(parent, max_position_embeddings=roomy), base_word(words)
    distinct = dict.fromkeys([BASE, *(served(parent, key) for key in words if key[1] != "noop")])
    probes = {key: probe(parent, first, key, config.depth) for key in distinct}

    def ask(model: ModelConfig) -> dict:
        place = run.state_path / "probe"
        place.mkdir(parents=True, exist_ok=True)
        write_config(model, place)
        request = job(config, place, model.vocab_size)
        request["arguments"]["load_format"] = "dummy"  # random weights
        return drive(python, request, config.threads, cache_bytes(config, model))

    answers: dict[Key, list[dict]] = {key: [] for key in probes}
    with Progress(run.name, config.starts * len(probes), "starts", quiet=run.quiet) as bar:
        for start in range(config.starts):
            for key, model in probes.items():
                file = run.state_path / f"{'-'.join((*key, str(start)))}.json"
                answers[key].append(resumable(file, lambda one=model: ask(one)))
                bar.advance(1, 1)
    return answers


def cost_rows(
    config: VLLMCostConfig,
    parent: ModelConfig,
    words: Sequence[Key],
    answers: Mapping[Key, Sequence[Mapping]],
) -> list[dict]:
    """Rows of `tables/costs.jsonl`, as stage `cost` has them: every scenario at every batch."""
    first, wide, rows = base_word(words), expressible(parent), []
    bytes_each = BYTES[config.dtype]
    for number, (label, scenario) in enumerate(config.priced()):
        rounds = {k: sum((a["seconds"][number] for a in v), []) for k, v in answers.items()}
        found = {key: prefill_and_step(value, scenario.new) for key, value in rounds.items()}
        alone = np.array(found.pop(BASE))
        over = {k: np.maximum(0.0, (np.array(v) - alone) / config.depth) for k, v in found.items()}
        seconds = monotone({key: (float(p), float(d)) for key, (p, d) in over.items()})
        # The base is its probe without the first layer: embedding, head, the engine's own work.
        base = np.maximum(0.0, alone - np.array(seconds[first]))
        seconds[BASE] = float(base[0]), float(base[1])
        columns: dict[Key, dict] = {BASE: base_row(parent, bytes_each)}
        for kind, word in words:
            padded = served(parent, (kind, word))
            seconds[kind, word] = (0.0, 0.0) if word == "noop" else seconds[padded]
            own = count(wide, kind, parse_kind(*padded), scenario, (bytes_each, bytes_each))
            own["parameters"] = parent.subblock_params(kind, parse_kind(kind, word))
            columns[kind, word] = {"kind": kind, "word": word, **own}
        for key, row in columns.items():
            prefill, decode = seconds[key]
            row = {"scenario": label, "batch": scenario.batch, **row}
            rows.append({**row, "prefill_seconds": prefill, "decode_seconds": decode})
    return rows


def stage(config: VLLMCostConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `cost_vllm`: price in vLLM every word of the library that vLLM can load."""
    parent = load_config(inputs["parent"])
    words = offered_words(read_space(inputs["library"]))
    python = find_python(config.python)
    dropped = unloadable(parent, words)
    for (kind, word), reason in dropped.items():
        run.say(f"no price for {word} ({kind}): {reason}")
    words = [key for key in words if key not in dropped]
    answers = measure(config, run, parent, words, python)
    run.write_table("costs", cost_rows(config, parent, words, answers))
    run.write_json("probes", {" ".join(key): answer for key, answer in answers.items()})
    answer, size = answers[BASE][0], BYTES[config.dtype]
    facts = {"engine": answer["engine"], "clock": answer["clock"]}
    facts["unavailable"] = [
        {"kind": kind, "word": word, "reason": reason} for (kind, word), reason in dropped.items()
    ]
    known = config.described("measured", answer["device"], size, size)
    run.write_json("scenarios", known | facts)
