"""lm-evaluation-harness drives a tessera model: `lm_eval`'s own command, with `--model tessera`.

    python -m tessera.eval.harness run --model tessera --model_args pretrained=RUN_OR_MODEL \\
        --tasks gsm8k --limit 50

pretrained: a finished run, a model directory or a hub id. thinking=on|off: with
--apply_chat_template, how the switch is said. Further ones: max_length, max_gen_toks, batch and
add_bos_token. Whatever is not asked of the model is the harness's: tasks, few shots, metrics. It
comes with `pip install 'tessera[harness]'`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tessera.data.switch import set_switch
from tessera.data.template import template_of
from tessera.data.tokenizer import load_tokenizer
from tessera.generate.engine import SamplingParams
from tessera.generate.text import stop_watch
from tessera.generate.torch_engine import TorchEngine
from tessera.model.weights import load_model, resolve
from tessera.progress import Progress

SCORED = 64  # sequences handed to the engine at once
Pair = tuple[tuple[str, str], list[int], list[int]]  # texts, context, continuation


@register_model("tessera")
class TesseraLM(TemplateLM):
    """A model as the harness knows them, over `TorchEngine`."""

    def __init__(
        self,
        pretrained: str,
        thinking: str = "",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch: int = 64,
        add_bos_token: bool = True,
        **_: Any,  # batch_size, device and what else the harness hands to every model
    ) -> None:
        super().__init__()
        if thinking not in ("", "on", "off"):
            raise ValueError(f"thinking={thinking}: give on, off, or leave it out")
        home = resolve(pretrained)
        module = load_model(home, frozen=True)
        self.home, self.thinking, self.max_gen_toks = str(home), thinking, max_gen_toks
        self.words, self.template = load_tokenizer(home), None
        self.engine = TorchEngine(module, max_batch_size=batch)
        room = module.config.max_position_embeddings
        self.max_length = min(max_length or room, room)
        self.bos = [self.words.bos_id] if add_bos_token and self.words.bos_id is not None else []

    @property
    def eot_token_id(self) -> int:
        return self.words.eos_ids[0] if self.words.eos_ids else self.words.pad_id

    @property
    def prefix_token_id(self) -> int:
        return self.words.bos_id if self.words.bos_id is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.home.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What the harness notes with its results."""
        return template_of(self.words).source if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a prompt, the switch said in it."""
        self.template = self.template or template_of(self.words)
        messages, variables = chat_history, {}
        if self.thinking:
            messages, variables = set_switch(messages, self.thinking)  # type: ignore[arg-type]
        return self.template.render(
            messages, add_generation_prompt=add_generation_prompt, **variables
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids; begins with BOS where the tokenizer has one, once."""
        ids = self.words.encode(string, special=True)
        wanted = self.bos if add_special_tokens is not False else []
        return ids if ids[: len(wanted)] == wanted else wanted + ids

    def tok_decode(self, tokens: Sequence[int], **_: Any) -> str:
        return self.words.decode(list(tokens))

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-prob of the continuation, whether greedy decoding would say it) of each pair.

        What is too long is cut at its left, as the harness does.
        """
        found: list[tuple[float, bool]] = []
        with Progress("loglikelihood", len(requests), "sequences", quiet=disable_tqdm) as bar:
            for start in range(0, len(requests), SCORED):
                part = [self._cut(*pair[1:]) for pair in requests[start : start + SCORED]]
                scores = self.engine.score([context + said for context, said in part])
                sums = [
                    sum(one[len(one) - len(said) :])
                    for one, (_, said) in zip(scores, part, strict=True)
                ]
                found += zip(sums, self._greedy(part), strict=True)
                bar.advance(len(part))
        return found

    def _cut(self, context: list[int], said: list[int]) -> tuple[list[int], list[int]]:
        whole = (context + said)[-self.max_length :]
        kept = min(len(said), len(whole) - 1)
        return whole[: len(whole) - kept], whole[len(whole) - kept :]

    def _greedy(self, part: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Each token is the likeliest after those before it: then greedy decoding says them all."""
        room = self.engine.packed.config.max_position_embeddings
        found = [False] * len(part)
        for length, group in itertools.groupby(
            sorted(range(len(part)), key=lambda i: len(part[i][1])), key=lambda i: len(part[i][1])
        ):
            numbers = [i for i in group if len(part[i][0]) + length <= room and length]
            params = SamplingParams(max_tokens=max(1, length), temperature=0.0)
            said = self.engine.generate([part[i][0] for i in numbers], params) if numbers else []
            for i, (one,) in zip(numbers, said, strict=True):
                found[i] = one.token_ids == part[i][1]
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-prob of whole texts, in the harness's windows."""
        found = []
        for (text,) in [request.args for request in requests]:
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                self.prefix_token_id,
                self.max_length - 1,
                1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            scores = self.engine.score([context + said for context, said in pairs])
            found.append(
                sum(
                    sum(one[len(one) - len(said) :])
                    for one, (_, said) in zip(scores, pairs, strict=True)
                )
            )
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """What is said after each context, up to the first of its stop strings."""
        handles = []
        for number, (context, told) in enumerate(request.args for request in requests):
            stops = [one for one in _several(told.get("until")) if one]
            new = min(int(told.get("max_gen_toks", self.max_gen_toks)), self.max_length - 1)
            prompt = self.tok_encode(context)[-(self.max_length - new) :]
            sampled = told.get("do_sample", False) and told.get("temperature", 1.0) > 0
            params = SamplingParams(
                max_tokens=new,
                temperature=float(told.get("temperature", 1.0)) if sampled else 0.0,
                top_p=float(told.get("top_p", 1.0)) if sampled else 1.0,
                stop_token_ids=self.words.eos_ids,
            )
            watch = stop_watch(self.words, stops, prompt) if stops else None
            handles.append((self.engine.submit(prompt, params, key=number, watch=watch), stops))
        self._run([handle for handle, _ in handles], disable_tqdm)
        return [
            self._text(request, handle.result()[0].token_ids, stops)
            for request, (handle, stops) in zip(requests, handles, strict=True)
        ]

    def _run(self, handles: list[Any], quiet: bool) -> None:
        done = 0
        with Progress("generate", len(handles), "answers", quiet=quiet) as bar:
            while self.engine.step():
                finished = sum(handle.done for handle in handles)
                bar.advance(finished - done)
                done = finished
            bar.advance(len(handles) - done)

    def _text(self, request: Any, ids: list[int], stops: list[str]) -> str:
        text = self.words.decode([i for i in ids if i not in self.words.eos_ids])
        text = text[
            : min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))
        ]
        self.cache_hook.add_partial("generate_until", request.args, text)
        return text


def _several(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def main() -> None:
    """`lm_eval`'s command line, with this model among those it knows."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
