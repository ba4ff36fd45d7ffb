"""A local teacher that gives vectors: an encoder of the BERT kind, run by transformers.

    v = p / |p|,   p = mean of the last states of a text's tokens, or the first token's state

Which of the two, how long a text may be and what stands before it is read from the files that
sentence-transformers writes beside a model; what those ask for beyond it (another pooling, a
further layer) is refused, never left out. Texts are batched by length, and what fills a batch up is
masked. Weights are safetensors and code is transformers' own: nothing that comes with a model is
run. No prompt by task, and no training.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tessera import dist
from tessera.ask.ask import AskError, Receive, Reply, Request
from tessera.model.source import resolve
from tessera.runs.files import fingerprint
from tessera.runs.recipe import Config
from tessera.runs.run import fingerprint_path

if TYPE_CHECKING:
    from torch import Tensor

Pooling = Literal["mean", "cls"]
POOLINGS: tuple[Pooling, ...] = ("mean", "cls")
MODULES = ("Transformer", "Pooling", "Normalize")  # of sentence-transformers, that are known here
WINDOW = 64  # batches whose texts are sorted together
DIGITS = 7  # of a vector's numbers on disk: those that a float32 below 1 has


class EmbedderConfig(Config):
    """The encoder in `model`, a directory or a hub id.

    pooling, max_tokens and prefix (put before every text) are the model's own, if not given; a
    model that says nothing takes the mean. Of a text that is longer, the first max_tokens count.
    batch: texts at a time; what a batch gave is kept when it ends.
    """

    kind: Literal["embedder"]
    model: str
    pooling: Pooling | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    prefix: str | None = None
    batch: int = Field(default=32, ge=1)


@dataclass(frozen=True)
class Reading:
    """How texts are read: what a vector follows from, beside the weights. longest: in tokens."""

    pooling: Pooling
    longest: int
    prefix: str
    lower: bool


class Embedder:
    """An `Answerer` in this process that gives vectors; weights are loaded when it is asked."""

    def __init__(self, directory: Path, reading: Reading, batch: int) -> None:
        self.directory, self.reading, self.batch = directory, reading, batch
        self.model = fingerprint([fingerprint_path(directory), asdict(reading)])

    def ask(self, requests: Iterable[Request], receive: Receive) -> None:
        """See `Answerer.ask`. Texts are asked in the order of their length, a window at a time."""
        coming = iter(requests)
        while window := list(itertools.islice(coming, WINDOW * self.batch)):
            if not all(request.embed for request in window):
                raise AskError(
                    'a teacher of kind "embedder" gives vectors and writes no answers; ask an '
                    'endpoint, or a teacher of kind "engine"'
                )
            self._ask(window, receive)

    def _ask(self, window: Sequence[Request], receive: Receive) -> None:
        tokens = self._tokens([request.messages[-1]["content"] for request in window])
        order = sorted(range(len(window)), key=lambda index: len(tokens[index]))
        for begin in range(0, len(order), self.batch):
            places = order[begin : begin + self.batch]
            vectors = self._vectors([tokens[one] for one in places])
            for place, vector in zip(places, vectors, strict=True):
                receive(window[place], _reply(vector, len(tokens[place])))

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's ids, the model's special ones among them, cut to `longest`."""
        reading, tokenizer = self.reading, self._loaded[0]
        whole = [reading.prefix + text for text in texts]
        whole = [text.lower() for text in whole] if reading.lower else whole
        return tokenizer(whole, truncation=True, max_length=reading.longest)["input_ids"]

    def _vectors(self, tokens: Sequence[list[int]]) -> list[list[float]]:
        """The vector of each text; zeros where there is no token."""
        import torch

        tokenizer, encoder = self._loaded
        ids, mask = padded(tokens, tokenizer.pad_token_id or 0)
        if not ids.shape[1]:
            return [[0.0]] * len(tokens)
        ids, mask = ids.to(encoder.device), mask.to(encoder.device)
        with torch.no_grad():
            states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return pooled(states, mask, self.reading.pooling).tolist()

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """Tokenizer and encoder. Raises AskError for what cannot be read whole."""
        return _load(self.directory)


def padded(tokens: Sequence[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    """(B, T) ids, filled up at the end, and (B, T) which of them are the texts' own."""
    import torch

    longest = max(map(len, tokens))
    rows = [ids + [fill] * (longest - len(ids)) for ids in tokens]
    kept = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in tokens]
    return torch.tensor(rows, dtype=torch.long), torch.tensor(kept, dtype=torch.long)


def pooled(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """(B, C) vectors of norm 1, from (B, T, C) last states and the (B, T) mask."""
    import torch

    if pooling == "cls":
        found = states[:, 0]
    else:
        found = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.nn.functional.normalize(found.float(), dim=-1)


def load(config: EmbedderConfig) -> Embedder:
    """The teacher of a directory or hub id. Raises AskError, CheckpointError."""
    directory = resolve(config.model)
    return Embedder(directory, read(directory, config), config.batch)


def read(directory: Path, config: EmbedderConfig) -> Reading:
    """How the texts of a directory's model are read. Raises AskError for what is not known here."""
    folder = _pooling_folder(directory)
    said = _json(folder / "config.json")
    bert = _json(directory / "sentence_bert_config.json")
    prefix = _default_prompt(directory) if config.prefix is None else config.prefix
    if prefix and said.get("include_prompt") is False:
        raise AskError(f"{directory}: pools without the prompt's tokens, which is not supported")
    pooling = config.pooling or _pooling(said, folder)
    longest = _longest(directory, bert, config.max_tokens)
    return Reading(pooling, longest, prefix, bool(bert.get("do_lower_case")))


def _pooling_folder(directory: Path) -> Path:
    """Where the pooling is said. Raises AskError for a module that would have to be left out."""
    modules = _json(directory / "modules.json") or []
    names = {str(one.get("type", "")).rpartition(".")[2]: str(one["path"]) for one in modules}
    if unknown := names.keys() - MODULES:
        raise AskError(
            f"{directory}: its modules.json asks for {', '.join(sorted(unknown))}, and known here "
            f"are {', '.join(MODULES)}; take another model, or serve this one behind an endpoint"
        )
    return directory / names.get("Pooling", "1_Pooling")


def _pooling(file: dict[str, Any], folder: Path) -> Pooling:
    """The pooling of a config.json, of sentence-transformers 6 or older."""
    said = file.get("pooling_mode") or [
        key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for key, value in file.items()
        if key.startswith("pooling_mode_") and value is True
    ]
    modes = [said] if isinstance(said, str) else said or ["mean"]
    for known in POOLINGS:
        if modes == [known]:
            return known
    raise AskError(
        f"{folder}: pools by {' and '.join(modes)}, and known here are {' or '.join(POOLINGS)}; "
        "take another model, or serve this one behind an endpoint"
    )


def _default_prompt(directory: Path) -> str:
    said = _json(directory / "config_sentence_transformers.json")
    return (said.get("prompts") or {}).get(said.get("default_prompt_name")) or ""


def _longest(directory: Path, bert: dict[str, Any], wanted: int | None) -> int:
    """Tokens of a text: what is wanted, or all that the model's files allow."""
    model, tokenizer = _json(directory / "config.json"), _json(directory / "tokenizer_config.json")
    limits = [model.get("max_position_embeddings"), tokenizer.get("model_max_length")]
    most = int(min([one for one in limits if one], default=512))
    if wanted is not None and wanted > most:
        raise AskError(f"max_tokens = {wanted}: {directory} reads at most {most} tokens")
    return wanted or min(int(bert.get("max_seq_length") or most), most)


def _json(file: Path) -> Any:
    """What a file says; an empty object where there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise AskError(f"{file} is not JSON ({error}); download the model again") from None


def _load(directory: Path) -> tuple[Any, Any]:
    import torch

    if not any(directory.glob("*.safetensors")):
        raise AskError(
            f"{directory} holds no *.safetensors; pickles can run code when they are read, and are "
            "refused"
        )
    transformers = _transformers()
    local = {"local_files_only": True, "trust_remote_code": False}
    wanted = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        with _quiet(transformers.utils.logging):
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **local)
            found = transformers.AutoModel.from_pretrained(directory, **wanted, **local)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        told = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        why = f"transformers cannot load it as an encoder: {told[0]}"
        raise AskError(f"{directory}: {why}") from error
    encoder, info = found
    absent = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if absent or encoder.config.is_encoder_decoder:
        why = f"its weights lack {absent[0]}" if absent else "it has a decoder"
        raise AskError(f"{directory} is no encoder that gives vectors: {why}; take another model")
    return tokenizer, encoder.eval().to(dist.device())


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without transformers' own bars and reports: what is amiss is said as an error here."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise AskError(
            "a teacher of kind \"embedder\" needs transformers: pip install 'tessera[embed]'"
        ) from None
    return transformers


def _reply(vector: list[float], tokens: int) -> Reply:
    if not tokens:
        return Reply(error="no token in it")
    return Reply(vector=[round(one, DIGITS) for one in vector], tokens=tokens)
