"""From answers to figures: verdicts kept by answer, then means with their standard errors.

An item's value is the mean over its samples; a task's, the mean over items, and its standard error
is that of the items' values. What could not be judged is left out and counted, never a silent 0.

    pass@k = 1 - C(n - c, k) / C(n, k)        n samples of which c are right   (arXiv 2107.03374)
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tessera.ask import judge
from tessera.ask.ask import Answerer, Reply, Request, ask_all
from tessera.data.switch import NONE, obedience
from tessera.data.thought import split
from tessera.eval.answers import Conversation
from tessera.eval.task import Measure, Task
from tessera.progress import Progress
from tessera.rl.pool import Pool
from tessera.rl.rewards import Sample
from tessera.runs.files import AnyJournal, fingerprint

AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Scored:
    """A conversation with its scores by column; None where it could not be judged."""

    chat: Conversation
    scores: Mapping[str, float | None]
    obedient: bool | None


def score(
    chats: Sequence[Conversation], task: Task, verdicts: AnyJournal, workers: int, *, quiet: bool
) -> list[Scored]:
    """Scores by the task's measures; verdicts that are kept already are not computed again."""
    mark = fingerprint([measure.reward.model_dump() for measure in task.measures])[:8]
    keys = [f"{chat.key}-{mark}-{fingerprint(dict(chat.item.fields))[:8]}" for chat in chats]
    missing = [(key, chat) for key, chat in zip(keys, chats, strict=True) if key not in verdicts]
    rewards = [measure.reward for measure in task.measures]
    with (
        Pool(rewards, workers) as pool,
        Progress(f"{task.name}: judging", len(missing), "answers", quiet=quiet) as progress,
    ):
        for start in range(0, len(missing), AT_ONCE):
            part = missing[start : start + AT_ONCE]
            samples = [
                Sample(one.messages[:-1], one.completion, dict(one.item.fields), one.truncated)
                for _, one in part
            ]
            found = iter(pool.check([(i, one) for one in samples for i in range(len(rewards))]))
            for key, chat in part:
                row = {
                    "task": task.name,
                    "item": chat.item.id,
                    "mode": chat.mode or NONE,
                    "sample": chat.sample,
                    "outcomes": {one.name: asdict(next(found)) for one in task.measures},
                }
                verdicts.add(key, row)
            progress.advance(len(part))
    return [
        _scored(chat, {name: one["score"] for name, one in verdicts.get(key)["outcomes"].items()})
        for key, chat in zip(keys, chats, strict=True)
    ]


def ask_judge(
    chats: Sequence[Conversation],
    task: Task,
    verdicts: AnyJournal,
    teacher: Answerer,
    *,
    quiet: bool,
) -> list[Scored]:
    """Scores by a judge; what it replied is kept, so the same answer is never judged twice."""
    assert task.judging is not None
    plans = []
    for chat in chats:
        asked = task.judging.prompts(chat.item, chat.messages)
        plans.append([judge.request(f"judge of {task.name}", one, 4096) for one in asked])
    keys = [[f"judge-{one.key(teacher.model)}" for one in plan] for plan in plans]
    flat = zip(itertools.chain(*keys), itertools.chain(*plans), strict=True)
    wanted = {key: one for key, one in flat if key not in verdicts}
    with Progress(
        f"{task.name}: judge", len(wanted), "tokens", steps="replies", quiet=quiet
    ) as progress:

        def receive(request: Request, reply: Reply) -> None:
            if reply.error is None:
                key = f"judge-{request.key(teacher.model)}"
                verdicts.add(key, {"task": task.name, "text": reply.answer})

        if wanted:
            ask_all(teacher, wanted.values(), receive, progress)
    scored = []
    for chat, names in zip(chats, keys, strict=True):
        whole = all(name in verdicts for name in names)
        replies = [split(verdicts.get(name)["text"]).answer for name in names] if whole else []
        mark = task.judging.read(replies) if whole else None
        scored.append(_scored(chat, {task.judging.name: mark}))
    return scored


def _scored(chat: Conversation, scores: Mapping[str, float | None]) -> Scored:
    return Scored(chat, scores, obedience(chat.completion, chat.mode))


def summary(
    task: Task, mode: str, found: Sequence[Scored], failed: Sequence[str]
) -> dict[str, Any]:
    """The row of a task in one mode; failed: why answers are missing, in the row their count."""
    names = [measure.name for measure in task.measures if mode in measure.modes]
    names = [task.judging.name] if task.judging else names
    row: dict[str, Any] = {"task": task.name, "mode": mode, "metric": names[0]}
    weights = {measure.name: measure for measure in task.measures}
    for number, name in enumerate(names):
        value, error = _mean(found, name, weights.get(name))
        row |= {"value": value, "stderr": error} if number == 0 else {name: value}
    by_item = _by_item(found, names[0])
    samples = min((len(values) for values in by_item), default=0)
    row |= {"items": len(by_item), "samples": samples}
    k = 2
    while k <= samples:
        rates = [pass_at(len(values), sum(v >= 1 for v in values), k) for values in by_item]
        row[f"pass@{k}"] = sum(rates) / len(rates)
        k *= 2
    row["obedience"] = _share([one.obedient for one in found if one.obedient is not None])
    row["tokens"] = _share([one.chat.tokens for one in found])
    row["truncated"] = sum(one.chat.truncated for one in found)
    row["unjudged"] = sum(None in one.scores.values() for one in found)
    row["failed"] = len(failed)
    return row | ({"why": failed[0]} if failed else {})


def groups(task: Task, mode: str, found: Sequence[Scored]) -> list[dict[str, Any]]:
    """The first column again, apart for each value of each of the task's groups."""
    rows = []
    for group in task.groups:
        parts: dict[Any, list[Scored]] = defaultdict(list)
        for one in found:
            parts[one.chat.item.groups.get(group)].append(one)
        if len(parts) < 2:
            continue
        for value, part in sorted(parts.items(), key=lambda pair: str(pair[0])):
            mean, error = _mean(part, task.metric, None)
            rows.append(
                {
                    "task": task.name,
                    "mode": mode,
                    "group": group,
                    "of": value,
                    "value": mean,
                    "stderr": error,
                    "items": len(_by_item(part, task.metric)),
                    "tokens": _share([one.chat.tokens for one in part]),
                    "obedience": _share([o.obedient for o in part if o.obedient is not None]),
                }
            )
    return rows


def _by_item(found: Sequence[Scored], name: str) -> list[list[float]]:
    """The samples' scores of each item that has any."""
    parts: dict[str, list[float]] = defaultdict(list)
    for one in found:
        value = one.scores.get(name)
        if value is not None:
            parts[one.chat.item.id].append(value)
    return list(parts.values())


def _mean(
    found: Sequence[Scored], name: str, measure: Measure | None
) -> tuple[float | None, float | None]:
    """The mean over items, and its standard error (None for one item, or where items weigh)."""
    if measure is not None and measure.weight:
        pairs = [
            (float(one.chat.item.fields[measure.weight]), one.scores[name])
            for one in found
            if one.scores.get(name) is not None
        ]
        total = sum(weight for weight, _ in pairs)
        return (sum(w * (s or 0.0) for w, s in pairs) / total if total else None), None
    means = [sum(values) / len(values) for values in _by_item(found, name)]
    if not means:
        return None, None
    mean = sum(means) / len(means)
    if len(means) == 1:
        return mean, None
    variance = sum((value - mean) ** 2 for value in means) / (len(means) - 1)
    return mean, math.sqrt(variance / len(means))


def pass_at(n: int, c: int, k: int) -> float:
    """The chance that one of k samples, drawn from n of which c are right, is right."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _share(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
