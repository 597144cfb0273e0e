"""The conformance kit: a method held against every property, at every legal width; what `qbench check` prints."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from qbench.bits import FLOAT, Bits
from qbench.check.properties import PROPERTIES, Property
from qbench.check.subject import MethodUnderTest, NotApplicable, PropertyViolation
from qbench.quant.method import Unsupported


@dataclass
class Finding:
    """What became of one property: at how many widths it was asked, where it does not hold, why it was not asked."""

    name: str
    asked: int = 0
    nothing: str = ""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def check(subject: MethodUnderTest) -> list[Finding]:
    """Return a finding for every property. An error inside the method is a failure of the property that met it."""
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        return [_ask(one, subject) for one in PROPERTIES]
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random)


def _ask(one: Property, subject: MethodUnderTest) -> Finding:
    finding, began = Finding(one.name), time.perf_counter()
    try:
        widths = _widths(one, subject)
    except Exception as error:
        widths, finding.failures = [], [f"{type(error).__name__}: {_first(error)}"]
    if not widths:
        finding.nothing = {"weights": "it leaves weights float", "inputs": "it leaves inputs float"}.get(
            one.where, "it quantizes nothing"
        )
    for bits in widths:
        finding.asked += 1
        try:
            one.holds(subject, bits)
        except PropertyViolation as violation:
            finding.failures.append(f"{bits}: {violation}")
        except NotApplicable as reason:
            finding.asked -= 1
            finding.nothing = finding.nothing or str(reason)
        except Unsupported as reason:
            finding.asked -= 1
            finding.nothing = finding.nothing or str(reason)
            if bits == subject.default:  # at other widths alone, options may ask for more
                finding.failures.append(f"{bits}: {reason}")
        except Exception as error:
            finding.failures.append(f"{bits}: {type(error).__name__}: {_first(error)}")
    finding.seconds = time.perf_counter() - began
    return finding


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _widths(one: Property, subject: MethodUnderTest) -> list[Bits]:
    if one.where == "default":  # and all that the method can quantize, at its narrowest
        narrow = Bits(*(min(subject.widths(key), default=FLOAT) for key in "wag"))
        return list(dict.fromkeys(bits for bits in (subject.default, narrow) if bits != Bits()))
    kinds: dict[str, Callable[[Bits], bool]] = {
        "weights": lambda bits: bits.w < FLOAT,
        "inputs": lambda bits: bits.a < FLOAT,
        "every": lambda bits: bits != Bits(),
        "own": lambda bits: bits == subject.default,
    }
    return [bits for bits in subject.supported_bits if kinds[one.where](bits)]


def report(subject: MethodUnderTest, findings: list[Finding]) -> str:
    """Return the findings as lines: what holds, what has nothing to ask, and at which widths what does not hold."""
    lines = []
    for finding in findings:
        state, plural = _state(finding), "" if finding.asked == 1 else "s"
        why = finding.nothing if state == NOTHING else f"{finding.asked} width{plural}, {finding.seconds:.1f} s"
        lines.append(f"{state:<15}{finding.name}  ({why})")
        lines += [f"               {failure}" for failure in finding.failures[:6]]
        lines += [f"               and {len(finding.failures) - 6} more"] if len(finding.failures) > 6 else []
    return "\n".join([*lines, f"{subject.name}: {_verdict(findings)}, {sum(f.seconds for f in findings):.1f} s"])


FAILS, HOLDS, NOTHING = "does not hold", "holds", "nothing to ask"


def _state(finding: Finding) -> str:
    return FAILS if finding.failures else HOLDS if finding.asked else NOTHING


def _verdict(findings: list[Finding]) -> str:
    """Return how many properties fail (left out where none does), hold, and have nothing to ask (left out too)."""
    count = Counter(map(_state, findings))
    said = [(count[FAILS], "does not hold", "do not hold"), (count[HOLDS], "holds", "hold")]
    said += [(count[NOTHING], "has nothing to ask of it", "have nothing to ask of it")]
    kept = [(n, one if n == 1 else many) for n, one, many in said if n or many == "hold"]
    (first, verb), *rest = kept
    noun = "property" if first == 1 else "properties"
    return ", ".join([f"{first} {noun} {verb}", *(f"{n} {verb}" for n, verb in rest)])
