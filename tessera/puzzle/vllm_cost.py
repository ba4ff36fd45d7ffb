"""What each word costs in stock vLLM: seconds measured there, the rest counted (Puzzle §2.5).

A probe is one layer of the parent's narrowest attention and `depth` layers of one word. What it
takes longer than that first layer alone, over `depth`, is the word's. One new token is the
prefill; what `new` take longer, over new - 1, is a decode step. Probes have no weights on disk.

A word costs what it costs in the exported directory. The DeciLM dialect knows FFN widths in steps
of 256, and vLLM's CPU build few head sizes: a narrower word is padded with zeros and is no cheaper.
Words that pad to the same share a probe; `bytes` are of the padded word, `parameters` of its own.
A word that vLLM cannot load has no row, so no search offers it; `scenarios.json` says why.
"""

from __future__ import annotations

import json
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
from tessera.puzzle.cost import CostConfig, count, monotone
from tessera.puzzle.cost_table import Scenario
from tessera.puzzle.space import Space, read_space
from tessera.runs.files import FailureError, RunError
from tessera.runs.recipe import Config
from tessera.runs.run import Run
from tessera.vllm.process import Process, find_python

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
BASE = ("base", "")
OURS = {"model", "load_format", "dtype", "enforce_eager", "enable_prefix_caching"}

Key = tuple[str, str]  # (kind, word)
Seconds = tuple[float, float]  # (prefill, one decode step)
Job = dict  # keys of `Worker.open` and `Worker.measure` (vllm/worker.py), as is the answer


class VLLMCostConfig(Config):
    """Scenarios as in stage `cost`, and how vLLM is run.

    `python`: that of an environment with vLLM; without, this one's or `.venv-vllm`'s.
    `arguments`: further ones of `vllm.LLM`, such as tensor_parallel_size.
    """

    scenario: Scenario = Scenario()
    scenarios: dict[str, Scenario] = {}
    batches: list[PositiveInt] = []
    rounds: int = Field(default=10, ge=3)  # of one start
    starts: int = Field(default=1, ge=1)  # of each probe, in turn: more where the machine is shared
    depth: int = Field(default=10, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    enforce_eager: bool = False  # true: neither compiled nor CUDA graphs; a start takes half
    threads: PositiveInt | None = None  # of the CPU build; left out: its own choice
    arguments: dict[str, bool | int | float | str] = {}
    python: str | None = None

    @field_validator("arguments")
    @classmethod
    def _ours(cls, value: dict) -> dict:
        if taken := OURS & value.keys():
            raise ValueError(
                f"{', '.join(sorted(taken))}: the stage sets this itself; dtype and enforce_eager "
                "are keys of its table"
            )
        return value

    @property
    def settings(self) -> CostConfig:
        """The same scenarios and bytes as the table of stage `cost` has them."""
        return CostConfig(
            scenario=self.scenario,
            scenarios=self.scenarios,
            batches=self.batches,
            bytes_per_parameter=BYTES[self.dtype],
            bytes_per_kv=BYTES[self.dtype],
        )


def offered(space: Space) -> list[Key]:
    """Every (kind, word) of a space once."""
    layers = range(len(space.layers))
    return list(dict.fromkeys((k, w) for i in layers for k in KINDS for w in space.words(i, k)))


def served(config: ModelConfig, key: Key) -> Key:
    """The word that an exported model has in this one's place: the same or a padded one."""
    (block,) = expressible(replace(config, blocks=(_alone(key),))).blocks
    return key[0], name(getattr(block, key[0]))


def base_word(words: Sequence[Key]) -> Key:
    """The narrowest attention on offer: a probe's first layer, where vLLM must have attention."""
    found = [v for k, w in words if isinstance(v := parse_kind(k, w), GQA)]
    if not found:
        raise RunError("no word of the space is attention, and vLLM loads no model without any")
    return "attention", name(min(found, key=lambda variant: variant.num_key_value_heads))


def probe(config: ModelConfig, first: Key, key: Key, depth: int) -> ModelConfig:
    """The model that a word is measured in, padded; of `BASE` it is the first layer alone."""
    repeated = () if key == BASE else (_alone(key),) * depth
    return expressible(replace(config, blocks=(_alone(first), *repeated)))


def _alone(key: Key) -> BlockConfig:
    kind, word = key
    return BlockConfig(NoOp(), NoOp()).with_(kind, parse_kind(kind, word))


def unloadable(config: ModelConfig, words: Sequence[Key]) -> dict[Key, str]:
    """The words that vLLM cannot load, with its reason.

    Raises RunError where that leaves no child: it is the parent's family, or one of its own words.
    """
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


def seconds_of(rounds: Sequence[Seconds], new: int) -> Seconds:
    """(prefill, one decode step) of rounds of (seconds to the first token, to all `new`).

    Lower quartiles of both, for noise only ever adds to a time; to their differences it would not.
    """
    first, whole = np.quantile(np.array(rounds), 0.25, axis=0)
    return float(first), float((whole - first) / (new - 1))


def split(found: Mapping[Key, Seconds], first: Key, depth: int) -> dict[Key, Seconds]:
    """Seconds of each word and of the base, from those of the probes.

    The base is what is left of its probe without the first layer: embedding, head, sampling and
    the engine's own work.
    """
    alone = np.array(found[BASE])
    over = {key: (np.array(pair) - alone) / depth for key, pair in found.items() if key != BASE}
    words = monotone({key: _positive(pair) for key, pair in over.items()})
    return {BASE: _positive(alone - np.array(words[first])), **words}


def _positive(pair: np.ndarray) -> Seconds:
    prefill, decode = np.maximum(0.0, pair)
    return float(prefill), float(decode)


def rows_of(
    config: ModelConfig, words: Sequence[Key], settings: CostConfig, seconds: Mapping[Key, Seconds]
) -> list[dict]:
    """One row a word and one `base` row, the columns those of a measured table of stage `cost`."""
    wide = expressible(config)
    outside = replace(config, blocks=()).num_params()
    memory = outside * settings.bytes_per_parameter
    base = {"parameters": outside, "kv_bytes_per_token": 0.0, "bytes": memory}
    rows = [_row(BASE, base, seconds[BASE])]
    for key in words:
        kind, word = padded = served(config, key)
        columns = count(wide, kind, parse_kind(kind, word), settings)
        own = config.subblock_params(kind, parse_kind(*key))
        spent = (0.0, 0.0) if word == "noop" else seconds[padded]
        rows.append(_row(key, columns | {"parameters": own}, spent))
    return rows


def _row(key: Key, columns: Mapping[str, float], seconds: Seconds) -> dict:
    kind, word = key
    prefill, decode = seconds
    return {
        "kind": kind, "word": word, **columns, "prefill_seconds": prefill, "decode_seconds": decode
    }  # fmt: skip


def job(config: VLLMCostConfig, model: Path, vocab_size: int) -> Job:
    """What the worker is asked about a model directory: all scenarios in one process."""
    priced = [scenario for _, scenario in config.settings.priced()]
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


def drive(python: str, asked: Job, threads: int | None, kv_bytes: float = 0.0) -> dict:
    """vLLM's answer to a job, from a process of its own. Raises FailureError.

    kv_bytes: of the cache that the largest scenario fills, for the CPU build, which has no
    memory of its own to fill.
    """
    environment = {"VLLM_CPU_KVCACHE_SPACE": str(1 + int(1.25 * kv_bytes / 2**30))}
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    process = Process(python, environment)
    try:
        opened = {key: asked[key] for key in ("model", "arguments", "plugin") if key in asked}
        timed = {key: asked[key] for key in ("scenarios", "rounds", "vocab_size")}
        answer = process.ask("open", checksums={}, **opened) | process.ask("measure", **timed)
    except GenerationError as error:
        raise FailureError(f"{error} ({python})") from error
    finally:
        process.close()
    needed = max(one["batch"] * (one["prompt"] + one["new"]) for one in asked["scenarios"])
    if (answer["cache_tokens"] or needed) < needed:
        raise FailureError(
            f"vLLM's KV cache holds {answer['cache_tokens']:,} tokens and a scenario needs "
            f"{needed:,}: it would wait instead of computing; give it a larger "
            "arguments.gpu_memory_utilization, or the scenario a smaller batch"
        )
    return answer


def measure(
    config: VLLMCostConfig, run: Run, probes: Mapping[Key, ModelConfig], python: str
) -> dict[Key, list[dict]]:
    """The worker's answers for every probe, one a start; an interrupted run's are not asked anew.

    probes: expressible configs. Starting vLLM is most of a probe's time, so that probes cannot
    alternate round by round; on a shared machine several starts make them alternate nevertheless.
    """
    answers: dict[Key, list[dict]] = {key: [] for key in probes}
    with Progress(run.name, config.starts * len(probes), "starts", quiet=run.quiet) as bar:
        for start in range(config.starts):
            for key, model in probes.items():
                kept = run.state_path / f"{'-'.join((*key, str(start)))}.json"
                known = kept.is_file()
                if not known:
                    answer = _asked(config, model, run.state_path / "probe", python)
                    run.write_file(f"state/{kept.name}", json.dumps(answer))
                answers[key].append(json.loads(kept.read_text()))
                bar.advance(1, 0 if known else 1)
    return answers


def _asked(config: VLLMCostConfig, model: ModelConfig, place: Path, python: str) -> dict:
    place.mkdir(parents=True, exist_ok=True)
    write_config(model, place)
    asked = job(config, place, model.vocab_size)
    asked["arguments"]["load_format"] = "dummy"  # random weights, none on disk
    return drive(python, asked, config.threads, cache_bytes(config, model))


def cache_bytes(config: VLLMCostConfig, model: ModelConfig) -> float:
    """Bytes of KV cache that the largest scenario fills in this model."""
    tokens = max(scenario.cached_tokens for _, scenario in config.settings.priced())
    return tokens * model.kv_bytes_per_token(BYTES[config.dtype])


def probes_of(
    config: VLLMCostConfig, parent: ModelConfig, words: Sequence[Key]
) -> dict[Key, ModelConfig]:
    """The probe of the base and of every distinct padded word; `noop` needs none."""
    longest = max(scenario.prompt + scenario.new for _, scenario in config.settings.priced())
    # vLLM refuses requests beyond the model's context, and a longer one costs nothing.
    roomy = max(parent.max_position_embeddings, longest)
    parent = replace(parent, max_position_embeddings=roomy)
    distinct = dict.fromkeys([BASE, *(served(parent, key) for key in words if key[1] != "noop")])
    first = base_word(words)
    return {key: probe(parent, first, key, config.depth) for key in distinct}


def tables(
    config: VLLMCostConfig,
    parent: ModelConfig,
    words: Sequence[Key],
    answers: Mapping[Key, Sequence[Mapping]],
) -> list[dict]:
    """Rows of `tables/costs.jsonl`: those of every scenario at every batch."""
    first = base_word(words)
    rows = []
    for number, (label, scenario) in enumerate(config.settings.priced()):
        rounds = {k: sum((a["seconds"][number] for a in v), []) for k, v in answers.items()}
        found = {key: seconds_of(value, scenario.new) for key, value in rounds.items()}
        seconds = split(found, first, config.depth)
        settings = config.settings.model_copy(update={"scenario": scenario})
        own = {"scenario": label, "batch": scenario.batch}
        rows += [own | row for row in rows_of(parent, words, settings, seconds)]
    return rows


def stage(config: VLLMCostConfig, run: Run, inputs: dict[str, Path]) -> None:
    """Stage `cost_vllm`: price in vLLM every word of the library that vLLM can load."""
    parent = load_config(inputs["parent"])
    words = offered(read_space(inputs["library"]))
    python = find_python(config.python)
    dropped = unloadable(parent, words)
    for (kind, word), reason in dropped.items():
        run.say(f"no price for {word} ({kind}): {reason}")
    words = [key for key in words if key not in dropped]
    answers = measure(config, run, probes_of(config, parent, words), python)
    run.write_table("costs", tables(config, parent, words, answers))
    run.write_json("probes", {" ".join(key): answer for key, answer in answers.items()})
    run.write_json("scenarios", _told(config, answers[BASE][0], dropped))


def _told(config: VLLMCostConfig, answer: Mapping, dropped: Mapping[Key, str]) -> dict:
    settings = config.settings
    return {
        "scenarios": {label: one.model_dump() for label, one in settings.named.items()},
        "batches": list(dict.fromkeys(config.batches)),
        "source": "measured",
        "device": answer["device"],
        "bytes_per_parameter": settings.bytes_per_parameter,
        "bytes_per_kv": settings.bytes_per_kv,
        "engine": answer["engine"],
        "clock": answer["clock"],
        "unavailable": [
            {"kind": kind, "word": word, "reason": reason}
            for (kind, word), reason in dropped.items()
        ],
    }
