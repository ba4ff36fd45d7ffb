"""lm-eval over our engine: its figures are those of the model itself, and ours of the same task."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tessera.data.chat import ChatEncoder
from tessera.data.conversation import Mode
from tessera.data.switch import DETAILED, record_switch, set_switch
from tessera.data.thought import CLOSE, OPEN
from tessera.data.tokenizer import train_bpe
from tessera.eval.evaluate import EvalConfig, evaluate, perplexity
from tessera.eval.tasks.maths import BOX
from tessera.generate.engine import SamplingParams
from tessera.model.checkpoint import save_model
from tessera.runs.recipe import RecipeError
from tests import tiny

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'tessera[harness]'")

from tessera.eval.harness import HarnessError, TesseraLM  # noqa: E402

ROOT = Path(__file__).parents[2]
QUESTIONS = [f"What is {a} plus {b}?" for a, b in ((3, 4), (5, 9), (8, 8), (2, 6), (7, 1), (9, 3))]
TAUGHT = ["7", "14", "\\$16", "9", "8.00", "11"]  # the fourth and the last are wrong
GOLD = ["7", "14", "16", "8", "8", "12"]
MODES: tuple[Mode, Mode] = ("on", "off")
EXACT = {"rtol": 0, "atol": 2e-5}


def taught(index: int, mode: Mode) -> str:
    """What the model learns to answer: a thought with a wrong box in it where it thinks."""
    thought = f"{OPEN}\nPerhaps \\boxed{{0}}.\n\n{CLOSE}\n\n" if mode == "on" else ""
    return f"{thought}So \\boxed{{{TAUGHT[index]}}}."


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows six questions by heart, thinking and not."""
    path = tmp_path_factory.mktemp("harness") / "model"
    texts = [question + BOX for question in QUESTIONS] + [taught(i, "on") for i in range(6)]
    tokenizer = train_bpe(texts * 3, 420, chat=True)
    encoder = ChatEncoder.of(tokenizer, switch=DETAILED)
    rows = []
    for mode in MODES:
        for i, question in enumerate(QUESTIONS):
            prompt = encoder.prompt([{"role": "user", "content": question + BOX}], mode)
            answer = tokenizer.encode(taught(i, mode), special=True)
            rows.append((prompt, [*answer, tokenizer.eos_ids[-1]]))
    config = tiny.config(
        [("gqa-4", "swiglu-64")] * 2,
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        head_dim=8,
        max_position_embeddings=96,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_ids,
    )
    module = tiny.model(config)
    learn(module, rows)
    save_model(module, path)
    tokenizer.save(path)
    record_switch(path, DETAILED)
    return path


def learn(module: Any, rows: list[tuple[list[int], list[int]]]) -> None:
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for i, (prompt, answer) in enumerate(rows):
        tokens[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) - 1 : len(prompt) + len(answer) - 1] = torch.tensor(answer)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(120):
        logits = module.logits(module(tokens))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05


@pytest.fixture(scope="module")
def lm(home: Path) -> TesseraLM:
    return TesseraLM(pretrained=str(home))


def asked(*args: Any) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=one) for one in args]


def direct(lm: TesseraLM, ids: list[int]) -> torch.Tensor:
    """Log-probs `(T,V)` behind each of these tokens, from the module itself."""
    from tessera.model.checkpoint import load_model

    module = load_model(lm.asked.pretrained, frozen=True)
    with torch.inference_mode():
        return module.logits(module(torch.tensor([ids])))[0].log_softmax(-1)


def likelihood(lm: TesseraLM, context: list[int], wanted: list[int]) -> tuple[float, bool]:
    logprobs = direct(lm, [*context, *wanted][-lm.max_length - 1 : -1])[-len(wanted) :]
    target = torch.tensor(wanted)
    value = logprobs.gather(-1, target[:, None]).sum()
    return float(value), bool((logprobs.argmax(-1) == target).all())


def test_a_likelihood_is_that_of_the_model(lm: TesseraLM):
    pairs = [("What is", " 3 plus 4?"), ("", "What is"), ("So ", "it is 7"), (QUESTIONS[0], "So")]
    found = lm.loglikelihood(asked(*pairs), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        whole = lm.codec.encode(context + continuation, bos=True)
        kept = len(lm.codec.encode(context.rstrip(), bos=True))
        expected = likelihood(lm, whole[:kept], whole[kept:])
        assert value == pytest.approx(expected[0], abs=2e-5) and greedy == expected[1]


def test_greedy_says_what_greedy_decoding_yields_and_long_contexts_lose_their_left(lm: TesseraLM):
    prompts = [[1, 40, 50], [1, *range(60, 200)]]
    params = SamplingParams(max_tokens=5, temperature=0)
    written = lm.engine.generate([prompt[-91:] for prompt in prompts], params)
    for prompt, (completion,) in zip(prompts, written, strict=True):
        right = completion.token_ids
        wrong = [*right[:-1], right[-1] ^ 1]
        rows = [(None, prompt, right), (None, prompt, wrong)]
        found = lm._loglikelihood_tokens(rows, disable_tqdm=True)
        expected = [likelihood(lm, prompt, one) for one in (right, wrong)]
        for (value, greedy), (other, same) in zip(found, expected, strict=True):
            assert value == pytest.approx(other, abs=5e-5) and greedy == same
        assert found[1][1] is False
    assert lm._loglikelihood_tokens([(None, prompts[0], written[0][0].token_ids)])[0][1] is True


def test_what_cannot_be_scored_is_refused(lm: TesseraLM):
    for context, wanted in (([1], []), ([], [1]), ([1], [4] * 97)):
        with pytest.raises(HarnessError, match="cannot be scored"):
            lm._loglikelihood_tokens([(None, context, wanted)], disable_tqdm=True)


@pytest.mark.parametrize("shared_tokens", [1, 40])
def test_a_rolling_text_counts_each_token_once_in_full_windows(home: Path, shared_tokens: int):
    lm = TesseraLM(pretrained=str(home), rolling_context=shared_tokens)
    text = " ".join(QUESTIONS * 4) + BOX
    ids, width = lm.codec.encode(text), lm.max_length
    assert len(ids) > 2 * width
    first = lm.codec.bos_id
    assert first is not None
    total, done = likelihood(lm, [first], ids[:width])[0], width
    while done < len(ids):
        fresh = min(width - shared_tokens + 1, len(ids) - done)
        window = ids[done + fresh - width - 1 : done + fresh]
        total += likelihood(lm, window[:-fresh], window[-fresh:])[0]
        done += fresh
    short = "What is 3 plus 4?"
    found = lm.loglikelihood_rolling(asked((text,), (short,), ("",)), disable_tqdm=True)
    assert found[0] == pytest.approx(total, rel=1e-5)
    alone = likelihood(lm, [first], lm.codec.encode(short))[0]
    assert found[1:] == [pytest.approx(alone, rel=1e-5), 0.0]


def test_rolling_perplexity_is_that_of_tessera_eval(home: Path, tmp_path: Path):
    """On texts of one window, and on one that fills its windows of 96 to the end."""
    tokenizer = TesseraLM(pretrained=str(home)).codec
    text = " ".join(QUESTIONS * 5)
    full = tokenizer.decode(tokenizer.encode(text)[: 95 + 3 * 48])
    assert len(tokenizer.encode(full)) == 95 + 3 * 48
    for documents in (QUESTIONS, [full]):
        file = tmp_path / "texts.jsonl"
        file.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
        ours = perplexity(home, str(file))
        lm = TesseraLM(pretrained=str(home), max_length=95, rolling_context=48)
        totals = lm.loglikelihood_rolling(asked(*((one,) for one in documents)), disable_tqdm=True)
        bits = -sum(totals) / math.log(2) / sum(len(one.encode()) for one in documents)
        assert bits == pytest.approx(ours["bits_per_byte"], rel=1e-6)


def test_a_completion_ends_at_the_stop_string_of_its_answer(home: Path):
    for mode, keep, expected in (
        ("off", False, "So \\box"),
        ("on", False, "So \\box"),
        ("on", True, f"{OPEN}\nPerhaps \\box"),
    ):
        lm = TesseraLM(pretrained=str(home), thinking=mode, keep_thought=keep)
        prompt = lm.apply_chat_template([{"role": "user", "content": QUESTIONS[0] + BOX}])
        given = {"until": ["ed{", "never"], "max_gen_toks": 60}
        assert lm.generate_until(asked((prompt, given)), disable_tqdm=True) == [expected]
    unfinished = asked((prompt, {"max_gen_toks": 2}))
    assert lm.generate_until(unfinished, disable_tqdm=True) == [OPEN + "\n"]
    lm = TesseraLM(pretrained=str(home), thinking="on")
    assert lm.generate_until(unfinished, disable_tqdm=True) == [""]


def test_a_sampled_completion_follows_from_seed_prompt_and_repeat(home: Path):
    lm = TesseraLM(pretrained=str(home), batch_size="2")
    given = {"do_sample": True, "temperature": 4.0, "top_p": 0.99, "max_gen_toks": 8}
    requests = asked(("So", given), ("So", given), ("What", given))
    texts = lm.generate_until(requests, disable_tqdm=True)
    assert len(set(texts)) == 3
    other = TesseraLM(pretrained=str(home), batch_size=64)
    assert other.generate_until(requests[2:] + requests[:1], disable_tqdm=True) == [
        texts[2],
        texts[0],
    ]
    seeded = TesseraLM(pretrained=str(home), seed=1)
    assert seeded.generate_until(requests, disable_tqdm=True) != texts


def test_prompts_are_cut_only_where_they_do_not_fit(lm: TesseraLM, caplog):
    long = " ".join(QUESTIONS * 3)
    ids = lm.tok_encode(long)
    assert len(ids) > 96
    given = {"max_gen_toks": 20}
    found = lm.generate_until(asked((long, given), ("So", given)), disable_tqdm=True)
    cut = lm.engine.generate(
        [ids[-76:]], SamplingParams(max_tokens=20, temperature=0, stop_token_ids=lm.codec.eos_ids)
    )
    assert lm.codec.decode(cut[0][0].token_ids) == found[0]
    assert f"1 of 2 prompts do not fit the model: up to {len(ids) - 76} tokens" in caplog.text
    with pytest.raises(HarnessError, match="smaller max_gen_toks"):
        lm.generate_until(asked((long, {"max_gen_toks": 96})), disable_tqdm=True)
    with pytest.raises(HarnessError, match="num_beams.*takes until"):
        lm.generate_until(asked((long, {"num_beams": 4})), disable_tqdm=True)


def test_a_chat_is_asked_as_an_engine_is_and_begins_once(home: Path):
    said = [{"role": "user", "content": QUESTIONS[0] + BOX}]
    for mode in MODES:
        lm = TesseraLM(pretrained=str(home), thinking=mode)
        expected = ChatEncoder.of(lm.codec).prompt(said, mode)
        assert lm.tok_encode(lm.apply_chat_template(said)) == expected
        plain = TesseraLM(pretrained=str(home))
        assert plain.apply_chat_template(
            set_switch(said, mode, DETAILED)[0]
        ) == lm.apply_chat_template(said)
    begun = [*said, {"role": "assistant", "content": "So \\boxed{"}]
    text = plain.apply_chat_template(begun, add_generation_prompt=False)
    assert text == plain.apply_chat_template(said) + "So \\boxed{"
    assert plain.tok_encode("So")[0] == plain.codec.bos_id
    assert plain.tok_encode("So", add_special_tokens=False) == plain.codec.encode("So")
    bare = TesseraLM(pretrained=str(home), add_bos_token=False)
    assert bare.tok_encode("So") == bare.codec.encode("So")


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"pretrain": "x"}, RecipeError, "pretrained"),
        ({"thinking": "yes"}, RecipeError, "not allowed"),
        ({"max_length": 97}, HarnessError, "has 96 positions"),
        ({"rolling_context": 97}, HarnessError, "at most"),
        ({"batch_size": "auto:4"}, RecipeError, "batch_size"),
    ],
)
def test_a_wrong_argument_is_named(home: Path, given: dict, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        TesseraLM(**{"pretrained": str(home)} | given)


def boxed(folder: Path, data: Path) -> Path:
    """The task of docs/evaluation.md, on these rows."""
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    kwargs = f"dataset_kwargs:\n  cache_dir: {folder / 'cache'}\n"
    code = code.replace("dataset_kwargs:\n", kwargs).replace("gsm8k/test.jsonl", str(data))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "gsm8k_boxed.yaml").write_text(code)
    return folder / "tasks"


def test_gsm8k_is_the_same_number_in_lm_eval_and_in_tessera_eval(home: Path, tmp_path: Path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    data = tmp_path / "test.jsonl"
    rows = [
        {"question": question, "answer": f"It adds up.\n#### {gold}"}
        for question, gold in zip(QUESTIONS, GOLD, strict=True)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = EvalConfig(
        tasks=("gsm8k",), data=str(data), max_tokens=40, on={"temperature": 0.0}, workers=1
    )
    table, _ = evaluate(config, tmp_path / "ours", home, 0, quiet=True)
    lines = (tmp_path / "ours" / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    manager = TaskManager(include_path=str(boxed(tmp_path, data)), include_defaults=False)
    for row, mode in zip(table, MODES, strict=True):
        theirs = simple_evaluate(
            TesseraLM(pretrained=str(home), thinking=mode),
            tasks=["gsm8k_boxed"],
            task_manager=manager,
            apply_chat_template=True,
            gen_kwargs={"max_gen_toks": 40},
            bootstrap_iters=0,
        )
        assert theirs is not None
        value = theirs["results"]["gsm8k_boxed"]["exact_match,boxed"]
        assert (row["mode"], row["value"], value) == (mode, 4 / 6, 4 / 6)
        texts = [one["resps"][0][0] for one in theirs["samples"]["gsm8k_boxed"]]
        ours = [one for one in records if one["mode"] == mode]
        assert texts == [one["text"] for one in sorted(ours, key=lambda one: int(one["item"]))]
