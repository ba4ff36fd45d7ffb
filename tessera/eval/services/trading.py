"""A broker: an account, orders, a watchlist and the day's stocks.

An order is placed and stays open: nothing is filled, and no price moves, so an account changes by
what is paid in and out alone. The clock stands at half past ten.
"""

from __future__ import annotations

from datetime import date
from typing import Any

from tessera.eval.services.base import Refused, Service, offered

TODAY, NOW = "2024-09-01", "10:30 AM"
STAMP = f"{TODAY} 10:30:00"
COMPANIES = {
    "Apple": "AAPL",
    "Google": "GOOG",
    "Tesla": "TSLA",
    "Microsoft": "MSFT",
    "Nvidia": "NVDA",
    "Amazon": "AMZN",
    "Zeta Corp": "ZETA",
    "Alpha Tech": "ALPH",
    "Omega Industries": "OMEG",
    "Quasar Ltd.": "QUAS",
    "Neptune Systems": "NEPT",
    "Synex Solutions": "SYNX",
}
SECTORS = {"Technology": ["AAPL", "GOOG", "MSFT", "NVDA"], "Automobile": ["TSLA"]}

# Of items that tell of no orders: their users speak of a pending one by this number.
ORDERS = {
    "12345": {
        "id": 12345,
        "order_type": "Buy",
        "symbol": "AAPL",
        "price": 210.65,
        "amount": 10,
        "status": "Completed",
    },
    "12446": {
        "id": 12446,
        "order_type": "Sell",
        "symbol": "GOOG",
        "price": 2840.34,
        "amount": 5,
        "status": "Pending",
    },
}


class Trading(Service):
    defaults = {
        "orders": ORDERS,
        "account_info": {"account_id": 12345, "balance": 10000.0, "binding_card": 0},
        "authenticated": False,
        "market_status": "Closed",
        "order_counter": 1,
        "stocks": {},
        "watch_list": [],
        "transaction_history": [],
    }

    def _inside(self) -> None:
        if not self.data["authenticated"]:
            raise Refused("nobody is logged in")

    def _stock(self, symbol: str) -> dict[str, Any]:
        if symbol not in self.data["stocks"]:
            raise Refused(f"there is no stock {symbol!r}")
        return self.data["stocks"][symbol]

    def _order(self, order_id: int) -> dict[str, Any]:
        order = self.data["orders"].get(str(order_id))
        if order is None:
            raise Refused(f"there is no order {order_id}")
        return order

    @offered
    def trading_login(self, username: str, password: str) -> Any:
        """No passwords are kept: whoever gives a name and one is in."""
        if not username or not password:
            raise Refused("a name and a password are needed")
        if self.data["authenticated"]:
            return {"status": "logged in before"}
        self.data["authenticated"] = True
        return {"status": "logged in"}

    @offered
    def trading_logout(self) -> Any:
        self._inside()
        self.data["authenticated"] = False
        return {"status": "logged out"}

    @offered
    def trading_get_login_status(self) -> Any:
        return {"status": bool(self.data["authenticated"])}

    @offered
    def get_current_time(self) -> Any:
        return {"current_time": NOW}

    @offered
    def get_symbol_by_name(self, name: str) -> Any:
        return {"symbol": COMPANIES.get(name, "Stock not found")}

    @offered
    def get_stock_info(self, symbol: str) -> Any:
        return self._stock(symbol)

    @offered
    def get_available_stocks(self, sector: str) -> Any:
        return {"stock_list": SECTORS.get(sector, [])}

    @offered
    def filter_stocks_by_price(self, stocks: list[str], min_price: float, max_price: float) -> Any:
        found = [s for s in stocks if min_price <= self._stock(s)["price"] <= max_price]
        return {"filtered_stocks": found}

    @offered
    def notify_price_change(self, stocks: list[str], threshold: float) -> Any:
        moved = [s for s in stocks if abs(self._stock(s)["percent_change"]) > threshold]
        said = f"moved by over {threshold:g} %: {', '.join(moved)}" if moved else "no stock moved"
        return {"notification": said}

    @offered
    def get_watchlist(self) -> Any:
        self._inside()
        return {"watchlist": self.data["watch_list"]}

    @offered
    def add_to_watchlist(self, stock: str) -> Any:
        self._stock(stock)
        if stock not in self.data["watch_list"]:
            self.data["watch_list"].append(stock)
        return {"watchlist": self.data["watch_list"]}

    @offered
    def remove_stock_from_watchlist(self, symbol: str) -> Any:
        self._inside()
        if symbol not in self.data["watch_list"]:
            raise Refused(f"{symbol!r} is not on the watchlist")
        self.data["watch_list"].remove(symbol)
        return {"status": f"{symbol} was removed from the watchlist"}

    @offered
    def place_order(self, order_type: str, symbol: str, price: float, amount: int) -> Any:
        self._inside()
        self._stock(symbol)
        if order_type.lower() not in ("buy", "sell"):
            raise Refused("order_type is Buy or Sell")
        if price <= 0 or amount <= 0:
            raise Refused("price and amount must be positive")
        number = self.data["order_counter"]
        order = {
            "id": number,
            "order_type": order_type.capitalize(),
            "symbol": symbol,
            "price": price,
            "amount": amount,
            "status": "Open",
        }
        self.data["orders"][str(number)] = order
        self.data["order_counter"] += 1
        told = {key: order[key] for key in ("order_type", "price", "amount")}
        return {"order_id": number, "status": "Pending", **told}

    @offered
    def get_order_details(self, order_id: int) -> Any:
        self._inside()
        return self._order(order_id)

    @offered
    def cancel_order(self, order_id: int) -> Any:
        self._inside()
        order = self._order(order_id)
        if order["status"] in ("Completed", "Cancelled"):
            raise Refused(f"order {order_id} is {order['status'].lower()} already")
        order["status"] = "Cancelled"
        return {"order_id": order_id, "status": "Cancelled"}

    @offered
    def get_order_history(self) -> Any:
        """An item's `orders` may hold a key that is no order, so numbers alone are told."""
        self._inside()
        return {"order_history": [int(key) for key in self.data["orders"] if key.isdigit()]}

    @offered
    def get_account_info(self) -> Any:
        self._inside()
        return self.data["account_info"]

    @offered
    def fund_account(self, amount: float) -> Any:
        return self._move("deposit", amount)

    @offered
    def withdraw_funds(self, amount: float) -> Any:
        return self._move("withdrawal", amount)

    def _move(self, kind: str, amount: float) -> Any:
        self._inside()
        account = self.data["account_info"]
        if amount <= 0:
            raise Refused("amount must be positive")
        if kind == "withdrawal" and amount > account["balance"]:
            raise Refused("the balance does not suffice")
        account["balance"] += amount if kind == "deposit" else -amount
        row = {"type": kind, "amount": amount, "timestamp": STAMP}
        self.data["transaction_history"].append(row)
        return {"status": f"the {kind} was made", "new_balance": account["balance"]}

    @offered
    def get_transaction_history(
        self, start_date: str | None = None, end_date: str | None = None
    ) -> Any:
        self._inside()
        first, last = _day(start_date or "0001-01-01"), _day(end_date or "9999-12-31")
        rows = self.data["transaction_history"]
        found = [one for one in rows if first <= _day(one["timestamp"][:10]) <= last]
        return {"transaction_history": found}


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise Refused(f"{text[:40]!r} is no date of the form YYYY-MM-DD") from None
