"""Conversations to ids, and which of them are trained.

A turn that is trained is what an engine would be asked and would have to write:

    prompt      the template with everything before it and the generation prompt: never trained
    completion  thought, answer and the token that ends the turn: trained, each id

Both are encoded apart, so the prompt's ids are those of inference. The template is asked for each
prompt anew, because templates cut old thoughts out of the history. As long as a prompt goes on from
the ids of the turn before, the two share a document, else each has its own; no turn is trained
twice. A template without a generation prompt is read by its `{% generation %}` marks, if any.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from tessera.data.conversation import Chat, Message, Mode, answer_fault, fault
from tessera.data.switch import DETAILED, set_switch
from tessera.data.template import Template, TemplateError, template_of
from tessera.data.thought import CLOSE, OPEN, split, split_message
from tessera.data.tokenizer import Tokenizer

Turns = Literal["last", "all"]
RULES = "chat-1"  # changed whenever a conversation becomes other ids than before
_OPENED = re.compile(rf"{OPEN}\s*({CLOSE}\s*)?\Z")  # a thought that a prompt begins, or shuts


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
    """How the conversations of a set become ids.

    turns: the last answer is trained, or all answers are. switch: how the mode is said (switch.py).
    """

    tokenizer: Tokenizer
    template: Template
    turns: Turns = "all"
    switch: str = DETAILED

    @classmethod
    def of(cls, tokenizer: Tokenizer, turns: Turns = "all", switch: str = DETAILED) -> ChatEncoder:
        """With the tokenizer's template. Raises TemplateError where there is none to be had."""
        return cls(tokenizer, template_of(tokenizer), turns, switch)

    @property
    def identity(self) -> list[Any]:
        """What the documents of a conversation follow from, beside itself."""
        rules = [self.turns, self.switch, self.tokenizer.eos_ids]
        return [RULES, self.tokenizer.fingerprint(), self.template.fingerprint(), *rules]

    def prompt(
        self, messages: Sequence[Message], mode: Mode, tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """The ids that an engine is asked with."""
        messages, variables = set_switch(messages, mode, self.switch)
        text = _Turns(self.template, messages, tools, variables).prompt(len(messages))
        return self.tokenizer.encode(text, special=True)

    def encode(self, chat: Chat) -> list[Document]:
        """The documents of a conversation; every trained answer is in exactly one.

        Raises ChatError with the reason for what must not be trained on.
        """
        (found,) = self.encode_batch([chat])
        if isinstance(found, str):
            raise ChatError(found)
        return found

    def encode_batch(self, chats: Sequence[Chat]) -> list[list[Document] | str]:
        """The documents of each conversation, or why it must not be trained on.

        All texts go to the tokenizer in one call, whose own threads share them.
        """
        plans = [self._plan(chat) for chat in chats]
        texts = [text for plan in plans if isinstance(plan, _Plan) for text in plan.texts()]
        ids = iter(self.tokenizer.encode_batch(texts, special=True))
        return [plan if isinstance(plan, str) else self._documents(plan, ids) for plan in plans]

    def _plan(self, chat: Chat) -> _Plan | str:
        """The texts of a conversation, or why there are none."""
        if reason := fault(chat) or self._forged(chat):
            return reason
        messages, variables = set_switch(chat.messages, chat.mode, self.switch)
        turns, last = _Turns(self.template, messages, chat.tools, variables), len(messages) - 1
        answers = _answers(messages, chat.mode) if self.turns == "all" else [last]
        try:
            if not self.template.marks_generation or turns.asks(last):
                return _Plan(chat.mode, [turns.split(index) for index in answers])
            text, spans = turns.whole(last)
        except TemplateError as error:
            return str(error)
        return _Plan(chat.mode, marked=_cut(text, spans if self.turns == "all" else spans[-1:]))

    def _documents(self, plan: _Plan, ids: Iterator[list[int]]) -> list[Document] | str:
        """The documents of a plan, its texts' ids taken from `ids`."""
        documents: list[Document] = []
        turns = [(next(ids), next(ids)) for _ in plan.turns]  # taken whole, whatever comes of it
        pieces = [(next(ids), inside) for _, inside in plan.marked]
        try:
            for (prompt, answer), (_, text) in zip(turns, plan.turns, strict=True):
                _extend(documents, prompt, self._stopped(answer, text), plan.mode)
            return documents or [self._marked(pieces, plan.mode)]
        except ChatError as error:
            return str(error)

    def _stopped(self, ids: list[int], text: str) -> list[int]:
        """The ids of a completion, up to the token at which generation stops."""
        ends = [i for i, token in enumerate(ids) if token in self.tokenizer.eos_ids]
        if not ends:
            stops = [self.tokenizer.token(i) for i in self.tokenizer.eos_ids]
            raise ChatError(
                f"the template ends a turn with {text[-16:]!r}, at which generation does not stop "
                f"(it stops at {', '.join(map(repr, stops))}): name the end of a turn as eos_token "
                "in tokenizer_config.json, or in generation_config.json"
            )
        return ids[: ends[-1] + 1]

    def _marked(self, pieces: Sequence[tuple[list[int], bool]], mode: Mode) -> Document:
        """The one document of a template that marks what the model has written."""
        ids = [i for piece, _ in pieces for i in piece]
        trained = [inside for piece, inside in pieces for _ in piece]
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
        for index, message in enumerate(chat.messages):
            for text in (message["content"], message.get("reasoning_content", "")):
                if hit := self._special.search(text):
                    return f"message {index} holds {hit[0]}, which the tokenizer reads as a mark"
        return None


def _answers(messages: Sequence[Message], mode: Mode) -> Iterator[int]:
    """The answers that are trained: those that do what the switch says, and the last one.

    An answer without a thought after `detailed thinking on` would teach the model not to think.
    OpenAI's `weight = 0` leaves an answer out.
    """
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            last = index == len(messages) - 1
            if last or (message.get("weight", 1) and answer_fault(message, mode) is None):
                yield index


@dataclass
class _Plan:
    """The texts of a conversation: (prompt, completion) of each trained turn, or (text, trained)
    of the stretches of a marked one.
    """

    mode: Mode
    turns: list[tuple[str, str]] = field(default_factory=list)
    marked: list[tuple[str, bool]] = field(default_factory=list)

    def texts(self) -> list[str]:
        return [text for turn in self.turns for text in turn] + [text for text, _ in self.marked]


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """A text in stretches, and whether each is inside of a span."""
    pieces, at = [], 0
    for start, stop in [*spans, (len(text), len(text))]:
        pieces += [(text[at:start], False), (text[start:stop], True)]
        at = stop
    return pieces


def _extend(documents: list[Document], prompt: list[int], answer: list[int], mode: Mode) -> None:
    """Adds a turn to the last document where its prompt goes on from it, else as one more."""
    before = documents[-1] if documents else None
    if before is None or prompt[: len(before.ids)] != before.ids:
        before = Document([], [], mode)
        documents.append(before)
    gap = len(prompt) - len(before.ids)
    before.ids = prompt + answer
    before.trained += [False] * gap + [True] * len(answer)


@dataclass(frozen=True)
class _Turns:
    """One conversation before a template."""

    template: Template
    messages: list[Message]
    tools: Sequence[dict[str, Any]]
    variables: dict[str, Any]

    def before(self, index: int) -> list[Message]:
        """The history of message `index`.

        Thoughts from before the last question are cut, whatever the template would do; those
        since then, between calls of tools, are the template's to cut or keep.
        """
        history = self.messages[:index]
        asked = max((i for i, one in enumerate(history) if one["role"] == "user"), default=0)
        return [_without_thought(one) if i < asked else one for i, one in enumerate(history)]

    def prompt(self, index: int) -> str:
        """What an engine is asked before message `index`."""
        return self._render(self.before(index), add_generation_prompt=True)

    def asks(self, index: int) -> bool:
        """Whether the template has a generation prompt."""
        return self.prompt(index) != self._render(self.before(index))

    def whole(self, index: int) -> tuple[str, list[tuple[int, int]]]:
        """The conversation up to message `index`, and what `{% generation %}` marks in it."""
        messages = [*self.before(index), self.messages[index]]
        return self.template.spans(messages, tools=self.tools, **self.variables)

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
        text = self._render([*before, message])
        if text.startswith(prompt) and (not thought or thought in text[len(prompt) :]):
            return prompt, text[len(prompt) :]
        text = self._render([*before, _without_thought(message)])
        head = prompt[: opened.start()] if opened else prompt
        if not text.startswith(head):
            raise TemplateError(
                f"the template asks for an answer with {prompt[-40:]!r} and does not render one "
                "behind that: nothing says where the answer begins"
            )
        written = _thought_text(message)
        if opened and thought:
            written = written[len(OPEN) :].lstrip()
        return prompt, written + text[len(head) :]

    def _render(self, messages: list[Message], **more: Any) -> str:
        return self.template.render(messages, tools=self.tools, **self.variables, **more)


def _without_thought(message: Message) -> Message:
    """An answer alone. An empty `reasoning_content` says that tags in it are its own text."""
    if message["role"] != "assistant":
        return message
    answer = split_message(message).answer
    rest = {k: v for k, v in message.items() if k != "reasoning_content"} | {"content": answer}
    return rest | {"reasoning_content": ""} if OPEN in answer or CLOSE in answer else rest


def _thought_text(message: Message) -> str:
    """The thought as the model is to write it, "" for none; a row's own white space is kept."""
    content, apart = message["content"], message.get("reasoning_content")
    if isinstance(apart, str):
        return f"{OPEN}\n{apart.strip()}\n{CLOSE}\n\n"
    return content.removesuffix(split(content).answer).lstrip()
