"""A server that speaks the OpenAI API, asked many things at once.

What may pass is tried again after 1, 2, 4 … seconds and a share of chance, or after what the server
says in Retry-After: no connection, a timeout, 408, 409, 425, 429 and 5xx. What will not pass is an
error: of the recipe where the server refuses the key or the model, else of the one request. A
request that failed to the last is counted; above a share of them the server is held to be down, and
the work stops, to go on where it stopped.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tessera.ask.ask import AskError, Receive, Reply, Request
from tessera.runs.files import FailureError
from tessera.runs.recipe import Config

if TYPE_CHECKING:
    import httpx

PASSING = {408, 409, 425, 429}
REFUSED = {401: "the key is refused", 403: "access is refused", 404: "no such model or path"}
FEW = 20  # failures in so few requests do not tell that a server is down
LONGEST_WAIT = 120.0


class EndpointConfig(Config):
    """A server at `url` (up to and with /v1) and the model asked for there.

    key_file: holds the API key. concurrency: requests under way at a time. timeout: seconds for one
    try. tries: of one request. max_failed: the share of requests that may fail to the last. extra:
    fields put into every request as they stand, `chat_template_kwargs` say.
    """

    kind: Literal["openai"] = "openai"
    url: str
    model: str
    key_file: str | None = None
    concurrency: int = Field(default=64, ge=1)
    timeout: float = Field(default=600.0, gt=0)
    tries: int = Field(default=6, ge=1)
    wait: float = Field(default=1.0, ge=0)
    max_failed: float = Field(default=0.01, ge=0, le=1)
    extra: dict[str, Any] = {}


class Endpoint:
    """An `Answerer` behind HTTP. deadline: seconds for all tries of a request; None: no limit."""

    def __init__(self, config: EndpointConfig, seed: int, deadline: float | None = None) -> None:
        self.config, self.model, self.seed = config, config.model, seed
        self.deadline = deadline
        self.asked = self.failed = 0

    def ask(self, requests: Iterable[Request], receive: Receive) -> None:
        """See `Answerer.ask`; `config.concurrency` requests are under way at a time."""
        asyncio.run(self._ask_all(iter(requests), receive))

    async def _ask_all(self, requests: Iterator[Request], receive: Receive) -> None:
        httpx, config = _httpx(), self.config
        limits = httpx.Limits(max_connections=config.concurrency)
        async with httpx.AsyncClient(
            base_url=config.url.rstrip("/"),
            headers=_headers(config),
            timeout=httpx.Timeout(config.timeout, pool=None),
            limits=limits,
        ) as client:
            workers = [self._work(client, requests, receive) for _ in range(config.concurrency)]
            try:
                async with asyncio.TaskGroup() as group:
                    for worker in workers:
                        group.create_task(worker)
            except ExceptionGroup as errors:  # what one of them could not mend stops them all
                raise errors.exceptions[0] from None

    async def _work(
        self, client: httpx.AsyncClient, requests: Iterator[Request], receive: Receive
    ) -> None:
        for request in requests:
            reply = await self._in_time(client, request)
            self.asked += 1
            self.failed += reply.error is not None
            receive(request, reply)
            if self.failed > FEW and self.failed > self.config.max_failed * self.asked:
                raise FailureError(
                    f"{self.config.url}: {self.failed} of {self.asked} requests failed, the last "
                    f"one with: {reply.error}. What was answered is kept; the same command goes on"
                )

    async def _in_time(self, client: httpx.AsyncClient, request: Request) -> Reply:
        try:
            async with asyncio.timeout(self.deadline):
                return await self._one(client, request)
        except TimeoutError:
            return Reply(error=f"no answer within {self.deadline:g} s")

    async def _one(self, client: httpx.AsyncClient, request: Request) -> Reply:
        path, body = _body(self.config, request, self.seed)
        httpx, chance = _httpx(), random.Random(request.key(self.model))
        told, wait = "", 0.0
        for tried in range(self.config.tries):
            if tried:
                least = self.config.wait * 2 ** (tried - 1) * (1 + chance.random())
                await asyncio.sleep(min(max(wait, least), LONGEST_WAIT))
            try:
                response = await client.post(path, json=body)
            except (httpx.TransportError, httpx.DecodingError) as error:
                told, wait = f"{type(error).__name__} {error}".strip(), 0.0
                continue
            if response.status_code == 200:
                reply = _reply(response)
                if reply is not None:
                    return reply
                told, wait = f"an answer of another form: {response.text[:200]}", 0.0
                continue
            told = f"{response.status_code}: {response.text[:200]}"
            if response.status_code in REFUSED:
                raise AskError(
                    f"{self.config.url}: {REFUSED[response.status_code]} ({told}); correct url, "
                    "model or key_file of the teacher"
                )
            if response.status_code not in PASSING and response.status_code < 500:
                return Reply(error=told)
            wait = _retry_after(response)
        return Reply(error=f"{told} (tried {self.config.tries} times)")


def _httpx() -> Any:
    try:
        import httpx
    except ImportError:
        raise AskError("asking an endpoint needs httpx: pip install 'tessera[endpoint]'") from None
    return httpx


def _headers(config: EndpointConfig) -> dict[str, str]:
    if not config.key_file:
        return {}
    try:
        key = Path(config.key_file).expanduser().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise AskError(f"key_file {config.key_file}: {error.strerror}") from None
    return {"Authorization": f"Bearer {key}"}


def _body(config: EndpointConfig, request: Request, seed: int) -> tuple[str, dict[str, Any]]:
    """Path and JSON of a request."""
    if request.embed:
        text = request.messages[-1]["content"]
        return "/embeddings", {"model": config.model, "input": [text], **config.extra}
    body = {"model": config.model, "messages": request.messages, **request.sampling}
    return "/chat/completions", {**body, "seed": seed + request.sample, **config.extra}


def _reply(response: httpx.Response) -> Reply | None:
    """The reply in a response; None where it is not of the API's form."""
    try:
        match response.json():
            case {"choices": [{"message": dict(message), **choice}, *_], **more}:
                usage = more.get("usage") or {}
                thought = message.get("reasoning_content") or message.get("reasoning")
                reason = str(choice.get("finish_reason") or "stop")
                tokens = int(usage.get("completion_tokens") or 0)
                return Reply(message.get("content") or "", thought, reason, tokens)
            case {"data": [{"embedding": list(vector)}, *_]}:
                return Reply(vector=[float(one) for one in vector])
    except (ValueError, TypeError, AttributeError):
        pass
    return None


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait; 0 where it does not say."""
    try:
        return float(response.headers.get("retry-after", 0))
    except ValueError:
        return 0.0
