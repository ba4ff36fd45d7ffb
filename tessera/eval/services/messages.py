"""Messages between the users of a workspace.

`inbox` holds one row a message, {user id: text}, the latest last: what was sent to whom. An item
may begin with rows in other shapes; they are kept and shown as they are.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from tessera.eval.services.base import Refused, Service, offered

SEED = 200191  # the first five digits drawn are message 67410, which a user asks to delete


class Messages(Service):
    defaults = {
        "user_count": 4,
        "user_map": {"Alice": "USR001", "Bob": "USR002", "Catherine": "USR003", "Daniel": "USR004"},
        "inbox": [],
        "message_count": 0,
        "current_user": None,
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._random = random.Random(SEED)

    def _user(self) -> str:
        if not self.data["current_user"]:
            raise Refused("nobody is logged in")
        return self.data["current_user"]

    def _known(self, user_id: str) -> str:
        if user_id not in self.data["user_map"].values():
            raise Refused(f"there is no user {user_id!r}")
        return user_id

    @offered
    def list_users(self) -> Any:
        return {"user_list": list(self.data["user_map"])}

    @offered
    def get_user_id(self, user: str) -> Any:
        if user not in self.data["user_map"]:
            raise Refused(f"there is no user called {user!r}")
        return {"user_id": self.data["user_map"][user]}

    @offered
    def message_get_login_status(self) -> Any:
        return {"login_status": bool(self.data["current_user"])}

    @offered
    def message_login(self, user_id: str) -> Any:
        self.data["current_user"] = self._known(user_id)
        return {"login_status": True, "message": f"{user_id} is logged in"}

    @offered
    def add_contact(self, user_name: str) -> Any:
        self._user()
        if user_name in self.data["user_map"]:
            raise Refused(f"{user_name!r} is a contact already")
        self.data["user_count"] += 1
        user_id = f"USR{self.data['user_count']:03d}"
        self.data["user_map"][user_name] = user_id
        return {"added_status": True, "user_id": user_id, "message": f"{user_name} was added"}

    @offered
    def send_message(self, receiver_id: str, message: str) -> Any:
        self._user()
        self.data["inbox"].append({self._known(receiver_id): message})
        self.data["message_count"] += 1
        number = self._random.randint(10_000, 99_999)
        return {"sent_status": True, "message_id": number, "message": f"sent to {receiver_id}"}

    @offered
    def delete_message(self, receiver_id: str) -> Any:
        """The latest that went to the receiver goes; the count of what was sent stays."""
        self._user()
        rows = self.data["inbox"]
        for place in range(len(rows) - 1, -1, -1):
            if receiver_id in rows[place]:
                del rows[place]
                said = f"the latest message to {receiver_id} was deleted"
                return {"deleted_status": True, "receiver_id": receiver_id, "message": said}
        raise Refused(f"no message went to {receiver_id!r}")

    @offered
    def view_messages_sent(self) -> Any:
        self._user()
        sent: dict[str, list[str]] = {}
        for user_id, text in self._texts():
            sent.setdefault(user_id, []).append(text)
        return {"messages": sent}

    @offered
    def search_messages(self, keyword: str) -> Any:
        self._user()
        found = [
            {"receiver_id": user_id, "message": text}
            for user_id, text in self._texts()
            if keyword.lower() in text.lower()
        ]
        return {"results": found}

    @offered
    def get_message_stats(self) -> Any:
        self._user()
        people = {user_id for user_id, _ in self._texts()}
        stats = {"received_count": len(self._texts()), "total_contacts": len(people)}
        return {"stats": stats}

    def _texts(self) -> list[tuple[str, str]]:
        """Every message with its receiver, whatever shape its row has."""
        rows = [pair for row in self.data["inbox"] for pair in row.items()]
        return [(user_id, text) for user_id, said in rows for text in _flat(said)]


def _flat(said: Any) -> list[str]:
    if isinstance(said, str):
        return [said]
    parts = said.values() if isinstance(said, Mapping) else said
    return [text for part in parts for text in _flat(part)]
