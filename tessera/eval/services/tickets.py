"""Support tickets: created by who is logged in, numbered upwards, edited, resolved and closed.

An item may begin with tickets whose id is a text, or that lack fields, even an id.
"""

from __future__ import annotations

from typing import Any

from tessera.eval.services.base import Refused, Service, offered

FIELDS = {"title": str, "description": str, "status": str, "priority": int}


class Tickets(Service):
    defaults = {"ticket_queue": [], "ticket_counter": 1, "current_user": None}

    def _user(self) -> str:
        if not self.data["current_user"]:
            raise Refused("nobody is logged in")
        return self.data["current_user"]

    def _ticket(self, ticket_id: int | str) -> dict[str, Any]:
        for ticket in self.data["ticket_queue"]:
            if str(ticket.get("id")) == str(ticket_id):
                return ticket
        raise Refused(f"there is no ticket {ticket_id}")

    @offered
    def ticket_login(self, username: str, password: str) -> Any:
        """No passwords are kept: whoever gives a name and one is in."""
        if not username or not password:
            raise Refused("a name and a password are needed")
        self.data["current_user"] = username
        return {"success": True}

    @offered
    def logout(self) -> Any:
        was = bool(self.data["current_user"])
        self.data["current_user"] = None
        return {"success": was}

    @offered
    def ticket_get_login_status(self) -> Any:
        return {"login_status": bool(self.data["current_user"])}

    @offered
    def create_ticket(self, title: str, description: str = "", priority: int = 1) -> Any:
        user = self._user()
        ticket = {
            "id": self.data["ticket_counter"],
            "title": title,
            "description": description,
            "status": "Open",
            "priority": _priority(priority),
            "created_by": user,
        }
        self.data["ticket_queue"].append(ticket)
        self.data["ticket_counter"] += 1
        return ticket

    @offered
    def get_ticket(self, ticket_id: int | str) -> Any:
        return self._ticket(ticket_id)

    @offered
    def edit_ticket(self, ticket_id: int | str, updates: dict[str, Any]) -> Any:
        ticket = self._ticket(ticket_id)
        for key, value in updates.items():
            if key not in FIELDS:
                raise Refused(
                    f"of a ticket one may change {', '.join(FIELDS)}, and no {key[:80]!r}"
                )
            if type(value) is not FIELDS[key]:
                raise Refused(f"{key} cannot be of type {type(value).__name__}")
        if "priority" in updates:
            _priority(updates["priority"])
        ticket.update(updates)
        return {"status": f"ticket {ticket_id} was changed"}

    @offered
    def resolve_ticket(self, ticket_id: int | str, resolution: str) -> Any:
        ticket = self._ticket(ticket_id)
        if ticket.get("status") == "Resolved":
            raise Refused(f"ticket {ticket_id} is resolved already")
        ticket.update(status="Resolved", resolution=resolution)
        return {"status": f"ticket {ticket_id} was resolved"}

    @offered
    def close_ticket(self, ticket_id: int | str) -> Any:
        ticket = self._ticket(ticket_id)
        if ticket.get("status") == "Closed":
            raise Refused(f"ticket {ticket_id} is closed already")
        ticket["status"] = "Closed"
        return {"status": f"ticket {ticket_id} was closed"}

    @offered
    def get_user_tickets(self, status: str | None = None) -> Any:
        user = self._user()
        own = [one for one in self.data["ticket_queue"] if one.get("created_by") == user]
        wanted = status.lower() if status else None
        return [one for one in own if wanted in (None, str(one.get("status")).lower())]


def _priority(value: int) -> int:
    if not 1 <= value <= 5:
        raise Refused("priority goes from 1 to 5")
    return value
