"""Bytes and seconds as text for tables: `5.3 MB`, `3 min 40 s`."""

from __future__ import annotations

from rich.filesize import decimal


def bytes_text(count: float) -> str:
    """Return bytes in the largest unit of at least 1, by powers of 1,000."""
    return decimal(round(count))


def seconds_text(seconds: float) -> str:
    """Return a duration in its two largest units, without a unit that is zero."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    units = (3600, "h", 60, "min") if rounded >= 3600 else (60, "min", 1, "s")
    large, large_unit, small, small_unit = units
    count, rest = divmod(round(seconds / small), large // small)
    return f"{count} {large_unit}" + (f" {rest} {small_unit}" if rest else "")


def quantity_text(name: str, value: float) -> str | None:
    """Return a metric of bytes or seconds as text, by the ending of its name; None for any other metric."""
    if name.endswith("bytes"):
        return bytes_text(value)
    return seconds_text(value) if name.endswith("seconds") else None
