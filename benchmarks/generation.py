"""Generation speed: `TorchEngine` against transformers' `generate`, on one dense model in one run.

    python benchmarks/generation.py [--model PATH] [--batch 1 8 32] [--threads 1] [--json]

Greedy, float32, KV cache and SDPA on both sides, the same weights and prompts, a fixed number
of new tokens (stop tokens off). The two alternate, so that both see the same neighbours on a
shared machine; figures are medians, and CPU seconds are the steadier ones. Without --model:
random weights in the 6M shape of the training baseline. Needs the `dev` extra.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tessera.generate.engine import SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tessera.model.weights import load_model

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Row:
    """One batch size: median seconds a run of each side; ratios are medians of the pairs'."""

    batch: int
    peer_wall: float
    ours_wall: float
    peer_cpu: float
    ours_cpu: float
    wall_ratio: float
    cpu_ratio: float
    ours_tokens_per_cpu_second: float
    agreeing: float


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or random_model(Path(folder))
        peer = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").eval()
        module = load_model(path, frozen=True)
    engine = TorchEngine(module)
    rows = [measure(peer, engine, batch, options) for batch in options.batch]
    if options.json:
        print(json.dumps({"machine": machine(options), "rows": [asdict(row) for row in rows]}))
    else:
        print(table(rows, options))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face directory (default: random 6M)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=64, help="tokens a prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens a prompt")
    parser.add_argument("--repeats", type=int, default=7, help="pairs, after one to warm up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def random_model(directory: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(directory)
    return directory


def measure(peer: Any, engine: TorchEngine, batch: int, options: argparse.Namespace) -> Row:
    vocab = engine.packed.config.vocab_size
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(0, vocab, (batch, options.prompt), generator=generator)
    params = SamplingParams(max_tokens=options.new, temperature=0)

    def theirs() -> list[list[int]]:
        with torch.inference_mode():
            out = peer.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                use_cache=True,
                max_new_tokens=options.new,
                min_new_tokens=options.new,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out[:, options.prompt :].tolist()

    def ours() -> list[list[int]]:
        return [done.token_ids for (done,) in engine.generate(prompts.tolist(), params)]

    pairs = []
    for _ in range(options.repeats + 1):
        (tokens, *peer_seconds), (own, *own_seconds) = clocked(theirs), clocked(ours)
        assert all(len(row) == options.new for row in tokens + own)
        pairs.append((*peer_seconds, *own_seconds))
    agreeing = sum(a == b for a, b in zip(tokens, own, strict=True)) / batch
    return summary(batch, pairs[1:], options.new, agreeing)


def clocked(run: Callable[[], list[list[int]]]) -> tuple[list[list[int]], float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def summary(batch: int, pairs: list[tuple], new: int, agreeing: float) -> Row:
    peer_wall, peer_cpu, ours_wall, ours_cpu = (
        statistics.median(x) for x in zip(*pairs, strict=True)
    )
    return Row(
        batch=batch,
        peer_wall=peer_wall,
        ours_wall=ours_wall,
        peer_cpu=peer_cpu,
        ours_cpu=ours_cpu,
        wall_ratio=statistics.median(p[0] / p[2] for p in pairs),
        cpu_ratio=statistics.median(p[1] / p[3] for p in pairs),
        ours_tokens_per_cpu_second=batch * new / ours_cpu,
        agreeing=agreeing,
    )


def machine(options: argparse.Namespace) -> str:
    return (
        f"{options.threads} thread(s), {torch.backends.cpu.get_cpu_capability()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{options.prompt} prompt + {options.new} new tokens, {options.repeats} pairs"
    )


def table(rows: list[Row], options: argparse.Namespace) -> str:
    name = options.model.name if options.model else "random 6M"
    lines = [
        f"{name}: {machine(options)}",
        "",
        "| batch | transformers, s wall (CPU) | tessera, s wall (CPU) | ratio wall (CPU) "
        "| tessera, tokens/CPU-s | rows with equal tokens |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        lines.append(
            f"| {r.batch} | {r.peer_wall:.3f} ({r.peer_cpu:.3f}) | {r.ours_wall:.3f} "
            f"({r.ours_cpu:.3f}) | {r.wall_ratio:.2f} ({r.cpu_ratio:.2f}) "
            f"| {r.ours_tokens_per_cpu_second:,.0f} | {r.agreeing:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
