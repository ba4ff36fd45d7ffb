"""Teachers in this process: an `Engine` asked through its chat template, and a text encoder."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tessera import dist
from tessera.ask.ask import AskError, Receive, Reply, Request, Working
from tessera.data.switch import Switch
from tessera.data.thought import Splitter
from tessera.model.source import resolve
from tessera.runs.files import fingerprint
from tessera.runs.recipe import Config
from tessera.runs.run import fingerprint_path
from tessera.vllm.config import InferenceConfig

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from tessera.generate.engine import GenerationRequest

SAMPLING = {"max_tokens", "temperature", "top_p"}
TEMPLATE = "chat_template_kwargs"  # in a request's sampling: variables of the chat template
SORTED_BATCHES = 64  # whose texts are sorted by length together
DIGITS = 7  # of a vector's numbers on disk: those of a float32 below 1


class EngineConfig(InferenceConfig):
    """The model that the stage's `model` names, run by an engine of this process.

    batch: requests generated at a time; another takes the place of each that ends. asking: "text"
    is for a base model, whose prompt is the question and a newline instead of a chat template.
    switch: how the model is told to think (data/switch.py), its own where not given.
    chat_template_kwargs: further variables of its template.
    """

    kind: Literal["engine"]
    batch: int = Field(default=64, ge=1)
    asking: Literal["chat", "text"] = "chat"
    switch: Switch | None = None
    chat_template_kwargs: dict[str, Any] = {}


class LocalAnswerer:
    """An `Answerer` that generates with an engine of this process.

    model: a model directory or run; an AskError says where it is missing.
    """

    def __init__(self, config: EngineConfig, model: Path | None, seed: int) -> None:
        from tessera.data.chat import ChatEncoder
        from tessera.data.tokenizer import load_tokenizer
        from tessera.model.placement import inference_dtype

        if model is None:
            raise AskError('a teacher of kind "engine" needs the stage\'s model = "RUN OR PATH"')
        self.engine = config.open_engine(model, config.batch)
        self.placement = config.placement(model)
        self.tokenizer = load_tokenizer(model)
        chats = config.asking == "chat"
        self.encoder = ChatEncoder.of(self.tokenizer, switch=config.switch) if chats else None
        self.variables = config.chat_template_kwargs
        self.model, self.batch, self.seed = fingerprint_path(model), config.batch, seed
        if (number := str(inference_dtype(config.dtype))) != "torch.float32":
            self.model = fingerprint([self.model, number])  # answers in another precision

    def ask(
        self, requests: Iterable[Request], receive: Receive, working: Working | None = None
    ) -> None:
        """See `Answerer.ask`."""
        from tessera.generate.text import completion_text

        wanted = self._wanted(requests, receive)
        with closing(self.engine.as_completed(wanted, working)) as completed:
            for one, _, completion in completed:
                tokens, splitter = completion.token_ids, Splitter()
                text = completion_text(self.tokenizer, one.prompt, tokens)
                said = splitter.push(text) + splitter.flush()
                prompt = self.tokenizer.decode(one.prompt, special=True)
                reason = completion.finish_reason
                reply = Reply(said.answer, said.thought, reason, len(tokens), prompt=prompt)
                receive(one.owner, reply)

    def tell(self, requests: list[Request] | None) -> list[Request] | None:
        """What the first process of a tensor group is about to ask, in all of the group; None is
        the end. Each of them calls it."""
        import torch.distributed

        box = [requests]
        if (mesh := self.placement.tensor_mesh) is not None:
            group = mesh.get_group()
            torch.distributed.broadcast_object_list(box, group=group, group_src=0)
        return box[0]

    def follow(self) -> None:
        """Answers together with the first process of the tensor group until that tells the end."""
        while (requests := self.tell(None)) is not None:
            self.ask(requests, lambda request, reply: None)

    def _wanted(self, requests: Iterable[Request], receive: Receive) -> Iterator[GenerationRequest]:
        """What the engine is asked; what it refuses is received as an error."""
        from tessera.generate.engine import GenerationError, GenerationRequest, SamplingParams

        for request in requests:
            if request.embed:
                raise AskError('a teacher of kind "engine" gives no vectors; use kind = "embedder"')
            sampling = {k: v for k, v in request.sampling.items() if k in SAMPLING}
            stops = self.tokenizer.eos_ids
            params = SamplingParams(**sampling, seed=self.seed, stop_token_ids=stops)
            key = int(request.key(self.model)[:15], 16)
            one = GenerationRequest(self._prompt(request), params, key, owner=request)
            try:
                self.engine.check([one])
            except GenerationError as error:  # its prompt is too long, say
                receive(request, Reply(error=str(error)))
            else:
                yield one

    def _prompt(self, request: Request) -> list[int]:
        if self.encoder is not None:
            variables = {**self.variables, **request.sampling.get(TEMPLATE, {})}
            return self.encoder.prompt(request.messages, request.mode, variables=variables)
        return self.tokenizer.encode(request.messages[-1]["content"] + "\n", bos=True)


class EmbedderConfig(Config):
    """The sentence-transformers encoder in `model`, a directory or a hub id.

    pooling, max_tokens and prefix (put before every text) are the model's own where not given; a
    model that names no pooling takes the mean. Longer texts are cut to max_tokens. batch: texts
    encoded together; vectors are kept when their batch ends.
    """

    kind: Literal["embedder"]
    model: str
    pooling: Literal["mean", "cls"] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    prefix: str | None = None
    batch: int = Field(default=32, ge=1)


class Embedder:
    """An `Answerer` that gives vectors of norm 1. Weights are loaded at the first request."""

    def __init__(self, config: EmbedderConfig) -> None:
        """Raises CheckpointError where the model is not found."""
        self.config, self.directory = config, resolve(config.model)
        settings = config.model_dump(include={"pooling", "max_tokens", "prefix"})
        self.model = fingerprint([fingerprint_path(self.directory), settings])

    def ask(
        self, requests: Iterable[Request], receive: Receive, working: Working | None = None
    ) -> None:
        """See `Answerer.ask`. Texts of similar length are encoded together."""
        coming, size = iter(requests), self.config.batch
        while window := list(itertools.islice(coming, SORTED_BATCHES * size)):
            if not all(request.embed for request in window):
                raise AskError('a teacher of kind "embedder" gives no answers; use kind = "engine"')
            window.sort(key=lambda one: len(one.messages[-1]["content"]))
            for begin in range(0, len(window), size):
                batch = window[begin : begin + size]
                vectors = self._vectors([one.messages[-1]["content"] for one in batch])
                for request, vector in zip(batch, vectors, strict=True):
                    receive(request, Reply(vector=[round(x, DIGITS) for x in vector]))

    def _vectors(self, texts: Sequence[str]) -> list[list[float]]:
        return self._encoder.encode(
            list(texts),
            prompt=self.config.prefix,
            batch_size=len(texts),
            normalize_embeddings=True,
            show_progress_bar=False,
        ).tolist()

    @functools.cached_property
    def _encoder(self) -> SentenceTransformer:
        """Raises AskError for a model that cannot be loaded whole."""
        try:
            from sentence_transformers import SentenceTransformer
            from sentence_transformers.sentence_transformer.modules import Pooling
        except ImportError:
            raise AskError("an embedder needs: pip install 'tessera[embed]'") from None
        try:
            _check_whole(self.directory)
            model = SentenceTransformer(
                str(self.directory),
                device=str(dist.device()),
                local_files_only=True,
                model_kwargs={"use_safetensors": True, "dtype": "float32"},
            )
        except AskError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise AskError(f"{self.directory}: {(*lines, type(error).__name__)[0]}") from error
        if wanted := self.config.max_tokens:
            encoder: Any = model[0]
            positions = getattr(encoder.auto_model.config, "max_position_embeddings", wanted)
            if wanted > positions:
                raise AskError(
                    f"max_tokens = {wanted}: {self.directory} reads at most {positions} tokens"
                )
            model.max_seq_length = wanted
        for name, module in model.named_children():
            if self.config.pooling and isinstance(module, Pooling):
                size = module.embedding_dimension
                model._modules[name] = Pooling(size, pooling_mode=self.config.pooling)
        return model.eval()


def _check_whole(directory: Path) -> None:
    """Raise AskError for pickles, and for an encoder that transformers would fill with noise."""
    import torch
    import transformers

    if not any(directory.glob("*.safetensors")):
        raise AskError(f"{directory} holds no *.safetensors; pickles are refused")
    _, info = transformers.AutoModel.from_pretrained(
        directory,
        local_files_only=True,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    if absent := sorted(name for name in info["missing_keys"] if not name.startswith("pooler.")):
        raise AskError(f"{directory} is no encoder: its weights lack {absent[0]}")
