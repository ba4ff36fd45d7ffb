"""Two tokenizers with chat templates, made here, each beside transformers' reading of its files."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from tessera.data.chat import ChatEncoder, Document
from tessera.data.template import template_of
from tessera.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

# SmolLM2's own.
CHATML = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
# Opens the thought in the generation prompt, as DeepSeek-R1's does.
OPENING = """\
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}\
{{- message.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}\
{%- if thinks is not defined or thinks %}{{- '<think>\n' }}{%- endif %}{%- endif %}"""


@dataclass(frozen=True)
class Made:
    """A tokenizer, transformers' of the same files, and what ends a turn."""

    tokenizer: Tokenizer
    peer: Any
    end: str

    def encoder(self, **options: Any) -> ChatEncoder:
        return ChatEncoder.of(self.tokenizer, **{"switch": "none", **options})

    def trained(self, documents: list[Document]) -> list[str]:
        """The trained stretches as texts, each without the mark that ends it."""
        found = []
        for document in documents:
            pairs = zip(document.ids, document.trained, strict=True)
            for trained, run in groupby(pairs, key=lambda pair: pair[1]):
                if trained:
                    ids = [i for i, _ in run]
                    assert self.tokenizer.token(ids[-1]) == self.end
                    found.append(self.tokenizer.decode(ids[:-1], special=True))
        return found

    def asked(self, messages: list[dict[str, Any]], tools: Any = None, **more: Any) -> list[int]:
        """The ids of a prompt by transformers."""
        return self.peer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False,
            **more,
        )  # fmt: skip

    def ids(self, text: str) -> list[int]:
        """The ids of a text by transformers."""
        return self.peer.encode(text, add_special_tokens=False)


@functools.cache
def made(name: str) -> Made:
    """`builtin`, `chatml` or `opening`."""
    trained = train_bpe(["the cat sat on the mat and thought of fish"], 300, chat=True)
    home = Path(tempfile.mkdtemp(prefix="tessera-cases-"))
    trained.save(home)
    if name == "builtin":
        (home / "chat_template.jinja").write_text(template_of(trained).source)
        end = "<|eot_id|>"
    else:
        end = "<|im_end|>"
        fast = tokenizers.Tokenizer.from_file(str(home / "tokenizer.json"))
        fast.add_special_tokens(["<|im_start|>", end])
        fast.save(str(home / "tokenizer.json"))
        config = json.loads((home / "tokenizer_config.json").read_text())
        config |= {"eos_token": end, "bos_token": "<|im_start|>"}
        (home / "tokenizer_config.json").write_text(json.dumps(config))
        (home / "generation_config.json").unlink(missing_ok=True)
        (home / "chat_template.jinja").write_text(CHATML if name == "chatml" else OPENING)
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(str(home))
    return Made(load_tokenizer(home), peer, end)
