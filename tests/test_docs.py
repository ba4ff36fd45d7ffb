"""What the pages of docs/ say holds: snippets run, commands parse, files and keys are there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer

from tessera.cli import quickstart
from tessera.cli.main import app
from tessera.data import problems
from tessera.data.tokenizer import train_bpe
from tessera.eval.task import Data
from tessera.eval.tasks.procedural import find
from tessera.export import engines
from tessera.generate.engine import SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tessera.model import config
from tessera.model.checkpoint import Checkpoint, load_model, save_model
from tessera.model.families import FAMILIES
from tessera.puzzle.library import BlockLibrary, assemble, save_library
from tessera.puzzle.space import SpaceConfig, build_space
from tessera.puzzle.surgery import ParentStatistics, cut, linear_weight
from tessera.rl.pool import Rubric
from tessera.rl.rewards import Sample
from tessera.rl.verifiers.outcome import Outcome
from tessera.runs.recipe import load
from tessera.runs.run import is_done
from tessera.train.flops import subblock_cost
from tests import tiny

ROOT = Path(__file__).parents[1]


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def snippets(language: str, name: str = "extending") -> Iterator[str]:
    yield from re.findall(rf"```{language}\n(.*?)```", page(name), re.DOTALL)


def named(file: str, name: str = "extending") -> str:
    return next(code for code in snippets("python", name) if code.startswith(f"# {file}"))


def commands(name: str) -> list[list[str]]:
    """The words of every `tessera` command in a page's bash blocks, one list a command."""
    lines = "".join(snippets("bash", name)).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words[words.index("tessera") + 1 :] for words in split if "tessera" in words]


def parsed(words: list[str]) -> dict[str, Any]:
    """What the command line makes of a command's words, nothing run; raises where it refuses."""
    name, command, context = "tessera", typer.main.get_command(app), None
    while True:
        context = command.make_context(name, words, parent=context)
        if not hasattr(command, "resolve_command"):
            return {"command": context.command_path, **context.params}
        left = [*getattr(context, "_protected_args", ()), *context.args]
        name, command, words = command.resolve_command(context, left)


def test_every_snippet_is_short():
    assert all(len(code.splitlines()) < 40 for code in (*snippets("python"), *snippets("toml")))


def test_the_reward_judges_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "rewards.py").write_text(named("rewards.py"))
    monkeypatch.syspath_prepend(tmp_path)
    recipe, _ = snippets("toml")
    from pydantic import TypeAdapter

    from tessera.rl.rewards import Reward

    rewards = TypeAdapter(list[Reward]).validate_python(tomllib.loads(recipe)["grpo"]["rewards"])
    given = [Sample([], text, {"answer": "4"}) for text in ("Answer: 4", "no " * 30, "<think>on")]
    with Rubric(rewards, 1) as rubric:
        short, long, none = rubric(given)
    assert (short.reward, long.reward, none.reward) == (1.2, 0.0, None)
    assert none.parts["function"] == Outcome("could-not-judge", None, "there is no answer")


def test_the_benchmark_reads_its_rows(tmp_path: Path):
    space: dict = {"__name__": "capitals"}
    exec(named("tessera/eval/tasks/capitals.py"), space)
    (tmp_path / "capitals.jsonl").write_text(json.dumps({"country": "France", "capital": "Paris"}))
    (task,) = space["TASKS"]
    (item,) = task.read(Data("capitals", str(tmp_path)))
    assert item.fields["answer"] == "Paris" and "France" in item.messages[-1]["content"]
    assert task.metric == "accuracy"


def test_the_family_is_held_out_by_its_text_and_can_be_evaluated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(problems, "TASKS", dict(problems.TASKS))
    space: dict = {"__name__": "reverse"}
    exec(named("tessera/data/problems.py"), space)
    drawn = space["reverse"](np.random.default_rng(0), 5)
    letters = drawn.question.split()[1:]
    assert drawn.answer == "".join(reversed(letters)) and drawn.work.split()[-1] == drawn.answer
    train, held = (
        {problems.problem("reverse", 0, i, s).question for i in range(99)}
        for s in ("train", "heldout")
    )
    assert not train & held
    assert find("reverse@5") is not None


@pytest.fixture
def lowrank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's variant is known for one test."""
    monkeypatch.setattr(config, "WORDS", dict(config.WORDS))
    code = compile(named("tessera/model/config.py"), "extending.md", "exec", dont_inherit=True)
    exec(code, {"__name__": "lowrank"})


MIXED = (("lowrank-3", "swiglu-24"), ("gqa-1", "lowrank-8"), ("linear", "lowrank-1"))


def test_the_variants_first_weights_are_the_nearest_of_its_rank(lowrank: None):
    parent = tiny.model(tiny.PARENT)
    for kind in config.KINDS:
        source = getattr(parent.blocks[0], kind)
        whole = 0.5 * linear_weight(source.op)
        for rank in (1, 5, 8):
            unit = cut(source, parent.config, config.parse(f"lowrank-{rank}"), linear_scale=0.5)
            missed = (whole - linear_weight(unit.op)).square().sum()
            lost = torch.linalg.svdvals(whole)[rank:].square().sum()
            torch.testing.assert_close(missed, lost, rtol=1e-4, atol=1e-6)


def test_the_variant_is_counted_as_it_is_built(lowrank: None):
    model = tiny.model(MIXED)
    assert model.config.words == MIXED
    assert model.config.num_params() == sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.blocks[1].ffn.op.parameters())
    assert subblock_cost(model.config, model.config.blocks[1].ffn).token == 2 * matrices


def test_the_variant_decodes_as_it_reads_and_comes_back_from_disk(lowrank: None, tmp_path: Path):
    model = tiny.model(MIXED)
    save_model(model, tmp_path / "model")
    prompt = [3, 4, 5]
    params = SamplingParams(max_tokens=6, temperature=0.0)
    written = TorchEngine(load_model(tmp_path / "model")).generate([prompt], params)[0][0]
    ids = torch.tensor([prompt + written.token_ids])
    with torch.no_grad():
        likeliest = model.logits(model(ids))[0].argmax(-1)
    assert likeliest[2:-1].tolist() == written.token_ids


def test_a_library_holds_the_variant(lowrank: None, tmp_path: Path):
    (_, space) = (tomllib.loads(code) for code in snippets("toml"))
    parent = tiny.model(tiny.PARENT, hidden_size=256)
    offered = build_space(SpaceConfig(**space["bld"]["space"]), parent.config)
    scales = {kind: [1.0] * 3 for kind in config.KINDS}
    statistics = ParentStatistics([None] * 3, scales, [1.0] * 3, [0.0] * 3)
    library = BlockLibrary.from_parent(parent, offered, statistics)
    save_library(library, tmp_path)
    words = (("lowrank-64", "lowrank-128"), *tiny.PARENT[1:])
    child = load_model(assemble(Checkpoint.of(parent), tmp_path, words))
    assert child.config.words == words
    assert torch.equal(child.blocks[0].ffn.op.weight, library["00/ffn/lowrank-128"].op.weight)


def test_the_variant_is_refused_where_it_cannot_be_told(lowrank: None):
    model = tiny.config(MIXED)
    for form in engines.FORMATS:
        assert any("lowrank-3" in reason for reason in engines.format_refusals(model, form))
    assert all(engines.refusals(model, engine) for engine in engines.ENGINES)
    with pytest.raises(config.ConfigError, match="at most half of 16"):
        tiny.config((("lowrank-9", "noop"),)).num_params()
    with pytest.raises(config.ConfigError, match="linear, noop or lowrank-N"):
        config.parse_kind("attention", "swiglu-8")


PAGES = ("first-hour", "your-checkpoint")


@pytest.mark.parametrize("name", PAGES)
def test_every_command_of_a_page_parses(name: str):
    found = commands(name)
    assert len(found) > 5
    for words in found:
        parsed(words)


@pytest.mark.parametrize("name", PAGES)
def test_every_file_that_a_page_names_is_there(name: str):
    for path in re.findall(r"`((?:recipes|docs|tests|tessera|benchmarks)/[\w./-]+)`", page(name)):
        assert (ROOT / path).exists(), path


def test_the_first_hour_speaks_of_the_recipe_that_is_run():
    steps = {"parent", "bld", "search", "search-dropped", "race", "kd", "frontier", "sft", "grpo"}
    for words in commands("first-hour"):
        told = parsed(words)
        if told["command"].endswith("quickstart"):
            plan = quickstart.recipe(fast=True, overrides=told["overrides"] or ())
            tables = {spec.name: spec.table for spec in plan.stages}
            assert plan.name == "quickstart-fast" and steps <= set(tables)
            assert set(told["redo"] or ()) <= set(tables)
        for path in re.findall(r"runs/quickstart-fast/([\w-]+)", " ".join(words)):
            assert path in tables
    assert tables["search"]["constraints"] == {"throughput": "2x"}
    numbers = [int(n) for n in re.findall(r"^\[\d+/(\d+)\]", page("first-hour"), re.MULTILINE)]
    assert set(numbers) == {len(tables)}
    assert 'constraints = { throughput = "3x" }' in quickstart.TOY.path.read_text()


def test_the_first_hours_chats_are_what_the_page_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    exec(named("chats.py", "first-hour"), {"__name__": "chats"})
    rows = [json.loads(line) for line in Path("chats.jsonl").read_text().splitlines()]
    asked, answer = rows[0]["messages"][1]["content"], rows[0]["messages"][2]["content"]
    assert f"\n{asked}<|eot_id|>" in page("first-hour") and answer in page("first-hour")
    assert "</think>" in Path("chats.jsonl").read_text().splitlines()[2]  # what the sed breaks


def test_the_first_hours_client_prints_both_modes(capsys: pytest.CaptureFixture[str]):
    said = SimpleNamespace(content="Answer: 9", reasoning_content="Work: m+3=7")
    answer = SimpleNamespace(
        choices=[SimpleNamespace(message=said)], usage=SimpleNamespace(completion_tokens=18)
    )
    asked: list[dict[str, Any]] = []
    create = lambda **given: asked.append(given) or answer  # noqa: E731
    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    code = named("ask.py", "first-hour").replace("from openai import OpenAI\n", "")
    exec(code, {"OpenAI": lambda **_: client})
    assert [one["messages"][0]["content"][-3:].strip() for one in asked] == ["on", "off"]
    assert "on: 'Answer: 9', thought 'Work: m+3=7', 18 tokens" in capsys.readouterr().out


def test_the_families_of_the_page_are_those_that_are_read():
    rows = re.findall(r"^\| `([\w-]+)` \|", page("your-checkpoint"), re.MULTILINE)
    assert rows[1 : len(FAMILIES) + 3] == [*FAMILIES, "nemotron-nas", "tessera"]


def test_the_keys_of_the_page_are_the_recipes():
    changed = re.search(r"\| what to change.*?\n\n", page("your-checkpoint"), re.DOTALL)
    assert changed is not None
    recipe = load(ROOT / "recipes" / "llama-3.2-1b.toml")
    tables = {spec.name: spec.table for spec in recipe.stages}
    keys = set(re.findall(r"`([a-z-]+(?:\.[a-z_]+)+)`", changed[0])) - {"llama.cpp"}
    assert len(keys) > 8
    for key in keys:
        found: Any = tables
        for part in key.split("."):
            found = found[part]


# A page of a package, and the files of benchmarks/results whose figures its tables repeat.
DESIGNS = {
    "puzzle": ("bld-cpu", "search-cpu", "frontier-cpu"),
    "rl": ("rl-cpu",),
    "curate": ("curate-cpu",),
    "data": ("data-cpu", "switch-cpu"),
    "generate": ("generation-cpu",),
    "model": ("attention-cpu", "memory-cpu", "puzzle-cpu", "training-cpu", "vllm-cost-cpu"),
    "serve": ("serve-cpu", "puzzle-cpu", "generation-cpu"),
    "planning": ("plan-cpu",),
    "train": ("kd-cpu", "step-cpu", "training-cpu"),
}
# Rows of a page whose figures stand in several rows of the results, because a table was turned.
TURNED = {"puzzle": 4}


@pytest.mark.parametrize("name", DESIGNS)
def test_the_code_of_a_page_stands_in_the_source(name: str):
    for code in snippets("python", name):
        head, _, body = code.partition("\n")
        source = (ROOT / head.removeprefix("# ")).read_text(encoding="utf-8")
        lines = [line.strip() for line in source.splitlines()]
        assert "\n".join(map(str.strip, body.splitlines())) in "\n".join(lines), head


@pytest.mark.parametrize("name", DESIGNS)
def test_every_file_that_a_page_of_a_package_names_is_there(name: str):
    found = re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|md|toml))`", page(name))
    assert found
    for path in found:
        assert any((home / path).is_file() for home in (ROOT, ROOT / "tessera")), path


@pytest.mark.parametrize("name", DESIGNS)
def test_the_figures_of_a_page_come_from_a_run(name: str):
    results = ROOT / "benchmarks" / "results"
    told = "\n".join((results / f"{one}.md").read_text() for one in DESIGNS[name]).splitlines()
    known = [set(re.findall(r"[\w.,-]+", line)) for line in told]
    rows = [line for line in page(name).splitlines() if re.match(r"\|.*\d", line)]
    assert len(rows) > 8
    figures = {row: set(re.findall(r"[\w.,-]*\d[\w.,-]*", row)) for row in rows}
    turned = [row for row in rows if not any(figures[row] <= line for line in known)]
    assert all(figures[row] <= set().union(*known) for row in turned), turned
    assert len(turned) == TURNED.get(name, 0), turned


@pytest.mark.parametrize("index", ["docs/architecture.md", "README.md"])
def test_the_index_names_every_page_of_a_package(index: str):
    text = (ROOT / index).read_text(encoding="utf-8")
    assert all(f"`docs/{name}.md`" in text for name in DESIGNS)


@pytest.mark.slow
def test_the_commands_of_the_page_run_as_they_stand(tmp_path: Path):
    name = "your-checkpoint"
    words = (("gqa-4", "swiglu-48"),) * 3
    tokenizer = train_bpe(["once upon a time there was a cat that thought of fish"] * 9, 300)
    shape = {"hidden_size": 32, "head_dim": 8, "max_position_embeddings": 512, "vocab_size": 300}
    tiny.saved(tmp_path / "MODEL", words, **shape, eos_token_id=tokenizer.eos_ids[:1])
    tokenizer.save(tmp_path / "MODEL")
    (template,) = snippets("jinja", name)
    (tmp_path / "MODEL" / "chat_template.jinja").write_text(template)
    (tmp_path / "chats.py").write_text(named("chats.py", name))
    text = "once upon a time there was a cat that thought of fish. " * 9
    rows = [json.dumps({"text": f"{i} {text}"}) for i in range(400)]
    (tmp_path / "DOCUMENTS.jsonl").write_text("\n".join(rows))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    shell = f"""set -e
python() {{ {sys.executable} "$@"; }}
tessera() {{ python -m tessera "$@"; }}
torchrun() {{ python -m torch.distributed.run "$@"; }}
{"".join(snippets("bash", name))}"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert (tmp_path / "exported" / "config.json").is_file()
    for run in ("runs/rehearsal/compare", "runs/two/bld"):
        assert is_done(tmp_path / run)
