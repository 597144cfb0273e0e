"""Computes the signal-to-quantization-noise ratio (SQNR)."""

from math import log10

MAX_SQNR = 140.0
"""Largest SQNR that is reported, in dB. Rounding errors of float32 (2^-23 of the signal) correspond to 138.5 dB."""


def sqnr_db(signal: float, noise: float) -> float:
    """Return the ratio of two powers in dB, at most `MAX_SQNR`. Without noise, return `MAX_SQNR`.

    Args:
        signal: power of the float values, above 0.
        noise: power of the difference between quantized and float values.
    """
    return min(MAX_SQNR, 10 * log10(signal / noise)) if noise > 0 else MAX_SQNR
