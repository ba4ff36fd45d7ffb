"""Problems drawn, not read: the toolkit's own families at a level, held out by construction.

    calc        levels as they are drawn for training      calc@6        six operations
    gym/NAME    reasoning-gym's, through its adapter       needle@4096   a needle in 4,096 words
    wish        requests that IFEval's checkers judge

Needle retrieval is in the manner of RULER (arXiv 2404.06654): a key's number stands among sentences
that say nothing and, at `keys` > 1, among other keys' numbers, at a depth drawn with the item.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import partial

from tessera.data import problems
from tessera.data.problems import PREFIX, family, problem
from tessera.data.thought import split
from tessera.eval.task import Data, EvalError, Item, Measure, Task, ask
from tessera.eval.tasks.programs import FOLLOWED
from tessera.rl.rewards import ExactReward, FunctionReward, NumberReward
from tessera.rl.rewards import Sample as Judged
from tessera.rl.verifiers.outcome import Outcome, judged

DRAWN = 400  # items, where no limit says otherwise
NEEDLE_WORDS = 1024
SAME_WORK = FunctionReward(kind="function", function=f"{__name__}:same_work")
WORK = Measure("work", SAME_WORK, modes=("on", "text", "none"))


def same_work(sample: Judged) -> Outcome:
    """Whether the thought (the whole text without one) holds the work of the problem."""
    found = split(sample.completion)
    shown = " ".join((found.answer if found.thought is None else found.thought).split())
    wanted = " ".join(str(sample.fields["work"]).split())
    return judged(bool(wanted) and wanted in shown, "another work")


def drawn(name: str, level: int | None, data: Data) -> Iterator[Item]:
    """Held-out problems, each once."""
    seen: set[str] = set()
    for index in range(50 * DRAWN):
        one = problem(name, 0, index, "heldout", level)
        if one.question in seen:
            continue
        seen.add(one.question)
        asked = one.fields.get("instruction_id_list", ())
        fields = {"answer": one.answer, "work": one.work, **one.fields, "instructions": len(asked)}
        yield Item(str(index), ask(one.question), fields, {"level": one.level})


KEYS = "amber birch cobalt dahlia ember fjord garnet hazel indigo jasper kestrel lotus".split()
HAY = (
    "The road turned at the mill and went on along the river.",
    "Nobody had opened the window since the morning.",
    "In the market they sold apples, rope and old maps.",
    "A clock struck somewhere behind the trees.",
    "She counted the stairs and forgot the number again.",
    "The train was late, as it was on every other day.",
)


def needles(words: int, keys: int, data: Data) -> Iterator[Item]:
    """Haystacks of so many words; `depth` is where the needle stands, in tenths."""
    for index in itertools.count():
        chance = random.Random(f"needle {words} {keys} {index}")
        names = chance.sample(KEYS, keys)
        numbers = [str(chance.randrange(10**6, 10**7)) for _ in names]
        hay: list[str] = []
        while sum(len(line.split()) for line in hay) < words:
            hay.append(chance.choice(HAY))
        depth = index % 11
        places = [round(depth / 10 * len(hay))]
        places += [chance.randrange(len(hay) + 1) for _ in names[1:]]
        for place, name, number in sorted(zip(places, names, numbers, strict=True), reverse=True):
            hay.insert(place, f"The number of {name} is {number}.")
        question = f"{' '.join(hay)}\n\nWhat is the number of {names[0]}? Answer: NUMBER."
        yield Item(str(index), ask(question), {"answer": numbers[0]}, {"depth": depth})


def find(name: str) -> Task | None:
    """The drawn task of that name; None where no family has it. Raises EvalError."""
    base, _, level = name.partition("@")
    if level and not level.isdigit():
        raise EvalError(f"{name}: what stands behind @ is a level, a number of 1 or more")
    if base in ("needle", "needles"):
        words, keys = int(level or NEEDLE_WORDS), 1 if base == "needle" else 4
        measure = Measure("accuracy", NumberReward(kind="number"))
        return Task(name, partial(needles, words, keys), (measure,), None, 256, ("depth",), DRAWN)
    if base not in problems.TASKS and not base.startswith(PREFIX):
        return None
    family(base)
    measures, first = (Measure("accuracy", ExactReward(kind="exact")),), problem(base, 0, 0)
    if first.fields:
        measures = FOLLOWED
    if first.work:
        measures = (*measures, WORK)
    read = partial(drawn, base, int(level) if level else None)
    return Task(name, read, measures, None, 256, ("level",), DRAWN)
