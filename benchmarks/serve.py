"""The server under load: streaming clients, clients that leave, garbage, a full queue, SIGTERM.

    python benchmarks/serve.py MODEL [--clients 64] [--minutes 3] [--batch 32] [--queue 256]

Clients ask one question after another, each streamed to its end; memory is the server's resident
set after a minute of warming up and at the end. Needs the extras serve and endpoint.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import httpx
from harness import Command, skip, table, tiny_model

PROBLEM = "start {} m+{} n*{} o-{} mod 10"


@dataclass
class Seen:
    """What clients saw: seconds to the first token and to the end, and how requests ended."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    ended: Counter[str] = field(default_factory=Counter)


def question(chance: random.Random) -> dict[str, Any]:
    text = PROBLEM.format(*(chance.randint(1, 3) for _ in range(4)))
    return {
        "messages": [{"role": "user", "content": text}],
        "chat_template_kwargs": {"enable_thinking": chance.random() < 0.5},
        "max_tokens": 64,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def ask(client: httpx.AsyncClient, body: dict[str, Any], seen: Seen, leave: bool) -> None:
    """One streamed request; `leave` hangs up after its first piece."""
    begun, first = time.monotonic(), 0.0
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                await reply.aread()
                seen.ended[str(reply.status_code)] += 1
                return
            last = ""
            async for line in reply.aiter_lines():
                last = line or last
                if not first and '"content": "' in line and '"role"' not in line:
                    first = time.monotonic() - begun
                    seen.first.append(first)
                    if leave:
                        seen.ended["left"] += 1
                        return
                if '"usage": {' in line:  # null but in the last event
                    told = json.loads(line.removeprefix("data: "))
                    seen.tokens += told["usage"]["completion_tokens"]
            seen.ended["whole" if last == "data: [DONE]" else "cut"] += 1
            seen.whole.append(time.monotonic() - begun)
    except httpx.HTTPError as error:
        seen.ended[type(error).__name__] += 1


async def client_loop(url: str, until: float, seed: int, seen: Seen, leave: float = 0.0) -> None:
    chance = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        while time.monotonic() < until:
            await ask(client, question(chance), seen, chance.random() < leave)


async def crowd(url: str, clients: int, seconds: float, leave: float = 0.0) -> Seen:
    seen, until = Seen(), time.monotonic() + seconds
    await asyncio.gather(*(client_loop(url, until, n, seen, leave) for n in range(clients)))
    return seen


async def burst(url: str, count: int) -> Seen:
    """So many requests at once, each of several long samples."""
    seen, chance = Seen(), random.Random(0)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        bodies = [{**question(chance), "n": 4} for _ in range(count)]
        await asyncio.gather(*(ask(client, body, seen, False) for body in bodies))
    return seen


async def garbage(url: str, count: int) -> Counter[str]:
    chance, found = random.Random(0), Counter()
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for _ in range(count):
            good = json.dumps(question(chance)).encode()
            cut = bytearray(good[: chance.randrange(len(good))])
            for _ in range(chance.randrange(4)):
                if cut:
                    cut[chance.randrange(len(cut))] = chance.randrange(256)
            headers = {"Content-Type": "application/json"}
            reply = await client.post("/v1/chat/completions", content=bytes(cut), headers=headers)
            found[str(reply.status_code)] += 1
    return found


def resident(pid: int) -> float:
    """MB of the server's memory."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--warm", type=float, default=20, help="seconds before and of hanging up")
    parser.add_argument("--garbage", type=int, default=2000, help="malformed bodies")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--queue", type=int, default=256)


def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = str(tiny_model(Path(folder))) if options.smoke else options.model
        if model is None:
            skip("give a model with a chat template")
        limits = ["--batch", str(options.batch), "--queue", str(options.queue)]
        words = [sys.executable, "-m", "tessera", "serve", model, "--port", "0", *limits]
        server = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        try:
            loaded(server, options)
        finally:
            server.kill()
            server.wait()


def loaded(server: subprocess.Popen[str], options: argparse.Namespace) -> None:
    assert server.stderr is not None
    url = server.stderr.readline().split()[-1].removesuffix("/v1")
    rows: dict[str, Any] = {}
    asyncio.run(crowd(url, options.clients, options.warm))
    before = resident(server.pid)
    seen = asyncio.run(crowd(url, options.clients, 60 * options.minutes))
    rows["requests, how they ended"] = dict(seen.ended)
    rows["tokens a second"] = f"{seen.tokens / (60 * options.minutes):,.0f}"
    for name, values in (("first token", seen.first), ("whole reply", seen.whole)):
        told = [f"{1000 * percentile(values, s):,.0f}" for s in (0.5, 0.99)]
        rows[f"{name}, ms: p50, p99"] = ", ".join(told)
    rows["memory, MB: before, after"] = f"{before:.0f}, {resident(server.pid):.0f}"
    left = asyncio.run(crowd(url, options.clients, options.warm, leave=0.5))
    rows["half of the clients hang up midway"] = dict(left.ended)
    rows[f"{options.garbage:,} bodies of garbage"] = dict(
        asyncio.run(garbage(url, options.garbage))
    )
    over = asyncio.run(burst(url, 10 * (options.queue + options.batch) // 4))
    rows["ten times what the queue holds, at once"] = dict(over.ended)
    after = asyncio.run(crowd(url, 8, 5))
    rows["and afterwards, eight clients"] = dict(after.ended)
    rows["memory at the end, MB"] = f"{resident(server.pid):.0f}"
    rows["first token afterwards, ms"] = f"{1000 * statistics.median(after.first):,.0f}"
    rows["SIGTERM"] = drained(server, url)
    table(
        [{"": name, "measured": value} for name, value in rows.items()],
        f"{options.clients} clients, {options.minutes:g} minutes, batch {options.batch}, "
        f"queue {options.queue}",
    )


def drained(server: subprocess.Popen[str], url: str) -> str:
    """A signal while clients are being answered: how theirs ended, and the exit code."""

    async def under_way() -> Seen:
        seen = Seen()
        loops = [client_loop(url, time.monotonic() + 1, n, seen) for n in range(8)]
        task = asyncio.gather(*loops)
        await asyncio.sleep(0.5)
        server.send_signal(signal.SIGTERM)
        await task
        return seen

    seen = asyncio.run(under_way())
    return f"{dict(seen.ended)}, exit code {server.wait(60)}"


if __name__ == "__main__":
    toy = {"clients": 4, "minutes": 0.05, "warm": 2, "garbage": 50, "batch": 4, "queue": 8}
    harness.main(__doc__, Command(run, arguments, toy))
