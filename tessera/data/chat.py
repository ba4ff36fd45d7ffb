"""Conversations to ids, and which of them are trained.

A trained turn is what an engine would be asked (the prompt) and would have to write (the
completion, to the token that ends the turn), each encoded apart. The template is asked for each
prompt anew, because templates cut old thoughts out of the history. `ChatEncoder.prompt` is the one
place where a model is asked: its ids are those of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from tessera.data.conversation import Chat, Message, Mode, answer_fault, fault, trained_answers
from tessera.data.switch import (
    DETAILED,
    NONE,
    is_variable,
    recorded_switch,
    set_switch,
    switch_of_model,
)
from tessera.data.template import RESERVED, RUN_DATE, Template, TemplateError, template_of
from tessera.data.thought import CLOSE, OPEN, split, split_message
from tessera.data.tokenizer import Tokenizer

Turns = Literal["last", "all"]
Ending = Literal["generation prompt", "open", "closed"]
_END = "\U0010fff2"  # a private character at the end of a message that stays open
MAX_TURNS = 1000  # that are trained of one conversation: each is rendered with all before it
RULES = "chat-2"  # changed whenever a conversation becomes other ids than before
_OPENED = re.compile(rf"{OPEN}\s*({CLOSE}\s*)?\Z")  # a thought that a prompt begins, or shuts
_Pairs = list[tuple[str, str]]


class ChatError(ValueError):
    """A conversation that must not or cannot be trained on; the text is the reason."""


@dataclass(slots=True)
class Document:
    """One sequence: its ids, which of them are trained, and whether its turns think."""

    ids: list[int]
    trained: list[bool]
    mode: Mode


@dataclass(frozen=True)
class ChatEncoder:
    """How conversations become ids.

    switch: how the mode is said (switch.py). default: the mode where nobody asks for one.
    """

    tokenizer: Tokenizer
    template: Template
    turns: Turns = "all"
    switch: str = NONE
    default: Mode | None = None

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        turns: Turns = "all",
        switch: str | None = None,
        *,
        today: bool = False,
    ) -> ChatEncoder:
        """With the tokenizer's template, and its model's own switch where none is given.

        A model that was trained with `detailed thinking` has always been told; it is told "off"
        where nobody asks. Raises TemplateError for a template that there is not, or that does not
        read the variable given as switch.
        """
        template = template_of(tokenizer, today=today)
        found = switch or switch_of_model(tokenizer.home, template)
        if switch and is_variable(switch) and switch not in template.variables:
            read = ", ".join(template.variables) or "none"
            raise TemplateError(f"the chat template reads no variable {switch}; it reads {read}")
        told = DETAILED in (switch, recorded_switch(tokenizer.home)) and found == DETAILED
        return cls(tokenizer, template, turns, found, "off" if told else None)

    @property
    def identity(self) -> list[Any]:
        """What the documents of a conversation follow from, beside itself."""
        rules = [self.turns, self.switch, self.tokenizer.eos_ids, str(RUN_DATE.date())]
        return [RULES, self.tokenizer.fingerprint(), self.template.fingerprint(), *rules]

    def prompt(
        self,
        messages: Sequence[Message],
        mode: Mode | None,
        tools: Sequence[dict[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        *,
        ending: Ending = "generation prompt",
    ) -> list[int]:
        """The ids that an engine is asked with; mode None: as the template stands.

        variables: what the template is given beside the switch, `chat_template_kwargs` of an API.
        ending: "open" for a last message that the model goes on with, "closed" for none of both.
        The tokenizer's marks in what others than the assistant say are characters.
        """
        if taken := sorted(set(variables or ()) & set(RESERVED)):
            raise TemplateError(f"chat_template_kwargs cannot set {', '.join(taken)}")
        messages, said = set_switch(messages, mode, self.switch)
        fence = _Fence(self._special, [messages, list(tools)])
        spoken = [one if one["role"] == "assistant" else fence.around(one) for one in messages]
        turns = _Turns(
            self.template, spoken, fence.around(list(tools)), {**said, **(variables or {})}
        )
        text = turns.ended(spoken, ending)
        return fence.encode(text, self.tokenizer)

    def encode(self, chat: Chat) -> list[Document]:
        """The documents of a conversation. Raises ChatError for what must not be trained on."""
        (found,) = self.encode_batch([chat])
        if isinstance(found, str):
            raise ChatError(found)
        return found

    def encode_batch(
        self, chats: Sequence[Chat], judge: Callable[[Chat], str | None] = fault
    ) -> list[list[Document] | str]:
        """The documents of each conversation, or why it must not be trained on.

        Every trained answer is in exactly one. The tokenizer's own threads share the texts. judge:
        why a conversation must not be trained on, whatever the template.
        """
        plans = [self._plan(chat, judge) for chat in chats]
        texts = [text for pairs, _ in plans for pair in pairs for text in pair]
        ids = iter(self.tokenizer.encode_batch(texts, special=True))
        found: list[list[Document] | str] = []
        for chat, (pairs, how) in zip(chats, plans, strict=True):
            encoded = [(next(ids), next(ids)) for _ in pairs]  # taken whole, whatever comes of it
            try:
                if how == "marked":
                    found.append([self._marked(encoded, chat.mode)])
                else:
                    found.append(self._documents(pairs, encoded, chat.mode) if pairs else how)
            except ChatError as error:
                found.append(str(error))
        return found

    def _plan(self, chat: Chat, judge: Callable[[Chat], str | None]) -> tuple[_Pairs, str]:
        """((prompt, completion) texts of each trained turn, ""), or none and why.

        Of a template without a generation prompt, the stretches that are not and that are inside of
        its `{% generation %}`, and "marked".
        """
        if reason := judge(chat) or self._forged(chat):
            return [], reason
        messages, variables = set_switch(chat.messages, chat.mode, self.switch)
        turns, last = _Turns(self.template, messages, chat.tools, variables), len(messages) - 1
        chosen = list(_answers(messages, None if self.switch == NONE else chat.mode))
        if self.turns == "last":
            chosen = [index for index in chosen if index == last]
        if not chosen:
            return [], 'the last answer has weight 0, and turns = "last" trains no other'
        if len(chosen) > MAX_TURNS:
            return [], (
                f"{len(chosen):,} answers to train in one conversation; at most {MAX_TURNS:,} are: "
                'split it, or set turns = "last"'
            )
        before = turns.before(chosen[-1])
        try:
            if reason := _left_out(turns, chosen[-1]):
                return [], reason
            marks = self.template.marks_generation
            if not marks or turns.prompt(chosen[-1]) != turns.render(before):
                return [turns.split(index) for index in chosen], ""
            return self._spans(turns, [*before, messages[chosen[-1]]], chosen), "marked"
        except TemplateError as error:
            return [], str(error)

    def _spans(self, turns: _Turns, whole: list[Message], chosen: Sequence[int]) -> _Pairs:
        """The stretches outside and inside of what the template marks as the chosen answers.

        An answer whose thought was cut out of the history is none of them.
        """
        text, spans = self.template.spans(whole, tools=turns.tools, **turns.variables)
        answers = [i for i, one in enumerate(whole) if one["role"] == "assistant"]
        kept = [i for i in chosen if whole[i] == turns.messages[i]]
        if len(spans) == len(answers):
            spans = [span for i, span in zip(answers, spans, strict=True) if i in kept]
        elif kept != answers:
            raise TemplateError(
                f"the template marks {len(spans)} of {len(answers)} answers with "
                "{% generation %}, so those that are not to be trained cannot be told apart"
            )
        pairs, at = [], 0
        for start, stop in spans:
            pairs.append((text[at:start], text[start:stop]))
            at = stop
        return [*pairs, (text[at:], "")]

    def _documents(
        self, pairs: _Pairs, encoded: Sequence[tuple[list[int], list[int]]], mode: Mode
    ) -> list[Document]:
        """Turns share a document as long as a prompt goes on from the ids of the turn before."""
        documents: list[Document] = []
        before: Document | None = None
        for (prompt, written), (_, text) in zip(encoded, pairs, strict=True):
            ends = [i for i, token in enumerate(written) if token in self.tokenizer.eos_ids]
            if not ends:
                stops = [repr(self.tokenizer.token(i)) for i in self.tokenizer.eos_ids]
                raise ChatError(
                    f"the template ends a turn with {text[-16:]!r}, at which generation does not "
                    f"stop (it stops at {', '.join(stops)}): name the end of a turn as eos_token "
                    "in tokenizer_config.json, or in generation_config.json"
                )
            answer = written[: ends[-1] + 1]
            if len(answer) == 1:
                raise ChatError("the chat template renders the answer as nothing but its end")
            if before is None or prompt[: len(before.ids)] != before.ids:
                before = Document([], [], mode)
                documents.append(before)
            gap = len(prompt) - len(before.ids)
            before.ids = prompt + answer
            before.trained += [False] * gap + [True] * len(answer)
        return documents

    def _marked(self, encoded: Sequence[tuple[list[int], list[int]]], mode: Mode) -> Document:
        """The one document of a template that marks what the model has written."""
        ids = [i for outside, inside in encoded for i in outside + inside]
        trained = [one for a, b in encoded for one in [False] * len(a) + [True] * len(b)]
        if not any(trained):
            raise ChatError("the template marks no answer with {% generation %}")
        final = max(i for i, one in enumerate(trained) if one)
        if ids[final] not in self.tokenizer.eos_ids:
            raise ChatError(
                "the template leaves the token that ends a turn outside of {% generation %}, so a "
                "model would not learn to stop; move {% endgeneration %} behind it"
            )
        return Document(ids[: final + 1], trained[: final + 1], mode)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        marks = sorted(self.tokenizer.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, marks)) or r"(?!)")

    def _forged(self, chat: Chat) -> str | None:
        """Why the template's own marks in a message would let it speak for others."""
        places: list[tuple[str, Message]] = [("the list of tools", {"tool_calls": chat.tools})]
        places += [(f"message {index}", one) for index, one in enumerate(chat.messages)]
        for place, one in places:
            texts = [one.get("content", ""), one.get("reasoning_content", "")]
            if calls := one.get("tool_calls"):
                texts.append(json.dumps(calls, ensure_ascii=False))
            for text in texts:
                if hit := self._special.search(text):
                    return f"{place} holds {hit[0]}, which the tokenizer reads as a mark"
        return None


class _Fence:
    """Characters that occur nowhere, around the tokenizer's marks in what a template is given.

    What somebody wrote is then told apart from what the template writes, and read as characters:
    `sanitize_control_tokens` of transformers, with its ids.
    """

    def __init__(self, marks: re.Pattern[str], given: Any) -> None:
        told = json.dumps(given, ensure_ascii=False, default=str)
        # Printable ones, which a template's `string` filter leaves as they are: Braille first.
        free = (one for one in map(chr, range(0x2800, 0xA000)) if one not in told)
        self.left, self.right, self.marks = next(free), next(free), marks
        self.used = False

    def around(self, value: Any) -> Any:
        """The value with every mark in its texts fenced in."""
        if isinstance(value, str):
            fenced, count = self.marks.subn(rf"{self.left}\g<0>{self.right}", value)
            self.used |= count > 0
            return fenced
        if isinstance(value, Mapping):
            return {key: self.around(one) for key, one in value.items()}
        return [self.around(one) for one in value] if isinstance(value, list) else value

    def encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """The ids of a rendered text without the fences."""
        if not self.used:
            return tokenizer.encode(text, special=True)
        whole = f"{self.left}({self.marks.pattern}){self.right}|[{self.left}{self.right}]"
        first, *others = re.split(whole, text)
        ids, line = tokenizer.encode(first, special=True), tokenizer.encode("\n", special=True)
        for number, piece in enumerate(others):  # marks and what is between them, in turn
            if piece:  # behind a line feed, because some vocabularies put a space before a text
                special = number % 2 == 1
                found = tokenizer.encode(f"\n{piece}", special=special)
                alone = found[: len(line)] != line
                ids += tokenizer.encode(piece, special=special) if alone else found[len(line) :]
        return ids


def _answers(messages: Sequence[Message], mode: Mode | None) -> Iterator[int]:
    """The answers that are trained: those that do what the switch says, and the last one.

    An answer without a thought after `detailed thinking on` would teach the model not to think;
    without a switch (mode None) each may think or not. OpenAI's `weight = 0` leaves an answer out,
    the last one, too.
    """
    weighed = trained_answers(messages)
    for index in weighed:
        message = messages[index]
        own: Mode = "off" if split_message(message).thought is None else "on"
        if index == weighed[-1] or answer_fault(message, mode or own) is None:
            yield index


def _left_out(turns: _Turns, last: int) -> str | None:
    """What of the calls and results of tools the template leaves out, so that it would be silence.

    They are replaced by words that stand nowhere else, and looked for in what is rendered.
    """
    words: dict[str, str] = {}

    def word(what: str) -> str:
        found = f"tessera{len(words)}x"
        words[found] = what
        return found

    messages = []
    for one in [*turns.before(last), turns.messages[last]]:
        if calls := one.get("tool_calls"):
            one = one | {"tool_calls": [_worded(call, word) for call in calls]}
        elif one["role"] == "tool":
            one = one | {"content": word("what tools gave back")}
        messages.append(one)
    text = turns.render(messages) if words else ""
    lost = next((what for found, what in words.items() if found not in text), None)
    if lost is None:
        return None
    return (
        f"the chat template leaves out {lost}, so a model would be trained on silence; take a "
        "tokenizer whose template renders tool calls"
    )


def _worded(call: dict[str, Any], word: Callable[[str], str]) -> dict[str, Any]:
    told, name = "the arguments of tool calls", word("the names of called tools")
    arguments = {word(told): word(told)} if call["function"]["arguments"] else {}
    return call | {"function": {"name": name, "arguments": arguments}}


@dataclass(frozen=True)
class _Turns:
    """One conversation before a template."""

    template: Template
    messages: list[Message]
    tools: Sequence[dict[str, Any]]
    variables: dict[str, Any]

    def before(self, index: int) -> list[Message]:
        """The history of a message, as a client would send it."""
        return without_old_thoughts(self.messages[:index])

    def prompt(self, index: int) -> str:
        return self.render(self.before(index), add_generation_prompt=True)

    def split(self, index: int) -> tuple[str, str]:
        """(prompt, completion) of the answer at `index`.

        The completion is as the template renders the answer; where it cuts the thought out, the
        thought is put before it. Raises TemplateError where the two do not fit together.
        """
        before, message = self.before(index), self.messages[index]
        prompt, thought = self.prompt(index), split_message(message).thought
        opened = _OPENED.search(prompt)
        if opened and bool(opened[1]) == bool(thought):
            cannot = "not think although reasoning is on" if thought else "only think"
            raise TemplateError(
                f"the template's generation prompt ends with {prompt[-20:]!r}, so the model could "
                f"{cannot}; set `switch` to the template's own variable (it reads "
                f"{', '.join(self.template.variables) or 'none'})"
            )
        text = self.render([*before, message])
        if text.startswith(prompt) and (not thought or thought in text[len(prompt) :]):
            return prompt, text[len(prompt) :]
        text = self.render([*before, _without_thought(message)])
        head = prompt[: opened.start()] if opened else prompt
        if not text.startswith(head):
            raise TemplateError(
                f"the template asks for an answer with {prompt[-40:]!r} and does not render one "
                "behind that: nothing says where the answer begins"
            )
        content, apart = message["content"], message.get("reasoning_content")
        written = content.removesuffix(split(content).answer).lstrip()  # white space is kept
        if isinstance(apart, str):
            written = f"{OPEN}\n{apart.strip()}\n{CLOSE}\n\n"
        if opened and thought:
            written = written[len(OPEN) :].lstrip()
        return prompt, written + text[len(head) :]

    def ended(self, messages: list[Message], ending: Ending) -> str:
        """The text of a conversation. An open last message ends as in transformers."""
        if ending != "open":
            return self.render(messages, add_generation_prompt=ending == "generation prompt")
        *before, last = messages
        marked = f"{last['content']}{_END} "
        text = self.render([*before, {**last, "content": marked}], add_generation_prompt=False)
        head, found, rest = text.rpartition(_END)
        if not found:
            raise TemplateError("the template leaves the last message out: nothing to go on with")
        return head if rest.startswith(" ") else head.rstrip()

    def render(self, messages: list[Message], **more: Any) -> str:
        return self.template.render(messages, tools=self.tools, **self.variables, **more)


def without_old_thoughts(messages: Sequence[Message]) -> list[Message]:
    """A history without thoughts from before the last question, which nobody sends back.

    Those since then, between calls of tools, are the template's to cut or keep.
    """
    asked = max((i for i, one in enumerate(messages) if one["role"] == "user"), default=0)
    return [_without_thought(one) if i < asked else one for i, one in enumerate(messages)]


def _without_thought(message: Message) -> Message:
    """An answer alone. An empty `reasoning_content` says that tags in it are its own text."""
    if message["role"] != "assistant":
        return message
    answer = split_message(message).answer
    rest = {k: v for k, v in message.items() if k != "reasoning_content"} | {"content": answer}
    return rest | {"reasoning_content": ""} if OPEN in answer or CLOSE in answer else rest
