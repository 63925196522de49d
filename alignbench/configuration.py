"""Around a composed configuration: where it comes from, what identifies it, where its run goes, what is amiss."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from alignbench.errors import ConfigError
from alignbench.records import config_hash
from alignbench.settings import nearest

PACKAGE = Path(__file__).parent
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())  # wheel, checkout
# Where a run goes, how it is shown or batched, what is allowed; everything else decides its numbers.
NOT_IDENTITY = (
    *("tracker", "results", "micro_batch", "checkpoint_every", "progress", "dry_run", "plan", "threads", "device"),
    *("evaluation.published", "reward.renamed"),
)
CHOICES = ("model", "method", "reward", "seed", "name", "experiment")  # named by the folders of a run's path


def by_domain(values: Mapping[str, Any], *, _root_: DictConfig) -> Any:
    """What ``${by_domain:{shapes:1,photo:2}}`` stands for: the value for the model's domain, or null."""
    return values.get(OmegaConf.select(_root_, "model.domain"))


OmegaConf.register_new_resolver("by_domain", by_domain, replace=True)


def plain(config: DictConfig) -> dict[str, Any]:
    """A configuration as plain data, interpolations resolved.

    Raises:
        ConfigError: a mandatory value is missing or an interpolation leads nowhere.
    """
    try:
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_unresolved(error)) from error
    if not isinstance(resolved, dict):
        raise ConfigError(f"the configuration is a {type(resolved).__name__}: it must be a mapping")
    return {str(key): value for key, value in resolved.items()}


def _unresolved(error: OmegaConfBaseException) -> str:
    """Which setting has no value, and why."""
    where = f"{error.full_key}: " if error.full_key else ""
    return f"the configuration is incomplete: {where}{str(error).splitlines()[0]}"


def identity(config: DictConfig) -> dict[str, Any]:
    """The part of a configuration that decides a run's numbers, as plain data."""

    def part(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        deciding = {key: value for key, value in node.items() if f"{prefix}{key}" not in NOT_IDENTITY}
        return {
            key: part(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
            for key, value in deciding.items()
        }

    whole = part(plain(config))
    domain = whole["model"]["domain"]
    for parts in (whole["reward"]["parts"], whole["evaluation"]["scorers"]):  # what it is for other models says nothing
        for name, node in parts.items():
            parts[name] = {key: value for key, value in node.items() if key == domain or not isinstance(value, Mapping)}
    return whole


def variant(overrides: Sequence[str]) -> str:
    """A short canonical name of the overrides that change a run's numbers, for its folder; "" if there are none.

    ``method.algorithm.beta=0.1`` becomes ``beta=0.1`` (the whole key where two overrides end alike); long names end in
    a hash.
    """
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    last = [key.rsplit(".", 1)[-1] for key in keys]
    parts = []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key not in CHOICES and not any(key == each or key.startswith(f"{each}.") for each in NOT_IDENTITY):
            short = key.rsplit(".", 1)[-1]
            parts.append(f"{key if last.count(short) > 1 else short}={value}")
    name = re.sub(r"[^\w.=,+-]+", "_", ",".join(sorted(parts)))
    return name if len(name) <= 80 else f"{name[:60]}_{config_hash({'overrides': sorted(parts)})}"


def reward_name(config: DictConfig) -> str:
    """The names of the reward's parts that have a positive weight, joined by ``+``."""
    names = [str(name) for name, part in config.reward.parts.items() if part.weight > 0]
    return "+".join(names) or "none"


def run_folder(config: DictConfig, overrides: Sequence[str]) -> Path:
    """``<results>/<experiment>/<model>/<reward>/<method>[@<variant>]/seed<k>``."""
    changed = variant(overrides)
    method = config.method.name + (f"@{changed}" if changed else "")
    parts = (config.results, config.name, config.model.name, reward_name(config), method, f"seed{config.seed}")
    return Path(*map(str, parts))


def for_domain(node: Mapping[str, Any], domain: str, what: str) -> Any:
    """The settings of a part on a model's domain.

    Raises:
        ConfigError: the part does not exist there; names the domains on which it does.
    """
    known = [key for key, value in node.items() if isinstance(value, Mapping) and "_target_" in value]
    if domain not in known:
        raise ConfigError(f"{what} does not exist for {domain} models; it does for: {', '.join(known)}")
    return node[domain]


def target(node: Mapping[str, Any], where: str) -> Callable[..., Any]:
    """What ``_target_`` names.

    Raises:
        ConfigError: it is missing, no name, or cannot be imported or called.
    """
    if "_target_" not in node:
        raise ConfigError(f"{where}._target_ is missing: it must be the full name of a class")
    name = node["_target_"]
    if not isinstance(name, str):
        raise ConfigError(f"{where}._target_ is {name!r}: it must be the full name of a class")
    try:
        found: Callable[..., Any] = hydra.utils.get_object(name)
    except (ImportError, ValueError, SyntaxError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ConfigError(f"{where}._target_ is {name!r}, which cannot be imported: {reason}") from error
    if not callable(found):
        raise ConfigError(f"{where}._target_ is {name!r}, a {type(found).__name__}: it must be the name of a class")
    return found


def embedded(node: Any) -> Any:
    """Replace ``embedded:NAME`` by the folder of a checkpoint that is shipped with the package."""
    if isinstance(node, Mapping):
        return {key: embedded(value) for key, value in node.items()}
    if isinstance(node, str) and node.startswith("embedded:"):
        return str(Path(__file__).parent / "shapes" / "checkpoints" / node.removeprefix("embedded:"))
    return node


def chosen_overlay() -> tuple[str, bool] | None:
    """The overlay that the composed configuration asks for, and whether it is there; None outside a command."""
    choice = HydraConfig.get().runtime.choices.get("overlay") if HydraConfig.initialized() else None
    return None if choice is None else (str(choice), str(choice) in _overlays())


def _overlays() -> list[str]:
    """Names of the overlays in conf/ and in the folders of ``--config-dir`` and the search path."""
    sources = HydraConfig.get().runtime.config_sources
    folders = [Path(source.path) / "overlay" for source in sources if source.schema == "file"]
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def check_overlay() -> None:
    """Refuse an overlay that was named and does not exist; the one that belongs to model and method may be absent.

    Raises:
        ConfigError: gives the nearest known name.
    """
    name, there = chosen_overlay() or ("", True)
    if there:
        return
    choices, known = HydraConfig.get().runtime.choices, _overlays()
    model, automatic = str(choices["model"]), f"{choices['model']}_{choices['method']}"
    if name != automatic:
        own = ", ".join(each for each in known if each.startswith(f"{model}_"))
        raise ConfigError(
            f"unknown overlay {name!r}.{nearest(name, known)} overlay=none takes the published settings; without "
            f"overlay=... {automatic} acts, where there is one. Known for {model}: {own}"
        )


def composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration of a run, for a command that is not Hydra's own.

    Raises:
        ConfigError: an overlay that does not exist.
    """
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("config", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    check_overlay()
    with open_dict(config):
        del config["hydra"]
    return config


def explain(error: Exception, conf: Path) -> str:
    """A composition error as one message, with the nearest known key or choice."""
    if isinstance(error, OmegaConfBaseException):
        return _unresolved(error)
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)  # type: ignore[arg-type]
    text = "\n".join(str(cause) for cause in causes)
    if choice := re.search(r"Could not find '([^'/]+)/([^']+)'", text):
        group, name = choice.groups()
        known = sorted(path.stem for path in (conf / group).glob("*.yaml"))
        return f"unknown {group} {name!r}.{nearest(name, known)} Known: {', '.join(known)}"
    told = r"Could not (?:override|append to config|delete from config\.) '([^']+)'|Key '([^']+)' is not in struct"
    if key := re.search(told, text):
        asked = (key.group(1) or key.group(2)).lstrip("+").split("=")[0]
        keys = _known_keys(conf)
        if elsewhere := keys.get(asked):
            return f"{asked!r} is no setting of what was chosen, but of {', '.join(elsewhere)}; --cfg job prints all"
        return f"unknown setting {asked!r}.{nearest(asked, list(keys))} --cfg job prints all of them"
    return str(error)


def _known_keys(conf: Path) -> dict[str, list[str]]:
    """Dotted keys of all configuration files, with the choices (``group=name``) that have each."""
    keys: dict[str, list[str]] = {}

    def walk(node: Any, prefix: str, choice: str) -> None:
        for key, value in node.items():
            keys.setdefault(f"{prefix}{key}", []).append(choice)
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{key}.", choice)

    for path in sorted(conf.rglob("*.yaml")):
        group = path.parent.name
        keys.setdefault(group, [])
        if path.parent == conf or group not in ("overlay", "experiment"):
            plain = OmegaConf.to_container(OmegaConf.load(path))
            if isinstance(plain, dict):
                plain.pop("defaults", None)
                plain.pop("hydra", None)
                walk(plain, "" if path.parent == conf else f"{group}.", f"{group}={path.stem}")
    return keys
