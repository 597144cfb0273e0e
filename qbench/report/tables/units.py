"""Numbers with units."""


def si_format(number: float) -> str:
    """Return a number with three digits and an SI prefix, such as `7.18 k`."""
    for prefix in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} T"
