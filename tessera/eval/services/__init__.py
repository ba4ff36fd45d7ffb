"""The services that BFCL's multi-turn sets simulate, by the names that the sets give them.

Written from the functions' descriptions, the items' configurations and their answers; no code of
BFCL's is here. A new service is a file of this folder and a line here.
"""

from __future__ import annotations

from tessera.eval.services.base import Service, Services
from tessera.eval.services.files import Files
from tessera.eval.services.maths import Maths
from tessera.eval.services.messages import Messages
from tessera.eval.services.posts import Posts
from tessera.eval.services.tickets import Tickets
from tessera.eval.services.trading import Trading
from tessera.eval.services.travel import Travel
from tessera.eval.services.vehicle import Vehicle

SERVICES: dict[str, type[Service]] = {
    "GorillaFileSystem": Files,
    "MathAPI": Maths,
    "MessageAPI": Messages,
    "TwitterAPI": Posts,
    "TicketAPI": Tickets,
    "TradingBot": Trading,
    "TravelAPI": Travel,
    "VehicleControlAPI": Vehicle,
}
__all__ = ["SERVICES", "Service", "Services"]
