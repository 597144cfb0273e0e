"""The conformance kit: a method held against every property, at every legal width; what `qbench check` prints."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from qbench.check.properties import PROPERTIES, Property
from qbench.check.subject import Subject, Violated
from qbench.quant.method import FLOAT, Bits, Unsupported


@dataclass
class Finding:
    """What became of one property: at how many widths it was asked, and where it does not hold."""

    name: str
    asked: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def check(subject: Subject) -> list[Finding]:
    """Return a finding for every property. An error inside the method is a failure of the property that met it."""
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        return [_ask(one, subject) for one in PROPERTIES]
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random)


def _ask(one: Property, subject: Subject) -> Finding:
    finding, began = Finding(one.name), time.perf_counter()
    try:
        widths = _widths(one, subject)
    except Exception as error:
        widths, finding.failures = [], [f"{type(error).__name__}: {_first(error)}"]
    for bits in widths:
        finding.asked += 1
        try:
            one.holds(subject, bits)
        except Violated as violation:
            finding.failures.append(f"{bits}: {violation}")
        except Unsupported as reason:
            finding.asked -= 1
            if bits == subject.default:  # at other widths alone, options may ask for more
                finding.failures.append(f"{bits}: {reason}")
        except Exception as error:
            finding.failures.append(f"{bits}: {type(error).__name__}: {_first(error)}")
    finding.seconds = time.perf_counter() - began
    return finding


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _widths(one: Property, subject: Subject) -> list[Bits]:
    if one.where == "default":  # and all that the method can quantize, at its narrowest
        narrow = Bits(*(min(subject.widths(key), default=FLOAT) for key in "wag"))
        return list(dict.fromkeys(bits for bits in (subject.default, narrow) if bits != Bits()))
    kinds: dict[str, Callable[[Bits], bool]] = {
        "weights": lambda bits: bits.w < FLOAT,
        "inputs": lambda bits: bits.a < FLOAT,
        "every": lambda bits: bits != Bits(),
        "own": lambda bits: bits == subject.default,
    }
    return [bits for bits in subject.legal if kinds[one.where](bits)]


def report(subject: Subject, findings: list[Finding]) -> str:
    """Return the findings as lines: what holds, and at which widths what does not."""
    lines = []
    for finding in findings:
        state = "does not hold" if finding.failures else "holds" if finding.asked else "nothing to ask"
        width = f"{finding.asked} width{'s' if finding.asked != 1 else ''}"
        lines.append(f"{state:<15}{finding.name}  ({width}, {finding.seconds:.1f} s)")
        lines += [f"               {failure}" for failure in finding.failures[:6]]
        lines += [f"               and {len(finding.failures) - 6} more"] if len(finding.failures) > 6 else []
    broken = sum(bool(finding.failures) for finding in findings)
    total = sum(finding.seconds for finding in findings)
    verdict = (
        f"{broken} of {len(findings)} properties do not hold" if broken else f"all {len(findings)} properties hold"
    )
    return "\n".join([*lines, f"{subject.name}: {verdict}, {total:.1f} s"])
