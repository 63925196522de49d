"""``python -m alignbench``: one run, or a sweep with ``-m``. Heavy imports wait until a run starts."""

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from alignbench import sweep
from alignbench.command import command_line, composed
from alignbench.configuration import CONF, plain
from alignbench.terminal import lasting


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(config: DictConfig) -> None:
    """One run of the composed configuration, or one cell of a sweep."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        sweep.cell(config)
        return
    plain(config)  # what has no value is told by its name, before anything is read off it
    from alignbench.run import run

    run(config, overrides=list(HydraConfig.get().overrides.task))


def main() -> None:
    """Run the command line."""
    with lasting(), sweep.concluded():
        command_line(composed(job), "alignbench")


if __name__ == "__main__":
    main()
