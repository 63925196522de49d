"""What a user gets wrong, and the sentence that says so; always before work is spent."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf, open_dict

from alignbench import assembly, records, schema
from alignbench.configuration import identity
from alignbench.errors import (
    AlignbenchError,
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    RecordError,
    RewardError,
)
from alignbench.ledger import Budget
from alignbench.methods.method import Needs
from alignbench.run import run
from alignbench.settings import nearest
from tests.conftest import CONF, Compose
from tests.stand_ins import GroupCentred

STEP = "tests.stand_ins"


def command(*arguments: str) -> str:
    """Standard error of a failing `python -m alignbench`."""
    done = subprocess.run(
        [sys.executable, "-m", "alignbench", *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.algorithm.betta=1", "unknown setting 'method.algorithm.betta'. Did you mean 'method.algorithm.beta'?"),
        ("~method.algorithm.betta", "unknown setting 'method.algorithm.betta'. Did you mean 'method.algorithm.beta'?"),
        ("bugdet.flops=1", "Did you mean 'budget.flops'?"),
        ("method=difusion_nft", "unknown method 'difusion_nft'. Did you mean 'diffusion_nft'? Known: "),
        ("reward=genevall", "unknown reward 'genevall'. Did you mean 'geneval'?"),
        (
            "model.policy.guidance_embedding=1",
            "'model.policy.guidance_embedding' is no setting of what was chosen, but of model=flux_dev",
        ),
        ("budget.flops.x=1", "unknown setting 'budget.flops.x'. Did you mean 'budget.flops'?"),
    ],
)
def test_unknown_names_come_with_the_nearest_known_one(override: str, message: str) -> None:
    assert message in command("--cfg", "job", override)


def test_the_nearest_name_is_another_one() -> None:
    assert nearest("beta", ["beta", "betta"]) == " Did you mean 'betta'?"
    assert nearest("a.beta", ["a.beta"]) == ""


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["method.batch.images=0"], ConfigError, "method.batch.images is 0: it must be between 1 and 1,000,000"),
        (["method.batch.updates=3"], ConfigError, "8 images cannot be split into 3 equal updates"),
        (["method.batch.prompts=5"], ConfigError, "needs 5 distinct prompts but the set has 4"),
        (["method.rollout.steps=1"], ConfigError, "rollout steps is 1: at least 2"),
        (["method.rollout.solver=heun"], ConfigError, "choose one of euler, ddim, dpm1, dpm2"),
        (["method.rollout.guidance=0.5"], ConfigError, "guidance is 0.5: 1 means none"),
        (["method.algorithm.beta=0"], ConfigError, "beta is 0; it must be positive"),
        (["method.algorithm.kl=-1"], ConfigError, "kl is -1; it must be 0 or more"),
        (["method=flow_grpo", "method.rollout.stochastic=null"], ConfigError, "flow_grpo needs log-probabilities"),
        (["budget.iterations=null"], BudgetError, "the run would never end"),
        (["budget.iterations=-3"], BudgetError, "budget.iterations is -3: it must be positive"),
        (["evaluation.fractions=[0,0.5]"], ConfigError, "they must increase from 0 to 1"),
        (["model.policy.source=/nowhere/sd3"], CheckpointError, "/nowhere/sd3"),
        (["prompts.path=/nowhere.txt"], DataError, "/nowhere.txt: cannot be read"),
        (["device=cuda"], ConfigError, "torch sees no CUDA device"),
        (["+method.algorithm.gamma=1"], ConfigError, "has no setting 'gamma'"),
        (["method.optimizer.lr=0"], ConfigError, "method.optimizer.lr is 0"),
    ],
)
def test_values_that_cannot_work(
    tiny_run: Compose, overrides: list[str], error: type[AlignbenchError], message: str
) -> None:
    with pytest.raises(error) as raised:
        run(tiny_run(*overrides))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.batch.prompts=abc"], "method.batch.prompts is 'abc': it must be an integer"),
        (["method.batch.images=4.0"], "method.batch.images is 4.0: it must be an integer"),
        (["+method.rollout.x=1"], "method.rollout has no setting 'x'. It has: steps, solver"),
        (["+method.rollout.guidence=1"], "no setting 'guidence'. Did you mean 'guidance'?"),
        (["+method.batch.prompt=1"], "method.batch has no setting 'prompt'. Did you mean 'prompts'?"),
        (["+metod=1"], "the configuration has no setting 'metod'. Did you mean 'method'?"),
        (["~method.algorithm.beta"], "method.algorithm.beta is missing: it must be a number"),
        (["~method.optimizer"], "method.optimizer is missing: it must be a mapping"),
        (["~device"], "device is missing: it must be auto, cpu or cuda"),
        (["method.algorithm.beta=high"], "method.algorithm.beta is 'high': it must be a number"),
        (["method.algorithm.beta=nan"], "method.algorithm.beta is NaN: it must be a number"),
        (["method.algorithm.kl=true"], "method.algorithm.kl is true: it must be a number"),
        (["method.algorithm.times=few"], "method.algorithm.times is 'few': it must be an integer or null"),
        (["method.algorithm.mode=some"], "is 'some': choose all, positive_only, negative_only, one_only or binary"),
        (["method=flow_grpo", "method.algorithm.detach_uncond=1"], "detach_uncond is 1: it must be true or false"),
        (["method.algorithm._target_=alignbench.nothing.There"], "alignbench.nothing.There', which cannot be imported"),
        (["method.optimizer.betas=[0.9]"], "betas is [0.9]: it must be a list of 2 (a number, a number)"),
        (["method.optimizer.betas=[0.9,1.0]"], "betas is [0.9, 1.0]; each must be in [0, 1)"),
        (["method.optimizer.lr=fast"], "method.optimizer.lr is 'fast': it must be a number"),
        (["method.optimizer.eps=0"], "method.optimizer.eps is 0; it must be positive"),
        (["method.optimizer.clip=-1"], "method.optimizer.clip is -1; it must be positive, or 0 not to clip"),
        (["method.optimizer.weight_decay=-0.1"], "method.optimizer.weight_decay is -0.1; it must be 0 or more"),
        (["threads=0"], "threads is 0: it must be between 1 and 1,024, or null for torch's own choice"),
        (["seed=first"], "seed is 'first': it must be an integer"),
        (["device=tpu"], "device is 'tpu': choose auto, cpu or cuda"),
        (["progress=maybe"], "progress is 'maybe': it must be true or false"),
        (["checkpoint_every=often"], "checkpoint_every is 'often': it must be a number"),
        (["budget.nfe=many"], "budget.nfe is 'many': it must be a number or null"),
        (["evaluation.curve.guidance=1.0"], "evaluation.curve.guidance is 1.0: it must be a list (of each a number)"),
        (["evaluation.fractions=1"], "evaluation.fractions is 1: it must be a list (of each a number)"),
        (["model.policy.rank=wide"], "model.policy.rank is 'wide': it must be an integer"),
        (["prompts.split=training"], "prompts.split is 'training': choose train, tuning, test or all"),
        (["name=../x"], "name is '../x': it names a folder, so use letters, digits and any of _ . @ = , + -"),
        (["model.name=a/b"], "model.name is 'a/b': it names a folder"),
        (["method.name=''"], "method.name is '': it names a folder"),
        (["method.optimizer.lr='1e-4'"], "method.optimizer.lr is '1e-4': it must be a number, without quotes"),
        (["method.optimizer.lr=inf"], "method.optimizer.lr is Infinity: it must be a number"),
        (["budget.iterations=inf"], "budget.iterations is Infinity: it must be a number or null"),
        (["budget.iterations=nan"], "budget.iterations is NaN: it must be a number or null"),
        (["model.policy=null"], "model.policy is null: it must be a mapping"),
        (["method.batch=null"], "method.batch is null: it must be a mapping"),
        (["evaluation.curve=null"], "evaluation.curve is null: it must be a mapping"),
        (["method.algorithm._target_=5"], "method.algorithm._target_ is 5: it must be the full name of a class"),
        (["method.algorithm._target_=os.sep"], "is 'os.sep', a str: it must be the name of a class"),
    ],
)
def test_settings_of_another_name_or_type(tiny_run: Compose, overrides: list[str], message: str) -> None:
    config = tiny_run(*overrides)
    with pytest.raises(ConfigError) as raised:
        run(config)
    assert message in str(raised.value)
    assert not Path(config.results).exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed is -1: it must be between 0 and 9,223,372,036,854,775,807"),
        ("seed=9223372036854775808", "seed is 9223372036854775808: it must be between 0 and"),
        (f"seed=1{'0' * 400}", "seed is too large a number: it must be between 0 and"),
        ("threads=1000000", "threads is 1000000: it must be between 1 and 1,024, or null for torch's own choice"),
        ("micro_batch=0", "micro_batch is 0: it must be between 1 and 65,536"),
        ("micro_batch=1000000000", "micro_batch is 1000000000: it must be between 1 and 65,536"),
        ("model.policy.rank=0", "model.policy.rank is 0: it must be between 1 and 4,096"),
        ("model.policy.rank=-4", "model.policy.rank is -4: it must be between"),
        ("model.policy.rank=1000000000", "model.policy.rank is 1000000000: it must be between"),
        ("model.policy.rank=65", "the LoRA rank is 65, but no layer it is added to has a rank above 16"),
        ("model.policy.alpha=0", "model.policy.alpha is 0: it must be between 1e-06 and 1,000,000"),
        ("model.policy.alpha=-1", "model.policy.alpha is -1: it must be between"),
        ("model.policy.max_sequence_length=-1", "model.policy.max_sequence_length is -1: it must be between 0 and"),
        ("model.policy.resolution=-16", "model.policy.resolution is -16: it must be between 8 and 8,192"),
        ("model.policy.resolution=1000000", "model.policy.resolution is 1000000: it must be between 8 and 8,192"),
        ("model.policy.resolution=17", "resolution must be a multiple of"),
        ("method.optimizer.lr=1e10", "method.optimizer.lr is 1e+10; it must be positive and at most 1"),
        (
            "method.optimizer.weight_decay=1e10",
            "method.optimizer.weight_decay is 1e+10; it must be 0 or more",
        ),
        ("method.batch.images=1000000000", "method.batch.images is 1000000000: it must be between 1 and 1,000,000"),
        ("method.batch.images=1000000", "2 prompts x 1000000 images = 2,000,000 images an iteration: at most"),
        ("evaluation.average=2", "evaluation.average is 2: a fraction of the budget in (0, 1]"),
        (
            "evaluation.curve.images_per_tag=0",
            "curve: images_per_tag is 0: it must be between 1 and 100,000",
        ),
        ("evaluation.final.images_per_tag=1000000000", "images_per_tag is 1000000000: it must be between"),
        ("evaluation.curve.guidance=[]", "evaluation curve: guidance is empty, give at least one scale"),
        ("evaluation.final.guidance=[1e9]", "guidance is 1e+09: 1 means none, larger follows the prompt more closely"),
        ("evaluation.curve.steps=1000000000", "rollout steps is 1000000000: it must be between 2 and 10,000"),
    ],
)
def test_values_out_of_every_range(tiny_run: Compose, override: str, message: str) -> None:
    config = tiny_run(override)
    with pytest.raises(ConfigError) as raised:
        run(config)
    assert message in str(raised.value)
    assert not Path(config.results).exists()


@pytest.mark.parametrize(("given", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), (".5", 0.5), ("+1e-3", 1e-3), ("1", 1.0)])
def test_numbers_may_be_written_in_any_way(tiny_run: Compose, given: str, value: float) -> None:
    config = tiny_run(f"method.optimizer.lr={given}")
    schema.check(config)
    assert config.method.optimizer.lr == value


@pytest.mark.parametrize(
    "section", ["plan", "model", "method", "reward", "reward.parts", "reward.parts.red", "evaluation", "budget"]
)
def test_sections_that_are_null(tiny_run: Compose, section: str) -> None:
    config = tiny_run()
    OmegaConf.update(config, section, None)
    with pytest.raises(ConfigError, match=f"^{section} is null: it must be a mapping$"):
        schema.check(config)


def test_a_reward_without_parts(tiny_run: Compose) -> None:
    config = tiny_run()
    config.reward.parts = {}
    with pytest.raises(ConfigError, match=r"reward.parts is empty: it must have at least one part"):
        schema.check(config)


def test_a_scorer_that_is_null(tiny_run: Compose) -> None:
    config = tiny_run()
    config.evaluation.scorers = {"mine": {"shapes": None}}
    with pytest.raises(ConfigError, match=r"evaluation.scorers.mine.shapes is null: it must be a mapping"):
        schema.check(config)


def settings_of(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a configuration, sections included."""
    for key in node:
        yield f"{prefix}{key}"
        if OmegaConf.is_dict(node._get_node(key)):
            yield from settings_of(node[key], f"{prefix}{key}.")


with initialize_config_dir(str(CONF), version_base="1.3"):
    WHOLE = compose("config")
NAMES = st.text("abcde_", min_size=1)
ANYTHING = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([-(10**400), -1, 0, 1, 2**31, 2**63, 2**64, 10**20, 10**400]),
        st.floats(),
        st.text(max_size=5),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(settings_of(WHOLE))), ANYTHING)
def test_any_value_anywhere_is_taken_or_refused_in_a_sentence(key: str, value: Any) -> None:
    config = WHOLE.copy()
    OmegaConf.set_struct(config, False)
    section, _, name = key.rpartition(".")
    (OmegaConf.select(config, section) if section else config)[name] = value
    with suppress(AlignbenchError):
        schema.check(config)
        Budget(config.budget)
        assembly.configured_protocols(config)


@pytest.mark.parametrize(
    ("weight", "message"),
    [("heavy", "reward.parts.red.weight is 'heavy': it must be a number"), (None, "red.weight is null: it must be a")],
)
def test_reward_weight_that_is_no_number(tiny_run: Compose, weight: object, message: str) -> None:
    config = tiny_run()
    config.reward.parts.red.weight = weight
    with pytest.raises(ConfigError, match=message):
        run(config)


class Epsilon(GroupCentred):
    """A method for models that predict the noise."""

    needs = Needs(parameterisations=("epsilon",))


class Likelihood(GroupCentred):
    """A method that needs the likelihood of what was sampled."""

    needs = Needs(log_probabilities=True)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("Epsilon", "holds for models that predict epsilon, but shapes predicts velocity; models that fit: sd15, sdxl"),
        ("Likelihood", "needs log-probabilities: set method.rollout.stochastic to flow, dance or cps"),
    ],
)
def test_methods_that_do_not_fit_are_refused_before_weights_are_loaded(
    tiny_run: Compose, method: str, message: str
) -> None:
    config = tiny_run("model.policy.source=/nowhere/sd3")
    config.method.algorithm = {"_target_": f"{__name__}.{method}"}
    with pytest.raises(ConfigError) as raised:
        run(config)
    assert message in str(raised.value)


def test_a_method_that_needs_a_gradient_names_the_rewards_that_have_one(tiny_run: Compose) -> None:
    config = tiny_run("model.policy.source=/nowhere/sd3", reward=f"{STEP}.Constant")
    config.method.algorithm = {"_target_": f"{STEP}.RewardGradient"}
    with pytest.raises(ConfigError, match=r"but red has none; differentiable here: pickscore$"):
        run(config)
    with open_dict(config):
        config.reward.parts.red.weight = 0.0  # never asked
        config.reward.parts.real = {"weight": 1.0, "shapes": {"_target_": f"{STEP}.Red"}}
    with pytest.raises(CheckpointError, match="/nowhere/sd3"):
        run(config)


def test_a_published_curve_needs_twenty_iterations(tiny_run: Compose, capsys: pytest.CaptureFixture[str]) -> None:
    """8 images x (3 steps to sample, 3 times x (old, current) to train) = 72 passes an iteration."""
    passes = ["budget.iterations=null", "dry_run=true", "method.algorithm.times=3"]
    published = [*passes, "evaluation.published=true"]
    message = (
        r"an iteration costs 72 nfe, 7.2% of budget.nfe=1000, but published curves need 20 iterations: "
        r"budget.nfe=1500 would do, or evaluation.published=false for a trial"
    )
    with pytest.raises(BudgetError, match=message):
        run(tiny_run(*published, "budget.nfe=1000"))
    run(tiny_run(*published, "budget.nfe=1440"))
    assert capsys.readouterr().out.count("warning") == 1  # of the plan that was refused
    run(tiny_run(*passes, "budget.nfe=1000"))
    assert "an iteration above 5% of the budget makes coarse curves" in capsys.readouterr().out


def test_a_budget_ends_no_sooner_than_one_iteration(tiny_run: Compose) -> None:
    message = "an iteration costs 8 images, 160.0% of budget.images=5, but a run needs one: budget.images=8 would do"
    with pytest.raises(BudgetError, match=message):
        run(tiny_run("budget.images=5"))


def test_what_is_published_is_decided_apart_from_the_numbers(tiny_run: Compose) -> None:
    configs = [tiny_run(f"evaluation.published={published}") for published in ("true", "false")]
    assert identity(configs[0]) == identity(configs[1])
    assert "published" not in identity(configs[0])["evaluation"]


def test_negative_reward_weight(tiny_run: Compose) -> None:
    config = tiny_run()
    config.reward.parts.red.weight = -1.0
    with pytest.raises(ConfigError, match=r"reward.red.weight is -1.0: weights must be 0 or more"):
        run(config)


def test_reward_that_does_not_exist_for_the_model(tiny_run: Compose) -> None:
    config = tiny_run()
    config.model.domain = "photo"
    with pytest.raises(ConfigError, match="reward red does not exist for photo models; it does for: shapes"):
        run(config)


def test_truncated_weights(tiny_run: Compose, tiny_checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", tiny_checkpoint, broken], check=True)
    weights = next((broken / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        run(tiny_run(f"model.policy.source={broken}"))


def test_nan_reward_names_prompt_and_image(tiny_run: Compose) -> None:
    config = tiny_run("method.batch.prompts=4")
    config.reward.parts = {
        "constant": {"weight": 1.0, "shapes": {"_target_": f"{STEP}.Constant", "value": 0.5, "bad_prompt": "ef"}}
    }
    with pytest.raises(RewardError, match=r"reward is nan for image \d+ of prompt prompts/00002 \('ef'\)"):
        run(config)


def test_constant_reward_is_an_error_after_three_iterations(tiny_run: Compose) -> None:
    config = tiny_run("budget.iterations=9", reward=f"{STEP}.Constant")
    with pytest.raises(RewardError, match="the same reward over the first 3 iterations"):
        run(config)
    folder = next(Path(config.results).rglob("status.json")).parent
    assert json.loads((folder / "status.json").read_text())["status"] == "failed"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_results_of_another_configuration(tiny_run: Compose) -> None:
    run(tiny_run())
    with pytest.raises(RecordError, match=r"method.algorithm.beta: 1.0 -> 0.5"):
        run(tiny_run("method.algorithm.beta=0.5"))


def test_target_below_a_file(tiny_run: Compose, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match=r"cannot write .*file"):
        run(tiny_run(f"results={tmp_path / 'file'}"))


def test_full_disk_leaves_valid_records_and_a_run_that_continues(
    tiny_run: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run()
    write, calls = os.write, iter(range(1000))

    def full(descriptor: int, data: bytes) -> int:
        if next(calls) >= 12:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(records, "_write", full)
        with pytest.raises(RecordError, match="the disk is full"):
            run(config)
    assert json.loads((run(config) / "status.json").read_text())["status"] == "done"


def test_file_size_limit(tiny_run: Compose) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(RecordError, match="size limit"):
            run(tiny_run())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "a cat\n\na dog\n", "line 2: empty"),
        ("p.jsonl", '{"prompt": "a cat"}\n{"prompt": \n', "line 2: not valid JSON"),
        ("p.jsonl", '{"text": "a cat"}\n', 'line 1: expected an object with a non-empty "prompt"'),
        ("p.txt", "a" * 10_000 + "\n", "line 1: the prompt has 10000 characters; at most 2000"),
        ("p.jsonl", '{"prompt": "cat"}\n{"prompt": "cat", "tag": "x"}\n', "'cat' was already given as p/00000, with"),
        ("p.txt", "", "is empty: expected a prompt per line"),
        ("p.csv", "a cat\n", "expected a .txt or .jsonl prompt file, got .csv"),
    ],
)
def test_prompt_files(tiny_run: Compose, tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as raised:
        run(tiny_run(f"prompts.path={path}"))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["+budget.seconds=60"], BudgetError, "budget.seconds is not counted; choose from flops, nfe"),
        (["evaluation.average=0"], ConfigError, "evaluation.average is 0"),
        (["evaluation.curve.name=final"], ConfigError, "need different names and one split"),
        (["evaluation.curve.split=tuning"], ConfigError, "need different names and one split"),
        (["evaluation.features=geneval"], ConfigError, "evaluation.features is 'geneval'"),
        (["prompts.balance=tags"], ConfigError, "choose tag, none or a mapping"),
        (["method.algorithm.a_max=0"], ConfigError, "a_max is 0"),
        (["method.algorithm.std=each"], ConfigError, "choose global or group"),
        (["method=flow_grpo", "method.algorithm.ddof=2"], ConfigError, "ddof is 2: choose 0 or 1"),
        (["method.batch.images=1"], ConfigError, "use 2 or more"),
    ],
)
def test_values_that_would_fail_or_mislead_later(
    tiny_run: Compose, overrides: list[str], error: type[AlignbenchError], message: str
) -> None:
    with pytest.raises(error) as raised:
        run(tiny_run(*overrides))
    assert message in str(raised.value)


def test_a_reward_refuses_prompts_it_cannot_score_before_any_work(tiny_run: Compose) -> None:
    with pytest.raises(DataError, match="has no GenEval record"):
        run(tiny_run(reward="alignbench.rewards.geneval.reward.ExactSceneReward"))
