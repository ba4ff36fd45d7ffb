"""Rows of the Llama-Nemotron Post-Training Dataset: its fields and folders, toy questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS = 40
ON, OFF = "detailed thinking on", "detailed thinking off"


def _sft(category: str, question: str, thought: str, answer: str, mode: str) -> dict[str, Any]:
    output = f"<think>\n{thought}\n</think>\n\n{answer}" if mode == "on" else answer
    return {
        "input": [{"role": "user", "content": question}],
        "output": output,
        "category": category,
        "license": "cc-by-4.0",
        "reasoning": mode,
        "generator": "DeepSeek-R1" if mode == "on" else "Llama-3.3-70B-Instruct",
        "used_in_training": ["Ultra", "Nano"],
        "version": "v1.1",
        "system_prompt": ON if mode == "on" else OFF,
    }


def _asked(category: str, number: int) -> tuple[str, str, str]:
    """Question, thought and answer of a row."""
    a, b = number % 3, number % 2
    match category:
        case "math":
            return (
                f"{number}: what is {a} + {b}?",
                f"{a} + {b}",
                f"The answer is \\boxed{{{a + b}}}.",
            )
        case "code":
            return f"{number}: return {a}.", "One line.", f"```python\nreturn {a}\n```"
        case "science":
            return f"{number}: A or B?", "I compare.", f"The answer is \\boxed{{{'AB'[b]}}}."
        case _:
            return f"{number}: say {a}.", "A wish.", f"Here it is: {a}, as you asked."


MODES = {"math": "on off", "code": "on off", "science": "on", "chat": "on off", "safety": "off"}
INSTRUCTIONS = (
    ("punctuation:no_comma", {"num_words": None, "relation": None}),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}),
)


def written(home: Path) -> Path:
    """The folders SFT and RL of the dataset, as it is published, under `home`."""
    for category, modes in MODES.items():
        rows = [
            _sft(category, *_asked(category, number), mode)
            for number in range(ROWS)
            for mode in modes.split()
        ]
        _write(home / "SFT" / category / f"{category}.jsonl", rows)
    rows = []
    for number in range(ROWS):
        name, kwargs = INSTRUCTIONS[number % len(INSTRUCTIONS)]
        asked = [{"role": "user", "content": f"{number}: write something short."}]
        args = {"instruction_id_list": [name], "instruction_kwargs": [kwargs]}
        own = {"category": "instruction following", "license": "odc-by"}
        rows.append({"input": asked, "args": args, **own})
    _write(home / "RL" / "instruction_following" / "instruction_following.jsonl", rows)
    return home


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
