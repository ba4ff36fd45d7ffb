"""Tightening in one step is the plain search; scores that follow find what sums do not see."""

from __future__ import annotations

from tessera.puzzle.cost_table import Costs, CostTable, Scenario
from tessera.puzzle.search import SearchConfig, polish, tighten
from tessera.puzzle.space import Space
from tests.searching import priced, search
from tests.toy import toy_config

LAYERS = 4
PARENT = toy_config(layers=LAYERS)
SPACE = Space(((("gqa-4",), ("swiglu-48", "noop")),) * LAYERS)
CONFIG = SearchConfig(constraints={"parameters": 2.5})
HARM = (0.2, 0.21, 0.3, 0.9)  # of each FFN's removal alone


def _costs() -> Costs:
    counts = {
        ("base", ""): 0,
        ("attention", "gqa-4"): 0,
        ("ffn", "swiglu-48"): 1,
        ("ffn", "noop"): 0,
    }
    rows = [
        {"kind": k, "word": w, "parameters": n, "bytes": n, "kv_bytes_per_token": 0}
        for (k, w), n in counts.items()
    ]
    return priced(CostTable.from_rows(rows, Scenario()))


def _kl(words) -> float:
    """FFNs 0 and 1 do the same work: either may go, both may not."""
    gone = [ffn == "noop" for _, ffn in words]
    return sum(h for h, g in zip(HARM, gone, strict=True) if g) + 5.0 * (gone[0] and gone[1])


def _rescore(words) -> list[dict]:
    rows = []
    for layer in range(LAYERS):
        for word in SPACE.words(layer, "ffn"):
            swapped = [*words[:layer], ("gqa-4", word), *words[layer + 1 :]]
            change = _kl(swapped) - _kl(words)
            rows.append({"layer": layer, "kind": "ffn", "word": word, "kl": change})
    return rows


def _solve_at(rows, share: float):
    return search(CONFIG, PARENT, SPACE, rows, _costs(), share)[0].words


def test_one_round_is_the_plain_search():
    plain = search(CONFIG, PARENT, SPACE, _rescore(PARENT.words), _costs())[0].words
    assert tighten(1, _rescore(PARENT.words), _solve_at, _rescore) == [plain]


def test_scores_that_follow_see_what_blocks_do_together():
    first, last = tighten(2, _rescore(PARENT.words), _solve_at, _rescore)
    plain = _solve_at(_rescore(PARENT.words), 1.0)
    assert [ffn for _, ffn in plain].count("noop") == [ffn for _, ffn in last].count("noop") == 2
    assert [ffn for _, ffn in first].count("noop") == 1
    assert _kl(plain) == 0.41 + 5.0
    assert _kl(last) == 0.5  # the least that two removals can do


def test_polishing_finds_what_sums_chose_wrongly_and_never_does_harm():
    def solve_near(rows, words, changes: int):
        return search(CONFIG, PARENT, SPACE, rows, _costs(), near=(list(words), changes))[0].words

    def measure(words):
        return _kl(words), _rescore(words)

    plain = _solve_at(_rescore(PARENT.words), 1.0)
    assert _kl(polish(0, plain, 2, solve_near, measure)) == _kl(plain) == 5.41
    assert _kl(polish(1, plain, 2, solve_near, measure)) == 0.5
    assert _kl(polish(9, plain, 4, solve_near, measure)) == 0.5


def test_near_an_architecture_no_more_places_change_than_are_allowed():
    words = [("gqa-4", "noop"), ("gqa-4", "noop"), ("gqa-4", "swiglu-48"), ("gqa-4", "swiglu-48")]
    rows = _rescore(PARENT.words)
    for changes in range(5):
        found = search(CONFIG, PARENT, SPACE, rows, _costs(), near=(words, changes))[0].words
        assert sum(a != b for a, b in zip(found, words, strict=True)) <= changes
    assert search(CONFIG, PARENT, SPACE, rows, _costs(), near=(words, 0))[0].words == words
