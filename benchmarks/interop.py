"""A child in software we did not write: greedy tokens of vLLM and llama.cpp beside ours.

    python benchmarks/interop.py RUN_OR_MODEL [--new 48] [--vllm .venv-vllm/bin/python]

Exports the model as decilm and as gguf into a temporary directory, prompts each engine with the
same token ids (eight chats where the model has a template, else openings of stories and of tasks),
float32, greedy, and prints how many tokens are equal and the largest difference of their
log-probabilities.
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

import harness
from harness import MODELS, ROOT, VLLM, Command, Figures, need, table, tiny_model

from tessera.data.chat import ChatEncoder
from tessera.data.template import TemplateError
from tessera.data.tokenizer import Tokenizer, load_tokenizer
from tessera.export.write import export_model
from tessera.model.checkpoint import load_model
from tessera.model.source import resolve

sys.path.insert(0, str(ROOT))

from tests.export.interop import greedy, llama_cpp  # noqa: E402

TEXTS = (
    "Once upon a time",
    "One day, a little girl",
    "The big dog",
    "start 6 m+3 n*2 o-3 mod 10\n",
)
CHATS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "A baker sells 12 rolls and then 9 more. How many rolls is that?",
    "Name three animals that live in the forest.",
    "Explain to a child why the sky is blue.",
    "Translate into French: good morning.",
    "Write a short poem about rain.",
    "What is 17 plus 25?",
)


Answer = tuple[list[int], list[float | None]]


def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as home:
        out = Path(home)
        model = str(tiny_model(out / "model")) if options.smoke else options.model
        need(model, hint="give a model")
        module = load_model(model, frozen=True)
        tokenizer = load_tokenizer(resolve(model))
        prompts = token_ids(tokenizer)
        ours = [greedy(module, prompt, options.new) for prompt in prompts]
        print("words:", " ".join("/".join(pair) for pair in module.config.words))
        rows = [agreement("llama.cpp", ours, ask_llama_cpp(model, out, prompts, options.new))]
        if options.vllm.is_file():
            theirs = ask_vllm(options.vllm, model, out, prompts, options.new)
            rows.append(agreement("vLLM", ours, theirs))
        else:
            print(f"vLLM: {options.vllm} is missing (make venv-vllm)")
    table(rows)


def token_ids(tokenizer: Tokenizer) -> list[list[int]]:
    """The prompts, each within what vllm_tokens.py holds."""
    try:
        encoder = ChatEncoder.of(tokenizer)
    except TemplateError:
        return [tokenizer.encode(text, bos=True) for text in TEXTS]
    return [encoder.prompt([{"role": "user", "content": text}], None) for text in CHATS]


def arguments(parser: argparse.ArgumentParser) -> None:
    model = str(MODELS / "stories260k")
    parser.add_argument("model", nargs="?", default=model, help="a run or a model directory")
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--vllm", type=Path, default=Path(VLLM))


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
    script = ROOT / "tests" / "export" / "vllm_tokens.py"
    command = [str(python), str(script), str(out / "decilm"), json.dumps(prompts), str(new)]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("TOKENS ")]
    if not lines:
        raise SystemExit(f"vLLM gave no answer:\n{ran.stderr[-3000:]}")
    return [(ids, logprobs) for ids, logprobs in json.loads(lines[0][7:])]


def agreement(engine: str, ours: Sequence[Answer], theirs: Sequence[Answer]) -> Figures:
    """Equal tokens of all, and the largest gap between log-probabilities."""
    equal = total = 0
    gap = 0.0
    for (tokens, logprobs), (other, given) in zip(ours, theirs, strict=True):
        total += len(tokens)
        equal += sum(a == b for a, b in zip(tokens, other, strict=False))
        pairs = zip(logprobs, given, strict=False)
        gap = max([gap, *(abs(x - y) for x, y in pairs if x is not None and y is not None)])
    return {
        "engine": engine,
        "tokens equal": f"{equal}/{total}",
        "log-probabilities within": f"{gap:.1e}",
    }


if __name__ == "__main__":
    harness.main(__doc__, Command(run, arguments, {"new": 8}))
