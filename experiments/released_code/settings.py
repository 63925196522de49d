"""``python experiments/released_code/settings.py``: write every released setting beside ours into the docs."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from alignbench.configuration import CONF

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "methods" / "released_settings.md"
HEAD = """# Settings beside the released configurations

What each released configuration sets, what the published settings here (`overlay=none`) set, and why where the two
differ. Released values were read in the files that are named; ours are read from `conf/` when this page is written, by
`python experiments/released_code/settings.py`. Rows without a name of ours are things that no setting decides. How much
the differences of behaviour change a gradient or a picture is
[measured](../../experiments/released_code/differences.md).

Not compared: ReFL and DRaFT, whose released configurations were not at hand ([page](refl_and_draft.md)), and the
baselines, which have none.
"""


def read() -> dict[str, dict[str, Any]]:
    """The released configurations, by their key in ``settings.yaml``."""
    found: dict[str, dict[str, Any]] = yaml.safe_load((HERE / "settings.yaml").read_text(encoding="utf-8"))
    return found


def composed(overrides: list[str]) -> DictConfig:
    """Our configuration."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides)


def rows(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(name, our value, what the entry says of the released one) of every setting."""
    config = composed(entry["compose"])
    for name, told in entry["settings"].items():
        ours = told["ours"] if "ours" in told else OmegaConf.select(config, name, throw_on_missing=True)
        yield name, OmegaConf.to_container(ours) if OmegaConf.is_config(ours) else ours, told


def page(released: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables as one document."""
    parts = [HEAD]
    for entry in released.values():
        parts += [f"## {entry['title']}", "", f"[{entry['title']}]({entry['page']}) · {entry['source']}", ""]
        parts += ["| setting | ours | released | name there | why ours differs |", "|---|---|---|---|---|"]
        for name, ours, told in rows(entry):
            setting = name if "ours" in told else f"`{name}`"
            released_as = f"{shown(told['released'])} ({told['note']})" if "note" in told else shown(told["released"])
            parts.append(f"| {setting} | {shown(ours)} | {released_as} | `{told['as']}` | {told.get('why', '')} |")
        parts.append("")
    return "\n".join(parts)


def shown(value: Any) -> str:
    """A value as a table says it."""
    if isinstance(value, Mapping):
        return " : ".join(f"{key} {each}" for key, each in value.items())
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    PAGE.write_text(page(read()), encoding="utf-8")
