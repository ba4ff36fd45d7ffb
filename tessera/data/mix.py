"""Whose row is the next: rows of several sources interleaved evenly, in closed form.

With shares p_1 … p_K of the rows, the first i rows hold

    n_1 = ⌊i·q_1 + ½⌋,  n_2 = ⌊(i - n_1)·q_2 + ½⌋,  …,  the last source has the rest,
    q_k = p_k / (p_k + … + p_K)

of each. Every row raises exactly one n_k by one, and n_k stays within about a row of i·p_k: the mix
holds in every step and not just on average, and row i is known without those before it. Shares are
integers over 2³², so that no rounding of a machine decides whose row it is.
"""

from __future__ import annotations

from collections.abc import Sequence

ONE = 1 << 32


class Interleaving:
    """Rows of several sources as one endless list; shares: (K,), above 0, only ratios count."""

    def __init__(self, shares: Sequence[float]) -> None:
        self.factors = [round(ONE * share / sum(shares[k:])) for k, share in enumerate(shares[:-1])]

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` rows each source gives."""
        taken, left = [], rows
        for factor in self.factors:
            taken.append((left * factor + ONE // 2) // ONE)
            left -= taken[-1]
        return [*taken, left]

    def row(self, index: int) -> tuple[int, int]:
        """Which source gives row `index`, and the number of that row among its own."""
        before, after = self.counts(index), self.counts(index + 1)
        source = next(k for k, (a, b) in enumerate(zip(before, after, strict=True)) if b > a)
        return source, before[source]
