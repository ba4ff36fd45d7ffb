"""BFCL's services: the same calls do the same, and no call a model can write raises."""

from __future__ import annotations

import inspect
import json
import random
from typing import Any

import pytest

from tessera.eval.services import SERVICES
from tessera.eval.services.base import Services
from tessera.eval.services.fares import AIRPORTS, base_fare
from tessera.eval.task import Data
from tessera.eval.tasks.multi_turn import DOCS, every_set
from tessera.eval.tasks.tools import read_calls

TREE = {
    "root": {
        "home": {
            "type": "directory",
            "contents": {
                "docs": {"type": "directory", "contents": {}},
                "a.txt": {"type": "file", "content": "b\na\nb c"},
                ".secret": {"type": "file", "content": ""},
            },
        }
    }
}


def files() -> Any:
    return SERVICES["GorillaFileSystem"](TREE)


def ran(service: Any, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
    return [service.call(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize("name", SERVICES)
def test_the_functions_are_those_that_the_descriptions_name(shared, name: str):
    rows = Data("", str(shared / "data")).rows(f"bfcl/multi_turn_func_doc/{DOCS[name]}.jsonl")
    functions = SERVICES[name]({}).functions
    described = {row["name"]: row["parameters"] for row in rows}
    assert set(described) == set(functions)
    for key, parameters in described.items():
        known = dict(list(inspect.signature(functions[key]).parameters.items())[1:])
        assert list(known) == list(parameters["properties"]), key
        needed = [n for n, one in known.items() if one.default is one.empty]
        assert set(needed) == set(parameters["required"]), key


def test_what_is_wrong_with_a_call_is_its_result_and_changes_nothing():
    service = files()
    before = service.state
    for name, arguments in (
        ("format_disk", {}),
        ("cat", {}),
        ("cat", {"file_name": "a.txt", "lines": 3}),
        ("cat", {"file_name": 3}),
        ("cat", {"file_name": "nothing"}),
        ("tail", {"file_name": "a.txt", "lines": True}),
        ("tail", {"file_name": "a.txt", "lines": 1.5}),
        ("tail", {"file_name": "a.txt", "lines": 10**400}),
        ("ls", {"a": "yes"}),
        ("cd", {"folder": "docs/.."}),
        ("mkdir", {"dir_name": "docs"}),
        ("cp", {"source": "docs", "destination": "docs"}),
        ("rmdir", {"dir_name": "a.txt"}),
    ):
        assert list(service.call(name, arguments)) == ["error"], name
    assert service.state == before == files().state


def test_a_null_and_the_text_none_leave_an_argument_out_and_whole_floats_are_whole():
    service = files()
    assert service.call("echo", {"content": "x", "file_name": "None"})["terminal_output"] == "x"
    assert service.call("echo", {"content": "x", "file_name": None})["terminal_output"] == "x"
    assert service.call("tail", {"file_name": "a.txt", "lines": 1.0}) == {"last_lines": "b c"}


def test_where_one_stands_is_no_part_of_the_state_and_what_one_does_there_is():
    one, other = files(), files()
    ran(one, ("cd", {"folder": "docs"}))
    assert one.state == other.state
    ran(one, ("touch", {"file_name": "x"}))
    assert one.state != other.state
    ran(other, ("touch", {"file_name": "x"}), ("mv", {"source": "x", "destination": "docs"}))
    assert one.state == other.state


def test_a_copy_is_its_own_and_moving_back_undoes_a_move():
    service = files()
    ran(service, ("cp", {"source": "a.txt", "destination": "b.txt"}))
    ran(service, ("echo", {"content": "new", "file_name": "a.txt"}))
    assert service.call("cat", {"file_name": "b.txt"}) == {"file_content": "b\na\nb c"}
    there, back = {"source": "b.txt", "destination": "c"}, {"source": "c", "destination": "b.txt"}
    before = json.dumps(service.state, sort_keys=True)
    ran(service, ("mv", there), ("mv", back))
    assert json.dumps(service.state, sort_keys=True) == before
    assert service.call("sort", {"file_name": "b.txt"}) == {"sorted_content": "a\nb\nb c"}
    assert service.call("diff", {"file_name1": "b.txt", "file_name2": "b.txt"}) == {
        "diff_lines": ""
    }


def test_a_tree_can_neither_double_nor_nest_without_end():
    service = files()
    for number in range(60):
        ran(service, ("cp", {"source": "docs", "destination": f"d{number}"}))
        ran(service, ("mv", {"source": f"d{number}", "destination": "docs"}))
    assert "error" in service.call("cp", {"source": "docs", "destination": "more"})
    service = files()
    found = []
    for _ in range(2000):
        found += ran(service, ("mkdir", {"dir_name": "d"}), ("cd", {"folder": "d"}))
    assert "error" in found[-1] and json.dumps(service.state)


def test_a_result_stays_what_it_was_when_the_state_goes_on():
    service = SERVICES["TicketAPI"]({"current_user": "me"})
    first = service.call("create_ticket", {"title": "t"})
    service.call("resolve_ticket", {"ticket_id": first["id"], "resolution": "done"})
    assert first["status"] == "Open"
    assert service.call("get_ticket", {"ticket_id": first["id"]})["status"] == "Resolved"


def test_a_cancelled_booking_leaves_the_card_as_it_was():
    cards = {"c": {"balance": 5000.0}}
    service = SERVICES["TravelAPI"]({"credit_card_list": cards, "access_token": "t"})
    flight = {"travel_from": "SFO", "travel_to": "LAX", "travel_class": "first"}
    day = {"travel_date": "2026-11-15", **flight}
    (cost,) = service.call("get_flight_cost", day)["travel_cost_list"]
    booked = service.call("book_flight", {"access_token": "t", "card_id": "c", **day})
    assert service.state["credit_card_list"]["c"]["balance"] == 5000.0 - cost
    service.call("cancel_booking", {"access_token": "t", "booking_id": booked["booking_id"]})
    assert service.state == SERVICES["TravelAPI"](service.state | {"booking_record": {}}).state
    assert service.state["credit_card_list"] == cards
    assert "error" in service.call("cancel_booking", {"access_token": "u", "booking_id": "1"})


def test_ids_are_those_that_the_data_name():
    messages = SERVICES["MessageAPI"]({"current_user": "USR001"})
    sent = messages.call("send_message", {"receiver_id": "USR003", "message": "hello"})
    assert sent["message_id"] == 67410
    travel = SERVICES["TravelAPI"]({})
    names = ("client_id", "client_secret", "refresh_token", "user_first_name", "user_last_name")
    login = {**dict.fromkeys(names, "x"), "grant_type": "read"}
    assert travel.call("authenticate_travel", login)["access_token"] == "251675"


def test_money_changed_there_and_back_is_the_same_money():
    service = SERVICES["TravelAPI"]({})
    for currency in ("RMB", "EUR", "GBP", "JPY"):
        pair = {"base_currency": "USD", "target_currency": currency}
        there = service.call("compute_exchange_rate", {**pair, "value": 120.0})
        back = {"base_currency": currency, "target_currency": "USD"}
        value = there["exchanged_value"]
        again = service.call("compute_exchange_rate", {**back, "value": value})
        assert again == {"exchanged_value": 120.0}


def test_every_town_is_flown_to_from_the_coast_and_no_place_to_itself():
    codes = list(AIRPORTS.values())
    assert all(base_fare(here, here) is None for here in codes)
    assert all(base_fare(here, town) for here in ("SFO", "LAX", "JFK") for town in codes[:12])
    assert base_fare("GFD", "RMS") is None


GARBAGE: list[Any] = [
    *(None, True, False, 0, -1, 1, 3.0, 0.5, 1e308, -1e308, 10**400, float("nan"), float("inf")),
    *("", ".", "..", "/", "a/b", "None", "\ud800", "x" * 999, "12446", "2026-02-30", "2026-10-06"),
    *([], [1], ["x"], [[]], [None], {}, {"status": 3}, {"priority": 9}, {"title": "t"}, {"a": {}}),
    *("USR001", "USD", "SFO", "LAX", "economy", "START", "engage", "AAPL", "fuel", "driver"),
]


def _strange(draw: random.Random, names: list[str]) -> dict[str, Any]:
    names = [name for name in names if draw.random() < 0.9]
    return {name: draw.choice(GARBAGE) for name in (*names, *["odd"] * (draw.random() < 0.05))}


def test_no_arguments_raise_and_every_result_can_be_said(shared):
    draw = random.Random(0)
    for item in every_set(Data("", str(shared / "data"))):
        configs = item.fields["services"]
        services = Services({name: SERVICES[name] for name in configs}, configs)
        functions = {k: v for part in services.parts.values() for k, v in part.functions.items()}
        known = [call for calls in item.fields["calls"] for call in calls]
        for _ in range(60):
            name = draw.choice(list(functions))
            arguments = _strange(draw, list(inspect.signature(functions[name]).parameters)[1:])
            json.dumps(services.call(name, arguments))
            name, true = draw.choice(known)  # so that what comes after begins from other states
            some = {key: one for key, one in true.items() if draw.random() < 0.8}
            json.dumps(services.call(name, true | _strange(draw, list(set(true) - set(some)))))
        json.dumps(services.state)


def test_no_answer_raises_when_its_calls_are_read():
    for text in (
        "[" * 100_000,
        "<TOOLCALL>" + '{"a":' * 100_000,
        "<TOOLCALL>[{}]</TOOLCALL>",
        '<TOOLCALL>[{"name": "f", "arguments": [1]}]</TOOLCALL>',
        '<TOOLCALL>[{"name": "f", "arguments": "x"}]</TOOLCALL>',
        "[f(*a)]",
        "[f(a=0x" + "f" * 9999 + ")]",
    ):
        for name, arguments in read_calls(text) or []:
            files().call(name, arguments)
    assert "error" in files().call("tail", {"file_name": "a.txt", "lines": 16**9999})
