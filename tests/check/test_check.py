"""The conformance kit: every method passes it, and each planted fault is found by the property that
is for it.
"""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import composed, tiered
from helpers import qbench
from torch import Tensor, nn

from qbench.bits import Bits
from qbench.check.kit import Finding, check, report
from qbench.check.properties import PROPERTIES
from qbench.check.subject import MethodUnderTest
from qbench.cli.main import main as cli
from qbench.config import groups
from qbench.experiment.builders import build_method
from qbench.methods import dorefa, dq, inq, pact, qcnn, qd, ttq, twn
from qbench.methods.xnor import BinaryWeight
from qbench.quant.method import Method
from qbench.quant.ops import on_backward, straight_through
from qbench.quant.quantizer import Grid, Quantizer, Storage


def method_under_test(name: str) -> MethodUnderTest:
    config = composed(f"method={name}")
    build = lambda bits: build_method(config.method, config.activation, bits)  # noqa: E731
    return MethodUnderTest(name, build, config.bits.resolved())


REACH = "weights, inputs and learned parameters get gradients"
LEARNED = "gradients of learned parameters agree with finite differences"
UNBIASED, RESUME = "stochastic rounding is unbiased", "resumed training gives the same weights"
FLOAT_AT_32, NOT_FINITE = "32 bits give the float network's gradients", "inf and nan raise an error"

APPLICABLE_TO = {
    LEARNED: {"apot", "dq", "lsq", "pact", "ttq"},  # points, steps, clips, scales that are trained
    UNBIASED: {"dorefa", "gupta"},  # noise in gradients, stochastic rounding; qd's is an option
}
NOT_APPLICABLE_TO = {
    REACH: {"float", "ptq", "qcnn"},  # nothing is quantized, no epoch is trained, the codes are fixed
    RESUME: {"float", "ptq"},
}


FAST = ("lsq",)
"""The method that is checked in the fast tier. The long tier checks all methods."""


@pytest.mark.parametrize("name", tiered(groups.option_names("method"), FAST))
@pytest.mark.parametrize("widths", tiered(["three", "all"], ["three"]))
def test_every_method_has_every_property(name: str, widths: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the narrowest, the default and the widest width of a method; in the long tier, check all widths."""
    one = method_under_test(name)
    if widths == "three" and len(supported := one.supported_bits) > 3:
        few = list(dict.fromkeys([supported[0], one.default, supported[-1]]))
        monkeypatch.setattr(MethodUnderTest, "supported_bits", few)
    findings = check(one)
    assert not any(finding.failures for finding in findings), report(one, findings)
    if name != "float":
        checked = {finding.name for finding in findings if finding.widths}
        assert {"levels", FLOAT_AT_32, "a saved and loaded state_dict gives the same outputs", NOT_FINITE} <= checked
        assert {one for one in APPLICABLE_TO if name in APPLICABLE_TO[one]} == checked & APPLICABLE_TO.keys()
        assert {
            one for one in NOT_APPLICABLE_TO if name not in NOT_APPLICABLE_TO[one]
        } == checked & NOT_APPLICABLE_TO.keys()
    assert [finding.name for finding in findings] == [one.name for one in PROPERTIES]


class Ternary(Quantizer):
    """TWN's weights with one thing wrong."""

    def __init__(self, wrong: Callable[..., Tensor]) -> None:
        super().__init__()
        self.wrong, self.calls = wrong, 0

    def forward(self, w: Tensor) -> Tensor:
        return self.wrong(self, w)

    def grid(self, w: Tensor) -> Grid:
        return twn.TWNWeight().grid(w)

    def bytes(self, w: Tensor) -> Storage:
        return Storage(w.numel(), 2, 4)


def weights(wrong: Callable[..., Tensor]) -> Callable[[], Method]:
    return lambda: replace(twn.build(), weight=lambda name, layer, bits: Ternary(wrong))


def off_by_a_little(quantizer: Ternary, w: Tensor) -> Tensor:
    return twn.ternarize_weight(w) * 1.001


def shifted(quantizer: Ternary, w: Tensor) -> Tensor:
    _, alpha = twn.threshold_and_scale(w)
    return straight_through(w, alpha * (w.detach() > 0.1))


def upside_down(quantizer: Ternary, w: Tensor) -> Tensor:
    return twn.ternarize_weight(-w)


def poisoned_by_zeros(quantizer: Ternary, w: Tensor) -> Tensor:
    top = w.abs().max()
    return twn.ternarize_weight(w) * (top / top)


def counting(quantizer: Ternary, w: Tensor) -> Tensor:
    """Computes something else after nine calls; the count is in no state_dict."""
    if quantizer.training:
        quantizer.calls += 1
    return twn.ternarize_weight(w if quantizer.calls < 9 else w.flip(0))


class WrongSign(ttq.TTQWeight):
    """The gradient of the negative scale without its minus sign."""

    def forward(self, w: Tensor) -> Tensor:
        negative = on_backward(self.negative, lambda grad: -grad)
        return ttq.ternarize_weight(w, self.positive, negative, self.delta(w))


class MeanOfAlpha(pact.PACTActivation):
    """A learned clip whose gradient is the mean instead of the sum."""

    def forward(self, x: Tensor) -> Tensor:
        return pact.quantize_activation(x, on_backward(self.alpha, lambda grad: grad / x.numel()), self.bits)


class Leaky(dorefa.DoReFaActivation):
    """A gradient passes where the clip is flat."""

    def forward(self, x: Tensor) -> Tensor:
        return straight_through(x, super().forward(x))


class Biased(qd.QDWeight):
    """Rounds up at random with the square of the probability."""

    def forward(self, w: Tensor) -> Tensor:
        if not self.training:
            return super().forward(w)
        grid = self.grid(w)
        rows = grid.arrange(w.detach())[..., 0]
        points = grid.points[..., 0]
        step = (points[:, -1:] - points[:, :1]) / (points.shape[1] - 1)
        unit = ((rows - points[:, :1]) / step).nan_to_num()
        up = torch.rand_like(unit) < (unit - unit.floor()) ** 2
        value = points[:, :1] + (unit.floor() + up) * step
        return straight_through(w, value.flatten()[: w.numel()].reshape(w.shape))


class Float64(BinaryWeight):
    """Forgets half types: overflows in them."""

    def forward(self, w: Tensor) -> Tensor:
        return super().forward(w * 1e30) / 1e30 if w.dtype == torch.float32 else super().forward(w)


def _ttq() -> Method:
    return replace(ttq.build(), weight=lambda name, layer, bits: WrongSign(layer, "max", 0.05, "mean", 0.0))


def _pact() -> Method:
    return replace(pact.build(w=32), input=lambda name, layer, bits: MeanOfAlpha(bits, 1.0, 0.0))


def _leaky() -> Method:
    return replace(
        dorefa.build(w=32, a=2), input=lambda name, layer, bits: Leaky(dorefa.quantize_activation, 0.0, bits)
    )


def _biased() -> Method:
    return replace(qd.build(w=2, stochastic=True), weight=lambda name, layer, bits: Biased(bits, 256, True))


def _not_float() -> Method:
    """Halves all weights when it is prepared, whatever the widths."""
    return replace(twn.build(w=32), prepare=halve)


def halve(model: nn.Module, probe: object) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)


class NarrowCodes(twn.TWNWeight):
    """Three levels, but codes of one bit."""

    def bytes(self, w: Tensor) -> Storage:
        return Storage(w.numel(), 1, 4)


def _narrow() -> Method:
    return replace(twn.build(), weight=lambda name, layer, bits: NarrowCodes())


PLANTED = {
    "off by a little": (weights(off_by_a_little), "levels"),
    "codes that are too narrow": (_narrow, "levels"),
    "not odd": (weights(shifted), "weights: odd, monotone, idempotent as declared"),
    "not monotone": (weights(upside_down), "weights: odd, monotone, idempotent as declared"),
    "nan for zeros": (weights(poisoned_by_zeros), "zero, constant and one-element weights give finite values"),
    "state in no state_dict": (weights(counting), RESUME),
    "sign of a scale's gradient": (_ttq, LEARNED),
    "mean for sum": (_pact, LEARNED),
    "gradient beyond the clip": (_leaky, "inputs: monotone, idempotent, clipped as declared"),
    "never float": (_not_float, FLOAT_AT_32),
    "biased": (_biased, UNBIASED),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_fault_is_found_by_its_property(what: str) -> None:
    build, name = PLANTED[what]
    method = build()
    one = MethodUnderTest("planted", lambda bits: method, method.bits if method.bits != Bits() else Bits(2))
    (prop,) = [p for p in PROPERTIES if p.name == name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qbench.check.kit.PROPERTIES", (prop,))
        (finding,) = check(one)
    assert finding.failures, what
    assert "Error" not in finding.failures[0], finding.failures


def plainly_rounded(quantizer: Ternary, w: Tensor) -> Tensor:
    """TWN's values without a useful gradient: it is zero for w, although the result depends on w."""
    return twn.ternarize_weight(w).detach() + 0 * w.round()


def with_a_live_scale(quantizer: Ternary, w: Tensor) -> Tensor:
    """TWN's values with the scale's derivative and none of the rounding: weights above the
    threshold get some.
    """
    code = twn.ternarize_weight(w).detach().sign()
    return code * ((w * code).sum() / code.abs().sum().clamp(min=1))


def cut_off(quantizer: Ternary, w: Tensor) -> Tensor:
    return twn.ternarize_weight(w).detach()


class Rounded(Quantizer):
    """DoReFa's activations without its straight-through gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.clamp(0, 1) * 3).round() / 3

    def grid(self, x: Tensor) -> Grid:
        return Grid((torch.arange(4) / 3).reshape(1, -1, 1).to(x))


class Unlearned(pact.PACTActivation):
    """A learned clip on which, for autograd, the result does not depend."""

    def forward(self, x: Tensor) -> Tensor:
        return pact.quantize_activation(x, self.alpha.detach(), self.bits)


class RoundedOutput(Quantizer):
    """Rounds a layer's output, and so its gradient to zero."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return (y * 64).round() / 64


def _rounded() -> Method:
    method = dorefa.build(w=32, a=2)
    return replace(method, traits=frozenset(), supported_bits={"a": (2, 32)}, input=lambda name, layer, bits: Rounded())


def _unlearned() -> Method:
    return replace(pact.build(w=32, a=2), input=lambda name, layer, bits: Unlearned(bits, 1.0, 0.0))


def _behind() -> Method:
    return replace(twn.build(), output=lambda name, layer, bits: RoundedOutput())


GRADIENTLESS = {
    "weights rounded": (weights(plainly_rounded), "its weights is zero everywhere"),
    "weights rounded, scale not": (weights(with_a_live_scale), "its weights is zero everywhere"),
    "weights detached": (weights(cut_off), "its weights get no gradient"),
    "weights neither trained nor fixed": (lambda: replace(dq.build(), prepare=None), "`requires_grad_(False)`"),
    "inputs rounded": (_rounded, "its inputs is zero everywhere"),
    "outputs rounded": (_behind, "its outputs is zero everywhere"),
    "clip detached": (_unlearned, "its learned parameters get no gradient"),
}


def finding_of_reach(method: Method) -> Finding:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qbench.check.kit.PROPERTIES", [p for p in PROPERTIES if p.name == REACH])
        (finding,) = check(MethodUnderTest("planted", lambda bits: replace(method, bits=bits), method.bits))
    return finding


@pytest.mark.parametrize("what", GRADIENTLESS)
def test_missing_gradients_are_found(what: str) -> None:
    build, message = GRADIENTLESS[what]
    failures = finding_of_reach(build()).failures
    assert failures
    assert message in failures[0], failures
    assert "learned" in message or "`straight_through` in qbench/quant/ops.py" in failures[0], failures


def test_no_other_property_checks_that_weights_get_a_gradient() -> None:
    method = weights(plainly_rounded)()
    plain = MethodUnderTest("planted", lambda bits: method if bits == method.bits else twn.build(w=bits.w), method.bits)
    assert [finding.name for finding in check(plain) if finding.failures] == [REACH]


@pytest.mark.parametrize(
    ("build", "applicable"),
    [
        (lambda: inq.build(portions=(0.95, 1.0)), True),  # a weight in twenty is free in the first epoch
        (lambda: inq.build(portions=(1.0,)), False),  # none is
        (dq.build, True),  # its points, not its weights
        (qcnn.build, False),
        (lambda: qd.build(trained=False), False),
    ],
)
def test_weights_that_are_not_trained_need_no_gradient(build: Callable[[], Method], applicable: bool) -> None:
    finding = finding_of_reach(build())
    assert not finding.failures
    assert bool(finding.widths) == applicable
    assert bool(finding.reason) != applicable


def test_properties_that_are_not_applicable_are_named_and_counted() -> None:
    """Weights rounded to nearest, without a trait, a learned parameter or a quantized input."""
    one = MethodUnderTest("bare", lambda bits: replace(twn.build(w=bits.w), traits=frozenset()), Bits(2))
    findings = check(one)
    assert {finding.name for finding in findings if not finding.widths} == {
        "weights: odd, monotone, idempotent as declared",
        "inputs: monotone, idempotent, clipped as declared",
        "inputs: saved as integers with the same results, as declared",
        LEARNED,
        UNBIASED,
    }
    text = report(one, findings)
    assert f"not applicable: {UNBIASED}  (the method's rounding is deterministic)" in text
    assert "clipped as declared  (the method does not quantize inputs)" in text
    assert "(the method does not declare odd or monotone or idempotent)" in text
    assert "bare: 9 properties hold, 5 are not applicable, " in text


@pytest.mark.parametrize(
    ("findings", "verdict"),
    [
        ([Finding("a", 1), Finding("b", 2)], "2 properties hold"),
        ([Finding("a", 1), Finding("b", reason="why")], "1 property holds, 1 is not applicable"),
        ([Finding("a", reason="why")], "0 properties hold, 1 is not applicable"),
        ([Finding("a", 1, failures=["w2"]), Finding("b", 1)], "1 property does not hold, 1 holds"),
        ([Finding("a", 1, failures=["w2"])] * 2, "2 properties do not hold, 0 hold"),
    ],
)
def test_the_last_line_counts_properties(findings: list[Finding], verdict: str) -> None:
    one = MethodUnderTest("one", lambda bits: twn.build(), Bits(2))
    assert report(one, findings).splitlines()[-1] == f"one: {verdict}, 0.0 s"


def checked(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `qbench check` in a folder."""
    return qbench("check", *words, cwd=folder)


def test_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(
        "from dataclasses import replace\n"
        "from torch import nn\n"
        "from qbench.methods import twn\n"
        "class Bad(twn.TWNWeight):\n"
        "    def forward(self, w):\n"
        "        return super().forward(w) * 1.01\n"
        "def build(*, w: int = 2):\n"
        "    return replace(twn.build(w=w), name='planted', weight=lambda name, layer, bits: Bad())\n"
    )

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return checked(tmp_path, *words)

    good, bad, unknown, nothing = run("twn"), run("planted:build"), run("method=nosuch"), run()
    for refused in (["ttq", "dorefa"], ["ttq", "--cfg=job"], ["ttq", "bits.w=5"]):
        assert cli(["check", *refused]) == 2, refused
    assert good.returncode == 0, good.stdout + good.stderr
    assert "twn: 10 properties hold, 4 are not applicable, " in good.stdout
    assert bad.returncode == 1
    assert "does not hold:  levels" in bad.stdout
    assert "values are not on" in bad.stdout
    assert unknown.returncode == nothing.returncode == 2
    assert "did you mean" in unknown.stderr or "no such method" in unknown.stderr


@pytest.mark.full
def test_the_command_line_with_options_and_another_property(tmp_path: Path) -> None:
    (tmp_path / "rounded.py").write_text(
        "from dataclasses import replace\n"
        "from qbench.methods import twn\n"
        "class Bad(twn.TWNWeight):\n"
        "    def forward(self, w):\n"
        "        return super().forward(w).detach() + 0 * w.round()\n"
        "def build(*, w: int = 2):\n"
        "    return replace(twn.build(w=w), name='rounded', weight=lambda name, layer, bits: Bad())\n"
    )

    for holds in (["bwn", "activation=hwgq"], ["xnor", "method.scale=K"]):
        assert cli(["check", *holds]) == 0, holds
    flat = checked(tmp_path, "rounded:build")
    assert flat.returncode == 1
    assert f"does not hold:  {REACH}" in flat.stdout
    assert "1 property does not hold" in flat.stdout
