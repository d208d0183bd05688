"""Numbers as text, for people to read."""

import math
import re
from collections.abc import Mapping
from typing import Any

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def share(value: float, error: float) -> str:
    """A share and its error, in percent."""
    return f"{100 * value:.1f} ± {100 * error:.1f}" if math.isfinite(value) else "undefined"


def snr_range(line: Mapping[str, Any]) -> str:
    """A bin of S/N in words."""
    low, high = line["snr_low"], line["snr_high"]
    return f"{low:g}–{high:g}" if math.isfinite(high) else f"above {low:g}"


def count(value: int) -> str:
    """A whole number in groups of three."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def number(value: float) -> str:
    """A number to three digits."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    text = f"{value:.3g}" if abs(value) < 1000 or abs(value) >= 1e6 else count(round(value))
    return minus(text)


def minus(text: str) -> str:
    """A number with a minus sign for its hyphen."""
    return text.replace("-", "\N{MINUS SIGN}")


def power(text: str) -> str:
    """A number, with a raised power of ten where Python writes 3e+06."""
    digits, _, exponent = text.partition("e")
    if not exponent:
        return minus(digits)
    times = "" if digits == "1" else f"{minus(digits)} \N{MULTIPLICATION SIGN} "
    return f"{times}10{str(int(exponent)).translate(_RAISED)}"


def unit(text: str) -> str:
    """A unit as astropy writes it, in fewer characters."""
    text = re.sub(r"\b([A-Za-z]+)2\b", "\\1\N{SUPERSCRIPT TWO}", text).replace(" / ", "/")
    return text.removeprefix("1") if text.startswith("1/") else text


def with_error(value: float, error: float) -> str:
    """``value ± error``: the error to two digits, the value to the same place."""
    if not math.isfinite(value):
        return "undefined"
    if not (math.isfinite(error) and error > 0):
        return power(f"{value:.6g}")
    exponent = math.floor(math.log10(max(abs(value), error)))
    shift = exponent if exponent >= 6 or exponent <= -5 else 0
    decimals = max(0, 1 - math.floor(math.log10(error)) + shift)
    text = minus(f"{value / 10.0**shift:.{decimals}f} ± {error / 10.0**shift:.{decimals}f}")
    return f"({text}) \N{MULTIPLICATION SIGN} 10{str(shift).translate(_RAISED)}" if shift else text
