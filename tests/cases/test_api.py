"""What people meet when they ask the API: the official client, OpenAI's words, vLLM's behaviour."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from tessera.data.tokenizer import load_tokenizer
from tessera.generate.grammar import choice_rule
from tessera.generate.token_bytes import TokenBytes
from tessera.generate.torch_engine import TorchEngine
from tessera.model.checkpoint import load_model
from tests.cases.answering import answering, saved

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from tessera.serve.replies import Entry, _by_text  # noqa: E402
from tessera.serve.session import ServedModel  # noqa: E402

ASKED: list[Any] = [{"role": "user", "content": "What is 1 and 2?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("api") / "model")


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    with answering(model, allow_origin=["https://app.example"]) as url:
        yield url


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as one:
        yield one


def post(address: str, path: str, body: Any) -> Any:
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{address}/{path}", content=content, headers=headers, timeout=60)


def ask(address: str, **more: Any) -> Any:
    body = {"messages": ASKED, "temperature": 0, "max_tokens": 8, **more}
    return post(address, "chat/completions", body)


def go_on(address: str, **more: Any) -> Any:
    body = {"prompt": "plain words", "temperature": 0, "max_tokens": 8, **more}
    reply = post(address, "completions", body)
    assert reply.status_code == 200, reply.text
    return reply.json()


OPTIONAL = (
    "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens "
    "max_tokens metadata modalities n parallel_tool_calls prediction presence_penalty "
    "reasoning_effort response_format seed service_tier stop store stream stream_options "
    "temperature tool_choice tools top_logprobs top_p user web_search_options best_of echo suffix "
    "verbosity top_k min_p repetition_penalty chat_template_kwargs structured_outputs model"
).split()


def test_null_for_an_optional_parameter_is_its_absence(address: str):
    null = {**dict.fromkeys(OPTIONAL), "temperature": 0, "max_tokens": 8}
    assert ask(address, **null).json()["choices"] == ask(address).json()["choices"]
    assert go_on(address, **null)["choices"] == go_on(address)["choices"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("audio", {"voice": "alloy"}),
        ("modalities", ["text", "audio"]),
        ("web_search_options", {}),
        ("verbosity", "low"),
        ("min_tokens", 3),
        ("use_beam_search", True),
        ("bad_words", ["x"]),
        ("echo", True),
        ("chat_template", "{{ messages }}"),
        ("response_format", {"type": "structural_tag"}),
        ("response_format", {"type": "json_schema"}),
        ("structured_outputs", {"grammar": "root ::= x"}),
        ("structured_outputs", {"regex": "a", "choice": ["b"]}),
        ("logit_bias", {"999999": 1}),
        ("logit_bias", {"5": 101}),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("top_logprobs", 2),
        ("stream_options", {"include_usage": True}),
        ("n", 0),
        ("max_tokens", 0),
    ],
)
def test_what_is_not_done_in_a_chat_is_refused_by_name(address: str, name: str, value: Any):
    reply = ask(address, **{name: value})
    error = reply.json()["error"]
    assert reply.status_code == 400 and name in error["message"], error
    assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("suffix", "end"), ("best_of", 3), ("prompt", []), ("prompt", [[]]), ("prompt", ["a", [1]]),
     ("prompt", [[1], 2]), ("prompt", [10**30]), ("prompt", {"a": 1}), ("prompt", [-1])],
)  # fmt: skip
def test_what_is_not_done_with_a_text_is_refused_by_name(address: str, name: str, value: Any):
    reply = post(address, "completions", {"prompt": "a", name: value})
    assert reply.status_code == 400 and name in reply.json()["error"]["message"], reply.text


@pytest.mark.parametrize(
    "harmless",
    [{"user": "u"}, {"metadata": {"a": "b"}}, {"store": True}, {"service_tier": "auto"},
     {"parallel_tool_calls": False}, {"prediction": {"type": "content", "content": "x"}},
     {"safety_identifier": "s"}, {"prompt_cache_key": "k"}, {"modalities": ["text"]},
     {"tools": []}, {"functions": []}, {"response_format": {"type": "text"}}, {"foo": 1}],
    ids=str,
)  # fmt: skip
def test_what_changes_nothing_is_taken(address: str, harmless: dict[str, Any]):
    reply = ask(address, **harmless)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"] == ask(address).json()["choices"]


@pytest.mark.parametrize(
    "body",
    [
        '{"messages": [{"role": "user", "content": "a\\ud800b"}]}',
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "\\udfff"}]}]}',
        '{"messages": [{"role": "user", "content": "a"}], "stop": "\\ud83d"}',
        '{"messages": [{"role": "user", "content": "a"}], "model": "\\ud83d"}',
        '{"messages": [{"role": "user", "content": "a"}], "\\ud83d": 1}',
        '{"messages": [{"role": "user", "content": "a", "name": "\\ud83d"}]}',
        '{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", '
        '"function": {"name": "f", "description": "\\ud83d"}}]}',
        '{"messages": [{"role": "user", "content": "a"}], "response_format": {"type": '
        '"json_schema", "json_schema": {"name": "x", "schema": {"const": "\\ud83d"}}}}',
    ],
)
def test_half_a_surrogate_pair_is_400(address: str, body: str):
    reply = post(address, "chat/completions", body)
    assert reply.status_code == 400 and "surrogate" in reply.json()["error"]["message"]
    for prompt in ('"a\\ud800"', '["a", "\\udc00"]'):
        reply = post(address, "completions", f'{{"prompt": {prompt}}}')
        assert reply.status_code == 400 and "surrogate" in reply.json()["error"]["message"]
    assert post(address, "completions", '{"prompt": "\\ud83d\\ude00"}').status_code == 200


def test_prompts_in_a_list_are_answered_in_turn(address: str, model: Path):
    tokenizer = load_tokenizer(model)
    prompts = ["plain words", "東京", '{"name"']
    one_by_one = [go_on(address, prompt=prompt) for prompt in prompts]
    ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    for given in (prompts, ids):
        reply = go_on(address, prompt=given, n=2)
        assert [row["index"] for row in reply["choices"]] == list(range(6))
        texts = [one["choices"][0]["text"] for one in one_by_one for _ in range(2)]
        assert [row["text"] for row in reply["choices"]] == texts
        assert reply["usage"]["prompt_tokens"] == sum(map(len, ids))
        assert reply["usage"]["completion_tokens"] == 6 * 8
    streamed, reasons = [""] * 3, [None] * 3
    with openai.OpenAI(base_url=address, api_key="none") as client:
        options = {"max_tokens": 8, "temperature": 0, "stream_options": {"include_usage": True}}
        for event in client.completions.create(
            model="tiny", prompt=prompts, stream=True, **options
        ):
            for row in event.choices:
                streamed[row.index] += row.text
                reasons[row.index] = row.finish_reason or reasons[row.index]
    assert streamed == [one["choices"][0]["text"] for one in one_by_one]
    assert reasons == [one["choices"][0]["finish_reason"] for one in one_by_one]
    assert event.usage.completion_tokens == 24


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 40])
def test_echo_with_log_probs_is_what_the_model_gives(
    address: str, model: Path, max_tokens: int, stream: bool
):
    tokenizer, engine = load_tokenizer(model), TorchEngine(load_model(model, frozen=True))
    prompts = ["plain 東京 words", "naïve 👩🏽‍🚀 <|eot_id|>b"]
    ids = [tokenizer.encode(prompt, bos=True, special=True) for prompt in prompts]
    body = {"prompt": prompts, "max_tokens": max_tokens, "echo": True, "logprobs": 1}
    body |= {"temperature": 0, "stream": stream, "ignore_eos": True}
    reply = post(address, "completions", body)
    rows = [{"text": "", "logprobs": {}} for _ in prompts]
    if stream:
        lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
        for row in (row for line in lines for row in json.loads(line)["choices"]):
            into = rows[row["index"]]
            into["text"] += row["text"]
            for key, values in (row["logprobs"] or {}).items():
                into["logprobs"].setdefault(key, []).extend(values)
    else:
        rows = reply.json()["choices"]
    for row, prompt, tokens in zip(rows, prompts, ids, strict=True):
        found = row["logprobs"]
        assert row["text"].startswith(prompt)
        assert "".join(found["tokens"]) == row["text"]
        assert len(found["tokens"]) == len(tokens) + max_tokens
        starts = [len("".join(found["tokens"][:i])) for i in range(len(found["tokens"]))]
        assert found["text_offset"] == starts
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        scored = engine.score_greedy([tokens])[0]
        told = found["token_logprobs"][1 : len(tokens)]
        assert told == pytest.approx(scored[0], abs=1e-5)
        for logprob, top, greedy in zip(
            told, found["top_logprobs"][1 : len(tokens)], scored[1], strict=True
        ):
            assert (logprob == max(top.values())) == greedy


def test_ids_are_echoed_with_their_marks(address: str, model: Path):
    ids = load_tokenizer(model).encode("plain<|eot_id|> words", bos=True, special=True)
    for logprobs in (None, 0):
        row = go_on(address, prompt=ids, echo=True, max_tokens=0, logprobs=logprobs)["choices"][0]
        assert row["text"] == "<bos>plain<|eot_id|> words"
    assert "".join(row["logprobs"]["tokens"]) == row["text"]


def test_max_tokens_0_says_nothing(address: str):
    reply = go_on(address, max_tokens=0)
    assert reply["choices"][0]["text"] == "" and reply["usage"]["completion_tokens"] == 0
    assert reply["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stop", [None, ["e"], ["\ufffd"]])
def test_tokens_and_bytes_join_to_the_text(address: str, stop: Any):
    for seed in range(6):
        more = {"temperature": 1.0, "seed": seed, "max_tokens": 60, "stop": stop}
        row = go_on(address, logprobs=2, **more)["choices"][0]
        assert "".join(row["logprobs"]["tokens"]) == row["text"]
        said = ask(address, logprobs=True, top_logprobs=2, **more).json()["choices"][0]
        content = said["logprobs"]["content"]
        joined = bytes(byte for one in content for byte in one["bytes"])
        assert joined.decode("utf-8", "replace") == said["message"]["content"]


class Point(BaseModel):
    x: int
    colour: Literal["red", "green"]
    inside: list[bool]


def test_the_clients_own_calls(client: Any, address: str):
    assert client.models.retrieve("tiny").id == "tiny" == client.models.list().data[0].id
    with pytest.raises(openai.NotFoundError, match="other"):
        client.models.retrieve("other/model")
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="tiny", messages=ASKED, temperature=-1)
    assert refusal.value.param == "temperature" and refusal.value.type == "invalid_request_error"
    parsed = client.chat.completions.parse(
        model="tiny", messages=ASKED, response_format=Point, seed=0, max_tokens=1500
    )
    assert isinstance(parsed.choices[0].message.parsed, Point)
    with client.chat.completions.stream(
        model="tiny", messages=ASKED, response_format=Point, seed=1, max_tokens=1500
    ) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Point)


def tools(*names: str) -> list[Any]:
    arguments = {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "東京"]}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    return [
        {"type": "function", "function": {"name": name, "parameters": arguments}} for name in names
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_required_calls_are_made(client: Any, stream: bool):
    for choice, names in (
        ("required", {"weather", "tide"}),
        ({"type": "function", "function": {"name": "tide"}}, {"tide"}),
    ):
        for seed in range(3):
            asked = {"model": "tiny", "messages": ASKED, "seed": seed, "max_tokens": 1500}
            asked |= {"tools": tools("weather", "tide"), "tool_choice": choice}
            if stream:
                with client.chat.completions.stream(**asked) as events:
                    said = events.get_final_completion().choices[0]
            else:
                said = client.chat.completions.create(**asked).choices[0]
            assert said.finish_reason == "tool_calls" and not said.message.content
            assert said.message.tool_calls
            for call in said.message.tool_calls:
                assert call.function.name in names and call.id.startswith("call_")
                assert json.loads(call.function.arguments)["city"] in ("Oslo", "東京")


def says(monkeypatch: Any, text: str) -> None:
    """Have the model of every server here give that one answer."""

    def only(self: ServedModel, request: Any, thought: Any) -> Any:
        return self._grammars.compile([choice_rule([text])])

    monkeypatch.setattr(ServedModel, "_grammar", only)


CALL = '<TOOLCALL>[{"name": "tide", "arguments": {"city": "Oslo"}}, {"name": "sun"}]</TOOLCALL>'


@pytest.mark.parametrize(
    ("text", "more", "content", "calls"),
    [
        (f"Let me see. {CALL}", {}, "Let me see. ", ["tide", "sun"]),
        (CALL, {"parallel_tool_calls": False}, None, ["tide"]),
        (CALL, {"tool_choice": "none"}, CALL, []),
        (CALL, {"tools": None}, CALL, []),
        ("<TOOLCALL>[{]</TOOLCALL> no", {}, "<TOOLCALL>[{]</TOOLCALL> no", []),
    ],
)
def test_calls_are_read_from_the_answer(
    client: Any, monkeypatch: Any, text: str, more: Any, content: str | None, calls: list[str]
):
    says(monkeypatch, text)
    asked = {"model": "tiny", "messages": ASKED, "tools": tools("tide", "sun"), "max_tokens": 300}
    asked = {key: value for key, value in {**asked, **more}.items() if value is not None}
    said = client.chat.completions.create(**asked).choices[0]
    assert said.message.content == content
    assert [call.function.name for call in said.message.tool_calls or ()] == calls
    assert said.finish_reason == ("tool_calls" if calls else "stop")
    given = [call.function.arguments for call in said.message.tool_calls or ()]
    content, parts = "", dict[int, list[str]]()
    for event in client.chat.completions.create(**asked, stream=True):
        delta = event.choices[0].delta
        content += delta.content or ""
        for call in delta.tool_calls or ():
            one = parts.setdefault(call.index, ["", ""])
            one[0], one[1] = one[0] + (call.function.name or ""), one[1] + call.function.arguments
    assert content == (said.message.content or "")
    assert list(parts.values()) == [list(pair) for pair in zip(calls, given, strict=True)]
    assert event.choices[0].finish_reason == said.finish_reason


def test_pages_of_the_sites_that_are_named_may_ask(address: str):
    origin = {"Origin": "https://app.example"}
    asked = {**origin, "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type"
    preflight = httpx.options(f"{address}/chat/completions", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    told = httpx.get(f"{address}/models", headers=origin).headers
    assert told["access-control-allow-origin"] == "https://app.example"
    other = httpx.get(f"{address}/models", headers={"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_errors_have_one_shape(address: str):
    for path in ("models/other", "models/a/b", "nothing", "models/%ff%00"):
        reply = httpx.get(f"{address}/{path}")
        assert reply.status_code == 404 and reply.json()["error"]["message"], path
    assert httpx.put(f"{address}/models").json()["error"]["code"] == 405


def told(address: str, **more: Any) -> str:
    reply = ask(address, max_tokens=12, **more)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def test_forms_of_answers(address: str):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema |= {"additionalProperties": False}
    named = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    for more in (
        {"response_format": named},
        {"structured_outputs": {"json": schema}},
        {"structured_outputs": {"json": json.dumps(schema)}},
        {"guided_json": schema},
    ):
        body = {"messages": ASKED, "max_tokens": 400, **more}
        reply = post(address, "chat/completions", body).json()["choices"][0]
        assert json.loads(reply["message"]["content"])["a"] in (1, 2)
        assert reply["finish_reason"] == "stop"
        assert json.loads(go_on(address, **more, max_tokens=400)["choices"][0]["text"])["a"]
    assert told(address, guided_choice=["yes", "no"]) in ("yes", "no")
    assert told(address, structured_outputs={"regex": "[ab]{3}"}).strip("ab") == ""
    bad = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}
    reply = ask(address, response_format=bad)
    assert reply.status_code == 400 and "not" in reply.json()["error"]["message"]


def test_without_the_library_forms_are_refused(address: str, monkeypatch: Any):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    reply = ask(address, response_format={"type": "json_object"})
    assert reply.status_code == 400
    assert "pip install 'tessera[serve]'" in reply.json()["error"]["message"]


def test_tokens_that_end_an_answer(address: str, model: Path):
    (token,) = load_tokenizer(model).encode("x")
    likely = {"max_tokens": 8, "logit_bias": {str(token): 100}}
    assert go_on(address, **likely)["choices"][0]["text"] == "x" * 8
    row = go_on(address, **likely, stop_token_ids=[token], logprobs=0)["choices"][0]
    assert (row["text"], row["finish_reason"], row["logprobs"]["tokens"]) == ("", "stop", [""])
    varied = go_on(address, **likely, frequency_penalty=2, temperature=0)["choices"][0]["text"]
    assert varied == "x" * 8  # 100 is more than 2 for each
    end = load_tokenizer(model).eos_ids[0]
    ended = {"max_tokens": 8, "logit_bias": {str(end): 100}}
    assert go_on(address, **ended)["usage"]["completion_tokens"] == 1
    assert go_on(address, **ended, ignore_eos=True)["usage"]["completion_tokens"] == 8


SMALL = {
    "generation prompt that opens a thought": "{% for m in messages %}<{{ m.role }}>"
    "{{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}<assistant><think>\n"
    "{% endif %}",
    "all kept": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
}


@pytest.mark.parametrize("source", ["", *SMALL.values()], ids=["built-in", *SMALL])
@pytest.mark.parametrize("content", ["It is ", "A\n\nB", "  x"])
def test_the_last_message_goes_on_as_in_transformers(tmp_path: Path, source: str, content: str):
    transformers = pytest.importorskip("transformers")
    from tessera.data.chat import ChatEncoder

    home = saved(tmp_path / "model", source)
    tokenizer = load_tokenizer(home)
    encoder = ChatEncoder.of(tokenizer)
    messages = [{"role": "system", "content": "detailed thinking off"}, *ASKED]
    messages.append({"role": "assistant", "content": content})
    other = transformers.AutoTokenizer.from_pretrained(home)
    for ending, options in (
        ("open", {"continue_final_message": True}),
        ("closed", {"add_generation_prompt": False}),
    ):
        wanted = other.apply_chat_template(
            messages, chat_template=encoder.template.source, tokenize=False, **options
        )
        assert encoder.prompt(messages, "off", ending=ending) == tokenizer.encode(  # type: ignore[arg-type]
            wanted, special=True
        )


def test_an_answer_that_was_begun_goes_on(address: str, tmp_path: Path, monkeypatch: Any):
    begun = [*ASKED, {"role": "assistant", "content": "It is"}]
    whole = ask(address, messages=begun, continue_final_message=True).json()
    more = {"continue_final_message": True, "add_generation_prompt": False}
    assert ask(address, messages=begun, **more).json()["choices"] == whole["choices"]
    prompt = ask(address, messages=begun).json()["usage"]["prompt_tokens"]
    assert whole["usage"]["prompt_tokens"] < prompt
    both = ask(address, messages=begun, continue_final_message=True, add_generation_prompt=True)
    assert both.status_code == 400
    says(monkeypatch, "it.</think>\n\nThree")
    thinking = [*ASKED, {"role": "assistant", "content": "<think>\nI add"}]
    with answering(saved(tmp_path / "model", SMALL["all kept"])) as url:
        said = ask(url, messages=thinking, max_tokens=40, **more).json()["choices"][0]["message"]
    assert (said["reasoning"], said["content"]) == ("it.", "Three")


def test_two_tokens_of_one_text_are_told_apart(model: Path):
    """vLLM's dictionary keeps the last; ours the chosen one's, and of others the likelier."""
    names = TokenBytes(load_tokenizer(model))
    (x,), (y,) = names.tokenizer.encode("x"), names.tokenizer.encode("y")
    entry = Entry(x, -3.0, [(y, -1.0), (x, -3.0), (y, -5.0)], text="x")
    assert _by_text(names, entry) == {"x": -3.0, "y": -1.0}
    half = names.tokenizer.encode("\U000f1234")[0]
    entry = Entry(x, float("-inf"), [(half, -1.0)], text="x")
    assert _by_text(names, entry) == {"x": -9999.0, names.name(half): -1.0}
    assert names.name(half).startswith("bytes:\\x")


def test_arguments_with_half_a_surrogate_pair_are_answered(address: str, monkeypatch: Any):
    says(monkeypatch, '<TOOLCALL>[{"name": "f", "arguments": {"a": "\\ud800"}}]</TOOLCALL>')
    for stream in (False, True):
        reply = ask(address, tools=tools("f"), max_tokens=200, stream=stream)
        assert reply.status_code == 200 and "ud800" in reply.text


def test_threads_that_encode_do_not_disturb_each_other(model: Path):
    tokenizer = load_tokenizer(model)
    wanted = {flag: tokenizer.encode("a<|eot_id|>b" * 50, special=flag) for flag in (True, False)}
    wrong: list[bool] = []

    def encode(flag: bool) -> None:
        for _ in range(300):
            if tokenizer.encode("a<|eot_id|>b" * 50, special=flag) != wanted[flag]:
                wrong.append(flag)

    threads = [threading.Thread(target=encode, args=(flag,)) for flag in (True, False) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_preflight_needs_no_key(model: Path, tmp_path: Path):
    (tmp_path / "keys").write_text("secret\n")
    with answering(model, allow_origin=["*"], key_file=str(tmp_path / "keys")) as url:
        headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        assert httpx.options(f"{url}/chat/completions", headers=headers).status_code == 200
        refused = httpx.get(f"{url}/models", headers={"Origin": "https://a.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "*"


SHOWN = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for m in messages %}"
    "[{{ m.role }}]{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
)


def test_tools_and_earlier_calls_reach_the_template_as_in_transformers(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    home = saved(tmp_path / "model", SHOWN)
    given = [{"function": {"description": "é", "parameters": {"b": None, "a": []}, "name": "f"}}]
    given[0]["type"] = "function"  # type: ignore[assignment]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}
    history = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
    history.append({"role": "tool", "tool_call_id": "1", "content": "3"})
    read = {**call, "function": {"name": "f", "arguments": {}}}
    told = [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [read]}, history[2]]
    other = transformers.AutoTokenizer.from_pretrained(home)
    text = other.apply_chat_template(told, tools=given, tokenize=False)
    wanted = load_tokenizer(home).encode(text, special=True)
    with answering(home) as url:
        reply = ask(url, messages=history, tools=given, max_tokens=1)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["prompt_tokens"] == len(wanted)


def test_messages_without_a_text_are_refused(model: Path):
    with answering(model, switch="detailed thinking") as url:
        for more in ({}, {"continue_final_message": True}):
            reply = ask(url, messages=[{"role": "system", "content": None}], **more)
            assert reply.status_code == 400 and "no text" in reply.json()["error"]["message"]
