"""The roofline beside published speeds of Llama-Nemotron's models and their parents.

    python benchmarks/roofline.py

Nothing is measured here: every prediction comes from the layer maps of the released configs, the
device's data sheet and the four constants of `devices.py`. Published: Puzzle's throughput
table (H100, FP8, TensorRT-LLM, tokens a second and GPU), FFN Fusion's latencies (8 H100, FP8, one
user), Llama-Nemotron's ratios, a sweep of vLLM on a B200, and, for dense models alone,
TensorRT-LLM's own table. A batch is
the largest whose cache fits by that engine's default (0.9 of what the weights leave) and at most
the published best one: 256 for the children on one GPU, 384 for Llama-70B on four. What the ratios
owe to each choice, the batch rule among them, is the last table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from tessera.devices import DEVICES, Device, find_device
from tessera.model.config import (
    GQA,
    KINDS,
    BlockConfig,
    Chain,
    ModelConfig,
    NoOp,
    RopeScaling,
    SwiGLU,
    uniform,
)
from tessera.model.families import read_config
from tessera.puzzle.cost_table import Scenario
from tessera.puzzle.roofline import Serving, model_seconds

CONFIGS = Path(__file__).parents[2] / "shared" / "data" / "nas_configs"
CACHE_SHARE = 0.9  # of the memory that weights leave, what TensorRT-LLM gives the KV cache
FUSED = {399360: 8, 425984: 12, 343040: 15, 301056: 14}  # width of Ultra's fused FFNs -> how many
# Published tokens a second and GPU: 51B on one, Llama-70B on four (per GPU) and on one.
PUZZLE = (
    (128, 128, 5478, 2645, None),
    (128, 1024, 6472, 2975, 1274),
    (128, 2048, 4910, 2786, None),
    (128, 4096, 3855, 1828, None),
    (2048, 128, 653, 339, 301),
    (2048, 2048, 2622, 1336, None),
)
# TensorRT-LLM's `perf-overview.md` at v1.0: tokens a second of all GPUs, H100 SXM, FP8.
SETTINGS = ((128, 128), (128, 2048), (128, 4096), (2048, 128), (2048, 2048), (500, 2000))
ENGINE = {
    "Llama-8B": (1, (28312, 22714, 14325, 3450, 9305, 17660)),
    "Llama-70B": (2, (6378, 6651, 4199, 762, 3082, 5222)),
    "Llama-405B": (8, (3627, 4340, 3116, 453, 2296, 3994)),
}
# Super-49B-v1.5 in FP8 by vLLM 0.16 on one B200, 2048 in and 512 out (Vultr's inference cookbook,
# "Concurrency tuning", 2026): requests at once -> tokens a second, ms a token. The layer map is
# v1's. The published first tokens (71 ms at 8 requests) leave no time for 2048 tokens of prompt, so
# the sweep's prompts, the same at each level, were cached; and 50 were asked at each, so that at
# 8 the seventh wave is two requests, and at 64 and more there is one wave of 50.
B200_PROMPTS, B200_NEW = 50, 512
B200 = {1: (73, 13.40), 8: (570, 12.34), 16: (1054, 11.17), 32: (2120, 11.57), 64: (3816, 12.70)}
ENGINE_MOST = 2048  # requests at once, its `max_batch_size` unless told


def predict(
    config: ModelConfig,
    device: str | Device,
    dtype: str,
    scenario: Scenario,
    tensor_parallel: int = 1,
) -> dict[str, float]:
    """What a whole model does on `tensor_parallel` devices: the sum of its words and the base.

    prefill_seconds, decode_seconds (a step), seconds (the scenario), throughput (tokens/s of all
    devices together), bytes (on each device). Raises DeviceError.
    """
    found = find_device(device) if isinstance(device, str) else device
    serving = Serving(found, dtype, tensor_parallel)
    prefill, decode = model_seconds(config, scenario, serving)
    seconds = prefill + (scenario.new - 1) * decode
    return {
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "seconds": seconds,
        "throughput": scenario.batch * scenario.new / seconds,
        "bytes": device_bytes(config, scenario, serving),
    }


def device_bytes(config: ModelConfig, scenario: Scenario, serving: Serving) -> float:
    """Bytes of weights and KV cache on the fullest device at the end of the scenario."""
    n = serving.tensor_parallel
    whole = sum(
        config.subblock_params(kind, getattr(block, kind))
        for block in config.blocks
        for kind in KINDS
        if isinstance(getattr(block, kind), Chain)
    )
    split = (config.num_params() - whole) / n
    heads = (
        serving.share(block.attention.num_key_value_heads)
        for block in config.blocks
        if isinstance(block.attention, GQA)
    )
    cached = scenario.cached_tokens * 2 * config.head_dim * serving.bytes_per_kv * sum(heads)
    return (whole + split) * serving.bytes_per_parameter + cached


def largest_batch(
    config: ModelConfig,
    scenario: Scenario,
    serving: Serving,
    share: float = 0.9,
    of_free: bool = False,
) -> int | None:
    """The most requests that fit: 0 where not one does, None where nothing is cached.

    share: of a device's memory for weights and cache (vLLM's rule) or, with `of_free`, of what the
    weights leave for the cache (TensorRT-LLM's).
    """
    one, two = (
        device_bytes(config, scenario.model_copy(update={"batch": batch}), serving)
        for batch in (1, 2)
    )
    each, memory = two - one, serving.device.memory
    weights = one - each
    room = share * (memory - weights) if of_free else share * memory - weights
    return max(0, math.floor(room / each)) if each else None


@dataclass(frozen=True)
class Choice:
    """What a prediction rests on besides the data sheet: the device's constants, the batch rule.

    whole: the cache gets 0.9 of the device less the weights, not 0.9 of what the weights leave.
    grown: a request holds its mean length (pages, requests of all ages), not its whole one.
    """

    device: Device = DEVICES["H100"]
    whole: bool = False
    grown: bool = False


AS_IS = Choice()


@dataclass(frozen=True)
class Row:
    """One figure: what the roofline says, and what was published."""

    what: str
    predicted: float
    published: float

    def shown(self) -> dict[str, object]:
        """As a table's row; the gap is relative to what was published."""
        gap = self.predicted / self.published - 1
        form = ",.0f" if self.published > 100 else ",.2f"
        cells = {"predicted": f"{self.predicted:{form}}", "published": f"{self.published:{form}}"}
        return {"figure": self.what, **cells, "gap": f"{gap:+.0%}"}


def llama(hidden: int, layers: int, heads: int, width: int) -> ModelConfig:
    """A dense Llama 3.x of this size: head size 128, 8 KV heads, vocabulary 128,256."""
    return ModelConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        num_attention_heads=heads,
        head_dim=128,
        blocks=uniform("gqa-8", f"swiglu-{width}", layers),
        rope_scaling=RopeScaling(rope_type="llama3", factor=8.0),
    )


def unfused(ultra: ModelConfig) -> ModelConfig:
    """Ultra as the search left it: each fused FFN is a run of FFN-only layers again.

    Their own widths were not published; they are taken as equal, to a channel.
    """
    blocks: list[BlockConfig] = []
    for block in ultra.blocks:
        width = getattr(block.ffn, "intermediate_size", 0)
        count = FUSED.get(width, 0)
        if not count:
            blocks.append(block)
        for part in range(count):
            own = (width + part) // count  # these sum to the width
            blocks.append(BlockConfig(NoOp(), SwiGLU(own)))
    return replace(ultra, blocks=tuple(blocks))


def fitting(
    config: ModelConfig, scenario: Scenario, tensor_parallel: int, most: int, choice: Choice
) -> int:
    """The largest batch whose cache fits beside the weights on H100s, and at most `most`."""
    serving = Serving(choice.device, "fp8", tensor_parallel)
    held = scenario.new // 2 if choice.grown else scenario.new
    asked = scenario.model_copy(update={"new": held})
    fits = largest_batch(config, asked, serving, CACHE_SHARE, of_free=not choice.whole)
    assert fits, f"not one request of {scenario.prompt}/{scenario.new} fits"
    return min(most, fits)


def per_gpu(
    config: ModelConfig, prompt: int, new: int, tensor_parallel: int, most: int, choice: Choice
) -> float:
    """Tokens a second and GPU of H100s in FP8 at the largest batch that fits."""
    scenario = Scenario(batch=1, prompt=prompt, new=new)
    batch = fitting(config, scenario, tensor_parallel, most, choice)
    full = scenario.model_copy(update={"batch": batch})
    found = predict(config, choice.device, "fp8", full, tensor_parallel)
    return found["throughput"] / tensor_parallel


def puzzle_rows(child: ModelConfig, parent: ModelConfig, choice: Choice = AS_IS) -> Iterator[Row]:
    """Puzzle's table: Nemotron-51B on one GPU, Llama-70B on four and on one."""
    for prompt, new, ours, on_four, on_one in PUZZLE:
        at = f"{prompt}/{new}"
        small = per_gpu(child, prompt, new, 1, 256, choice)
        yield Row(f"51B, {at}, tokens/s", small, ours)
        for devices, published in ((4, on_four), (1, on_one)):
            if published is not None:
                large = per_gpu(parent, prompt, new, devices, 384, choice)
                yield Row(f"Llama-70B TP{devices}, {at}, tokens/s and GPU", large, published)
                yield Row(f"51B / 70B TP{devices}, {at}", small / large, ours / published)


def super_rows(child: ModelConfig, parent: ModelConfig, choice: Choice = AS_IS) -> Iterator[Row]:
    """Llama-Nemotron §2: Super at batch 256 against Llama-70B on the same GPU, and on four."""
    small = per_gpu(child, 128, 1024, 1, 256, choice)
    for devices, most, published in ((1, 256, 5.0), (4, 384, 2.17)):
        large = per_gpu(parent, 128, 1024, devices, most, choice)
        yield Row(f"Super / 70B TP{devices}, 128/1024", small / large, published)


def ultra_rows(
    ultra: ModelConfig, dense: ModelConfig, small: ModelConfig, choice: Choice = AS_IS
) -> Iterator[Row]:
    """FFN Fusion's table: tokens a second of one user on 8 H100 in FP8."""
    one = Scenario(batch=1, prompt=128, new=1024)
    models = {"Llama-405B": dense, "before fusion": unfused(ultra), "Ultra": ultra}
    models["Llama-70B"] = small
    rate = {
        name: predict(c, choice.device, "fp8", one, 8)["throughput"] for name, c in models.items()
    }
    published = {"Llama-405B": 41.44, "before fusion": 63.38, "Ultra": 70.92, "Llama-70B": 94.03}
    for name, value in published.items():
        yield Row(f"{name}, TP8, one user, tokens/s", rate[name], value)
    for name in ("before fusion", "Ultra"):
        ratio = published[name] / published["Llama-405B"]
        yield Row(f"{name} / Llama-405B", rate[name] / rate["Llama-405B"], ratio)
    yield Row("Ultra / before fusion", rate["Ultra"] / rate["before fusion"], 70.92 / 63.38)


def engine_rows(models: dict[str, ModelConfig], choice: Choice = AS_IS) -> Iterator[Row]:
    """TensorRT-LLM's own table: dense models, so that no choice of words is in it."""
    for name, (devices, rates) in ENGINE.items():
        for (prompt, new), rate in zip(SETTINGS, rates, strict=True):
            found = per_gpu(models[name], prompt, new, devices, ENGINE_MOST, choice)
            yield Row(f"{name} TP{devices}, {prompt}/{new}, tokens/s", devices * found, rate)


def b200_rows(child: ModelConfig) -> Iterator[Row]:
    """The published sweep: each wave of requests decodes `B200_NEW` steps."""
    for at_once, (rate, token) in B200.items():
        batch = min(at_once, B200_PROMPTS)
        scenario = Scenario(batch=batch, prompt=2048, new=B200_NEW)
        step = predict(child, "B200", "fp8", scenario)["decode_seconds"]
        waves = math.ceil(B200_PROMPTS / at_once)
        found = B200_PROMPTS / (waves * step)
        yield Row(f"Super-49B-v1.5, {at_once} at once, tokens/s", found, rate)
        yield Row(f"Super-49B-v1.5, {at_once} at once, ms a token", 1e3 * step, token)


def choices() -> dict[str, Choice]:
    """One choice changed at a time."""
    own = AS_IS.device
    return {
        "as above": AS_IS,
        "both latencies halved": Choice(replace(own, kernel=own.kernel / 2, hop=own.hop / 2)),
        "both latencies doubled": Choice(replace(own, kernel=own.kernel * 2, hop=own.hop * 2)),
        "0.9 of the bandwidth, not 0.78": Choice(replace(own, memory_share=0.9)),
        "0.6 of the peak, not 0.73": Choice(replace(own, compute=0.6)),
        "0.5 of the peak, not 0.73": Choice(replace(own, compute=0.5)),
        "0.3 of the link, not all": Choice(replace(own, link=0.3 * own.link)),
        "80 GiB of memory, not 80 GB": Choice(replace(own, memory=80 * 2**30)),
        "batch: 0.9 of the whole memory": Choice(whole=True),
        "batch: requests half grown": Choice(grown=True),
    }


# Ratios that the last table follows, and the heads of its columns.
FOLLOWED = {
    "Super / 70B TP1, 128/1024": "Super/70B TP1",
    "Super / 70B TP4, 128/1024": "Super/70B TP4",
    "51B / 70B TP1, 128/1024": "51B/70B TP1",
    "51B / 70B TP4, 128/1024": "51B/70B TP4",
    "before fusion / Llama-405B": "unfused/405B",
    "Ultra / Llama-405B": "Ultra/405B",
}


def followed(what: str, rows: Sequence[Row], side: str) -> dict[str, object]:
    """A line of the last table: the followed ratios, `predicted` or `published`."""
    cells = {FOLLOWED[row.what]: getattr(row, side) for row in rows if row.what in FOLLOWED}
    return {"choice": what} | {head: f"{value:.2f}" for head, value in cells.items()}


def gaps(table: str, what: str, rows: Sequence[Row]) -> Mapping[str, object]:
    """How far the speeds of a table are off, ratios of speeds aside."""
    found = [row.predicted / row.published - 1 for row in rows if "tokens/s" in row.what]
    return {
        "table": table,
        "reserved": what,
        "median |gap|": f"{median(map(abs, found)):.0%}",
        "lowest": f"{min(found):+.0%}",
        "highest": f"{max(found):+.0%}",
    }


def run(options: argparse.Namespace) -> None:
    from harness import need, table

    def show(title: str, rows: Iterator[Row]) -> None:
        table([row.shown() for row in rows], title)

    small, dense = llama(8192, 80, 64, 28672), llama(16384, 126, 128, 53248)
    models = {"Llama-8B": llama(4096, 32, 32, 14336), "Llama-70B": small, "Llama-405B": dense}
    show("TensorRT-LLM: dense models on H100s, FP8", engine_rows(models))
    if options.smoke:
        return
    need(CONFIGS, hint="the released layer maps")
    puzzle = read_config(CONFIGS / "Llama-3_1-Nemotron-51B-Instruct.blocks.json")
    child = read_config(CONFIGS / "Llama-3_3-Nemotron-Super-49B-v1.config.json")
    ultra = read_config(CONFIGS / "Llama-3_1-Nemotron-Ultra-253B-v1.config.json")
    show("Llama-Nemotron: throughput on an H100, FP8", super_rows(child, small))
    show("vLLM on a B200: Super-49B-v1.5, FP8", b200_rows(child))
    show("Puzzle: throughput on H100s, FP8", puzzle_rows(puzzle, small))
    show("FFN Fusion: latency on 8 H100, FP8", ultra_rows(ultra, dense, small))
    told = [
        gaps(table, what, list(rows(choice)))
        for table, rows in (
            ("Puzzle", lambda choice: puzzle_rows(puzzle, small, choice)),
            ("TensorRT-LLM", lambda choice: engine_rows(models, choice)),
        )
        for what, choice in (("whole length", AS_IS), ("half grown", Choice(grown=True)))
    ]
    table(told, "What a request reserves: tokens/s, predicted against published")
    lines = []
    for what, choice in choices().items():
        rows = [
            *super_rows(child, small, choice),
            *puzzle_rows(puzzle, small, choice),
            *ultra_rows(ultra, dense, small, choice),
        ]
        lines += [] if lines else [followed("published", rows, "published")]
        lines.append(followed(what, rows, "predicted"))
    table(lines, "One choice changed at a time")


if __name__ == "__main__":
    import harness

    harness.main(__doc__, harness.Command(run))
