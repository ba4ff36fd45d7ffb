"""Memory and time of attention over long rows, beside SDPA with one mask of the whole row.

    python benchmarks/attention.py [--tokens 4096 8192 16384]

Forward and backward of one layer's attention, 8 heads and 2 KV heads of size 64, a row, in fresh
processes: in float32 on a CPU, in bfloat16 on a GPU. Rows: one document; four; one under a window
of 1,024 tokens; a prompt of a quarter and three answers. Memory is the peak less the inputs';
seconds are the CPU's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import harness
import torch
import torch.nn.functional as F
from harness import Command, Figures, fresh, memory_mb, table
from torch import Tensor

from tessera import dist
from tessera.model.attention import attend
from tessera.model.context import Context

CASES = ("causal", "packed", "window", "prefix")
HEADS, KV_HEADS, DIM, WINDOW = 8, 2, 64, 1024


def context(case: str, tokens: int) -> Context:
    order = torch.arange(tokens, device=dist.device())[None]
    quarter = tokens // 4
    if case == "packed":
        return Context(order % quarter, order // quarter)
    if case == "prefix":
        number = order // quarter
        positions = order % quarter + quarter * (number > 0)
        return Context(positions, number, prefix=(number > 0).long() - 1)
    return Context(order, sliding_window=WINDOW if case == "window" else None)


def one_mask(q: Tensor, k: Tensor, v: Tensor, where: Context) -> Tensor:
    """SDPA with a mask of `(T, T)`."""
    order = torch.arange(q.shape[1], device=q.device)
    seen = order[:, None] >= order
    if where.sliding_window is not None:
        seen &= order[:, None] - order < where.sliding_window
    if where.segments is not None:
        mine, theirs = where.segments[0, :, None], where.segments[0]
        other = (
            torch.zeros_like(seen) if where.prefix is None else where.prefix[0, :, None] == theirs
        )
        seen &= (mine == theirs) | other
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def measured(case: str, way: str, tokens: int) -> Figures:
    """The MiB and seconds of one way."""
    device = dist.device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    heads = (HEADS, KV_HEADS, KV_HEADS)
    inputs = [torch.randn(1, tokens, h, DIM, device=device, dtype=dtype) for h in heads]
    slope = torch.randn_like(inputs[0])
    where = context(case, tokens)
    function: Callable[..., Tensor] = attend if way == "tessera" else one_mask
    small = [x[:, :64].clone().requires_grad_() for x in inputs]  # loads what a first call loads
    function(*small, context(case, 64)).sum().backward()
    inputs = [x.requires_grad_() for x in inputs]
    if device.type == "cpu":
        before = memory_mb("VmRSS")
    else:
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated() / 2**20
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    begun = clock()
    function(*inputs, where).backward(slope)
    assert inputs[0].grad is not None
    inputs[0].grad.sum().item()
    seconds = clock() - begun
    most = memory_mb() if device.type == "cpu" else torch.accelerator.max_memory_allocated() / 2**20
    return {"mib": most - before, "seconds": seconds}


def row(case: str, tokens: int) -> Figures:
    words = ["--tokens", str(tokens), "--case", case]
    mask, own = (fresh(__file__, [*words, "--side", way]) for way in ("mask", "tessera"))
    return {
        "": case,
        "tokens": tokens,
        "one mask, MiB": f"{mask['mib']:,.0f}",
        "tessera, MiB": f"{own['mib']:,.0f}",
        "one mask, s": f"{mask['seconds']:.2f}",
        "tessera, s": f"{own['seconds']:.2f}",
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 8192, 16384])
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("mask", "tessera"), help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> None:
    if options.side:
        print(json.dumps(measured(options.case, options.side, options.tokens[0])))
        return
    table([row(case, tokens) for case in CASES for tokens in options.tokens])


if __name__ == "__main__":
    harness.main(__doc__, Command(run, arguments, {"tokens": [256]}))
