"""Runs the checks of `qbench check`: every property at every supported width, or slow ones at a few."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from qbench.bits import FLOAT, Bits
from qbench.check.properties import PROPERTIES, Property
from qbench.check.subject import MethodUnderTest, NotApplicable, PropertyViolation
from qbench.quant.method import Unsupported

HOLDS, FAILS, NOT_APPLICABLE = "holds", "does not hold", "not applicable"

MAX_FAILURES = 6
"""Maximum number of failures that are printed for a property."""


@dataclass
class Finding:
    """The result of checking one property.

    Args:
        name: the name of the property.
        widths: number of combinations of widths at which the property was checked.
        reason: if the property was not checked at any width, the reason why it does not apply.
        failures: one line for each combination of widths at which the property does not hold.
        seconds: duration of the check in seconds.
    """

    name: str
    widths: int = 0
    reason: str = ""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def state(self) -> str:
        """The state of the property: `HOLDS`, `FAILS` or `NOT_APPLICABLE`."""
        return FAILS if self.failures else HOLDS if self.widths else NOT_APPLICABLE


def check(subject: MethodUnderTest) -> list[Finding]:
    """Check every property of a method, and return one finding per property.

    If the method raises an error during a check, the checked property does not hold. The checks use one thread.
    Afterwards, the number of threads and the random state are restored.
    """
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        return [_check_property(one, subject) for one in PROPERTIES]
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random)


def _check_property(one: Property, subject: MethodUnderTest) -> Finding:
    finding, began = Finding(one.name), time.perf_counter()
    try:
        widths = _widths(one, subject)
    except Exception as error:
        widths, finding.failures = [], [f"{type(error).__name__}: {_first_line(error)}"]
    if not widths:
        reasons = {"weights": "the method does not quantize weights", "inputs": "the method does not quantize inputs"}
        finding.reason = reasons.get(one.where, "the method quantizes nothing")
    for bits in widths:
        _check_width(one, subject, bits, finding)
    finding.seconds = time.perf_counter() - began
    return finding


def _check_width(one: Property, subject: MethodUnderTest, bits: Bits, finding: Finding) -> None:
    """Check one property at one width and record the outcome in `finding`."""
    try:
        one.holds(subject, bits)
    except PropertyViolation as violation:
        finding.failures.append(f"{bits}: {violation}")
    except NotApplicable as error:
        finding.reason = finding.reason or str(error)
        return
    except Unsupported as error:
        finding.reason = finding.reason or str(error)
        if bits == subject.default:  # the method's options may exclude any width except the default
            finding.failures.append(f"{bits}: {error}")
        return
    except Exception as error:
        finding.failures.append(f"{bits}: {type(error).__name__}: {_first_line(error)}")
    finding.widths += 1


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _widths(one: Property, subject: MethodUnderTest) -> list[Bits]:
    """Return the widths at which a property is checked."""
    if one.where == "default and narrowest":
        # narrowest: the smallest supported width of weights, inputs and gradients
        narrow = Bits(*(min(subject.widths(key), default=FLOAT) for key in "wag"))
        return list(dict.fromkeys(bits for bits in (subject.default, narrow) if bits != Bits()))
    selections: dict[str, Callable[[Bits], bool]] = {
        "weights": lambda bits: bits.w < FLOAT,
        "inputs": lambda bits: bits.a < FLOAT,
        "every": lambda bits: bits != Bits(),
        "default": lambda bits: bits == subject.default,
    }
    return [bits for bits in subject.supported_bits if selections[one.where](bits)]


def report(subject: MethodUnderTest, findings: list[Finding]) -> str:
    """Return the findings as text. Each finding has one line, followed by one line per failure."""
    lines = []
    for finding in findings:
        plural = "" if finding.widths == 1 else "s"
        checked = f"{finding.widths} width{plural}, {finding.seconds:.1f} s"
        detail = finding.reason if finding.state == NOT_APPLICABLE else checked
        lines.append(f"{finding.state + ':':<15} {finding.name}  ({detail})")
        lines += [f"                {failure}" for failure in finding.failures[:MAX_FAILURES]]
        if len(finding.failures) > MAX_FAILURES:
            lines.append(f"                and {len(finding.failures) - MAX_FAILURES} more")
    return "\n".join([*lines, f"{subject.name}: {_verdict(findings)}, {sum(f.seconds for f in findings):.1f} s"])


def _verdict(findings: list[Finding]) -> str:
    """Return a text with the numbers of properties that fail, that hold and that are not applicable.

    The text always states how many properties hold. The other two counts are left out if they are zero.
    """
    count = Counter(finding.state for finding in findings)
    phrases = [
        (count[FAILS], "does not hold", "do not hold"),
        (count[HOLDS], "holds", "hold"),
        (count[NOT_APPLICABLE], "is not applicable", "are not applicable"),
    ]
    kept = [(n, one if n == 1 else many) for n, one, many in phrases if n or many == "hold"]
    (first, phrase), *others = kept
    noun = "property" if first == 1 else "properties"
    return ", ".join([f"{first} {noun} {phrase}", *(f"{n} {phrase}" for n, phrase in others)])
