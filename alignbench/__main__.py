"""``python -m alignbench``: one run, or a sweep with ``-m``. Heavy imports wait until a run starts."""

import logging
import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig

from alignbench.configuration import CONF, explain
from alignbench.errors import AlignbenchError


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(config: DictConfig) -> None:
    """One run of the composed configuration."""
    logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)  # notices of torchvision, not needed
    from alignbench.run import run

    run(config, overrides=list(HydraConfig.get().overrides.task))


def main() -> None:
    """Run the command line: errors that a user can act on are one message, status 1; Ctrl-C is status 130."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # hydra then raises instead of printing, and the message is ours
    try:
        job()
    except HydraException as error:
        sys.exit(f"alignbench: {explain(error, CONF)}")
    except AlignbenchError as error:
        sys.exit(f"alignbench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
