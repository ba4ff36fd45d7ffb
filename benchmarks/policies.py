"""Reinforcement learning and fine-tuning of the quickstart's child: what each choice is worth.

    python benchmarks/policies.py algorithms RUNS [--seeds 0 1 2]
    python benchmarks/policies.py curriculum RUNS [--seeds 0 1 2] [--repeats 2]
    python benchmarks/policies.py instructions RUNS [--seeds 0 1 2]
    python benchmarks/policies.py distillation [--seeds 1] [--runs DIR]
    python benchmarks/policies.py switch [--seeds 1 2 3] [--runs DIR] [--problems 400]

RUNS holds what benchmarks/quickstart.py made (RUNS/quickstart-SEED/sft). Accuracy is greedy on
held-out problems.

algorithms: every row trains the same model on as many answers: GRPO on prompts by chance, from easy
to hard and answered one step ahead, RLOO, and online RPO; three and six operations, reasoning on.

curriculum: a pool of prompts that are mostly too hard to learn from. One prompt in ten has three
operations, as the model has seen them; nine have HARD, more than it was ever trained on. GRPO
learns from few answers, in a random order, from easy to hard (Llama-Nemotron, arXiv 2505.00949,
§5.1) and, as a control, from hard to easy: the same model, prompts, rewards and number of answers.

instructions: RLOO on instruction checkers. Every question of the toy comes with two of IFEval's
instructions. A short fine-tuning on answers of which half leave one of the two out makes a model
that follows them some of the time; RLOO (Llama-Nemotron §5.2) is rewarded by the checkers alone,
both followed or nothing, and as much for the switch. Measured is IFEval's prompt-level strict share
on 200 held-out questions, beside whether the question is still answered rightly, which nothing
rewards.

distillation: a model with the switch (as for `switch`) teaches what is left of it without some of
its layers: on chats (`kd`), on the student's own answers (`gkd`, reverse KL), and on one after the
other. Measured are the forward KL on held-out chats, the reverse KL on the student's own answers to
held-out problems, and how many of these are right.

switch: the reasoning switch on the toy of recipes/sft-toy.toml: accuracy, obedience, tokens, on and
off. Each seed is a parent from scratch and its fine-tuning, run by the command line (5 to 7
CPU-minutes; what DIR holds already is not run again), asked through the model's own template.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from harness import ROOT, Command, skip, table, tiny_model

from tessera.data.chat import ChatEncoder
from tessera.data.conversation import Mode
from tessera.data.problems import MODES, Problem, problem
from tessera.data.switch import DETAILED, obeys, record_switch
from tessera.data.thought import CLOSE, OPEN, split, split_message
from tessera.data.tokenizer import load_tokenizer
from tessera.generate.engine import SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tessera.model.checkpoint import Checkpoint, load_model, save_model
from tessera.model.source import resolve
from tessera.objectives.gkd import GKD, GKDLossConfig
from tessera.objectives.lm import Heldout, loss_sums
from tessera.pipeline import run_recipe
from tessera.puzzle.library import assemble
from tessera.rl.experience import Answer, Group, rows
from tessera.runs.recipe import dumps, loads
from tessera.runs.run import read_manifest, read_metrics, read_table
from tessera.train.optim import DocumentTrainConfig

EVAL = """
[eval-{name}]
stage = "eval"
model = "{model}"
tasks = {tasks}
thinking = "on"
on = {{ temperature = 0.0 }}
max_tokens = {tokens}
"""
TOY = {"steps": 2, "samples": 2, "prompts_per_rollout": 2, "max_tokens": 16, "heldout": 10}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])


def of_seeds(
    run: Callable[[int, Path], list[dict[str, Any]]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of every seed; in a smoke run, of a random model and with little training."""
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            toy(Path(folder) / "quickstart-0" / "sft")
            return run(0, Path(folder))
    if options.runs is None:
        skip("give the runs of benchmarks/quickstart.py")
    return [row for seed in options.seeds for row in run(seed, options.runs)]


def toy(home: Path) -> Path:
    """A random model that stands for one fine-tuned with the switch."""
    tiny_model(home)
    record_switch(home, DETAILED)
    return home


def finish(text: str, runs: Path, smoke: bool) -> None:
    """Run the recipe of this text."""
    run_recipe(
        loads(dumps(shrunk(tomllib.loads(text)))) if smoke else loads(text), runs, quiet=True
    )


def shrunk(tables: dict[str, Any]) -> dict[str, Any]:
    """The same tables with toy sizes."""
    found: dict[str, Any] = {}
    for key, value in tables.items():
        if key == "tasks" and isinstance(value, dict):
            value = dict.fromkeys(value, 12)
        elif isinstance(value, dict):
            value = shrunk(value)
        found[key] = min(value, TOY[key]) if key in TOY else value
    return found | ({"limit": 4} if tables.get("stage") == "eval" else {})


def over_seeds(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    values = [float(row[key]) for row in rows]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {f"{key}, mean": statistics.mean(values), "spread": round(spread, 3)}


# Algorithms


ALGORITHMS = """
name = "policies-{seed}"
seed = {seed}
[profile]
model = "{sft}"
tasks = {{ calc = 500 }}
off = 0.1
samples = 8
max_tokens = 64
rewards = [{{ kind = "exact" }}]
drop_from = {drop}
[grpo]
{common}
train = {{ {train}, lr = 5e-4 }}
[grpo-curriculum]
{common}
curriculum = {{ order = "curriculum" }}
train = {{ {train}, lr = 5e-4 }}
[grpo-ahead]
{common}
staleness = 1
gap_limit = 1.0
train = {{ {train}, lr = 5e-4 }}
[rloo]
{common}
kl = 0.0
train = {{ {train}, lr = 5e-4 }}
[rpo]
{common}
beta = 0.1
eta = 10.0
dynamic_sampling = 2
train = {{ {train}, lr = 5e-4 }}
"""
COMMON = """model = "{sft}"
prompts_per_rollout = 12
samples = 12
max_tokens = 64
rewards = [{{ kind = "exact" }}, {{ kind = "format", weight = 0.1 }}]"""


TRAIN = 'steps = 100, microbatch_tokens = 2048, schedule = "constant"'
NAMES = ("grpo", "grpo-curriculum", "grpo-ahead", "rloo", "rpo")


def algorithms(options: argparse.Namespace) -> None:
    rows = of_seeds(lambda seed, runs: trained_by_each(seed, runs, options.smoke), options)
    table(rows)
    ways = {name: [row for row in rows if row["way"] == name] for name in ("sft", *NAMES)}
    table([{"way": name, **over_seeds(found, "hard")} for name, found in ways.items()])


def trained_by_each(seed: int, runs: Path, smoke: bool) -> list[dict[str, Any]]:
    """A row for each way of training one seed's model."""
    sft = (runs / f"quickstart-{seed}" / "sft").resolve()
    # Above every pass rate, so that all ways see the same prompts, easy ones among them.
    words = {"seed": seed, "sft": sft, "drop": 1.01, "train": TRAIN}
    asked = {"tasks": ["calc@3", "calc@6"], "tokens": 64}
    text = ALGORITHMS.format(**words, common=COMMON.format(sft=sft))
    text += EVAL.format(name="sft", model=sft, **asked)
    text += "".join(EVAL.format(name=name, model=name, **asked) for name in NAMES)
    finish(text, runs, smoke)
    home = runs / f"policies-{seed}"
    rows = []
    for name in ("sft", *NAMES):
        found = {row["task"]: row for row in read_table(home / f"eval-{name}", "eval")}
        seconds = read_manifest(home / name).seconds if name != "sft" else 0.0
        row: dict[str, Any] = {"way": name, "seed": seed, "seconds": round(seconds, 1)}
        row |= {"easy": found["calc@3"]["value"], "hard": found["calc@6"]["value"]}
        rows.append({**row, "obedience": found["calc@6"]["obedience"]})
    return rows


# Curriculum


HARD = 9


STEPS = 40


LEVELS = (3, 6, HARD)


ORDERS = {
    "random": '{ order = "random" }',
    "easy to hard": '{ order = "curriculum" }',
    "hard to easy": '{ order = "curriculum", start = 0.1, end = 0.9 }',
}
CURRICULUM = """
name = "curriculum-{seed}-{repeat}"
seed = {repeat}
[profile]
model = "{sft}"
tasks = {{ "calc@3" = 200, "calc@{hard}" = 1800 }}
samples = 8
max_tokens = 96
rewards = [{{ kind = "exact" }}]
drop_from = 1.01
"""
GRPO = """
[{name}]
stage = "grpo"
model = "{sft}"
prompts = "profile"
prompts_per_rollout = 12
samples = 4
max_tokens = 96
rewards = [{{ kind = "exact" }}, {{ kind = "format", weight = 0.1 }}]
curriculum = {order}
train = {{ steps = {steps}, microbatch_tokens = 2048, lr = 5e-4, schedule = "constant" }}
"""


def curriculum(options: argparse.Namespace) -> None:
    def repeated(seed: int, runs: Path) -> list[dict[str, Any]]:
        found = (ordered(seed, repeat, runs, options.smoke) for repeat in range(options.repeats))
        return [row for rows in found for row in rows]

    rows = of_seeds(repeated, options)
    table(rows)
    table(gains(rows))


def curriculum_options(parser: argparse.ArgumentParser) -> None:
    arguments(parser)
    parser.add_argument("--repeats", type=int, default=2)


def ordered(seed: int, repeat: int, runs: Path, smoke: bool) -> list[dict[str, Any]]:
    """A row for the model as it is, and one for each order."""
    sft = (runs / f"quickstart-{seed}" / "sft").resolve()
    asked = {"tasks": [f"calc@{level}" for level in LEVELS], "tokens": 96}
    text = CURRICULUM.format(seed=seed, repeat=repeat, sft=sft, hard=HARD)
    text += EVAL.format(name="before", model=sft, **asked)
    for order, values in ORDERS.items():
        name = order.replace(" ", "-")
        text += GRPO.format(name=name, sft=sft, order=values, steps=STEPS)
        text += EVAL.format(name=name, model=name, **asked)
    finish(text, runs, smoke)
    home, rows = runs / f"curriculum-{seed}-{repeat}", []
    for order in ("before", *ORDERS):
        found = read_table(home / f"eval-{order.replace(' ', '-')}", "eval")
        row: dict[str, Any] = {"order": order, "seed": seed, "repeat": repeat}
        row |= {each["task"]: each["value"] for each in found}
        rows.append({**row, "obedience": min(each["obedience"] for each in found)})
    return rows


def gains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each order's mean, and its distance from random order in pairs of one seed and repeat."""
    told = []
    for order in ("before", *ORDERS):
        row: dict[str, Any] = {"order": order}
        for level in LEVELS:
            task = f"calc@{level}"
            here, random = (
                [float(one[task]) for one in rows if one["order"] == name]
                for name in (order, "random")
            )
            row[task] = round(statistics.mean(here), 3)
            apart = [mine - theirs for mine, theirs in zip(here, random, strict=True)]
            if order not in ("before", "random"):
                row[f"{task} - random"] = round(statistics.mean(apart), 3)
                row[f"± {level}"] = round(statistics.stdev(apart) / len(apart) ** 0.5, 3)
        told.append(row)
    return told


# Instructions


WORDS = list("bdfghjmpqvxz")  # a token each, and none of "Answer" and the filler "k"
INSTRUCTIONS = """
name = "instructions-{seed}"
seed = {seed}
[data]
model = "{sft}"
paths = ["{home}/chats.jsonl"]
format = "chat"
heldout = 100
[sft]
model = "{sft}"
[sft.train]
steps = 600
tokens_per_step = 1536
microbatch_tokens = 768
sequence_length = 192
lr = 2e-3
[profile]
model = "sft"
paths = ["{home}/prompts.jsonl"]
off = 0.5
samples = 0
[rloo]
model = "sft"
prompts_per_rollout = 24
samples = 12
max_tokens = 96
rewards = [{{ kind = "instructions" }}, {{ kind = "format", weight = 1.0 }}]
kl = 0.02
train = {{ steps = 150, microbatch_tokens = 3072, lr = 3e-4, schedule = "constant" }}
[eval-sft]
stage = "eval"
model = "sft"
tasks = ["ifeval"]
data = "{home}/heldout.jsonl"
max_tokens = 96
on = {{ temperature = 0.0 }}
[eval-rloo]
stage = "eval"
model = "rloo"
tasks = ["ifeval"]
data = "{home}/heldout.jsonl"
max_tokens = 96
on = {{ temperature = 0.0 }}
"""
Follow = Callable[[list[str]], list[str]]  # the words of an answer, changed so that it follows
Drawn = tuple[str, str, dict[str, Any], Follow]  # what is said, its name, its arguments


def instructions(chance: random.Random) -> list[Drawn]:
    """Two of the kinds, in an order that lets an answer follow both."""
    word, last = chance.sample(WORDS, 2)
    count, times = chance.randint(4, 9), chance.randint(2, 4)
    least = {"relation": "at least"}
    kinds: list[Drawn] = [
        (
            f"say {word} {times} times",
            "keywords:frequency",
            {"keyword": word, "frequency": times, **least},
            lambda said: [*said, *[word] * times],
        ),
        (
            f"use {count} words",
            "length_constraints:number_words",
            {"num_words": count, **least},
            lambda said: [*said, *["k"] * max(0, count - len(said))],
        ),
        (
            f"end with {last}",
            "startend:end_checker",
            {"end_phrase": last},
            lambda said: [*said, last],
        ),
        (
            "in quotes",
            "startend:quotation",
            {},
            lambda said: [f'"{said[0]}', *said[1:-1], f'{said[-1]}"'],
        ),
    ]
    first, second = sorted(chance.sample(range(len(kinds)), 2))
    return [kinds[first], kinds[second]]


def asked(one: Problem, drawn: list[Drawn]) -> str:
    return f"{one.question}\n{drawn[0][0]}, {drawn[1][0]}"


def chat(one: Problem, drawn: list[Drawn], chance: random.Random) -> dict[str, Any]:
    """A conversation in either mode; half of the answers leave one instruction out."""
    mode, missing = chance.choice(["on", "off"]), chance.choice([0, 1, None, None])
    said = ["Answer:", one.answer]
    for number, (_, _, _, follow) in enumerate(drawn):
        said = said if number == missing else follow(said)
    thought = f"{OPEN}\nWork: {one.work}\n{CLOSE}\n\n" if mode == "on" else ""
    turns = [
        {"role": "system", "content": f"detailed thinking {mode}"},
        {"role": "user", "content": asked(one, drawn)},
        {"role": "assistant", "content": thought + " ".join(said)},
    ]
    return {"messages": turns}


def write(home: Path, seed: int) -> None:
    """chats.jsonl to imitate, prompts.jsonl to be rewarded for, heldout.jsonl to be measured by."""
    home.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)

    def drawn(count: int, split: Any) -> list[tuple[Problem, list[Drawn]]]:
        return [
            (problem("calc", seed, index, split, 2), instructions(chance)) for index in range(count)
        ]

    def save(name: str, rows: list[dict[str, Any]]) -> None:
        (home / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    save("chats.jsonl", [chat(*pair, chance) for pair in drawn(4000, "train")])
    prompts, heldout = [], []
    for one, pair in drawn(600, "train"):
        messages = [{"role": "user", "content": asked(one, pair)}]
        prompts.append({"messages": messages, **told(pair), "answer": one.answer})
    for number, (one, pair) in enumerate(drawn(200, "heldout")):
        row = {"key": number, "prompt": asked(one, pair), "answer": one.answer}
        heldout.append(row | told(pair))
    save("prompts.jsonl", prompts)
    save("heldout.jsonl", heldout)


def told(pair: list[Drawn]) -> dict[str, Any]:
    return {"instruction_id_list": [one[1] for one in pair], "kwargs": [one[2] for one in pair]}


def right(run: Path, home: Path, mode: str) -> float:
    """The share of held-out questions that are answered rightly, whatever is said around it."""
    lines = (home / "heldout.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    answers = {str(row["key"]): row["answer"] for row in map(json.loads, lines)}
    found = []
    for line in (run / "records.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        record = json.loads(line)
        if record["mode"] == mode:
            text = record["text"].partition("Answer: ")[2]
            found.append(text[:1] == answers[record["item"]])
    return statistics.mean(found)


def followed(options: argparse.Namespace) -> None:
    rows = of_seeds(lambda seed, runs: before_and_after(seed, runs, options.smoke), options)
    table(rows)
    told = []
    for mode in ("on", "off"):
        for name in ("sft", "rloo"):
            found = [row for row in rows if (row["model"], row["mode"]) == (name, mode)]
            told.append({"model": name, "mode": mode, **over_seeds(found, "strict")})
    table(told)


def before_and_after(seed: int, runs: Path, smoke: bool) -> list[dict[str, Any]]:
    """Rows before and after, in each mode."""
    sft = (runs / f"quickstart-{seed}" / "sft").resolve()
    home = (runs / f"instructions-data-{seed}").resolve()
    write(home, seed)
    finish(INSTRUCTIONS.format(seed=seed, sft=sft, home=home), runs, smoke)
    made = runs / f"instructions-{seed}"
    rows = []
    for name in ("sft", "rloo"):
        for found in read_table(made / f"eval-{name}", "eval"):
            row = {"model": name, "seed": seed, "mode": found["mode"]}
            row |= {"strict": found["value"], "obedience": found["obedience"]}
            row |= {"right": right(made / f"eval-{name}", home, found["mode"])}
            row |= {"tokens": round(found["tokens"], 1)}
            rows.append(row | {"seconds": round(read_manifest(made / name).seconds, 1)})
    return rows


# The switch


COLUMNS = ("obedience", "accuracy", "tokens")


def trained(seed: int, runs: Path) -> Path:
    """The fine-tuned model of a seed, made if it is not there."""
    name = f"sft-toy-{seed}"
    words = ["run", str(ROOT / "recipes" / "sft-toy.toml"), f"seed={seed}", f"name={name}"]
    subprocess.run([sys.executable, "-m", "tessera", *words, "--runs", str(runs)], check=True)
    return runs / name / "sft"


DISTILLATION = """
name = "distillation-{seed}"
seed = {seed}
[data]
model = "{teacher}"
tasks = {{ calc = 4000 }}
format = "chat"
heldout = 200
[profile]
model = "{teacher}"
tasks = {{ calc = 4000 }}
off = 0.5
samples = 0
[kd]
model = "{student}"
{texts} steps = {steps} }}
[gkd]
model = "{student}"
{own} steps = {steps} }}
[gkd-forward]
stage = "gkd"
model = "{student}"
beta = 0.0
{own} steps = {steps} }}
[kd-half]
stage = "kd"
model = "{student}"
{texts} steps = {half} }}
[kd-gkd]
stage = "gkd"
model = "kd-half"
{own} steps = {half} }}
"""
OWN = """teacher = "{teacher}"
max_tokens = 64
prompts_per_rollout = 48
train = {{ microbatch_tokens = 2048, {rate}"""
TEXTS = """teacher = "{teacher}"
cosine = 0.0
train = {{ tokens_per_step = {tokens}, microbatch_tokens = {tokens}, sequence_length = 96, {rate}"""
RATE = "lr = 2e-3,"
WAYS = {
    "before": (),
    "kd": ("kd",),
    "gkd": ("gkd",),
    "gkd, forward KL": ("gkd-forward",),
    "kd, then gkd": ("kd-half", "kd-gkd"),
}


def distillation(options: argparse.Namespace) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            teacher = toy(Path(folder) / "toy") if options.smoke else trained(seed, options.runs)
            student = without_layers(teacher, Path(folder) / f"student-{seed}", options.drop)
            told = {"teacher": teacher.resolve(), "student": student, "rate": RATE}
            told["own"] = OWN.format(**told)
            told["texts"] = TEXTS.format(**told, tokens=options.tokens)
            steps = {"steps": options.steps, "half": options.steps // 2}
            runs = Path(folder) if options.smoke else options.runs
            finish(DISTILLATION.format(seed=seed, **told, **steps), runs, options.smoke)
            home = runs / f"distillation-{seed}"
            for way, stages in WAYS.items():
                model = home / stages[-1] if stages else student
                spent = [learnt(home / name, home / "data") for name in stages]
                rows.append(
                    {
                        "way": way,
                        "seed": seed,
                        "trained tokens": sum(tokens for tokens, _ in spent),
                        "CPU s": round(sum(seconds for _, seconds in spent), 1),
                        **apart(model, teacher, home / "data", options.problems),
                    }
                )
    table(rows)


def without_layers(teacher: Path, out: Path, dropped: Sequence[int]) -> Path:
    """The model without some of its layers."""
    checkpoint = Checkpoint.of(load_model(teacher, frozen=True))
    words = list(checkpoint.config.words)
    for layer in dropped:
        words[layer] = ("noop", "noop")
    save_model(assemble(checkpoint, out, words), out, tokenizer_from=resolve(teacher))
    record_switch(out, DETAILED)
    return out


def learnt(run: Path, data: Path) -> tuple[int, float]:
    """Trained tokens and CPU seconds of a stage."""
    manifest, rows = read_manifest(run), read_metrics(run)
    if manifest.stage == "gkd":
        answers = manifest.config["prompts_per_rollout"] * manifest.config["samples"]
        tokens = sum(row["length"] for row in rows) * answers
    else:
        summary = read_table(data, "summary")[0]
        positions = summary["tokens"] - summary["documents"]
        tokens = manifest.config["train"]["tokens_per_step"] * len(rows)
        tokens *= summary["trained"] / positions
    return round(tokens), manifest.cpu_seconds


def apart(model: Path, teacher: Path, data: Path, count: int) -> dict[str, Any]:
    """Nats a token between teacher and model, and what the model's own answers are worth."""
    own, theirs = load_model(model, frozen=True), load_model(teacher, frozen=True)
    sizes = {"sequence_length": 96, "microbatch_tokens": 960, "tokens_per_step": 960}
    settings = DocumentTrainConfig(steps=1, **sizes)
    forward = GKD(theirs, GKDLossConfig(beta=0.0))
    found: dict[str, Any] = {"KL, held out": Heldout(forward, own, data, settings, 0)()["heldout"]}
    encoder, engine = ChatEncoder.of(load_tokenizer(resolve(model))), TorchEngine(own)
    params = SamplingParams(max_tokens=64, seed=1, stop_token_ids=encoder.tokenizer.eos_ids)
    groups, right = [], {}
    for mode in MODES:
        drawn = [problem("calc", 0, index, "heldout", 4) for index in range(count)]
        asked = [encoder.prompt(one.chat(mode).messages[:1], mode) for one in drawn]
        said = [completion for (completion,) in engine.generate(asked, params)]
        for ids, one in zip(asked, said, strict=True):
            made = Answer(one.token_ids, one.logprobs, "stop", "", None, {}, True, 1.0)
            groups.append(Group(0, mode, ids, [made]))
        texts = [split(encoder.tokenizer.decode(one.token_ids)).answer.strip() for one in said]
        right[f"right, {mode}"] = statistics.mean(
            text == split_message(one.chat(mode).messages[-1]).answer
            for text, one in zip(texts, drawn, strict=True)
        )
    reverse = GKD(theirs, GKDLossConfig(beta=1.0))
    loss, weight = loss_sums(reverse, own, rows(groups, 2048, "token"))[0].tolist()
    return {**found, "reverse KL, own answers": loss / weight, **right}


def distillation_options(parser: argparse.ArgumentParser) -> None:
    switch_options(parser)
    parser.set_defaults(seeds=[1], problems=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=1920, help="of a step of kd, prompts too")
    parser.add_argument("--drop", type=int, nargs="+", default=[2, 3], help="layers")


def answers(model: Path, problems: list[Problem], mode: Mode) -> Iterator[dict[str, Any]]:
    """What `switch_metrics` reads, of each problem."""
    tokenizer = load_tokenizer(resolve(model))
    encoder, engine = ChatEncoder.of(tokenizer), TorchEngine(load_model(model, frozen=True))
    params = SamplingParams(max_tokens=64, temperature=0, stop_token_ids=tokenizer.eos_ids)
    chats = [one.chat(mode) for one in problems]
    prompts = [encoder.prompt(chat.messages[:1], mode) for chat in chats]
    for chat, (completion,) in zip(chats, engine.generate(prompts, params), strict=True):
        text = tokenizer.decode(completion.token_ids)
        wanted = split_message(chat.messages[-1]).answer
        correct = split(text).answer.strip() == wanted
        yield {"mode": mode, "text": text, "correct": correct, "tokens": len(completion.token_ids)}


def switch_metrics(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The switch as a contract: obedience, accuracy and tokens of each mode, over all its rows.

    rows: {"mode": "on" or "off", "text": what was written, "correct": bool, "tokens": int} each,
    and "opened" where the prompt held `<think>`. A mode without rows has no entries.
    """
    sums: dict[str, list[float]] = {}
    for row in rows:
        mode = row["mode"]
        obedient = obeys(row["text"], mode, opened=row.get("opened", False))
        values = (obedient, row["correct"], row["tokens"], 1)
        sums[mode] = [a + b for a, b in zip(sums.get(mode, [0.0] * 4), values, strict=True)]
    names = ("obedience", "accuracy", "tokens")
    return {
        f"{name}_{mode}": total / found[3]
        for mode, found in sorted(sums.items(), reverse=True)
        for name, total in zip(names, found, strict=False)
    }


def switch(options: argparse.Namespace) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            model = toy(Path(folder)) if options.smoke else trained(seed, options.runs)
            for level in range(2, 7):
                drawn = [problem("calc", 0, i, "heldout", level) for i in range(options.problems)]
                drawn = list({one.question: one for one in drawn}.values())
                found = switch_metrics(
                    [row for mode in MODES for row in answers(model, drawn, mode)]
                )
                named = {f"{c}_{m}": round(found[f"{c}_{m}"], 3) for m in MODES for c in COLUMNS}
                rows.append({"seed": seed, "operations": level, "problems": len(drawn), **named})
    table(rows)


def switch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/switch"))
    parser.add_argument("--problems", type=int, default=400, help="of each number of operations")


if __name__ == "__main__":
    harness.main(
        __doc__,
        {
            "algorithms": Command(algorithms, arguments),
            "curriculum": Command(curriculum, curriculum_options, {"repeats": 2}),
            "instructions": Command(followed, arguments),
            "distillation": Command(
                distillation,
                distillation_options,
                {"problems": 2, "drop": [1], "tokens": 192},
            ),
            "switch": Command(switch, switch_options, {"seeds": [1], "problems": 2}),
        },
    )
