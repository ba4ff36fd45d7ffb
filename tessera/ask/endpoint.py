"""A server that speaks the OpenAI API, asked many requests at once through the `openai` client.

The client retries lost connections, timeouts, 408, 409, 429 and 5xx, and follows Retry-After. What
a retry cannot fix is an error of the one request, or an AskError where key or model are refused.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tessera.ask.ask import AskError, Receive, Reply, Request, Working
from tessera.data.thought import CLOSE, OPEN
from tessera.runs.files import FailureError
from tessera.runs.recipe import Config

if TYPE_CHECKING:
    from openai import AsyncOpenAI

REFUSED = {401: "the key is refused", 403: "access is refused", 404: "no such model or path"}
LARGEST_BODY = 64 << 20  # bytes of a response
LARGEST_COUNT = 1 << 31  # of tokens
EMBED_BATCH = 32  # texts of one request to /embeddings
ALLOWED_FAILURES = 20  # whatever their share
# What a template opened and a server left in the text: its end stands at the end of a line, while
# an answer that speaks of the tag goes on behind it.
_THOUGHT_LEFT = re.compile(rf"((?:(?!{OPEN}|{CLOSE}).)*){CLOSE}[ \t]*(?:\n\s*(.*))?\Z", re.S)


class EndpointConfig(Config):
    """A server at `url` (up to and with /v1) and the model asked for there.

    key_file: holds the API key. concurrency: requests under way at a time. timeout: seconds of one
    try, to the last byte of its response. tries: of one request. max_failed: the share of requests
    that may fail for good. extra: fields added to every request as they are, e.g.
    `chat_template_kwargs`.
    """

    kind: Literal["openai"] = "openai"
    url: str
    model: str
    key_file: str | None = None
    concurrency: int = Field(default=64, ge=1)
    timeout: float = Field(default=600.0, gt=0)
    tries: int = Field(default=6, ge=1)
    max_failed: float = Field(default=0.01, ge=0, le=1)
    extra: dict[str, Any] = {}


class Endpoint:
    """An `Answerer` behind HTTP. deadline: seconds for all tries of a request; None: as many as
    they may take one after another."""

    def __init__(self, config: EndpointConfig, seed: int, deadline: float | None = None) -> None:
        self.config, self.model, self.seed = config, config.model, seed
        self.deadline = deadline or config.timeout * config.tries
        self.sent = self.failed = self.under_way = 0

    def ask(
        self, requests: Iterable[Request], receive: Receive, working: Working | None = None
    ) -> None:
        """See `Answerer.ask`; `config.concurrency` requests are under way at a time."""
        batches = _batches(requests)

        async def ask_all() -> None:
            async with _client(self.config) as client, asyncio.TaskGroup() as group:
                for _ in range(self.config.concurrency):
                    group.create_task(self._work(client, batches, receive, working))

        try:
            asyncio.run(ask_all())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _work(
        self,
        client: AsyncOpenAI,
        batches: Iterator[list[Request]],
        receive: Receive,
        working: Working | None,
    ) -> None:
        for batch in batches:
            self.under_way += len(batch)
            replies = await self._replies(client, batch)
            self.under_way -= len(batch)
            if working is not None:
                working(0, self.under_way)
            for request, reply in zip(batch, replies, strict=True):
                self.sent += 1
                self.failed += reply.error is not None
                receive(request, reply)
                most = max(ALLOWED_FAILURES, self.config.max_failed * self.sent)
                if self.failed > most:
                    raise FailureError(
                        f"{self.config.url}: {self.failed} of {self.sent} requests failed, the "
                        f"last with: {reply.error}. To go on, run the same command again"
                    )

    async def _replies(self, client: AsyncOpenAI, batch: list[Request]) -> list[Reply]:
        import openai

        error = "the answer has another form than the API's"
        try:
            async with asyncio.timeout(self.deadline):
                for _ in range(self.config.tries):
                    found = _parse(await self._send(client, batch), len(batch))
                    if found is not None:
                        return found
        except TimeoutError:
            error = f"no answer within {self.deadline:g} s"
        except openai.APIStatusError as failure:
            status = failure.status_code
            error = f"{status}: {failure.response.content[:200].decode(errors='replace')}"
            if status in REFUSED:
                raise AskError(
                    f"{self.config.url}: {REFUSED[status]} ({error}); correct url, model or "
                    "key_file of the teacher"
                ) from None
            if len(batch) > 1 and status < 500:  # one text is too long, say
                return [(await self._replies(client, [one]))[0] for one in batch]
        except openai.APIError as failure:
            error = f"{type(failure).__name__}: {failure}"
        return [Reply(error=error)] * len(batch)

    async def _send(self, client: AsyncOpenAI, batch: list[Request]) -> bytes:
        """The body of the response."""
        first, extra = batch[0], self.config.extra
        if first.embed:
            texts = [one.messages[-1]["content"] for one in batch]
            response = await client.embeddings.with_raw_response.create(
                model=self.model, input=texts, encoding_format="float", extra_body=extra
            )
        else:
            body = {**first.sampling, "seed": self.seed + first.sample, **extra}
            messages: Any = first.messages
            response = await client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages, extra_body=body
            )
        return response.content


def _batches(requests: Iterable[Request]) -> Iterator[list[Request]]:
    """Chats one at a time, texts to embed `EMBED_BATCH` at a time."""
    for embed, group in itertools.groupby(requests, key=lambda one: one.embed):
        while batch := list(itertools.islice(group, EMBED_BATCH if embed else 1)):
            yield batch


def _client(config: EndpointConfig) -> AsyncOpenAI:
    try:
        import openai
    except ImportError:
        raise AskError("asking an endpoint needs openai: pip install 'tessera[endpoint]'") from None
    key = "none"  # the client insists on one, and would otherwise take that of the environment
    if config.key_file:
        try:
            key = Path(config.key_file).expanduser().read_text(encoding="utf-8").strip()
        except OSError as error:
            raise AskError(f"key_file {config.key_file}: {error.strerror}") from None
    return openai.AsyncOpenAI(
        api_key=key,
        base_url=config.url,
        timeout=config.timeout,
        max_retries=config.tries - 1,
        default_headers={"Accept-Encoding": "identity"},  # what is packed has no known size
        http_client=openai.DefaultAsyncHttpxClient(
            event_hooks={"response": [_bounds(config.timeout)]}
        ),
    )


def _bounds(seconds: float) -> Callable[[Any], Awaitable[None]]:
    """A hook that ends a response `seconds` after its head and after LARGEST_BODY bytes."""
    import openai

    client = openai.DefaultAsyncHttpxClient.__bases__[0]  # httpx's, of later releases httpx2's
    httpx: Any = importlib.import_module(client.__module__.partition(".")[0])

    class Body(httpx.AsyncByteStream):
        def __init__(self, stream: Any) -> None:
            self.stream, self.end = stream, time.monotonic() + seconds

        async def __aiter__(self) -> AsyncIterator[bytes]:
            size, parts = 0, aiter(self.stream)
            while True:
                try:
                    async with asyncio.timeout(self.end - time.monotonic()):
                        part = await anext(parts, None)
                except TimeoutError:
                    raise httpx.ReadTimeout(f"no whole response within {seconds:g} s") from None
                if part is None:
                    return
                if (size := size + len(part)) > LARGEST_BODY:
                    raise httpx.ReadError(f"a response of more than {LARGEST_BODY:,} bytes")
                yield part

        async def aclose(self) -> None:
            await self.stream.aclose()

    async def bound(response: Any) -> None:
        response.stream = Body(response.stream)
        # Nothing is unpacked, and no codec of the server's choice is taken.
        response.headers.pop("content-encoding", None)
        response.headers["content-type"] = "application/json"

    return bound


def _parse(text: bytes, count: int) -> list[Reply] | None:
    """The replies in a response's body; None where it has another form than the API's."""
    try:
        match json.loads(text):
            case {"choices": [{"message": dict(message), **choice}, *_], **more}:
                answer = message.get("content") or ""
                thought = message.get("reasoning_content") or message.get("reasoning")
                if not isinstance(answer, str) or not isinstance(thought, str | None):
                    return None
                f"{answer}{thought}".encode()  # half a surrogate could not be written again
                if thought is None and (left := _THOUGHT_LEFT.match(answer)):
                    thought, answer = left[1].strip(), left[2]
                reason = choice.get("finish_reason") or "stop"
                tokens = (more.get("usage") or {}).get("completion_tokens") or 0
                if type(tokens) is not int or not 0 <= tokens < LARGEST_COUNT:
                    tokens = 0
                return [Reply(answer, thought, str(reason)[:40], tokens)]
            case {"data": list(rows)} if len(rows) == count:
                rows = sorted(rows, key=lambda row: row.get("index", 0))
                vectors = [[float(x) for x in row["embedding"]] for row in rows]
                if all(vector and all(map(math.isfinite, vector)) for vector in vectors):
                    return [Reply(vector=vector) for vector in vectors]
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
        pass
    return None
