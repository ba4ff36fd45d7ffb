"""A child in software we did not write: greedy tokens of vLLM and llama.cpp beside ours.

    python benchmarks/interop.py RUN_OR_MODEL [--new 48] [--vllm .venv-vllm/bin/python]

Exports the model as decilm and as gguf into a temporary directory, prompts each engine with the
same token ids (openings of stories and of tasks, by the model's own tokenizer), float32, greedy,
and prints how many tokens are equal and the largest difference of their log-probabilities.
vLLM's CPU build is skipped where its environment (`make venv-vllm`) is missing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tessera.data.tokenizer import load_tokenizer
from tessera.export.write import export_model
from tessera.model.checkpoint import load_model
from tessera.model.source import resolve

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.export.interop import greedy, llama_cpp  # noqa: E402

TEXTS = (
    "Once upon a time",
    "One day, a little girl",
    "The big dog",
    "start 6 m+3 n*2 o-3 mod 10\n",
)
Answer = tuple[list[int], list[float | None]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = ROOT.parent / "shared" / "models" / "stories260k"
    parser.add_argument("model", nargs="?", default=str(model), help="a run or a model directory")
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--vllm", type=Path, default=ROOT / ".venv-vllm" / "bin" / "python")
    options = parser.parse_args()
    if options.model == str(model) and not model.is_dir():
        print("skipped: no model given, and none beside the repository")
        return
    module = load_model(options.model, frozen=True)
    tokenizer = load_tokenizer(resolve(options.model))
    prompts = [tokenizer.encode(text, bos=True) for text in TEXTS]
    ours = [greedy(module, prompt, options.new) for prompt in prompts]
    print("words:", " ".join("/".join(pair) for pair in module.config.words))
    with tempfile.TemporaryDirectory() as home:
        out = Path(home)
        report("llama.cpp", ours, ask_llama_cpp(options.model, out, prompts, options.new))
        if options.vllm.is_file():
            report("vLLM", ours, ask_vllm(options.vllm, options.model, out, prompts, options.new))
        else:
            print(f"vLLM: skipped, {options.vllm} is missing (make venv-vllm)")


def ask_llama_cpp(model: str, out: Path, prompts: Sequence[list[int]], new: int) -> list[Answer]:
    """llama.cpp's server, from the xllamacpp wheel, on the exported GGUF."""
    export_model(model, out / "gguf", "gguf")
    with llama_cpp(out / "gguf" / "model.gguf", out / "llama.log") as server:
        return [server.complete(prompt, new) for prompt in prompts]


def ask_vllm(
    python: Path, model: str, out: Path, prompts: Sequence[list[int]], new: int
) -> list[Answer]:
    """Stock vLLM's CPU build on the exported DeciLM directory."""
    export_model(model, out / "decilm", "decilm")
    script = ROOT / "tests" / "serve" / "vllm_tokens.py"
    command = [str(python), str(script), str(out / "decilm"), json.dumps(prompts), str(new)]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("TOKENS ")]
    if not lines:
        raise SystemExit(f"vLLM gave no answer:\n{ran.stderr[-3000:]}")
    return [(ids, logprobs) for ids, logprobs in json.loads(lines[0][7:])]


def report(engine: str, ours: Sequence[Answer], theirs: Sequence[Answer]) -> None:
    """One line: equal tokens of all, and the largest gap between log-probabilities."""
    equal = total = 0
    gap = 0.0
    for (tokens, logprobs), (other, given) in zip(ours, theirs, strict=True):
        total += len(tokens)
        equal += sum(a == b for a, b in zip(tokens, other, strict=False))
        pairs = zip(logprobs, given, strict=False)
        gap = max([gap, *(abs(x - y) for x, y in pairs if x is not None and y is not None)])
    print(f"{engine}: {equal}/{total} tokens equal, log-probabilities within {gap:.1e}", flush=True)


if __name__ == "__main__":
    main()
