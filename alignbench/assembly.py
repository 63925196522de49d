"""The parts of a run, built from its configuration and checked against each other before any work."""

import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import psutil
import torch
import transformers
from omegaconf import Container, DictConfig, OmegaConf

from alignbench import inputs, needs, optimizer, schema, settings
from alignbench.configuration import embedded, for_domain, identity, target
from alignbench.errors import ConfigError
from alignbench.evaluation import Evaluator, Protocol, Samples, tag_of
from alignbench.ledger import Budget, Ledger
from alignbench.methods.method import BatchSize, Method
from alignbench.policies.diffusers_policy import DiffusersPolicy
from alignbench.policies.lora import Lora, read_lora
from alignbench.policies.policy import Policy
from alignbench.processes import Processes
from alignbench.prompts import sets
from alignbench.prompts.prompt import Prompt
from alignbench.records import config_hash
from alignbench.rewards import foreign
from alignbench.rewards.reward import Reward, WeightedSum
from alignbench.sampling.rollout import Sampler
from alignbench.stack import Stack
from alignbench.tracking import Tracker

T = TypeVar("T")

DOMAIN_PROMPTS = {"shapes": "shapes", "photo": "geneval"}  # the prompt set that belongs to a domain
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "hydra-core", "numpy")


@dataclass
class Parts:
    """Everything a run is made of."""

    processes: Processes
    policy: Policy
    stack: Stack
    method: Method
    prompts: list[Prompt]
    evaluator: Evaluator
    curve: Protocol
    final: Protocol
    budget: Budget
    optimizer: torch.optim.Optimizer

    @property
    def ledger(self) -> Ledger:
        """The run's ledger."""
        return self.stack.ledger


@dataclass
class Checked:
    """What a configuration asks for, as far as it can be known without a model."""

    method: Method
    budget: Budget
    curve: Protocol
    final: Protocol
    prompts: list[Prompt]


def launched(config: DictConfig) -> Processes:
    """The processes of the run, on GPUs where that is possible and not refused."""
    return Processes("cuda" if config.get("device") != "cpu" and torch.cuda.is_available() else "cpu")


def check(config: DictConfig, processes: int) -> Checked:
    """Check a configuration for a number of processes, and read its prompts; no model is loaded.

    Raises:
        ConfigError: parts that do not fit each other, impossible batch arithmetic, values out of range.
        DataError, BudgetError: prompts or limits that cannot be used.
    """
    schema.check(config)
    if config.device == "cuda" and not torch.cuda.is_available() and not config.dry_run:
        raise ConfigError("device=cuda, but torch sees no CUDA device; device=cpu runs everything, slowly")
    budget = Budget(config.budget)
    curve, final = configured_protocols(config)
    method = _method(config)
    needs.check(config, method)
    if method.batch.total < processes:
        raise ConfigError(
            f"{method.batch.prompts} prompts x {method.batch.images} images = {method.batch.total} images for "
            f"{processes} processes: every process needs at least one image"
        )
    prompts = _prompts(config, config.prompts.split)
    sets.probabilities(prompts, method.batch.prompts, _plain(config.prompts.balance))
    return Checked(method, budget, curve, final, prompts)


def check_models(config: DictConfig) -> None:
    """Check the settings of the reward and of the scorers, which a plan does not load.

    Raises:
        ConfigError: one does not exist for the model's domain, lacks a package, or has a setting that does not fit.
    """
    domain = config.model.domain
    for name, part in _plain(config.reward.parts).items():
        _check_made(for_domain(part, domain, f"reward {name}"), f"reward.parts.{name}.{domain}", device="cpu")
    for name, node in _plain(config.evaluation.scorers).items():
        if domain in node:
            _check_made(node[domain], f"evaluation.scorers.{name}.{domain}", device="cpu")


def assemble(config: DictConfig, processes: Processes | None = None) -> Parts:
    """Build the parts of a run.

    Args:
        config: the composed configuration.
        processes: of the run, if they are known already.

    Raises:
        ConfigError: parts that do not fit each other, impossible batch arithmetic, values out of range.
        CheckpointError, DataError, BudgetError: weights, prompts or limits that cannot be used.
    """
    processes = processes or launched(config)
    checked = check(config, processes.count)
    method = checked.method
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    reward = trained_reward(config, processes)
    judges = scorers(config, processes)  # before the policy, which takes longer to load
    policy = pretrained(config, processes)
    for sampler in (method.sampler, checked.curve.sampler(1.0), checked.final.sampler(1.0)):
        policy.grid(sampler.steps, sampler.grid)  # refuses one that the model does not have, before any is walked
    for view in (*method.needs.views, "evaluation"):
        policy.add_view(view)
    foreign.check(reward, checked.prompts)
    stack = Stack(policy, reward, new_ledger(processes), processes, micro_batch=config.micro_batch)
    adamw = _plain(config.method.optimizer)
    return Parts(
        processes=processes,
        policy=policy,
        stack=stack,
        method=method,
        prompts=checked.prompts,
        evaluator=evaluator(config, stack, evaluated_prompts(config), judges),
        curve=checked.curve,
        final=checked.final,
        budget=checked.budget,
        optimizer=optimizer.adamw(policy, **{name: adamw[name] for name in ("lr", "weight_decay", "betas", "eps")}),
    )


def configured_protocols(config: DictConfig) -> tuple[Protocol, Protocol]:
    """The protocol of the curves and that of the final scores.

    Raises:
        ConfigError: values out of range, one name for both, or two splits.
    """
    curve, final = (_build(Protocol, config.evaluation[name], f"evaluation.{name}") for name in ("curve", "final"))
    if curve.name == final.name or curve.split != final.split:
        raise ConfigError(
            "evaluation.curve and evaluation.final need different names and one split, got "
            f"{curve.name!r} on {curve.split} and {final.name!r} on {final.split}"
        )
    return curve, final


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if isinstance(node, Container) else node


def _build(function: Callable[..., T], node: Any, where: str, **more: Any) -> T:
    """Call a constructor with checked settings; see ``settings.construct``."""
    return settings.construct(function, embedded(_plain(node)), where, **more)


def _made(node: Any, where: str, **more: Any) -> Any:
    """Call ``_target_`` with the node's other settings, and with those of ``more`` that it takes."""
    plain = _plain(node)
    return _build(target(plain, where), {key: plain[key] for key in plain if key != "_target_"}, where, **more)


def _check_made(node: Any, where: str, **more: Any) -> None:
    """Errors of ``_made``, as far as settings have them."""
    plain = embedded(_plain(node))
    settings.arguments(target(plain, where), {key: plain[key] for key in plain if key != "_target_"}, where, **more)


def _method(config: DictConfig) -> Method:
    method: Method = _made(
        config.method.algorithm,
        "method.algorithm",
        sampler=_build(Sampler, config.method.rollout, "method.rollout"),
        batch=_build(BatchSize, config.method.batch, "method.batch"),
        seed=config.seed,
    )
    return method


def trained_reward(config: DictConfig, processes: Processes) -> Reward:
    """The reward that is trained on: its one part, or the weighted sum of several."""
    domain = config.model.domain
    rewards = {
        name: (
            _reward(for_domain(part, domain, f"reward {name}"), f"reward.parts.{name}.{domain}", processes),
            float(part["weight"]),
        )
        for name, part in _plain(config.reward.parts).items()
    }
    return WeightedSum(rewards) if len(rewards) > 1 else _single(rewards)


def _reward(node: Any, where: str, processes: Processes) -> Reward:
    """A reward of the configuration.

    Raises:
        ConfigError: a setting that does not fit, or something that is no reward, or has no name.
        RewardError: it could not be made.
    """
    with foreign.guarded(f"{where}, when it was made,"):
        made = _made(node, where, device=str(processes.device))
    if not isinstance(made, Reward) or not isinstance(getattr(made, "name", None), str):
        raise ConfigError(
            f"{where}._target_ is {node['_target_']}, which makes a {type(made).__name__}: it must make an "
            "alignbench.rewards.reward.Reward whose `name` is text"
        )
    return made


def pretrained(config: DictConfig, processes: Processes, **settings: Any) -> Policy:
    """The configured model with its weights; ``settings`` stand in place of those of ``model.policy``."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    node = _plain(config.model.policy) | settings
    policy: Policy = _made(node, "model.policy", device=str(processes.device), seed=config.seed)
    return policy


def check_source(config: DictConfig, source: str) -> None:
    """Check a checkpoint that is to be loaded in the configured model's place later.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not one of this family, or not whole.
    """
    needs.policy_class(config.model).check_source(source)


def lora(config: DictConfig, source: str) -> Lora:
    """A LoRA of the configured model.

    Raises:
        CheckpointError: it cannot be read, or is one of another model.
    """
    policy = embedded(_plain(config.model.policy))
    return read_lora(source, needs.policy_class(config.model), policy["source"], policy.get("revision"))


def abstract_policy(config: DictConfig) -> DiffusersPolicy:
    """The configured model inside ``architecture.abstract()``: its architecture, with nothing in its tensors."""
    node = _plain(config.model.policy) | {"weights": "random"}
    policy: DiffusersPolicy = _made(node | {"compile": False}, "model.policy", device="cpu", seed=config.seed)
    return policy


def new_ledger(processes: Processes) -> Ledger:
    """An empty ledger whose clocks wait for the device."""
    return Ledger(synchronise=torch.cuda.synchronize if processes.device.type == "cuda" else lambda: None)


def _single(rewards: Mapping[str, tuple[Reward, float]]) -> Reward:
    """The reward of a single part; its weight must be 1, since a method's own scaling is a knob of the method."""
    ((name, (reward, weight)),) = rewards.items()
    return reward if weight == 1 else WeightedSum({name: (reward, weight)})


def _prompts(config: DictConfig, split: sets.Split) -> list[Prompt]:
    source = config.prompts.source
    if source == "domain":
        if config.model.domain not in DOMAIN_PROMPTS:
            raise ConfigError(
                f"there is no prompt set for {config.model.domain} models: give one with prompts=file prompts.path=FILE"
            )
        source = DOMAIN_PROMPTS[config.model.domain]
    return sets.load(source, split, config.prompts.path, _plain(config.prompts.get("dataset")))


def evaluated_prompts(config: DictConfig) -> list[Prompt]:
    """The prompts of the evaluation protocols."""
    return _prompts(config, config.evaluation.final.split)


def read_inputs(config: DictConfig) -> dict[str, str]:
    """The inputs of a run by hash, before anything is loaded; see ``inputs.of``.

    Raises:
        AlignbenchError: prompts that cannot be used, files that cannot be read.
    """
    return inputs.of(config, prompts=_prompts(config, config.prompts.split), evaluated=evaluated_prompts(config))


def scorers(config: DictConfig, processes: Processes) -> dict[str, Reward]:
    """The configured scorers that exist for the model's domain."""
    domain = config.model.domain
    return {
        name: _reward(node[domain], f"evaluation.scorers.{name}.{domain}", processes)
        for name, node in _plain(config.evaluation.scorers).items()
        if domain in node
    }


def evaluator(config: DictConfig, stack: Stack, prompts: Sequence[Prompt], scorers: Mapping[str, Reward]) -> Evaluator:
    """What evaluates with the scorers that can score these prompts."""
    foreign.check(stack.reward, prompts)
    fewest = min(config.evaluation[name].images_per_tag for name in ("curve", "final"))
    if fewest * len({tag_of(prompt) for prompt in prompts}) < stack.processes.count:
        raise ConfigError(f"{stack.processes.count} processes but fewer evaluated images: raise images_per_tag")
    if not all(prompt.metadata.get("include") for prompt in prompts):  # prompts of one's own have no GenEval records
        scorers = {name: scorer for name, scorer in scorers.items() if name != "geneval"}
    for scorer in scorers.values():
        foreign.check(scorer, prompts)
    features = config.evaluation.features
    if features is not None and not hasattr(scorers.get(features), "embed_images"):
        able = [name for name, scorer in scorers.items() if hasattr(scorer, "embed_images")]
        raise ConfigError(
            f"evaluation.features is {features!r}: it must be null or name a scorer with image embeddings "
            f"({', '.join(able)})"
        )
    return Evaluator(stack, prompts, scorers, features)


def protocols(config: DictConfig, parts: Parts) -> dict[str, dict[str, Any]]:
    """What the records say about each evaluation protocol, by its name, with its hash."""
    return {
        protocol.name: described(config, protocol, parts.evaluator, parts.policy)
        for protocol in (parts.curve, parts.final)
    }


def described(config: DictConfig, protocol: Protocol, evaluator: Evaluator, policy: Policy) -> dict[str, Any]:
    """What the records say about an evaluation protocol, with its hash."""
    samples = Samples.choose(evaluator.prompts, protocol.images_per_tag)
    description = protocol.describe(samples, list(evaluator.scorers), config.model.policy.dtype, policy.latent_shape)
    return description | {"hash": config_hash(description)}


def tracker(config: DictConfig, folder: Path) -> Tracker | None:
    """The configured mirror of the records, or None."""
    return _made(config.tracker, "tracker", folder=folder) if config.get("tracker") else None


def describe(config: DictConfig, parts: Parts) -> dict[str, Any]:
    """What run.json says about a run, apart from its reward and variant."""
    trainable = sum(parameter.numel() for parameter in parts.policy.trainable_parameters().values())
    known = protocols(config, parts)
    main = parts.processes.main  # which alone writes records: files are read once
    return {
        "experiment": config.name,
        "model": config.model.name,
        "method": config.method.name,
        "seed": config.seed,
        "config_hash": config_hash(identity(config)),
        "protocol": known[parts.curve.name],
        "protocol_hash": known[parts.curve.name]["hash"],
        "final_protocol": known[parts.final.name],
        "final_protocol_hash": known[parts.final.name]["hash"],
        "targets": _plain(config.reward.targets),
        "normalisation": _plain(config.reward.normalisation),
        "budget": parts.budget.limits,
        "parameters": {"trainable": trainable},
        "inputs": inputs.of(config, prompts=parts.prompts, evaluated=parts.evaluator.prompts) if main else {},
        **environment(parts.processes),
    }


def environment(processes: Processes) -> dict[str, Any]:
    """What run.json says about the code, the packages and the machine."""
    return {
        "git": _git(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if processes.device.type == "cuda" else None,
        },
        "threads": torch.get_num_threads(),
        "processes": processes.count,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _git() -> dict[str, Any]:
    """Commit of the code and whether it was changed since; nulls outside a checkout."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    commit = git("rev-parse", "HEAD")
    code = Path(__file__).parent
    changes = git("status", "--porcelain", "--", str(code), str(code.parent / "conf"))
    return {"commit": commit, "dirty": bool(changes) if commit else None}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
