"""The airports and what a flight between two costs in economy class: BFCL's figures.

Most fares are a rule: from a place to the towns in their order, ten dollars more with each.
"""

from __future__ import annotations

AIRPORTS = {
    "Rivermist": "RMS",
    "Stonebrook": "SBK",
    "Maplecrest": "MPC",
    "Silverpine": "SVP",
    "Shadowridge": "SHD",
    "Sunset Valley": "SSV",
    "Oakendale": "OKD",
    "Willowbend": "WLB",
    "Crescent Hollow": "CRH",
    "Autumnville": "ATV",
    "Pinehaven": "PHV",
    "Greenfield": "GFD",
    "San Francisco": "SFO",
    "Los Angeles": "LAX",
    "New York": "JFK",
    "Chicago": "ORD",
    "Boston": "BOS",
    "London": "LHR",
    "Paris": "CDG",
    "Rome": "CIA",
    "Beijing": "PEK",
    "Shanghai": "PVG",
    "Hong Kong": "HKG",
    "Tokyo": "HND",
}
TOWNS = tuple(AIRPORTS.values())[:12]
STEP = 10
# From a city to the first of the towns, and from a town to the one that follows it.
TO_FIRST = {"LAX": 310, "JFK": 450, "ORD": 350, "BOS": 400}
TO_NEXT = dict(zip(TOWNS, (220, 200, 210, 230, 220, 240, 230, 250, 240, 230, 220), strict=False))
APART = {
    "SFO": "LAX 200 JFK 500 ORD 400 BOS 450 CIA 700 RMS 300 SBK 350 MPC 370 SVP 320 SHD 330 "
    "SSV 340 OKD 360 WLB 310 CRH 380 ATV 390 PHV 420 GFD 430",
    "LAX": "SFO 100 JFK 600 ORD 500 BOS 550 HND 430",
    "JFK": "ORD 300 BOS 250 LAX 570 HND 800 PVG 950 PEK 1000",
    "ORD": "LAX 180 BOS 200",
    "RMS": "BOS 200 JFK 210 LAX 330",
    "CRH": "SFO 270 RMS 280 HKG 290 JFK 300",
    "OKD": "LAX 220",
    "LHR": "CDG 100",
}


def base_fare(here: str, there: str) -> int | None:
    """Dollars between two codes; None where nothing flies. The way back has a fare of its own."""
    words = APART.get(here, "").split()
    apart = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    if there in apart:
        return apart[there]
    if there not in TOWNS:
        return None
    place = TOWNS.index(there)
    if here in TO_FIRST:
        return TO_FIRST[here] + STEP * place
    steps = place - TOWNS.index(here) - 1 if here in TO_NEXT else -1
    return TO_NEXT[here] + STEP * steps if steps >= 0 else None
