"""Range checks shared by the theorems and the estimates: ValueError with the name, the range and the value."""

import math


def check_number(name: str, value: float, *, positive: bool = False) -> None:
    if not (math.isfinite(value) and value >= 0.0 and not (positive and value == 0.0)):
        raise ValueError(f"{name} must be a finite number {'> 0' if positive else '>= 0'}, got {value:g}")


def check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value}")
