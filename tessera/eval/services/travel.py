"""Flights, their insurance, cards and a budget.

What an answer can know only by asking must be what the items' own answers presuppose: fares, rates
and the ids of cards and bookings are therefore BFCL's. Ids are drawn from one generator of a fixed
seed, in the order in which things are made.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import date
from typing import Any

from tessera.eval.services.base import Refused, Service, offered
from tessera.eval.services.fares import AIRPORTS, base_fare

SEED = 141053  # the first seven digits drawn are booking 3426812, which the answers name
CLASSES = {"economy": 1, "business": 2, "first": 5}
RATES = {  # of one dollar
    "USD": 1.0,
    "RMB": 7.0,
    "EUR": 0.8,
    "JPY": 110.0,
    "GBP": 0.7,
    "CAD": 1.3,
    "AUD": 1.4,
    "INR": 70.0,
    "RUB": 60.0,
    "BRL": 3.8,
    "MXN": 20.0,
}
TODAY, ADULT = date(2024, 9, 1), 18
INVOICE = ("travel_date", "travel_from", "travel_to", "travel_class", "travel_cost")


class Travel(Service):
    defaults = {
        "credit_card_list": {},
        "booking_record": {},
        "access_token": None,
        "token_type": "Bearer",
        "token_expires_in": 0,
        "token_scope": None,
        "user_first_name": None,
        "user_last_name": None,
        "budget_limit": None,
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._random = random.Random(SEED)

    def _number(self, digits: int) -> str:
        return str(self._random.randint(10 ** (digits - 1), 10**digits - 1))

    def _inside(self, access_token: str) -> None:
        if not self.data["access_token"] or access_token != self.data["access_token"]:
            raise Refused("the access token is not valid")

    def _card(self, card_id: str) -> dict[str, Any]:
        if card_id not in self.data["credit_card_list"]:
            raise Refused(f"there is no card {card_id!r}")
        return self.data["credit_card_list"][card_id]

    def _booking(self, booking_id: str | None) -> dict[str, Any]:
        if booking_id not in self.data["booking_record"]:
            raise Refused(f"there is no booking {booking_id!r}")
        return self.data["booking_record"][booking_id]

    def _pay(self, card_id: str, amount: float) -> None:
        card = self._card(card_id)
        if card.get("balance", 0.0) < amount:
            raise Refused("the card's balance does not suffice")
        card["balance"] -= amount

    @offered
    def authenticate_travel(
        self,
        client_id: str,
        client_secret: str,
        refresh_token: str,
        grant_type: str,
        user_first_name: str,
        user_last_name: str,
    ) -> Any:
        if grant_type not in ("read_write", "read", "write"):
            raise Refused("grant_type is read_write, read or write")
        told = {"expires_in": 3600, "access_token": self._number(6), "token_type": "Bearer"}
        self.data |= {
            "access_token": told["access_token"],
            "token_expires_in": told["expires_in"],
            "token_type": told["token_type"],
            "token_scope": grant_type,
            "user_first_name": user_first_name,
            "user_last_name": user_last_name,
        }
        return {**told, "scope": grant_type}

    @offered
    def travel_get_login_status(self) -> Any:
        return {"status": bool(self.data["access_token"])}

    @offered
    def get_budget_fiscal_year(
        self, lastModifiedAfter: str | None = None, includeRemoved: str | None = None
    ) -> Any:
        return {"budget_fiscal_year": "2018"}

    @offered
    def set_budget_limit(self, access_token: str, budget_limit: float) -> Any:
        self._inside(access_token)
        self.data["budget_limit"] = budget_limit
        return {"budget_limit": budget_limit}

    @offered
    def register_credit_card(
        self,
        access_token: str,
        card_number: str,
        expiration_date: str,
        cardholder_name: str,
        card_verification_number: int,
    ) -> Any:
        self._inside(access_token)
        card_id = self._number(12)
        self.data["credit_card_list"][card_id] = {
            "card_number": card_number,
            "expiration_date": expiration_date,
            "cardholder_name": cardholder_name,
            "card_verification_number": card_verification_number,
            "balance": float(self._number(5)),
        }
        return {"card_id": card_id}

    @offered
    def get_all_credit_cards(self) -> Any:
        return {"credit_card_list": self.data["credit_card_list"]}

    @offered
    def get_credit_card_balance(self, access_token: str, card_id: str) -> Any:
        self._inside(access_token)
        return {"card_balance": self._card(card_id).get("balance", 0.0)}

    @offered
    def list_all_airports(self) -> Any:
        return {"airports": list(AIRPORTS.values())}

    @offered
    def get_nearest_airport_by_city(self, location: str) -> Any:
        if location not in AIRPORTS:
            raise Refused(f"no airport is known near {location!r}")
        return {"nearest_airport": AIRPORTS[location]}

    @offered
    def get_flight_cost(
        self, travel_from: str, travel_to: str, travel_date: str, travel_class: str
    ) -> Any:
        cost = _cost(travel_from, travel_to, travel_date, travel_class)
        return {"travel_cost_list": [cost]}

    @offered
    def compute_exchange_rate(self, base_currency: str, target_currency: str, value: float) -> Any:
        """By way of the dollar; towards it the cents are rounded, as the answers' are."""
        for currency in (base_currency, target_currency):
            if currency not in RATES:
                raise Refused(f"the currency {currency!r} is not known; {', '.join(RATES)} are")
        dollars = value / RATES[base_currency]
        if target_currency == "USD":
            return {"exchanged_value": round(dollars, 2)}
        return {"exchanged_value": dollars * RATES[target_currency]}

    @offered
    def book_flight(
        self,
        access_token: str,
        card_id: str,
        travel_date: str,
        travel_from: str,
        travel_to: str,
        travel_class: str,
    ) -> Any:
        """A budget is money set aside: a card that holds less of it than that pays for nothing."""
        self._inside(access_token)
        cost = _cost(travel_from, travel_to, travel_date, travel_class)
        limit = self.data["budget_limit"]
        if limit is not None and self._card(card_id).get("balance", 0.0) < limit:
            raise Refused("the card holds less than the budget")
        self._pay(card_id, cost)
        booking_id, transaction_id = self._number(7), self._number(8)
        self.data["booking_record"][booking_id] = {
            "card_id": card_id,
            "travel_date": travel_date,
            "travel_from": travel_from,
            "travel_to": travel_to,
            "travel_class": travel_class,
            "travel_cost": cost,
            "transaction_id": transaction_id,
        }
        told = {"booking_id": booking_id, "transaction_id": transaction_id}
        return {**told, "booking_status": True, "booking_history": {}}

    @offered
    def cancel_booking(self, access_token: str, booking_id: str) -> Any:
        self._inside(access_token)
        booking = self._booking(booking_id)
        card = self.data["credit_card_list"].get(booking.get("card_id"))
        if card is not None and "balance" in card:
            card["balance"] += booking.get("travel_cost", 0.0)
        del self.data["booking_record"][booking_id]
        return {"cancel_status": True}

    @offered
    def get_booking_history(self, access_token: str) -> Any:
        self._inside(access_token)
        return {"booking_history": self.data["booking_record"]}

    @offered
    def purchase_insurance(
        self,
        access_token: str,
        insurance_type: str,
        insurance_cost: float,
        booking_id: str,
        card_id: str,
    ) -> Any:
        self._inside(access_token)
        booking = self._booking(booking_id)
        if insurance_cost < 0:
            raise Refused("insurance_cost must not be negative")
        self._pay(card_id, insurance_cost)
        insurance_id = self._number(9)
        booking |= {
            "insurance_id": insurance_id,
            "insurance_type": insurance_type,
            "insurance_cost": insurance_cost,
        }
        return {"insurance_id": insurance_id, "insurance_status": True}

    @offered
    def retrieve_invoice(
        self, access_token: str, booking_id: str | None = None, insurance_id: str | None = None
    ) -> Any:
        """Of a booking, or of the one that an insurance is for."""
        self._inside(access_token)
        if booking_id is None:
            insured = {
                str(booking.get("insurance_id")): key
                for key, booking in self.data["booking_record"].items()
            }
            booking_id = insured.get(insurance_id or "")
        booking = self._booking(booking_id)
        told = {key: booking.get(key) for key in (*INVOICE, "transaction_id")}
        return {"invoice": {"booking_id": booking_id, **told}}

    @offered
    def contact_customer_support(self, booking_id: str, message: str) -> Any:
        self._booking(booking_id)
        return {"customer_support_message": "Thank you; we will come back to you within a day."}

    @offered
    def verify_traveler_information(
        self, first_name: str, last_name: str, date_of_birth: str, passport_number: str
    ) -> Any:
        own = (self.data["user_first_name"], self.data["user_last_name"])
        reason = ""
        if (first_name, last_name) != own:
            reason = "this is not the name of who is logged in"
        elif _years(_day(date_of_birth)) < ADULT:
            reason = f"the traveler must be {ADULT} years old"
        elif not passport_number.isalnum() or len(passport_number) < 6:
            reason = "this is no number of a passport"
        return {"verification_status": not reason, "verification_failure": reason}


def _cost(travel_from: str, travel_to: str, travel_date: str, travel_class: str) -> float:
    """Twice the fare on days whose digits have an even sum. Raises Refused."""
    for code in (travel_from, travel_to):
        if code not in AIRPORTS.values():
            raise Refused(f"{code!r} is no airport's code")
    fare = base_fare(travel_from, travel_to)
    if fare is None:
        raise Refused(f"no flight goes from {travel_from} to {travel_to}")
    if travel_class not in CLASSES:
        raise Refused(f"the classes are {', '.join(CLASSES)}")
    digits = _day(travel_date).strftime("%Y%m%d")
    dear = 2 - sum(map(int, digits)) % 2
    return float(fare * CLASSES[travel_class] * dear)


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise Refused(f"{text[:40]!r} is no date of the form YYYY-MM-DD") from None


def _years(born: date) -> int:
    had = (TODAY.month, TODAY.day) >= (born.month, born.day)
    return TODAY.year - born.year - (not had)
