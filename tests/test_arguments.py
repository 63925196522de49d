"""Command lines and folders of configurations, from careless to hostile: accepted, or refused in one sentence."""

import os
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from alignbench.arguments import check, check_overrides, endless, quoted
from alignbench.configuration import CONF, explain, plain, target
from alignbench.errors import AlignbenchError, ConfigError

OWN = "results/reference/shapes/geneval/flow_grpo@lr=1e-4,beta=0/seed0/lora"
ODD = [
    *(OWN, "a,b", "a#b", "a[1]", "a{b}", "a(b)", "ü/é", "日本", "a:b c", "x y", 'say "so"', "it's", "back\\slash\\"),
    *("a%b", "=", "~/x", "a@b", "!", "a\tb"),
]


def refusal(override: str) -> str:
    """What is said of a setting; nothing if it is accepted."""
    try:
        check_overrides([override])
    except ConfigError as error:
        return str(error)
    return ""


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("evaluate", list(overrides))


@pytest.mark.parametrize("path", ODD)
def test_a_path_is_read_or_its_quoted_form_is_given_and_works(path: str) -> None:
    override = f"checkpoint={path}"
    told = refusal(override)
    if told:
        form = quoted(override)
        assert form is not None
        assert form in told
        assert "\n" not in told
        (override,) = shlex.split(form)  # what the shell makes of it
    assert refusal(override) == ""
    assert composed(override).checkpoint == path


@given(st.text(st.characters(exclude_characters="$", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30))
@settings(deadline=None, max_examples=200)
def test_every_path_without_an_interpolation_has_a_quoted_form(path: str) -> None:
    form = quoted(f"results={path}")
    assert form is not None
    check_overrides(shlex.split(form))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=null", "method=null: method takes the name of a configuration; choose one of: awm, "),
        ("method=5", "method=5: method takes the name of a configuration"),
        ("method=", "method=: method takes the name of a configuration"),
        ("evaluation=null", "evaluation takes the name of a configuration; choose one of: "),
        ("hydra/launcher=null", "hydra/launcher takes the name of a configuration"),
        ("~method", "~method: a run needs a method; choose one of: awm, "),
        ("~model", "~model: a run needs a model; choose one of: "),
        ("nonsense", "'nonsense' is no setting: write KEY=VALUE"),
        ("seed=0,1", "seed=0,1 has several values. One text with commas is quoted: 'seed=\"0,1\"'"),
    ],
)
def test_settings_that_cannot_be_read(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_overrides([override])
    assert message in str(refused.value)


def test_several_values_are_for_sweeps() -> None:
    check(["-m", "seed=0,1", "method=awm,dpo"])
    check(["seed=0,1", "hydra.mode=MULTIRUN"])
    check(["~experiment", "~tracker", "experiment=none", "+method.new=1", "evaluation.fractions=[0,1]"])


@pytest.mark.parametrize("option", ["--experimental-rerun=x.pickle", "--experimental-re=x"])
def test_a_pickle_is_not_loaded(option: str) -> None:
    with pytest.raises(ConfigError, match="loads a pickle"):
        check([option])


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)
ENDLESS = {
    "bomb": (BOMB, "has more than 100,000 values once its aliases are expanded"),
    "itself": ("a: &x {b: [1, *x]}", "refers to itself: *x stands inside &x"),
    "deep": (f"a: {'[' * 5000}{']' * 5000}", "is nested more than 50 levels deep"),
    "large": ("#" * 2**20 + "\n", "bytes: a configuration has at most"),
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("group", [".", "experiment", "method/own", "hydra/launcher"])
def test_files_that_have_no_end(tmp_path: Path, name: str, group: str) -> None:
    path = tmp_path / group / "x.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(ENDLESS[name][0])
    with pytest.raises(ConfigError) as refused:
        check(["--config-dir", str(tmp_path)])
    assert str(refused.value).startswith(f"{path} ")
    assert ENDLESS[name][1] in str(refused.value)


def test_files_that_are_none_and_files_that_are_nobodys_business(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "x.yaml").mkdir()
    (tmp_path / "experiment" / "broken.yaml").write_text("a: [")  # no setting names it
    (tmp_path / "experiment" / "binary.yaml").write_bytes(b"\xff\x00")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "bomb.yaml").write_text(BOMB)
    check(["--config-dir", str(tmp_path)])
    os.mkfifo(tmp_path / "experiment" / "pipe.yaml")
    with pytest.raises(ConfigError, match="is no regular file"):
        check(["--config-dir", str(tmp_path)])


def test_the_suites_own_files_are_fine() -> None:
    assert [problem for path in CONF.rglob("*.yaml") if (problem := endless(path))] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1, 2\nb: }", "x.yaml, line 2, is no configuration: expected ',' or ']'"),
        (b"\xff\xfe\x00\x01", "x.yaml is no configuration: a YAML file is text in UTF-8, and byte 0 is none"),
        (b"a: \x00", "x.yaml is no configuration: a YAML file is text, without the character 0"),
        (b"a: !!python/object/apply:os.system [ls]", "x.yaml, line 1, is no configuration: could not determine"),
        (b"seed: 1\nseed: 2", "x.yaml, line 2, is no configuration: found duplicate key seed"),
        (b"a: &a [*a]", "x.yaml refers to itself"),
        (b"# @package _global_\nresults: ${nope}", "results: Interpolation key 'nope' not found"),
        (b"# @package _global_\nresults: ${results}", "results: Recursive interpolation detected"),
        (b"# @package _global_\nresults: ${oc.env:NOWHERE}", "Environment variable 'NOWHERE' not found"),
        (b"- a\n- b\n", "no setting 'experiment'"),
    ],
)
def test_a_folder_of_configurations_with_a_broken_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "x.yaml").write_bytes(content)
    command = [sys.executable, "-m", "alignbench", "--config-dir", str(tmp_path), "experiment=x", "dry_run=true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("alignbench: ")
    assert message in last


def test_a_quoted_path_of_a_run_folder_in_a_sweep_and_with_a_percent_sign(tmp_path: Path) -> None:
    results = tmp_path / "100%s,lr=1e-4 é"
    form = quoted(f"results={results}")
    script = f'"{sys.executable}" -m alignbench -m dry_run=true plan.flops_per_second=1e9 seed=0 {form}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "sweep: 1 planned" in done.stdout
    assert [path.name for path in results.iterdir()] == [".sweep"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "where._target_ is missing: it must be the full name of a class"),
        (5, "where._target_ is 5: it must be the full name of a class"),
        (["a"], r"where._target_ is \['a'\]: it must be the full name of a class"),
        ("", "where._target_ is '', which cannot be imported"),
        ("..", r"where._target_ is '\.\.', which cannot be imported"),
        ("a b", "where._target_ is 'a b', which cannot be imported: No module named 'a b'"),
        ("os", "where._target_ is 'os', a module: it must be the name of a class"),
        ("os.sep", "where._target_ is 'os.sep', a str: it must be the name of a class"),
    ],
)
def test_targets_that_are_no_names(name: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        target({"_target_": name} if name is not None else {}, "where")


def test_a_setting_of_another_choice_is_not_its_own_correction() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(Exception, match="pickscore") as refused:
        compose("config", ["reward.parts.pickscore.weight=1"])
    told = explain(refused.value, CONF)
    assert told.startswith("'reward.parts.pickscore.weight' is no setting of what was chosen, but of reward=pickscore")


TEXTS = ["${a}", "${a.b}", "${", "${oc.env:HOME}", "${b}", "???", "&a", "*a", "!!python/name:os", "a: b", "- a", "%"]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(TEXTS)
TREES = st.recursive(
    LEAVES, lambda node: st.lists(node, max_size=3) | st.dictionaries(st.text(max_size=4), node, max_size=3)
)


@given(st.binary(max_size=60) | st.text("ab:[]{}&*!,-?|>'\"%#\n ${}", max_size=60).map(str.encode))
@settings(deadline=None, max_examples=1000)
def test_any_yaml_is_looked_at_in_bounded_time(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(content)
    endless(path)


@given(st.dictionaries(st.sampled_from(["a", "b", "seed", "model"]), TREES, max_size=4))
@settings(deadline=None, max_examples=500)
def test_any_configuration_is_plain_data_or_refused(content: dict[str, object]) -> None:
    try:
        config = OmegaConf.create(content)
    except Exception:  # what OmegaConf does not take never reaches us
        return
    with suppress(AlignbenchError):
        plain(config)
