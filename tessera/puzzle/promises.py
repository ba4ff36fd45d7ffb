"""What a search promises of an architecture, as a row of `architectures.json` and as a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tessera.puzzle.cost_table import Words
from tessera.puzzle.program import Solution
from tessera.puzzle.sweep import Found

_TOLD = ("throughput", "parameters", "bytes")
_PROVED = 1e-6


def promised(method: str, found: Found, parent: Words, swept: bool) -> dict[str, Any]:
    """A row: words, and every cost column of the architecture and of the parent.

    The scenario that weighs most stands for all of them. swept: whether there were batches to
    choose from, so that child and parent may be served at different ones; then, and where there
    are several, `scenarios` has the same numbers of each.
    """
    case = found.case
    served = {
        name: {
            "predicted": table.total(found.words),
            "parent": (case.reference[name] or table).total(parent),
            "scenario": table.scenario.model_dump(),
            "parent_batch": (case.reference[name] or table).scenario.batch,
        }
        for name, table in case.tables.items()
    }
    first = served[max(case.weights, key=case.weights.__getitem__)]
    solution = found.solution
    row = {
        "method": method,
        "words": found.words,
        "predicted": first["predicted"],
        **({"score": solution.score, "gap": solution.gap} if solution else {}),
        "meets": found.meets,
        "parent": first["parent"],
        "scenario": first["scenario"],
    }
    return row | ({"scenarios": served} if swept or len(served) > 1 else {})


def told(row: Mapping[str, Any], found: Found) -> str:
    """`1.29x throughput, 0.94x parameters promised; score 0.3189; optimal, proved: gap 0; 1 s`."""
    served = row.get("scenarios", {"": row})
    parts = []
    for name, one in served.items():
        own, parent = one["predicted"], one["parent"]
        shares = ", ".join(f"{own[k] / parent[k]:.2f}x {k}" for k in _TOLD if parent.get(k))
        parts.append(f"{name}: {shares}" if len(served) > 1 else shares)
    line = f"{'; '.join(parts)} promised"
    if "scenarios" in row:
        parents = (f"{name} {one['parent_batch']}".strip() for name, one in served.items())
        line += f", at {found.case} (the parent's: {', '.join(parents)})"
    if not found.meets:
        line += "; it does NOT meet the constraints, and is the nearest there is"
    return line + (f"; {proof(found.solution)}" if found.solution else "")


def proof(solution: Solution) -> str:
    """`score 0.3189; optimal, proved: gap 0; 0.02 s`, or how far from proved it is."""
    score = f"score {solution.score:.4f}"
    if solution.gap < _PROVED:
        return f"{score}; optimal, proved: gap 0; {solution.seconds:.2f} s"
    return (
        f"{score}; gap {100 * solution.gap:.2g} % after {solution.seconds:.0f} s; "
        "raise search.time_limit to prove more"
    )
