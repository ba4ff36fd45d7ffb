"""lm-evaluation-harness asks the API, and reads of it what it reads of the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cases.answering import answering, saved

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'tessera[harness]'")
pytest.importorskip("fastapi")

COMMON = "output_type: {kind}\ndataset_path: json\ntest_split: test\n"
CHOICES = COMMON.format(kind="multiple_choice") + (
    'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n'
    "target_delimiter: ' '\n"
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEXT = COMMON.format(kind="generate_until") + (
    'doc_to_text: "{{question}}"\ndoc_to_target: "x"\n'
    "generation_kwargs: {until: ['q'], max_gen_toks: 12, do_sample: false}\n"
)


def tasks(home: Path) -> list[Any]:
    rows = [
        {"question": f"plain {word} words", "choices": ["second", "naïve 東京", "a"], "gold": i % 3}
        for i, word in enumerate(["and", "second", "yes", "façade", "sentence"])
    ]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for name, text in (("small_choices", CHOICES), ("small_text", TEXT)):
        files = f"task: {name}\ndataset_kwargs:\n  data_files: {{test: {home}/rows.jsonl}}\n"
        (home / f"{name}.yaml").write_text(files + text)
        found.append(str(home / f"{name}.yaml"))
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_local_completions_and_chats_give_the_models_own_figures(tmp_path: Path, monkeypatch: Any):
    from lm_eval import simple_evaluate

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    home, (choices, text) = saved(tmp_path / "model", TEMPLATE), tasks(tmp_path)

    def run(model: str, arguments: str, task: str, **more: Any) -> list[Any]:
        found = simple_evaluate(
            model, arguments, [task], bootstrap_iters=0, log_samples=True, **more
        )
        (samples,) = found["samples"].values()  # type: ignore[index]
        rows = sorted(samples, key=lambda row: row["doc_id"])
        return [row["resps"] for row in rows]

    plain = f"pretrained={home},dtype=float32,device=cpu,add_bos_token=true"
    wanted, said = run("hf", plain, choices, batch_size=2), run("hf", plain, text, batch_size=1)
    with answering(home) as url:
        asked = f"model=tiny,base_url={url}/completions,tokenizer={home}"
        asked += ",tokenizer_backend=huggingface,add_bos_token=true,max_retries=1"
        for size in (1, 3):
            given = run("local-completions", asked, choices, batch_size=size)
            for ours, theirs in zip(given, wanted, strict=True):
                for (found,), (right,) in zip(ours, theirs, strict=True):
                    assert float(found[0]) == pytest.approx(float(right[0]), abs=1e-4)
                    assert str(found[1]) == str(right[1])
        assert run("local-completions", asked, text, batch_size=2) == said
        chats = f"model=tiny,base_url={url}/chat/completions,max_retries=1"
        chatted = run("local-chat-completions", chats, text, apply_chat_template=True)
    own = run("hf", plain, text, batch_size=1, apply_chat_template=True)
    assert [row[0][0].strip() for row in chatted] == [row[0][0].strip() for row in own]
