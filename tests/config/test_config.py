"""The configuration: what is refused and how, what follows from a key, which runs are the same."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Configure, tiered
from omegaconf import OmegaConf

from qbench.config import compose, groups
from qbench.config.fields import parse_bits
from qbench.config.hydra_sources import OwnYaml
from qbench.config.identity import run_identity
from qbench.config.schema import to_dict
from qbench.config.validate import from_dict
from qbench.errors import ConfigError
from qbench.experiment.planned_run import planned_run
from qbench.runs.directory import directory_name
from qbench.system.files import read_yaml

REFUSED = {
    "method=dorfa": ("method=dorfa", "did you mean dorefa?", "allowed: apot, bwn, dorefa"),
    "metod=dorefa": ("metod", "did you mean method?"),
    "model=resnet9": ("model=resnet9", "resnet8"),
    "experiment=nosuch": ("experiment=nosuch", "smoke"),
    "optim@pretrain.optim=adm": ("adm", "did you mean adam?"),
    "+bits.x=3": ("bits.x", "bits.w, bits.a, bits.g"),
    "bits.x=3": ("bits.x", "bits.w, bits.a, bits.g"),
    "+foo=1": ("foo", "no such key"),
    "bits.w=two": ("bits.w=two", "whole number"),
    "bits.w=0": ("bits.w=0", "1 to 32"),
    "bits.w=33": ("bits.w=33", "1 to 32"),
    "bits=w2b3": ("bits=w2b3", "w2a2g6"),
    "bits=w99": ("bits.w=99", "1 to 32"),
    "optim.lr=nan": ("optim.lr=nan", "above 0"),
    "optim.lr=inf": ("optim.lr=inf", "above 0"),
    "optim.lr=abc": ("optim.lr=abc", "a number"),
    "optim.lrr=1": ("optim.lrr", "did you mean optim.lr?"),
    "optim.lr_end=0": ("optim.lr_end=0", "exponential"),
    "optim.momentum=0.5": ("optim.momentum", "no such key"),
    "optim=dorefaa": ("optim=dorefaa", "did you mean dorefa?"),
    "optim.name=lamb": ("optim.name=lamb", "adam, adamw, radam, sgd"),
    "optim.accumulate=0": ("optim.accumulate=0", "from 1"),
    "optim.warmup=-1": ("optim.warmup=-1", "from 0"),
    "optim.warmup=30": ("optim.warmup=30", "must be below epochs=30"),
    "pretrain.optim.warmup=60": ("pretrain.optim.warmup=60", "must be below pretrain.epochs=60"),
    "optim.decay_until=0": ("optim.decay_until=0", "above 0"),
    "optim.decay_norm_and_bias=some": ("optim.decay_norm_and_bias=some", "true or false"),
    "pretrain.optim.quantizer_lr=0.1": ("pretrain.optim.quantizer_lr", "type optim.quantizer_lr"),
    "optim.quantizer_decay=-1": ("optim.quantizer_decay=-1", "from 0"),
    "pretrain.optim.lr=-1": ("pretrain.optim.lr=-1", "above 0"),
    "seed=-1": ("seed=-1", "from 0"),
    "seed=1.5": ("seed=1.5", "whole number"),
    "seed=[": ("seed=[", "KEY=VALUE"),
    "epochs=-1": ("epochs=-1", "from 0"),
    "layers.first=abc": ("layers.first=abc", "float, same, a number of bits"),
    "layers.first=8.5": ("layers.first=8.5", "float, same, a number of bits"),
    "layers.rules={conv1: 0}": ("layers.rules[conv1]=0", "float, same, a number of bits"),
    "runtime.threads=0": ("runtime.threads=0", "from 1"),
    "init=nowhere": ("init=nowhere", "scratch"),
    "method=null": ("method=null", "no such method", "dorefa"),
    "optim=null": ("optim=null", "no such optim", "sgd"),
    "bits=2": ("bits=2", "w2a2g6"),
    "runtime=[1]": ("runtime=[1]", "must be one value, not a list", "type runtime=1"),
    "pretrain.optim=adam": ("pretrain.optim=adam", "optim@pretrain.optim=NAME"),
    "layers.rules=abc": ("layers.rules=abc", "{layer1.*: 8}"),
    "seed=null": ("seed=None", "a value"),
    "seed=1,2": ("seed=1,2", "put -m first"),
    "init=": ("init=", "scratch"),
    "init=é": ("init=é", "quote special characters"),
    "optim.ema=1": ("optim.ema=1", "below 1"),
    "model.act=odd": ("model.act=odd", "auto, keep, fused"),
    "~method": ("~method", "type method=NAME"),
    "~optim.schedule": (
        "~optim.schedule: this key cannot be removed",
        "type optim.schedule=VALUE; allowed: constant, lin",
    ),
    "~optim.schedule=exponential": ("~optim.schedule=exponential", "type optim.schedule=VALUE"),
    "~pretrain.optim.lr": ("~pretrain.optim.lr", "type pretrain.optim.lr=VALUE; allowed: a number above 0"),
    "~optim.ema": ("~optim.ema", "type optim.ema=null"),
    "~seed": ("~seed", "type seed=VALUE"),
    "~layers": ("~layers", "type layers=NAME"),
    "~layers.rules": ("~layers.rules", "type layers.rules=null"),
    "~dataset.val": ("~dataset.val", "type dataset.val=VALUE"),
    "layers.rules={conv1: 8, layer1.*: 4, conv1: 2}": ("conv1 must be typed once",),
    "layers.rules={conv1: 8, conv1: 8}": ("conv1 must be typed once",),
    "claim={a: {b: 1, b: 2}}": ("b must be typed once",),
    "method=no.such.module:build": ("no.such.module:build", "No module named"),
    "--frobnicate": ("--frobnicate", "no such flag"),
    "--cfg=jop": ("--cfg jop", "job, hydra, all"),
    "--package": ("--package", "a value"),
    "frobnicate": ("frobnicate", "KEY=VALUE"),
}


LISTS = {  # a list where one option is wanted -> the last line of the message
    "bits=[w2a2,w4a4]": "one run for each value: -m bits=w2a2,w4a4",
    "bits=[w1,w2]": "one run for each value: -m bits=w1,w2",
    "optim=[sgd,adam]": "one run for each value: -m optim=sgd,adam",
    "dataset=[digits,glyphs]": "one run for each value: -m dataset=digits,glyphs",
    "method=[float,'dorefa']": "one run for each value: -m method=float,dorefa",
    "model=[resnet8,lenet]": "one run for each value: -m model=resnet8,lenet",
    "activation=[none,hwgq]": "one run for each value: -m activation=none,hwgq",
    "layers=[default,default]": "one run for each value: -m layers=default,default",
    "optim@pretrain.optim=[sgd,adam]": "one run for each value: -m optim@pretrain.optim=sgd,adam",
    "experiment=[smoke,claims/qd_kd]": "one run for each value: -m experiment=smoke,claims/qd_kd",
    "+bits=[w2,w4]": "one run for each value: -m bits=w2,w4",
    "bits=[w2]": "type bits=w2",
    "bits=[]": "type bits=VALUE",
    "-m bits=[w2,w4],w8": "one run for each value: -m bits=w2,w4",
    "-m bits=choice(w8,[w2,w4])": "one run for each value: -m bits=w2,w4",
}


@pytest.mark.parametrize("words", LISTS)
def test_a_list_where_one_option_is_wanted_does_not_take_the_last(words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose.configurations(words.split())
    first, last = str(caught.value).splitlines()
    assert first.endswith("must be one value, not a list"), first
    assert last == LISTS[words]


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("bits=w2a2 bits=w4a4", "-m bits=w2a2,w4a4"),
        ("method=dorefa method=ttq", "-m method=dorefa,ttq"),
        ("optim@pretrain.optim=adam optim@pretrain.optim=sgd", "-m optim@pretrain.optim=adam,sgd"),
        ("-m dataset=digits,glyphs dataset=mnist", "-m dataset=digits,glyphs,mnist"),
        ("epochs=1 epochs=2", "-m epochs=1,2"),
        ("bits.w=2 seed=0 bits.w=3", "-m bits.w=2,3"),
        ("-m seed=0,1 seed=2", "-m seed=0,1,2"),
        ("optim.lr=0.1 ++optim.lr=0.2", "-m optim.lr=0.1,0.2"),
    ],
)
def test_a_key_that_is_typed_twice_does_not_take_the_last(words: str, fix: str) -> None:
    with pytest.raises(ConfigError, match="must be typed once") as caught:
        compose.configurations(words.split())
    assert str(caught.value).endswith(fix)


def test_a_list_of_options_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\ndefaults:\n  - override /bits: [w2, w4]\n")
    with pytest.raises(ConfigError, match="must be one value, not a list"):
        compose.configurations(["experiment=mine", "--config-dir", str(tmp_path)])


def test_keys_of_a_network_that_the_chosen_one_does_not_have_may_be_removed(configure: Configure) -> None:
    config = configure("experiment=smoke", "model=mobilenet_v2")
    assert config.model == configure("model=mobilenet_v2").model
    config = configure("experiment=smoke", "model=mobilenet_v2", "~model.width")
    assert "width" not in config.model


def test_a_typed_option_has_priority_over_an_experiment(configure: Configure) -> None:
    """The experiment sets bits and keys of its optimizer, and the experiment smoke sets the width of its network."""
    experiment = "experiment=lsq/resnet18_w2a2"
    own = configure(experiment)
    assert (own.bits.resolved().w, own.optim.name, own.optim.lr) == (2, "sgd", 0.01)
    assert configure(experiment, "bits=w8a8").bits.resolved() == (8, 8, 32)
    runs = compose.configurations(["-m", experiment, "bits=w2a2,w4a4", "optim=adam,sgd_step"])
    assert [(run.bits.w, run.optim.name) for run in runs] == [(2, "adam"), (2, "sgd"), (4, "adam"), (4, "sgd")]
    adam = configure(experiment, "optim=adam", "optim.batch_size=32")
    plain = configure("method=lsq", "optim=adam", "optim.batch_size=32")
    assert adam.optim == plain.optim
    assert adam.pretrain == own.pretrain
    assert configure(experiment, "layers=default").layers == own.layers, "the experiment has the same option"
    assert configure("experiment=smoke", "model=mobilenet_v2").model == configure("model=mobilenet_v2").model


def test_experiment_files_have_only_choices_and_keys() -> None:
    """`typed_groups` assumes that these files include no other files."""
    for name in groups.option_names("experiment"):
        defaults = OmegaConf.load(groups.option_file("experiment", name)).get("defaults", [])
        words = [entry if isinstance(entry, str) else next(iter(entry)) for entry in defaults]
        assert all(word == "_self_" or word.startswith("override /") for word in words), (name, words)


def test_an_option_that_the_experiment_chose_itself_keeps_the_keys_of_the_experiment(configure: Configure) -> None:
    experiment = "experiment=gupta/mnist_cnn_stochastic_fl12"
    own = configure(experiment)
    assert own.method["integer_weights"] == 4
    assert configure(experiment, "method=gupta", "optim=sgd", "dataset=mnist") == own
    assert configure(experiment, "optim@pretrain.optim=adam").pretrain.optim.name == "adam"


def test_the_printed_configuration_is_that_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=lsq/resnet18_w2a2", "bits=w8a8", "--cfg", "job"]
    assert compose.configurations([*words, "--package", "bits"]) == []
    assert "w: 8\na: 8\n" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--package bit: the configuration has no such key"):
        compose.configurations([*words, "--package", "bit"])


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {launcher: {n_jobs: 2}}\n",
        "defaults:\n  - override /hydra/launcher: joblib\n",
        "defaults:\n  - /hydra/launcher: joblib\n",
    ],
)
def test_keys_of_hydra_in_a_file_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    with pytest.raises(ConfigError, match="has no effect in a file\ntype it on the command line: hydra/launcher=NAME"):
        compose.configurations(["experiment=mine", "--config-dir", str(tmp_path)])


def test_a_pattern_that_is_twice_in_a_file_of_rules_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text("conv1: 8\nlayer1.*: 4\nconv1: 2\n")
    with pytest.raises(ConfigError, match="line 3: conv1 occurs twice"):
        compose.configurations(["method=dorefa", f"layers=@{file}"])


def test_two_files_of_rules_that_a_word_could_name_are_refused(tmp_path: Path) -> None:
    """Hydra removes the suffix of a typed name, so that both words name either file."""
    for name in ("rules", "rules.yaml"):
        (tmp_path / name).write_text("conv1: 8\n")
    for name in ("rules", "rules.yaml"):
        with pytest.raises(ConfigError, match="there are two such files"):
            compose.configurations(["method=dorefa", f"layers=@{tmp_path / name}"])


@pytest.mark.parametrize("name", ["optim/sgd.yaml", "experiment/smoke.yaml", "method/dorefa.yaml"])
def test_a_users_file_with_the_name_of_one_of_ours_is_not_passed_over(tmp_path: Path, name: str) -> None:
    """Hydra would take ours, `optim.lr=0.1`."""
    file = tmp_path / name
    file.parent.mkdir()
    file.write_text("name: sgd\nlr: 0.7\n")
    words = ["method=dorefa", "optim=sgd", "--config-dir", str(tmp_path)]
    with pytest.raises(ConfigError, match=f"{name}: qbench has a file of this name"):
        compose.configurations(words)
    shutil.copy(groups.conf_directory() / name, file)
    (config,) = compose.configurations(words)
    assert config.optim.lr == 0.1
    file.rename(file.with_name("mine.yaml"))
    compose.configurations(words)


@pytest.mark.parametrize("word", tiered(REFUSED, list(REFUSED)[::2]))
def test_refused_in_three_lines_that_name_the_key(configure: Configure, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure("method=dorefa", word) if not word.startswith(("method", "~")) else configure(word)
    message = str(caught.value)
    for phrase in REFUSED[word]:
        assert phrase in message, message
    assert len(message.splitlines()) <= 3


def test_refused_by_the_builders_before_any_work(configure: Configure) -> None:
    from qbench.experiment.run import run

    cases = {
        "model.depth=9": "model.depth=9",
        "model.depth=x": "model.depth=x: must be a whole number",
        "method.activation=relu": "method.activation=relu: must be one of clip, abs, tanh",
        "dataset.val=1": "dataset.val=1",
        "dataset.val=0.9999": "leaves no images to train on",
        "dataset.val=-0.1": "dataset.val=-0.1",
        "layers.downsample=8": "layers.downsample: matches no layer",
        "layers.rules={nosuch*: 8}": "rules[nosuch*]: matches no layer; the layers are conv1",
        "model.norm=odd": "model.norm=odd",
        "dataset.pad=-1": "dataset.pad=-1: must be 0 to 7",
        "runtime.device=meta": "runtime.device=meta: must be",
        "runtime.device=tpu9": "runtime.device=tpu9",
    }
    for word, phrase in cases.items():
        config = configure("method=dorefa", word)
        with pytest.raises(ConfigError) as caught:
            run(planned_run(config))
        assert str(caught.value).startswith(word.partition("=")[0])
        assert phrase in str(caught.value)
    assert not list(Path(config.out).iterdir())


def test_unset_widths_come_from_the_method(configure: Configure) -> None:
    assert str(configure("method=dorefa").bits) == "w2a32g32"
    assert str(configure("method=dorefa", "bits.a=4").bits) == "w2a4g32"
    assert str(configure("method=dorefa", "bits=w3a4g5").bits) == "w3a4g5"
    assert str(configure("method=dorefa", "bits=a4").bits) == "w2a4g32"
    assert str(configure().bits) == "w32a32g32"


def test_the_same_run_however_it_is_typed(configure: Configure) -> None:
    same = [
        configure("method=dorefa"),
        configure("method=dorefa", "bits.w=2"),
        configure("method=dorefa", "bits=w2a32"),
        configure("method=dorefa", "init=float", "runtime.log_every=3", "runtime.device=cpu", "rerun=true"),
    ]
    assert len({directory_name(run_identity(config)) for config in same}) == 1
    other = [
        "bits.w=3",
        "seed=1",
        "epochs=2",
        "optim.lr=0.5",
        "layers.last=8",
        "runtime.threads=2",
        "init=scratch",
    ]
    found = {directory_name(run_identity(configure("method=dorefa", word))) for word in other}
    assert len(found) == len(other)
    assert directory_name(run_identity(same[0])) not in found


def test_the_place_of_published_files_is_no_part_of_the_identity(configure: Configure) -> None:
    first, second = (configure("dataset=cifar10", f"dataset.root={root}") for root in ("a", "b"))
    assert directory_name(run_identity(first)) == directory_name(run_identity(second))
    assert directory_name(run_identity(first)) != directory_name(
        run_identity(configure("dataset=cifar10", "dataset.flip=false"))
    )


def test_protocol_ignores_what_belongs_to_the_method(configure: Configure) -> None:
    first = run_identity(configure("method=dorefa")).protocol
    assert (
        run_identity(configure("method=dorefa", "bits=w4a4", "seed=3", "model.act=keep", "runtime.threads=2")).protocol
        == first
    )
    assert run_identity(configure("method=dorefa", "epochs=7")).protocol != first


def test_a_float_run_is_the_baseline_of_the_others(configure: Configure) -> None:
    from qbench.config.schema import baseline_config

    run = configure("method=dorefa", "bits=w2a2", "epochs=3", "optim.lr=0.5", "layers.first=8", "seed=4")
    assert directory_name(run_identity(baseline_config(run))) == directory_name(
        run_identity(configure("method=float", "seed=4"))
    )
    assert directory_name(run_identity(baseline_config(run))) == directory_name(
        run_identity(configure("method=float", "seed=4", "epochs=9", "init=scratch"))
    )
    control = configure("method=float", "init=float", "epochs=3")
    assert not control.is_baseline
    assert control.epochs == 3


def test_the_command_line_overrides_an_experiment_file(configure: Configure) -> None:
    assert configure("method=dorefa", "experiment=smoke").epochs == 1
    assert configure("method=dorefa", "experiment=smoke", "epochs=5").epochs == 5
    assert configure("epochs=5", "experiment=smoke", "method=dorefa").epochs == 5


@pytest.mark.parametrize(("before", "now"), [(False, "recompute"), (True, "codes")])
def test_a_configuration_that_an_earlier_version_stored_is_read(configure: Configure, before: bool, now: str) -> None:
    config = configure("method=dorefa", f"runtime.activation_memory={now}")
    values = to_dict(config)
    del values["runtime"]["activation_memory"]
    values["runtime"]["compress_activations"] = before
    assert from_dict(values) == config


def test_a_stored_configuration_comes_back(configure: Configure) -> None:
    config = configure("method=dorefa", "bits=w2a2g6", "layers.rules={layer1.*: 8}", "optim=sgd_step")
    again = from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config))))
    assert again == config
    assert directory_name(run_identity(again)) == directory_name(run_identity(config))


GROUPS = sorted({*groups.group_names()} - {"experiment"})  # see tests/methods/test_method_model_pairs.py


@pytest.mark.parametrize("group", tiered(GROUPS, {*GROUPS} - {"method", "model", "activation", "dataset", "optim"}))
def test_every_yaml_of_the_tree_composes(configure: Configure, group: str) -> None:
    for name in groups.option_names(group):
        config = configure(f"{group}={name}", *(["bits.a=2"] if group == "activation" and name != "none" else []))
        node = getattr(config, group, None)
        if isinstance(node, dict):
            assert node["name"] == name
        if group == "optim":
            configure(f"optim@pretrain.optim={name}")


def test_widths_are_parsed() -> None:
    assert parse_bits("w2a2g6") == {"w": 2, "a": 2, "g": 6}
    assert parse_bits("a4") == {"w": None, "a": 4, "g": None}
    for text in ("", "2", "w", "a2w2", "w2x2", "w2a2g6 "):
        with pytest.raises(ConfigError):
            parse_bits(text)


def test_a_flag_with_a_value_is_typed_once() -> None:
    with pytest.raises(ConfigError, match="--config-dir must be typed once"):
        compose.sorted_out(["--config-dir", "a", "--config-dir=b"])


def test_flags_may_stand_anywhere() -> None:
    assert compose.sorted_out(["a=1", "-m", "b=2", "--cfg", "job", "-p", "bits", "c=3", "--info"]) == (
        ["-m", "--cfg", "job", "-p", "bits", "--info", "all"], ["a=1", "b=2", "c=3"],
    )  # fmt: skip
    assert compose.sorted_out(["--info", "plugins", "~seed"]) == (["--info", "plugins"], ["~seed"])


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"], ["list", "methods"], ["describe", "dorefa"]])
def test_quick_answers_do_not_import_torch(words: list[str]) -> None:
    code = (
        "import sys; from qbench.cli.main import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'sklearn', 'matplotlib', 'tensorboard', 'torchvision', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert any(word in done.stdout for word in ("dorefa", "resnet8", "DoReFa"))


def test_training_imports_what_it_uses(tmp_path: Path) -> None:
    """Without TensorBoard, torchvision's networks or pictures, their packages are not loaded."""
    code = (
        "import sys; from qbench.cli.main import main; status = main(sys.argv[1:]);"
        "heavy = {'sklearn', 'matplotlib', 'tensorboard', 'torchvision', 'scipy', 'PIL'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    words = ["experiment=smoke", "method=dorefa", "runtime.tensorboard=false", f"out={tmp_path}"]
    own = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}  # other clones of qbench share the user's cache
    shared: dict[str, Any] = {"capture_output": True, "text": True, "cwd": ROOT, "env": own}
    done = subprocess.run([sys.executable, "-c", code, *words], **shared, timeout=120)
    assert done.returncode == 0, done.stderr
    again = code.replace("'scipy'", "'scipy', 'torch'")
    done = subprocess.run([sys.executable, "-c", again, *words], **shared, timeout=60)
    assert done.returncode == 0, "a finished run's repeat needs no torch: " + done.stderr


def test_a_seed_changes_nothing_else(configure: Configure) -> None:
    """Tests share configurations that differ in it (tests/conftest.py)."""
    (config,) = compose.configurations(["method=dorefa", "seed=3"])
    assert configure("method=dorefa", "seed=3", f"out={config.out}") == config
    assert configure("method=dorefa").seed == 0


def test_own_yaml_is_read_like_omegaconfs_and_no_key_is_there_twice(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("lr: 1e-4\nday: 2026-01-02\nsecond: 1:30\non: yes\n")
    assert read_yaml(file, OwnYaml) == OmegaConf.to_container(OmegaConf.load(file))
    file.write_text("lr: 1\nwidth: 2\nlr: 3\n")
    with pytest.raises(ConfigError, match="line 3: lr occurs twice"):
        read_yaml(file, OwnYaml)


def test_numbers_are_names_of_layers(configure: Configure, tmp_path: Path) -> None:
    """`nn.Sequential` names its layers 0, 1, ..."""
    (tmp_path / "rules.yaml").write_text("0: 4\n10: 3\n")
    typed = configure("method=dorefa", "layers.rules={0: 4, 10: 3}")
    assert typed.layers.rules == {"0": 4, "10": 3}
    assert typed == configure("method=dorefa", f"layers=@{tmp_path / 'rules.yaml'}")
    assert (
        run_identity(typed).digest
        == run_identity(configure("method=dorefa", "+layers.rules.0=4", "+layers.rules.10=3")).digest
    )
    with pytest.raises(ConfigError, match=r"Key 1\.5"):
        configure("method=dorefa", "layers.rules={1.5: 4}")
