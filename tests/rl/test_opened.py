"""Where the prompt opens the thought, what is judged is the whole of it, the opening tag too."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tessera.data.chat import ChatEncoder
from tessera.data.template import Template
from tessera.data.tokenizer import byte_tokenizer
from tessera.generate.engine import Completed, Completion, GenerationRequest
from tessera.rl.advantages import rloo
from tessera.rl.experience import Answer
from tessera.rl.pool import Rubric
from tessera.rl.profile import ProfileConfig, Prompt, measure
from tessera.rl.rewards import ExactReward, FormatReward
from tessera.rl.rollouts import RolloutConfig, Rollouts
from tessera.runs.run import Run

TOKENIZER = byte_tokenizer()
PLAIN = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
OPENING = PLAIN + "<think>\n"
REWARDS = (ExactReward(kind="exact"), FormatReward(kind="format"))
SAID = ["1+1\n</think>\n\n2", "<think>1+1</think>2", "1+1", "2"]


class Parrot:
    """An engine that says `SAID`, the third time cut short."""

    def generate(self, prompts: Sequence[list[int]], *_: Any, **__: Any) -> list[list[Completion]]:
        return [list(self._said()) for _ in prompts]

    def as_completed(
        self, requests: Iterable[GenerationRequest], *_: Any
    ) -> Generator[Completed, None, None]:
        for request in requests:
            for number, completion in enumerate(self._said()):
                yield request, number, completion

    def sync(self, *_: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def _said(self) -> Iterator[Completion]:
        for number, text in enumerate(SAID):
            ids = TOKENIZER.encode(text) + ([] if number == 2 else [TOKENIZER.eos_ids[0]])
            yield Completion(ids, [0.0] * len(ids), "length" if number == 2 else "stop")


def encoder(template: str) -> ChatEncoder:
    return ChatEncoder(TOKENIZER, Template(template, TOKENIZER.special_names()))


def prompt(mode: Any) -> Prompt:
    says = {"role": "system", "content": f"detailed thinking {mode}"}
    return Prompt("p", [says, {"role": "user", "content": "1+1?"}], mode, {"answer": "2"})


def answers(where: Path, template: str, mode: str) -> list[Answer]:
    train: Any = {"steps": 1, "microbatch_tokens": 64}
    settings = {"prompts_per_rollout": 1, "samples": len(SAID), "workers": 1}
    config = RolloutConfig(train=train, rewards=REWARDS, **settings)
    opened: Any = {"stage": "grpo", "config": {}, "inputs": {}, "seed": 0, "quiet": True}
    engine: Any = Parrot()
    with Run.open(where / "run", **opened) as run, Rubric(REWARDS, 1) as rubric:
        rollouts = Rollouts(
            engine,  # stands for the module, too: nothing is trained here
            engine,
            encoder(template),
            [prompt(mode)],
            config,
            rloo,
            run,
            rubric,
        )
        (group,) = rollouts._sample(0).groups
    return group.answers


@pytest.mark.parametrize(
    ("template", "mode", "exact", "obedient"),
    [
        (OPENING, "on", [1, 1, 0, 0], [True, False, False, False]),
        (OPENING, "off", [1, 1, 0, 0], [False] * 4),
        (PLAIN, "on", [0, 1, 0, 1], [False, True, False, False]),  # the first closes nothing
        (PLAIN, "off", [0, 1, 0, 1], [False, False, True, True]),
    ],
)
def test_a_thought_that_the_prompt_opens_is_judged_as_one(
    tmp_path: Path, template: str, mode: str, exact: list[int], obedient: list[bool]
):
    found = answers(tmp_path, template, mode)
    assert [one.parts["exact"] for one in found] == exact
    assert [one.obedient for one in found] == obedient
    for number, one in enumerate(found):
        exempt = mode == "on" and number == 2  # cut short
        assert one.parts["format"] == float(obedient[number] or exempt)


@pytest.mark.parametrize(("template", "right"), [(OPENING, 2), (PLAIN, 2)])
def test_a_profile_reads_answers_as_the_training_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, right: int
):
    monkeypatch.setattr(ProfileConfig, "open_engine", lambda *_: Parrot())
    config = ProfileConfig(samples=len(SAID), rewards=REWARDS, workers=1, tensor=1)
    opened: Any = {"stage": "profile", "config": {}, "inputs": {}, "seed": 0, "quiet": True}
    with Run.open(tmp_path / "run", **opened) as run:
        (found,) = measure([prompt("on")], config, tmp_path, encoder(template), run)
    assert found.pass_rate == right / len(SAID) and found.samples == len(SAID)
