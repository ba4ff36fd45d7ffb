"""lm-evaluation-harness on our models: its numbers are those of the model, and ours."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tessera.data.tokenizer import load_tokenizer
from tessera.eval.perplexity import perplexity
from tessera.model.weights import load_model, save_model
from tests import tiny
from tests.serve.interop import random_model, write_byte_tokenizer

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install '.[harness]'")
from tessera.eval.harness import TesseraLM  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("harness") / "model"
    save_model(random_model(), place)
    write_byte_tokenizer(place)
    return place


def asked(*arguments: Any) -> Any:
    return [SimpleNamespace(args=one) for one in arguments]


def logprobs(model: Path, ids: list[int]) -> torch.Tensor:
    """(T - 1, V) log-probs of what follows each token."""
    module = load_model(model, frozen=True)
    with torch.no_grad():
        return module.logits(module(torch.tensor([ids]))).log_softmax(-1)[0, :-1]


def test_loglikelihood_is_the_models_and_greedy_is_what_it_would_say(model: Path):
    lm = TesseraLM(str(model))
    context = lm.tok_encode("One day")
    likely = lm.engine.generate([context], greedy(5))[0][0].token_ids
    said = lm.words.decode(likely)
    pairs = [("One day", " a dog came"), ("One day", said), ("The end", ".")]
    found = lm.loglikelihood(asked(*pairs), disable_tqdm=True)
    for (before, after), (total, is_greedy) in zip(pairs, found, strict=True):
        ids, first = lm.tok_encode(before + after), len(lm.tok_encode(before))
        table = logprobs(model, ids)[first - 1 :]
        expected = table.gather(1, torch.tensor(ids[first:])[:, None]).sum().item()
        assert total == pytest.approx(expected, abs=1e-4)
        assert is_greedy == (table.argmax(1).tolist() == ids[first:])


def greedy(new: int) -> Any:
    from tessera.generate.engine import SamplingParams

    return SamplingParams(max_tokens=new, temperature=0.0)


def test_rolling_perplexity_is_ours_where_one_window_holds_the_text(model: Path, tmp_path: Path):
    text = "Once upon a time there was a little girl who had a red ball."
    (tmp_path / "t.txt").write_text(text)
    lm = TesseraLM(str(model))
    (total,) = lm.loglikelihood_rolling(asked((text,)), disable_tqdm=True)
    ours = perplexity(model, str(tmp_path / "t.txt"), None)
    assert -total / ours["tokens"] == pytest.approx(math.log(ours["value"]), rel=1e-5)
    # Disjoint windows see less, so they are worse, and each token is counted once.
    short = TesseraLM(str(model), max_length=16)
    (less,) = short.loglikelihood_rolling(asked((text,)), disable_tqdm=True)
    assert less != total and math.isfinite(less)


def test_answers_end_before_the_first_stop_string(model: Path):
    lm = TesseraLM(str(model))
    (whole,) = lm.generate_until(asked(("A b", {"until": [], "max_gen_toks": 24})), True)
    stop = whole[3:6]
    (cut,) = lm.generate_until(asked(("A b", {"until": [stop], "max_gen_toks": 24})), True)
    assert cut == whole[: whole.index(stop)]


def test_its_gsm8k_and_ours_agree(tmp_path: Path):
    """A model that always says 7 has solved the problems whose answer is 7, whoever counts."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from tessera.eval.evaluate import EvalConfig, evaluate

    place = tmp_path / "model"
    write_model_that_says(place, "answer: 7")
    answers = [7, 3, 7, 12, 7, 9]
    rows = [{"question": f"What is {n}?", "answer": f"so\n#### {n}"} for n in answers]
    (tmp_path / "gsm8k").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "gsm8k" / "test.jsonl").write_text(lines)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "gsm8k_local.yaml").write_text(TASK.format(file=tmp_path / "gsm8k"))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    theirs = simple_evaluate(
        TesseraLM(str(place)), tasks=["gsm8k_local"], task_manager=manager, bootstrap_iters=0
    )
    config = EvalConfig(tasks=("gsm8k",), data=str(tmp_path), asking="text", max_tokens=16)
    (ours,), _ = evaluate(config, tmp_path, place, 0, quiet=True)
    assert theirs is not None
    found = theirs["results"]["gsm8k_local"]["exact_match,strict-match"]
    assert found == ours["value"] == 0.5


TASK = """
task: gsm8k_local
dataset_path: json
dataset_kwargs: {{ data_files: {{ test: {file}/test.jsonl }}, cache_dir: {file} }}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}\\n"
doc_to_target: "{{{{answer.split('####')[-1].strip()}}}}"
generation_kwargs: {{ until: ["\\n"], do_sample: false, max_gen_toks: 16 }}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
filter_list:
  - name: strict-match
    filter:
      - function: regex
        regex_pattern: "answer: ([0-9]+)"
      - function: take_first
"""


def write_model_that_says(place: Path, text: str) -> None:
    """Without blocks: each token's one-hot embedding is the head's row of the token behind it."""
    sizes = {"vocab_size": 320, "hidden_size": 320, "head_dim": 80}
    config = tiny.config([], **sizes, max_position_embeddings=256)
    module = tiny.model(config)
    save_model(module, place)
    write_byte_tokenizer(place)
    ids = load_tokenizer(place).encode(f"\n{text}")
    assert len({*ids}) == len(ids)
    with torch.no_grad():
        module.norm.weight.fill_(1.0)
        module.embed_tokens.weight.copy_(torch.eye(320))
        module.lm_head.weight.zero_()
        for token, behind in zip(ids, [*ids[1:], *config.eos_token_id], strict=True):
            module.lm_head.weight[behind, token] = 1.0
    save_model(module, place)
    write_byte_tokenizer(place)
