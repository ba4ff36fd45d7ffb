"""Two real pretrained checkpoints: known logits and known losses, reproduced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from tessera.model.checkpoint import load_model
from tessera.model.transformer import Transformer

MODELS = ("stories260k", "tinystories-char-940k")
STORIES = {"valid_5_stories": "valid_5_stories.txt", "train_head": "train_head_2316_stories.txt"}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_first_logits_are_the_expected_ones(shared, name):
    directory = shared / "models" / name
    module = load_model(directory, frozen=True)
    for case in json.loads((directory / "expected_outputs.json").read_text())["greedy"]:
        logits = module.logits(module(torch.tensor([case["prompt_ids"]]))[0, -1])
        for token, value in case["last_prompt_position_top5"]:
            assert abs(float(logits[token]) - value) < 1e-4


@torch.no_grad()
def nll(module: Transformer, rows: list[list[int]]) -> tuple[float, int]:
    """Mean loss and number of predicted tokens, each row a document."""
    total, count = 0.0, 0
    for first in range(0, len(rows), 20):
        batch = rows[first : first + 20]
        tokens = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
        labels = torch.full_like(tokens, -100)
        for i, row in enumerate(batch):
            tokens[i, : len(row)] = torch.tensor(row)
            labels[i, : len(row) - 1] = torch.tensor(row[1:])
        logits = module.logits(module(tokens))
        total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int((labels >= 0).sum())
    return total / count, count


def stories(shared: Path, file: str, limit: int) -> list[str]:
    text = (shared / "data/tinystories" / file).read_text()
    return [story.strip() for story in text.split("<|endoftext|>") if story.strip()][:limit]


@pytest.mark.parametrize("part", STORIES)
@pytest.mark.parametrize("name", MODELS)
def test_losses_are_the_expected_ones(shared, name, part):
    directory = shared / "models" / name
    module = load_model(directory, frozen=True)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    expected = json.loads((directory / "expected_outputs.json").read_text())["mean_nll"]
    wanted = next(value for key, value in expected.items() if key.startswith(part))
    limit, bos = module.config.max_position_embeddings, module.config.bos_token_id
    rows = [
        [bos, *tokenizer.encode(story, add_special_tokens=False).ids][:limit]
        for story in stories(shared, STORIES[part], 200)
    ]
    loss, count = nll(module, rows)
    assert (round(loss, 4), count) == (wanted["nats_per_token"], wanted["tokens"])
