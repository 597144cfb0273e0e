"""Numbers with units."""


def si_format(number: float, digits: int = 3, gap: str = " ") -> str:
    """Return a number with so many digits and an SI prefix, such as `7.18 k`; `gap` separates them."""
    for prefix in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.{digits}g}{gap}{prefix}"
        number /= 1000
    return f"{number:.{digits}g}{gap}T"
