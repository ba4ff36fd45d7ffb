"""A car: doors, engine, brakes, fuel, climate, lights, tires and the way to a place.

Zip codes and distances are BFCL's, for the items' answers name them. The forces on pedals and
brakes are no part of the state that is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tessera.eval.services.base import Refused, Service, offered

TANK = 50.0  # gallons
MILES_PER_GALLON = 20.0
LITERS_PER_GALLON = 3.78541
HEALTHY_PSI = (30.0, 35.0)
SHOP = "456 Oakwood Avenue, Rivermist, 83214"
DOORS = ("driver", "passenger", "rear_left", "rear_right")
TIRES = ("frontLeft", "frontRight", "rearLeft", "rearRight")
FORCES = ("parkingBrakeForce", "slopeAngle")  # given without the underscore that hides them
ZIPCODES = {
    "Rivermist": "83214",
    "Stonebrook": "74532",
    "Maplecrest": "56108",
    "Silverpine": "62947",
    "Shadowridge": "71354",
    "Sunset Valley": "83462",
    "Oakendale": "47329",
    "Willowbend": "52013",
    "Crescent Hollow": "69238",
    "Autumnville": "51479",
    "San Francisco": "94016",
}
DISTANCES = {
    frozenset(pair.split("-")): distance
    for pair, distance in {
        "83214-74532": 750.0,
        "56108-62947": 320.0,
        "71354-83462": 450.0,
        "47329-52013": 290.0,
        "69238-51479": 630.0,
        "94016-83214": 980.0,
        "94016-94704": 600.0,
        "94704-08540": 2550.0,
        "94016-08540": 1950.0,
        "62947-47329": 1053.0,
        "94016-62947": 780.0,
        "94016-74532": 880.0,
    }.items()
}
# What each word of displayCarStatus shows: the name in the answer, and in the state.
SHOWN = {
    "fuel": {"fuelLevel": "fuelLevel"},
    "battery": {"batteryVoltage": "batteryVoltage"},
    "doors": {"doorStatus": "doorStatus"},
    "climate": {
        "currentACTemperature": "acTemperature",
        "fanSpeed": "fanSpeed",
        "climateMode": "acMode",
        "humidityLevel": "humidityLevel",
    },
    "headlights": {"headlightStatus": "headLightStatus"},
    "parkingBrake": {
        "parkingBrakeStatus": "parkingBrakeStatus",
        "parkingBrakeForce": "_parkingBrakeForce",
        "slopeAngle": "_slopeAngle",
    },
    "brakePedal": {
        "brakePedalStatus": "brakePedalStatus",
        "brakePedalForce": "_brakePedalForce",
    },
    "engine": {"engineState": "engineState"},
}


class Vehicle(Service):
    defaults = {
        "fuelLevel": 0.0,
        "batteryVoltage": 12.6,
        "engineState": "stopped",
        "doorStatus": dict.fromkeys(DOORS, "unlocked"),
        "acTemperature": 25.0,
        "fanSpeed": 50,
        "acMode": "auto",
        "humidityLevel": 50.0,
        "headLightStatus": "off",
        "parkingBrakeStatus": "released",
        "brakePedalStatus": "released",
        "distanceToNextVehicle": 50.0,
        "cruiseStatus": "inactive",
        "cruiseSpeed": 0.0,
        "destination": "None",
        **{f"{tire}TirePressure": 32.0 for tire in TIRES},
        "_parkingBrakeForce": 0.0,
        "_slopeAngle": 0.0,
        "_brakePedalForce": 0.0,
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        own = {f"_{key}": config[key] for key in FORCES if key in config}
        super().__init__({key: one for key, one in config.items() if key not in FORCES} | own)

    @offered
    def startEngine(self, ignitionMode: str) -> Any:
        if ignitionMode not in ("START", "STOP"):
            raise Refused("ignitionMode is START or STOP")
        if ignitionMode == "START":
            unlocked = [door for door, how in self.data["doorStatus"].items() if how != "locked"]
            if unlocked:
                raise Refused(f"all doors must be locked; unlocked are {', '.join(unlocked)}")
            if self.data["fuelLevel"] <= 0:
                raise Refused("the tank is empty")
            if self.data["_brakePedalForce"] < 1000.0:
                raise Refused("the brake pedal must be pressed fully")
        self.data["engineState"] = "running" if ignitionMode == "START" else "stopped"
        return {key: self.data[key] for key in ("engineState", "fuelLevel", "batteryVoltage")}

    @offered
    def fillFuelTank(self, fuelAmount: float) -> Any:
        if fuelAmount < 0:
            raise Refused("fuelAmount must not be negative")
        if self.data["fuelLevel"] + fuelAmount > TANK:
            raise Refused(f"the tank holds {TANK:g} gallons; {self.data['fuelLevel']:g} are in it")
        self.data["fuelLevel"] += fuelAmount
        return {"fuelLevel": self.data["fuelLevel"]}

    @offered
    def lockDoors(self, unlock: bool, door: list[str]) -> Any:
        for one in door:
            if one not in self.data["doorStatus"]:
                raise Refused(f"there is no door {one!r}; there are {', '.join(DOORS)}")
        status = "unlocked" if unlock else "locked"
        self.data["doorStatus"] |= dict.fromkeys(door, status)
        left = sum(how == "unlocked" for how in self.data["doorStatus"].values())
        return {"lockStatus": status, "remainingUnlockedDoors": left}

    @offered
    def adjustClimateControl(
        self,
        temperature: float,
        unit: str = "celsius",
        fanSpeed: int = 50,
        mode: str = "auto",
    ) -> Any:
        if unit not in ("celsius", "fahrenheit"):
            raise Refused("unit is celsius or fahrenheit")
        if not 0 <= fanSpeed <= 100:
            raise Refused("fanSpeed goes from 0 to 100")
        if mode not in ("auto", "cool", "heat", "defrost"):
            raise Refused("mode is auto, cool, heat or defrost")
        celsius = (temperature - 32) * 5 / 9 if unit == "fahrenheit" else temperature
        self.data |= {"acTemperature": celsius, "fanSpeed": fanSpeed, "acMode": mode}
        told = {"currentTemperature": celsius, "climateMode": mode}
        return {**told, "humidityLevel": self.data["humidityLevel"]}

    @offered
    def setHeadlights(self, mode: str) -> Any:
        if mode not in ("on", "off", "auto"):
            raise Refused("mode is on, off or auto")
        self.data["headLightStatus"] = "on" if mode != "off" else "off"
        return {"headlightStatus": self.data["headLightStatus"]}

    @offered
    def pressBrakePedal(self, pedalPosition: float) -> Any:
        if not 0 <= pedalPosition <= 1:
            raise Refused("pedalPosition goes from 0 to 1")
        return self._brake(1000.0 * pedalPosition)

    @offered
    def releaseBrakePedal(self) -> Any:
        return self._brake(0.0)

    def _brake(self, force: float) -> Any:
        self.data["brakePedalStatus"] = "pressed" if force else "released"
        self.data["_brakePedalForce"] = force
        return {"brakePedalStatus": self.data["brakePedalStatus"], "brakePedalForce": force}

    @offered
    def activateParkingBrake(self, mode: str) -> Any:
        if mode not in ("engage", "release"):
            raise Refused("mode is engage or release")
        on = mode == "engage"
        self.data["parkingBrakeStatus"] = "engaged" if on else "released"
        self.data["_parkingBrakeForce"] = 500.0 if on else 0.0
        keys = ("parkingBrakeStatus", "_parkingBrakeForce", "_slopeAngle")
        return {key: self.data[key] for key in keys}

    @offered
    def setCruiseControl(self, speed: float, activate: bool, distanceToNextVehicle: float) -> Any:
        if self.data["engineState"] != "running":
            raise Refused("the engine does not run")
        if not 0 <= speed <= 120 or speed % 5:
            raise Refused("speed goes from 0 to 120 in steps of 5")
        self.data |= {
            "cruiseStatus": "active" if activate else "inactive",
            "cruiseSpeed": speed if activate else 0.0,
            "distanceToNextVehicle": distanceToNextVehicle,
        }
        told = {"cruiseStatus": self.data["cruiseStatus"], "currentSpeed": self.data["cruiseSpeed"]}
        return {**told, "distanceToNextVehicle": distanceToNextVehicle}

    @offered
    def get_current_speed(self) -> Any:
        return {"currentSpeed": self.data["cruiseSpeed"]}

    @offered
    def displayCarStatus(self, option: str) -> Any:
        if option not in SHOWN:
            raise Refused(f"option is one of {', '.join(SHOWN)}")
        return {"status": {told: self.data[key] for told, key in SHOWN[option].items()}}

    @offered
    def display_log(self, messages: list[str]) -> Any:
        return {"log": messages}

    @offered
    def check_tire_pressure(self) -> Any:
        found = {f"{tire}TirePressure": self.data[f"{tire}TirePressure"] for tire in TIRES}
        least, most = HEALTHY_PSI
        mean = sum(found.values()) / len(found)
        told = {**found, "healthy_tire_pressure": least <= mean <= most, "car_info": {}}
        return {"tirePressure": told}

    @offered
    def find_nearest_tire_shop(self) -> Any:
        return {"shopLocation": SHOP}

    @offered
    def estimate_drive_feasibility_by_mileage(self, distance: float) -> Any:
        return {"canDrive": self.data["fuelLevel"] * MILES_PER_GALLON >= distance}

    @offered
    def liter_to_gallon(self, liter: float) -> Any:
        return {"gallon": liter / LITERS_PER_GALLON}

    @offered
    def gallon_to_liter(self, gallon: float) -> Any:
        return {"liter": gallon * LITERS_PER_GALLON}

    @offered
    def get_zipcode_based_on_city(self, city: str) -> Any:
        return {"zipcode": ZIPCODES.get(city, "00000")}

    @offered
    def estimate_distance(self, cityA: str, cityB: str) -> Any:
        distance = DISTANCES.get(frozenset((cityA, cityB)))
        if distance is None:
            raise Refused("the distance is not known")
        return {"distance": distance}

    @offered
    def set_navigation(self, destination: str) -> Any:
        self.data["destination"] = destination
        return {"status": f"the way leads to {destination}"}

    @offered
    def get_outside_temperature_from_google(self) -> Any:
        return {"outsideTemperature": 31.0}

    @offered
    def get_outside_temperature_from_weather_com(self) -> Any:
        return {"outsideTemperature": 30.0}
