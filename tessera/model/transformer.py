"""The one model: parent, child, teacher, policy and reference are all this class.

`forward` returns hidden states and `logits(hidden)` is separate, so that losses can run the
head in chunks of tokens and never hold `(B, T, V)`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from tessera.model.config import BlockConfig, ModelConfig, NoOp
from tessera.model.context import Context
from tessera.model.cpu import linear
from tessera.model.layers import RMSNorm, Subblock, rope_frequencies
from tessera.model.sequence import all_tokens, own_tokens

if TYPE_CHECKING:
    from tessera.model.pipelining import Stage

Checkpointing = bool | Literal["selective"]

_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.mkldnn._linear_pointwise)


def _selective() -> tuple[AbstractContextManager, AbstractContextManager]:
    """A checkpoint that keeps what attention and every second product gave."""
    products = itertools.count()

    def policy(_: object, operation: torch._ops.OpOverload, *args: Any, **kw: Any) -> Any:
        if getattr(operation, "overloadpacket", None) in _PRODUCTS:
            kept = next(products) % 2 == 1  # of q k v o gate up down: k o up
        else:
            kept = any(word in str(operation) for word in ("attention", "attn"))
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Block(nn.Module):
    """One layer: two subblocks, each adding its delta to the residual stream.

    gradient_checkpointing: keep the input alone, or besides it what is slow to make again, and run
    again in the backward pass.
    """

    gradient_checkpointing: Checkpointing = False

    def __init__(self, config: ModelConfig, block: BlockConfig) -> None:
        super().__init__()
        self.attention = Subblock(config, block.attention)
        self.ffn = Subblock(config, block.ffn)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            kept = _selective if self.gradient_checkpointing == "selective" else noop_context_fn
            return checkpoint(self._run, x, context, use_reentrant=False, context_fn=kept)  # type: ignore[return-value]
        return self._run(x, context)

    def _run(self, x: Tensor, context: Context) -> Tensor:
        if not isinstance(self.attention.variant, NoOp):  # adding 0.0 would copy the stream
            x = x + self.attention(x, context)
        if not isinstance(self.ffn.variant, NoOp):
            x = x + self.ffn(x, context)
        return x

    @property
    def config(self) -> BlockConfig:
        return BlockConfig(self.attention.variant, self.ffn.variant)  # type: ignore[arg-type]


class Transformer(nn.Module):
    """A decoder of the Llama class whose blocks may all differ.

    h = embed(tokens);  h += attention(h);  h += ffn(h)  for every block;  norm(h)

    tokens_mesh: of the processes that hold the residual stream together, some tokens each. stage:
    which layers are here, of a pipeline; incoming: what the stage before made of the tokens.
    """

    tokens_mesh: DeviceMesh | None = None
    stage: Stage | None = None
    incoming: Tensor | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, block) for block in config.blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._frequencies: Tensor | None = None

    @property
    def blocks(self) -> list[Block]:
        """The layers, with their type."""
        return [block for block in self.layers if isinstance(block, Block)]

    @property
    def device(self) -> torch.device:
        """Where it computes; parameters that are spread may wait elsewhere."""
        weight = next(self.parameters())
        spread = isinstance(weight, DTensor)
        return torch.device(weight.device_mesh.device_type) if spread else weight.device

    @property
    def head(self) -> Tensor:
        """The output matrix `(V, C)`: the embedding itself when tied."""
        tied = self.config.tie_word_embeddings
        return self.embed_tokens.weight if tied else self.lm_head.weight

    def prepare(self, context: Context) -> Context:
        """The context with what this model adds to it: rotary frequencies, sliding window."""
        frequencies = self.inverse_frequencies(context.positions.device)
        known = context.inverse_frequencies
        assert known is None or torch.equal(known, frequencies), "a context of another model"
        context.inverse_frequencies = frequencies
        context.sliding_window = self.config.sliding_window
        return context

    def inverse_frequencies(self, device: torch.device) -> Tensor:
        """RoPE's `(D/2,)`, always float32: no buffer, so that `.to(bfloat16)` cannot round it."""
        if self._frequencies is None or self._frequencies.device != device:
            self._frequencies = rope_frequencies(self.config).to(device)
        return self._frequencies

    def forward(
        self, tokens: Tensor, context: Context | None = None, *, output_hidden_states: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Final, normalised hidden states `(B,T,C)` of tokens `(B,T)`.

        output_hidden_states: those, and the whole residual stream as `hidden_states` gives it.
        A module whose parameters are sharded is to be called, so that they are gathered: its
        `head` holds afterwards until the backward pass is over.
        """
        states, length = self.hidden_states(tokens, context), tokens.shape[1]
        if output_hidden_states:
            kept = list(states)
            return self._output(kept[-1], length), [self._whole(x, length) for x in kept]
        *_, last = states
        return self._output(last, length)

    def hidden_states(self, tokens: Tensor, context: Context | None = None) -> Iterator[Tensor]:
        """The residual stream entering layer 0, 1, …, L-1, and leaving the last: `(B,T,C)`, or this
        process's tokens of it."""
        context = self.prepare(Context.rows(tokens) if context is None else context)
        x = self.embed_tokens(tokens) if self.incoming is None else self.incoming
        if self.tokens_mesh is not None and self.incoming is None:
            x = own_tokens(x, self.tokens_mesh)
        yield x
        for block in self.blocks:
            x = block(x, context)
            yield x

    def _output(self, last: Tensor, length: int) -> Tensor:
        """Normalised, of all tokens; of a pipeline's earlier stage what goes to the next."""
        if self.stage is not None and not self.stage.last:
            return last
        return self._whole(self.norm(last), length)

    def _whole(self, x: Tensor, length: int) -> Tensor:
        """The residual stream of all tokens."""
        if self.tokens_mesh is None:
            return x
        x = all_tokens(x, length, self.tokens_mesh).to_local()
        return torch.ops.aten._unsafe_view(x, x.shape)  # FSDP warns of a module that returns a view

    def logits(self, hidden: Tensor) -> Tensor:
        """`(…, V)` of normalised hidden states `(…, C)`."""
        return linear(hidden, self.head)

    def replace(self, layer: int, kind: str, subblock: Subblock) -> Subblock:
        """Put `subblock` in a layer's place, on this model's device and in its precision; returns
        the one that stood there."""
        block = self.blocks[layer]
        old = getattr(block, kind)
        setattr(block, kind, subblock.to(self.head))
        blocks = list(self.config.blocks)
        blocks[layer] = block.config
        self.config = dataclasses.replace(self.config, blocks=tuple(blocks))
        return old

    @torch.no_grad()
    def init_weights(self, seed: int) -> Transformer:
        """Fresh weights for training from scratch: normal, std 1/sqrt(fan_in).

        Matrices that write into the residual stream are scaled by 1/sqrt(2L) (GPT-2); the head is
        small, so the first loss is log V.
        """
        generator = torch.Generator().manual_seed(seed)
        depth = (2 * max(1, len(self.layers))) ** -0.5
        for key, weight in self.named_parameters():
            if weight.ndim < 2:
                weight.fill_(0.0 if key.endswith("bias") else 1.0)
                continue
            std = weight.shape[1] ** -0.5
            if key.endswith(("o_proj.weight", "down_proj.weight")):
                std *= depth
            if key.startswith(("embed_tokens", "lm_head")):
                std = 0.02 if self.config.tie_word_embeddings or key[0] == "l" else 1.0
            weight.normal_(0.0, std, generator=generator)
        return self


def holding(config: ModelConfig, tensor: Callable[[str, torch.Size], Tensor]) -> Transformer:
    """A model of the tensors that are given for its names and shapes; it holds them, not copies."""
    with torch.device("meta"):
        module = Transformer(config)
    found = {key: tensor(key, like.shape) for key, like in module.state_dict().items()}
    module.load_state_dict(found, assign=True)
    return module
