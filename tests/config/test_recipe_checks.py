"""Recipes: keys that do not fit together are errors, and the options named after papers are what the papers state."""

import pytest
from conftest import ROOT, Configure

from qbench.config.schema import Optim
from qbench.errors import ConfigError
from qbench.experiment.setup import assemble
from qbench.training.schedule import learning_rate

REFUSED = {
    "optim=sgd_step optim.factors=[1,0.1]": "must be numbers above 0, one for the start and one for each milestone",
    "optim=sgd_step optim.factors=[1,0.1,0]": "must be numbers above 0, one for the start and one for each milestone",
    "optim=sgd +optim.factors=[1,0.1,0.01]": "with schedule=step",
    "optim.schedule=one_cycle optim.warmup=1": "has a warm-up of its own",
}


@pytest.mark.parametrize("words", REFUSED)
def test_keys_that_do_not_fit_together_are_refused(words: str, configure: Configure) -> None:
    with pytest.raises(ConfigError, match=REFUSED[words]) as caught:
        configure("method=dorefa", *words.split())
    assert len(str(caught.value).splitlines()) <= 2


ASSEMBLED = {
    "optim.accumulate=1000": r"optim.accumulate=1000: must be at most \d+, the number of batches in an epoch",
    "pretrain.optim.accumulate=1000": r"pretrain.optim.accumulate=1000: must be at most \d+",
    "method=inq optim.warmup=8": "optim.warmup=8: must be shorter than each phase of training",
    "method=pact method.decay=0.1 optim.quantizer_decay=0": "type one of them",
}


@pytest.mark.parametrize("words", ASSEMBLED)
def test_recipes_that_do_not_fit_data_or_method_are_refused(words: str, configure: Configure) -> None:
    with pytest.raises(ConfigError, match=ASSEMBLED[words]):
        assemble(configure("method=dorefa", *words.split()))  # of two words for `method`, the last counts


def test_a_method_decay_at_its_default_gives_way(configure: Configure) -> None:
    assert assemble(configure("method=pact", "optim.quantizer_decay=0")).optim.quantizer_decay == 0


PAPERS = {  # option -> epochs, and (last epoch, learning rate) of each piece
    "apot": (300, [(150, 0.04), (225, 0.004), (300, 4e-4)]),
    "bwn": (55, [(18, 1e-2), (29, 5e-3), (43, 1e-3), (52, 5e-4), (55, 1e-4)]),
    "dorefa": (200, [(100, 1e-3), (200, 5e-4)]),
    "pact": (200, [(60, 0.1), (120, 0.01), (200, 1e-3)]),
    "ttq": (400, [(1, 2e-4), (82, 0.1), (123, 0.01), (300, 1e-3), (400, 2e-4)]),
    "xnor": (55, [(18, 1e-3), (29, 5e-4), (43, 1e-4), (52, 5e-5), (55, 1e-5)]),
}
STEPS = 391


@pytest.mark.parametrize("name", PAPERS)
def test_the_rates_of_a_paper_change_at_its_epochs(name: str, configure: Configure) -> None:
    """The first and the last step of each piece, with as many steps per epoch as CIFAR-10 has."""
    optim = configure("method=dorefa", f"optim={name}").optim
    epochs, pieces = PAPERS[name]
    start = 0
    for stop, rate in pieces:
        for step in (start * STEPS, stop * STEPS - 1):
            assert learning_rate(optim, step, epochs * STEPS) == pytest.approx(rate), step / STEPS
        start = stop


def test_other_values_of_papers(configure: Configure) -> None:
    found = {name: configure("method=dorefa", f"optim={name}").optim for name in (*PAPERS, "hwgq")}
    assert {name: (optim.name, optim.batch_size, optim.weight_decay) for name, optim in found.items()} == {
        "apot": ("sgd", 128, 1e-4), "bwn": ("sgd", 128, 5e-4), "dorefa": ("adam", 128, 0.0),
        "hwgq": ("sgd", 100, 5e-4), "pact": ("sgd", 128, 2e-4), "ttq": ("sgd", 128, 2e-4), "xnor": ("adam", 800, 0.0),
    }  # fmt: skip
    assert found["dorefa"].eps == 1e-5
    assert (found["hwgq"].schedule, found["hwgq"].lr, found["hwgq"].lr_end, found["hwgq"].bias_lr) == (
        "linear",
        0.01,
        0,
        2,
    )
    assert found["bwn"].decay_until * 55 == pytest.approx(29)
    assert found["bwn"].decay_until < 29 / 55, "rounded down: epoch 30 has no decay"


def test_every_option_of_a_paper_states_a_verified_source() -> None:
    for name in (*PAPERS, "hwgq"):
        text = (ROOT / "conf" / "optim" / f"{name}.yaml").read_text()
        assert "# Source: " in text, name
        assert "(verified)" in text, name


def test_the_defaults_of_new_keys_are_in_every_option(configure: Configure) -> None:
    """A key can be typed without `+` whatever the option."""
    defaults = Optim(lr=1.0)
    for file in (ROOT / "conf" / "optim").glob("[a-z]*.yaml"):
        optim = configure("method=dorefa", f"optim={file.stem}", "optim.warmup=1", "optim.accumulate=1").optim
        assert optim.warmup == 1
        assert optim.quantizer_decay is defaults.quantizer_decay
