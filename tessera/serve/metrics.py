"""Counters in Prometheus' text format, under vLLM's kind of names."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

from tessera.generate.torch_engine import TorchEngine
from tessera.serve.session import Talk


@dataclass
class Metrics:
    """What was answered since the server began."""

    ended: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, talk: Talk) -> None:
        """Counts a request that has ended, or was left by its client."""
        usage = talk.usage
        with self._lock:
            for stream, completion in zip(talk.streams, talk.handle.completions, strict=True):
                reason = "stop" if stream.stopped else completion.finish_reason
                self.ended[reason if talk.handle.done else "cancelled"] += 1
            self.tokens["prompt"] += usage["prompt_tokens"]
            self.tokens["generation"] += usage["completion_tokens"]
            self.tokens["reasoning"] += usage["completion_tokens_details"]["reasoning_tokens"]

    def text(self, engine: TorchEngine) -> str:
        """All of it, with what the engine does at this moment."""
        with self._lock:
            ended, tokens = dict(self.ended), dict(self.tokens)
        lines = [
            "# HELP tessera_requests_running Samples being decoded.",
            "# TYPE tessera_requests_running gauge",
            f"tessera_requests_running {engine.running}",
            "# HELP tessera_requests_waiting Samples waiting for a place.",
            "# TYPE tessera_requests_waiting gauge",
            f"tessera_requests_waiting {len(engine.waiting)}",
            "# HELP tessera_requests_finished_total Samples that ended, by reason.",
            "# TYPE tessera_requests_finished_total counter",
        ]
        lines += [
            f'tessera_requests_finished_total{{reason="{reason}"}} {count}'
            for reason, count in sorted(ended.items())
        ]
        lines += [
            "# HELP tessera_tokens_total Tokens, by kind.",
            "# TYPE tessera_tokens_total counter",
        ]
        lines += [f'tessera_tokens_total{{kind="{k}"}} {n}' for k, n in sorted(tokens.items())]
        return "\n".join(lines) + "\n"
