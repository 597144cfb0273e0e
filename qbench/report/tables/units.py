"""Formats numbers with SI prefixes."""


def si_format(number: float, digits: int = 3, gap: str = " ") -> str:
    """Return a number as text with `digits` significant digits, then `gap` and an SI prefix, such as `7.18 k`."""
    for prefix in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.{digits}g}{gap}{prefix}"
        number /= 1000
    return f"{number:.{digits}g}{gap}T"
