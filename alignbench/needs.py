"""What a method needs against the model, the rollout and the reward that were chosen; nothing is loaded for it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from alignbench.configuration import CONF, for_domain, target
from alignbench.errors import ConfigError
from alignbench.methods.method import Method
from alignbench.policies.policy import Policy


def check(config: DictConfig, method: Method) -> None:
    """Refuse a method whose equations do not hold here; see ``Needs``.

    Raises:
        ConfigError: another model, rollout or reward is needed; names those that fit.
    """
    name, needs, model = config.method.name, method.needs, config.model
    predicts = parameterisation(model)
    if predicts not in needs.parameterisations:
        fitting = [each.name for each in _known("model") if parameterisation(each) in needs.parameterisations]
        raise ConfigError(
            f"{name} holds for models that predict {' or '.join(needs.parameterisations)}, but {model.name} predicts "
            f"{predicts}; models that fit: {', '.join(fitting) or 'none yet'}"
        )
    if needs.log_probabilities and method.sampler.stochastic is None:
        raise ConfigError(
            f"{name} needs log-probabilities: set method.rollout.stochastic to flow, dance or cps, and "
            "method.rollout.noise_level to a positive value"
        )
    if method.sampler.guidance_embedding is not None and model.policy.get("guidance_embedding") is None:
        raise ConfigError(
            f"method.rollout.guidance_embedding is {method.sampler.guidance_embedding:g}, but {model.name} has no "
            "guidance input: null here, and method.rollout.guidance for classifier-free guidance"
        )
    if needs.differentiable_reward:
        without = [part for part in config.reward.parts if not _has_gradient(config.reward, part, model.domain)]
        if without:
            raise ConfigError(
                f"{name} takes gradients through the reward, but {' and '.join(without)} has none; "
                f"differentiable here: {', '.join(_differentiable_rewards(model.domain)) or 'none'}"
            )


def parameterisation(model: DictConfig) -> str:
    """What a model predicts, read off the path that its policy's class declares: ``"velocity"``, ``"epsilon"``."""
    return str(get_type_hints(policy_class(model))["path"].parameterisation)


def policy_class(model: DictConfig) -> Any:
    """The class of a model's policy.

    Raises:
        ConfigError: ``model.policy._target_`` names no policy.
    """
    found = _class_of(target(model.policy, "model.policy"))
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise ConfigError(f"model.policy._target_ is {model.policy._target_}, which makes no policy: see conf/model")
    return found


def _class_of(function: Callable[..., Any]) -> Any:
    """The class that a constructor (``from_pretrained``, or the class itself) makes."""
    return getattr(function, "__self__", function)


def _has_gradient(reward: DictConfig, part: str, domain: str) -> bool:
    """Whether a part of a reward passes gradients on; one of weight 0 is never asked."""
    node: Mapping[str, Any] = reward.parts[part]
    made = _class_of(target(for_domain(node, domain, f"reward {part}"), f"reward.parts.{part}.{domain}"))
    return node["weight"] == 0 or bool(getattr(made, "differentiable", False))


def _differentiable_rewards(domain: str) -> Iterator[str]:
    for path in sorted((CONF / "reward").glob("*.yaml")):
        reward = OmegaConf.load(path)
        assert isinstance(reward, DictConfig)  # the suite's own files
        with suppress(ConfigError):  # one that does not exist on this domain, or lacks a package here
            # an old name of another reward has no parts in its own file
            if "parts" in reward and all(_has_gradient(reward, part, domain) for part in reward.parts):
                yield path.stem


def _known(group: str) -> Iterator[DictConfig]:
    for path in sorted((CONF / group).glob("*.yaml")):
        node = OmegaConf.load(path)
        assert isinstance(node, DictConfig)
        yield node
