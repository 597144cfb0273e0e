"""Formats numbers with SI prefixes."""


def si_format(number: float, digits: int = 3, gap: str = " ") -> str:
    """Return a number with `digits` digits, followed by `gap` and an SI prefix, such as `7.18 k`."""
    for prefix in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.{digits}g}{gap}{prefix}"
        number /= 1000
    return f"{number:.{digits}g}{gap}T"
