"""Formats numbers with SI prefixes."""


def si_format(number: float, digits: int = 3, gap: str = " ") -> str:
    """Return a number as text with `digits` significant digits, then `gap` and an SI prefix, such as `7.18 k`."""
    for prefix in ("", "k", "M", "G"):
        text = f"{number:.{digits}g}"
        if abs(float(text)) < 1000:  # 999.9 is rounded to 1e+03
            return f"{text}{gap}{prefix}"
        number /= 1000
    return f"{number:.{digits}g}{gap}T"
