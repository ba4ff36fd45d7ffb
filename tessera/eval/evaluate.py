"""Stage `eval`: a model's tasks with reasoning on and off, after Llama-Nemotron's protocol (§6).

records.jsonl   every answer      verdicts.jsonl   what was found of each, and why
tables/eval.jsonl   one row a task and mode        tables/eval_groups.jsonl   levels, subjects
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tessera import dist
from tessera.ask.endpoint import Endpoint, EndpointConfig
from tessera.ask.local import EngineConfig, LocalAnswerer
from tessera.data.config import no_chat_template
from tessera.data.conversation import Mode
from tessera.data.switch import NONE, Switch, require_switch
from tessera.eval import scores
from tessera.eval.answers import Asker, Conversation, Sampling, Thinking, answer, conversations
from tessera.eval.task import Data, EvalError, Item, Task
from tessera.eval.tasks import find
from tessera.model.placed import PlacedConfig
from tessera.progress import Progress, tell
from tessera.rl.rewards import require_fields
from tessera.runs.files import AnyJournal, FailureError, Journal, SharedJournal
from tessera.runs.plan import Step
from tessera.runs.run import Run
from tessera.vllm.config import InferenceConfig

if TYPE_CHECKING:
    from tessera.model.placement import Layout

WINDOW = 4096
PERPLEXITY = "perplexity"


def perplexity(
    model: Path | None,
    place: str,
    limit: int | None = None,
    placed: PlacedConfig = PlacedConfig(),  # noqa: B008
) -> dict[str, Any]:
    """The row of the task `perplexity`; limit: documents. Raises EvalError without a text.

    ppl = exp(-1/N Σ log p(t_i | t_<i)), in windows with half of each as context;
    bits a byte = Σ -log2 p / bytes of the text, which compares models of different tokenizers.
    """
    from tessera.data.readers import Bad, expand, read
    from tessera.data.tokenizer import load_tokenizer
    from tessera.generate.torch_engine import TorchEngine

    if model is None:
        raise EvalError("perplexity needs the model itself: an endpoint gives no log-probs")
    if not place:
        raise EvalError("perplexity: give --data perplexity=FILE (.txt, .jsonl, .parquet)")
    tokenizer, placement = load_tokenizer(model), placed.placement(model)
    module, layout = placement.load(model, frozen=True), placement.layout
    engine = TorchEngine(module)
    window = min(WINDOW, module.config.max_position_embeddings)
    found: dict[int, tuple[float, int, int]] = {}  # of each document: log-prob, tokens, bytes
    readable = (one for path in expand([place]) for one in read(path) if not isinstance(one, Bad))
    texts = [one.content for one in itertools.islice(readable, limit)]
    with Progress(PERPLEXITY, len(texts), "tokens") as bar:
        for documents, text in enumerate(texts, 1):
            if documents % layout.data_world == layout.data_rank:
                ids = tokenizer.encode(text, bos=True)
                logprobs = _logprobs(engine, ids, window) if len(ids) > 1 else []
                found[documents] = math.fsum(logprobs), len(logprobs), len(text.encode())
                bar.advance(1, len(ids))
    rows = sorted(layout.joined(found).items())
    total, tokens, size = (sum(row[i] for _, row in rows) for i in range(3))
    if not tokens:
        raise EvalError(f"perplexity: {place} holds no text")
    return {
        "task": "perplexity",
        "mode": "text",
        "metric": "perplexity",
        "value": math.exp(-total / tokens),
        "bits_per_byte": -total / math.log(2) / size,
        "items": len(texts),
        "tokens": tokens,
    }


def _logprobs(engine: Any, ids: list[int], window: int) -> list[float]:
    """Of every token but the first; each sees half a window before it, where there is so much."""
    found = engine.score([ids[:window]])[0]
    stride, end = max(1, window // 2), window
    while end < len(ids):
        start = end - (window - stride)
        part = engine.score([ids[start : start + window]])[0]
        found += part[window - stride - 1 :]
        end = start + window
    return found


class EvalConfig(InferenceConfig):
    """Which tasks, and how they are asked.

    data: a directory with the tasks' files, or a place for each task by name. limit: the first so
    many items of each. switch: how a mode is said (data/switch.py); where not given, the model's
    own, "none" of an endpoint. A model with "none" is asked once, as it is, in a mode named "none".
    on, off, none: how each mode samples. endpoint: answers instead of the stage's model.
    chat_template_kwargs: further variables of the chat template. judge: who judges mt_bench and
    arena_hard. asking: "text" gives a base model each question without a chat template, once.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    data: str | dict[str, str] = ""
    thinking: Thinking = "both"
    limit: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    on: Sampling = Sampling(temperature=0.6, top_p=0.95)
    off: Sampling = Sampling()
    none: Sampling = Sampling()
    switch: Switch | None = None
    chat_template_kwargs: dict[str, Any] = {}
    asking: Literal["chat", "text"] = "chat"
    batch: int = Field(default=64, ge=1)
    endpoint: EndpointConfig | None = None
    judge: EndpointConfig | None = None
    # That judge, on each machine.
    workers: int = Field(default_factory=lambda: min(8, os.cpu_count() or 1), ge=1)

    def warnings(self, step: Step, steps: Sequence[Step]) -> list[str]:
        chats = self.asking == "chat" and not self.endpoint and set(self.tasks) != {PERPLEXITY}
        return no_chat_template(step, steps) if chats else []

    def modes(self, switch: str) -> tuple[Mode | None, ...]:
        """The modes a model of this switch is asked in. Raises SwitchError for "on" of "none"."""
        if self.asking == "text":
            return ("off",)
        if switch == NONE:
            asked = None if self.thinking == "both" else self.thinking
            require_switch(switch, asked, "the endpoint" if self.endpoint else "the model")
            return (None,)
        return ("on", "off") if self.thinking == "both" else (self.thinking,)

    def place(self, task: str) -> str:
        """Where a task's data are."""
        return self.data if isinstance(self.data, str) else self.data.get(task, "")


def _items(task: Task, config: EvalConfig) -> list[Item]:
    """The first items of a task, checked to hold what its measures judge by."""
    data = Data(task.name, config.place(task.name))
    found = list(itertools.islice(task.read(data), config.limit or task.limit))
    if not found:
        raise EvalError(f"{task.name}: {data.place or 'its data'} holds no items")
    rewards = [measure.reward for measure in task.measures]
    for item in found:
        require_fields(rewards, item.fields)
    return found


def evaluate(
    config: EvalConfig, folder: Path, model: Path | None, seed: int, *, quiet: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the table and of the groups; answers and verdicts are kept in `folder`."""
    texts = [name for name in config.tasks if name == PERPLEXITY]
    asked = [find(name) for name in config.tasks if name != PERPLEXITY]
    plan = [(task, _items(task, config)) for task in asked]
    if not config.judge and any(task.judging for task in asked):
        names = ", ".join(task.name for task in asked if task.judging)
        raise EvalError(f"{names}: give judge = {{ url, model }}, or --judge MODEL@URL")
    table, by_group = [], []
    if texts:
        table.append(perplexity(model, config.place(PERPLEXITY), config.limit, config))
    shared = dist.world() > 1 and not config.endpoint
    if not plan or not (shared or dist.is_main()):  # one process asks an endpoint
        return table, by_group
    kind = SharedJournal if shared else Journal
    with kind(folder / "records.jsonl") as records, kind(folder / "verdicts.jsonl") as kept:
        asker = _asker(config, model, seed, quiet)
        if isinstance(records, SharedJournal) and isinstance(kept, SharedJournal):
            assert model is not None
            layout = config.placement(model).layout
            _answer_share(config, plan, asker, layout, records, kept, quiet)
        for task, items in plan if dist.is_main() else ():
            chats = _chats(config, task, items, asker)
            answer(chats, asker, records, label=task.name, quiet=quiet or shared)
            judged_before = shared and not task.judging
            rows, parts = _judged(config, task, chats, kept, quiet or judged_before)
            table += rows
            by_group += parts
    return table, by_group


def _chats(
    config: EvalConfig, task: Task, items: Sequence[Item], asker: Asker
) -> list[Conversation]:
    samplings = {"on": config.on, "off": config.off, None: config.none}
    modes = config.modes(asker.switch)
    return list(conversations(task, items, modes, samplings, config.max_tokens))


def _answer_share(
    config: EvalConfig,
    plan: Sequence[tuple[Task, Sequence[Item]]],
    asker: Asker,
    layout: Layout,
    records: SharedJournal,
    verdicts: SharedJournal,
    quiet: bool,
) -> None:
    """Each tensor group answers some of the conversations, and judges the answers that need no
    endpoint; the main process then has the rows of all."""
    for task, items in plan:
        own = layout.mine(_chats(config, task, items, asker))
        answer(own, asker, records, label=layout.title(task.name), quiet=quiet)
        if layout.leads and not task.judging:
            whole = [chat for chat in own if not chat.failed]
            workers = dist.share_of_machine(config.workers)
            scores.score(whole, task, verdicts, workers, quiet=quiet)
    records.collect()
    verdicts.collect()


def _asker(config: EvalConfig, model: Path | None, seed: int, quiet: bool) -> Asker:
    asker = _teacher(config, model, seed)
    if config.modes(asker.switch) == (None,) and not quiet and dist.is_main():
        what = "no switch was given for the endpoint" if config.endpoint else "the model has none"
        tell(f"no reasoning switch ({what}): each item is asked once, as it is")
    return asker


def _teacher(config: EvalConfig, model: Path | None, seed: int) -> Asker:
    if config.endpoint:
        teacher = Endpoint(config.endpoint, seed)
        return Asker(teacher, True, config.switch or NONE, config.chat_template_kwargs)
    own = EngineConfig(
        kind="engine",
        batch=config.batch,
        asking=config.asking,
        switch=config.switch,
        **{key: getattr(config, key) for key in InferenceConfig.model_fields},
    )
    local = LocalAnswerer(own, model, seed)
    switch = local.encoder.switch if local.encoder else NONE
    return Asker(local, False, switch, config.chat_template_kwargs)


def _judged(
    config: EvalConfig, task: Task, chats: Sequence[Conversation], kept: AnyJournal, quiet: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The task's rows, one a mode, and those of its groups."""
    whole = [chat for chat in chats if not chat.failed]
    if not whole:
        raise FailureError(f"{task.name}: not one of {len(chats)} answers came: {chats[0].failed}")
    if task.judging:
        assert config.judge is not None
        found = scores.ask_judge(whole, task, kept, Endpoint(config.judge, 0), quiet=quiet)
    else:
        found = scores.score(whole, task, kept, config.workers, quiet=quiet)
    rows, parts = [], []
    for mode in dict.fromkeys(chat.mode for chat in chats):
        of_mode = [one for one in found if one.chat.mode == mode]
        failed = [chat.failed for chat in chats if chat.mode == mode and chat.failed]
        name = "text" if config.asking == "text" else mode or NONE
        rows.append(scores.summary(task, name, of_mode, failed))
        parts += scores.groups(task, name, of_mode)
    return rows, parts


def stage(config: EvalConfig, run: Run, inputs: dict) -> None:
    """Stage `eval`: write `tables/eval.jsonl` and `tables/eval_groups.jsonl`."""
    table, by_group = evaluate(config, run.path, inputs["model"], run.seed, quiet=run.quiet)
    for row in table:
        if row.get("failed") or row.get("unjudged"):
            run.say(
                f"{row['task']} ({row['mode']}): {row['failed']} answers are missing and "
                f"{row['unjudged']} could not be judged; they are left out {row.get('why', '')}"
            )
    run.write_table("eval", table)
    if by_group:
        run.write_table("eval_groups", by_group)
