"""lm-evaluation-harness with one more model: any of its tasks asks our engine.

    python -m tessera.eval.harness run --model tessera --model_args pretrained=RUN --tasks ...

Prompts, filters, metrics and conventions are lm-eval's; where they leave a choice it is a field
of `Arguments`. Needs `tessera[harness]`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, PositiveInt

from tessera import dist
from tessera.data.chat import ChatEncoder
from tessera.data.conversation import Message, Mode
from tessera.data.switch import Switch, SwitchError, require_switch, set_switch
from tessera.data.template import TemplateError, template_of
from tessera.data.thought import Thought, split
from tessera.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from tessera.generate.engine import GenerationError, GenerationRequest, SamplingParams
from tessera.generate.text import StopStrings, TextStream, opens_thought
from tessera.generate.torch_engine import TorchEngine
from tessera.model.placed import DtypeName
from tessera.model.placement import for_inference
from tessera.model.source import CheckpointError, resolve
from tessera.progress import Progress
from tessera.runs.files import fingerprint
from tessera.runs.recipe import Config, RecipeError, validate
from tessera.runs.run import fingerprint_path


@dataclass(frozen=True, slots=True)
class Wanted:
    """A completion to make; key: what its randomness follows from, beside the seed.

    keep_thought: the thought is part of the text, and its stop strings count there too.
    """

    prompt: list[int]
    params: SamplingParams
    stops: tuple[str, ...] = ()
    key: int = 0
    keep_thought: bool = False


class Answer:
    """Tokens of a completion in, its answer up to the task's stop string out; "" for none.

    A stop string counts in the answer alone: a blank line ends a sentence of a thought, too.
    """

    def __init__(self, tokenizer: Tokenizer, wanted: Wanted) -> None:
        opened = None if wanted.keep_thought else opens_thought(tokenizer, wanted.prompt)
        self._stream, self._stops = TextStream(tokenizer, opened=opened), StopStrings(wanted.stops)
        self._whole, self._text = wanted.keep_thought, ""

    def push(self, token: int) -> bool:
        """Whether the text has come to a stop string: a stopping criterion of the engine."""
        self._add(self._stream.push([token]))
        return self._stops.stopped

    def finish(self) -> str:
        """All of it, where no more tokens come."""
        self._add(self._stream.finish())
        self._text += self._stops.flush()
        return self._text if self._whole else split(self._text).answer

    def _add(self, piece: Thought) -> None:
        self._whole |= piece.thought is not None
        self._text += self._stops.push(piece.answer)


def complete(
    engine: TorchEngine,
    tokenizer: Tokenizer,
    wanted: Sequence[Wanted],
    *,
    room: int,
) -> Iterator[tuple[int, str]]:
    """(its index, its text) of each completion, as they end; what is unfinished is cancelled.

    room: tokens of a prompt and its completion. The longest prompts go first.
    """

    def requests() -> Iterator[GenerationRequest]:
        for i in sorted(range(len(wanted)), key=lambda i: -len(wanted[i].prompt)):
            one = wanted[i]
            most = min(one.params.max_tokens, room - len(one.prompt))
            params = dataclasses.replace(one.params, max_tokens=most)
            stopping = (lambda one=one: Answer(tokenizer, one).push) if one.stops else None
            yield GenerationRequest(one.prompt, params, one.key, stopping=stopping, owner=i)

    with closing(engine.as_completed(requests())) as completed:
        for request, _, completion in completed:
            tokens, answer = completion.token_ids, Answer(tokenizer, wanted[request.owner])
            ended = bool(tokens) and tokens[-1] in request.params.stop_token_ids
            for token in tokens[: len(tokens) - ended]:
                answer.push(token)
            yield request.owner, answer.finish()


try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
    )
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lm_eval":
        raise
    raise ModuleNotFoundError(
        "tessera.eval.harness needs lm-eval: pip install 'tessera[harness]'", name="lm_eval"
    ) from None

SCORED_AT_ONCE = 256  # sequences between two moves of the progress
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
log = logging.getLogger(__name__)
Scores = list[tuple[float, bool]]


class HarnessError(ValueError):
    """What a task asks for and the engine cannot give; the text says what to change."""


class Arguments(Config):
    """The words of `--model_args`.

    pretrained: a run, a model directory or a hub id. thinking: says the mode in the prompts of
    `--apply_chat_template`, `switch` how (data/switch.py), the model's own where not given; without
    thinking, prompts are rendered as the task wrote them. chat_template_kwargs: further variables
    of the chat template.
    keep_thought: show thoughts to the task's filters; else it sees the answer, "" where none came,
    and stop strings count in the answer alone. add_bos_token: left out, as the tokenizer's own rule
    says. max_length: of prompt and completion, at most the model's. max_gen_toks: of a completion
    whose task does not say. rolling_context: tokens that a window of a rolling text shares with the
    one before, at the least; lm-eval's models have 1. batch_size: samples decoded together; "auto"
    is max_batch_size. No figure follows from it. device, dtype: as in `tessera eval`.
    """

    pretrained: str
    thinking: Mode | None = None
    switch: Switch | None = None
    chat_template_kwargs: dict[str, Any] = {}
    keep_thought: bool = False
    add_bos_token: bool | None = None
    max_length: int | None = Field(default=None, ge=2)
    max_gen_toks: int = Field(default=256, ge=1)
    rolling_context: int = Field(default=1, ge=1)
    batch_size: PositiveInt | Literal["auto"] = "auto"
    max_batch_size: int = Field(default=64, ge=1)
    device: str | None = None
    dtype: DtypeName = "auto"
    seed: int = Field(default=0, ge=0)

    @property
    def batch(self) -> int:
        return self.max_batch_size if self.batch_size == "auto" else self.batch_size


@register_model("tessera")
class TesseraLM(TemplateLM):
    """The model `tessera` of lm-eval. Its arguments are the fields of `Arguments`."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        size = arguments.get("batch_size")
        if isinstance(size, str) and size.isdigit():  # lm-eval's own option gives a text
            arguments["batch_size"] = int(size)
        self.asked = config = validate(Arguments, arguments, "model_args")
        home = resolve(config.pretrained)
        self.codec = load_tokenizer(home)
        # lm-eval's command line says cuda:0 where nobody said anything, also where there is none.
        with dist.computing_on(None if config.device == "cuda:0" else config.device):
            module = for_inference(home, dtype=config.dtype).load(home, frozen=True)
        self.engine = TorchEngine(module, max_batch_size=config.batch)
        self.batch_size = config.batch
        longest = module.config.max_position_embeddings
        self.max_length = config.max_length or longest
        if self.max_length > longest:
            raise HarnessError(
                f"max_length is {self.max_length}; the model has {longest} positions"
            )
        if config.rolling_context > self.max_length:
            raise HarnessError(f"give a rolling_context of at most {self.max_length}, a window")
        self.begin = list(self.codec.beginning(config.add_bos_token))
        self._info = {
            "model_num_parameters": module.config.num_params(),
            "model_dtype": str(module.head.dtype).removeprefix("torch."),
            "model_sha": fingerprint_path(home),
        }

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes of the model beside its results."""
        return self._info

    # Text to tokens.

    @property
    def eot_token_id(self) -> int:
        if not self.codec.eos_ids:
            raise TokenizerError("this tokenizer names no end-of-text token, which lm-eval needs")
        return self.codec.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text whose first token is scored."""
        return self.eot_token_id if self.codec.bos_id is None else self.codec.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids; special tokens in the text are read as such, for a chat prompt is made of them."""
        ids = self.codec.encode(string, special=True)
        if add_special_tokens is None:
            held = self.begin and ids[: len(self.begin)] == self.begin
            return ids if held else self.begin + ids
        return [*self.codec.begin, *ids] if add_special_tokens else ids

    @property
    def tokenizer_name(self) -> str:
        return f"tessera-{self.codec.fingerprint()}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return template_of(self.codec).source if chat_template else ""

    @functools.cached_property
    def encoder(self) -> ChatEncoder:
        """Raises SwitchError where a mode is to be said and the model has no switch."""
        found = ChatEncoder.of(self.codec, switch=self.asked.switch)
        require_switch(found.switch, self.asked.thinking, self.asked.pretrained)
        return found

    def apply_chat_template(
        self, chat_history: list[Message], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation. Without a generation prompt it ends within the last answer,
        which the model is to continue. Raises TemplateError.
        """
        encoder = self.encoder
        history, variables = set_switch(chat_history, self.asked.thinking, encoder.switch)
        template, variables = encoder.template, variables | self.asked.chat_template_kwargs
        if add_generation_prompt:
            return template.render(history, add_generation_prompt=True, **variables)
        text, begun = template.render(history, **variables), history[-1]["content"].strip()
        at = text.rfind(begun)
        if at < 0:
            raise TemplateError(f"the template does not render the answer that begins {begun!r}")
        return text[: at + len(begun)]

    # Likelihoods.

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> Scores:
        """(log-likelihood of the continuation, whether greedy decoding yields it) of each."""
        longest, rows = self.max_length, []
        for _, context, wanted in requests:
            if not context or not 0 < len(wanted) <= longest:
                raise HarnessError(
                    f"a continuation of {len(wanted)} tokens after {len(context)} cannot be "
                    f"scored: it needs a context, and from 1 to {longest} tokens"
                )
            rows.append([*context, *wanted])
        _tell_cuts("contexts", [max(0, len(row) - longest - 1) for row in rows])
        rows = [row[-(longest + 1) :] for row in rows]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found: Scores = [(0.0, False)] * len(rows)
        with Progress("lm-eval: scoring", len(rows), "texts", quiet=disable_tqdm) as progress:
            for start in range(0, len(order), SCORED_AT_ONCE):
                part = order[start : start + SCORED_AT_ONCE]
                scored = self.engine.score_greedy([rows[i] for i in part])
                for i, (logprobs, greedy) in zip(part, scored, strict=True):
                    text, _, wanted = requests[i]
                    n = len(wanted)
                    found[i] = (math.fsum(logprobs[-n:]), all(greedy[-n:]))
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, found[i])
                progress.advance(len(part))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """Log-likelihood of whole texts, each token once, in windows of `max_length`."""
        rows, counts = [], []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=self.asked.rolling_context,
            )
            before = len(rows)
            rows += [(None, *make_disjoint_window(window)) for window in windows]
            counts.append(len(rows) - before)
        values = iter(self._loglikelihood_tokens(rows, disable_tqdm))
        totals = [math.fsum(next(values)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # Completions.

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text of each completion, before its stop string and behind its thought."""
        seen: Counter[str] = Counter()
        wanted: list[Wanted] = []
        cuts: list[int] = []
        for request in requests:
            context, given = request.args
            ids = self.tok_encode(context) or [self.prefix_token_id]
            wanted.append(self._wanted(context, ids, given, seen[context]))
            cuts.append(len(ids) - len(wanted[-1].prompt))
            seen[context] += 1
        _tell_cuts("prompts", cuts)
        texts = [""] * len(wanted)
        answers = complete(self.engine, self.codec, wanted, room=self.max_length)
        with Progress("lm-eval: answering", len(wanted), "answers", quiet=disable_tqdm) as progress:
            for i, text in answers:
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
                progress.advance(1)
        return texts

    def _wanted(self, context: str, ids: list[int], given: dict[str, Any], repeat: int) -> Wanted:
        """One request of a task; repeat: how often the same context came before it."""
        kwargs: dict[str, Any] = {**normalize_gen_kwargs(given, self.asked.max_gen_toks)}
        stops = tuple(stop for stop in kwargs.pop("until") if stop)
        max_tokens, sampled = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample")
        if strange := kwargs.keys() - set(SAMPLING):
            raise HarnessError(
                f"generation_kwargs has {', '.join(sorted(strange))}, which the engine does not "
                f"know; it takes until, max_gen_toks, do_sample, {', '.join(SAMPLING)}"
            )
        kwargs.setdefault("temperature", 1.0 if sampled else 0.0)
        params = SamplingParams(
            max_tokens=max_tokens,
            stop_token_ids=self.codec.eos_ids,
            seed=self.asked.seed,
            **kwargs,
        )
        key = int(fingerprint([context, repeat])[:15], 16)
        if len(ids) >= self.max_length:  # cut from the left, so that its completion has its room
            if max_tokens >= self.max_length:
                raise HarnessError(
                    f"a prompt has {len(ids)} tokens and its completion {max_tokens}, but the "
                    f"model has {self.max_length} positions: give a smaller max_gen_toks"
                )
            ids = ids[-(self.max_length - max_tokens) :]
        return Wanted(ids, params, stops, key, self.asked.keep_thought)


def _tell_cuts(what: str, cuts: Sequence[int]) -> None:
    """A figure of cut texts is another task's, so it is said once a call."""
    found = [cut for cut in cuts if cut]
    if found:
        log.warning(
            "%d of %d %s do not fit the model: up to %d tokens were cut from the left",
            *(len(found), len(cuts), what, max(found)),
        )


def main() -> None:
    """lm-eval's own command line, which knows the model `tessera` because this file is read."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    ours = (CheckpointError, GenerationError, HarnessError, RecipeError)
    try:
        cli_evaluate()
    except (*ours, SwitchError, TemplateError, TokenizerError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
