"""How the commands that Hydra composes begin and end: an error that a user can act on is one message."""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from alignbench import arguments
from alignbench.configuration import CONF, explain
from alignbench.errors import AlignbenchError, ConfigError, LockedError
from alignbench.terminal import lasting


def composed(job: Callable[[], None]) -> Callable[[], None]:
    """A job that Hydra composes from the command line, which is checked before."""

    def checked() -> None:
        arguments.check(sys.argv[1:])
        try:
            job()
        except (yaml.YAMLError, UnicodeDecodeError) as error:  # of a file that Hydra reads
            if (problem := arguments.misread(error, sys.argv[1:])) is None:
                raise
            raise ConfigError(problem) from error

    return checked


@lasting()
def command_line(job: Callable[[], None], name: str) -> None:
    """Run a command: errors that a user can act on are one message, status 1 (75 if it is only too early, because
    another process is at the run); Ctrl-C is status 130. With ``ALIGNBENCH_DEBUG=1`` the traceback stands before it,
    with that of the library whose error it was.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # hydra then raises instead of printing, and the message is ours
    logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)  # notices of torchvision, not needed
    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        _end(f"{name}: {explain(error, CONF)}", 1)
    except AlignbenchError as error:
        if os.environ.get("ALIGNBENCH_DEBUG") == "1":
            traceback.print_exception(error)
        _end(f"{name}: {error}", os.EX_TEMPFAIL if isinstance(error, LockedError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _end(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)
