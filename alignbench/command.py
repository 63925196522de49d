"""How the commands that Hydra composes end: an error that a user can act on is one message."""

import logging
import os
import sys
import traceback
from collections.abc import Callable

from hydra.errors import HydraException

from alignbench.configuration import CONF, explain
from alignbench.errors import AlignbenchError, LockedError


def command_line(job: Callable[[], None], name: str) -> None:
    """Run a command: errors that a user can act on are one message, status 1 (75 if it is only too early, because
    another process is at the run); Ctrl-C is status 130. With ``ALIGNBENCH_DEBUG=1`` the traceback stands before it,
    with that of the library whose error it was.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # hydra then raises instead of printing, and the message is ours
    logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)  # notices of torchvision, not needed
    try:
        job()
    except HydraException as error:
        sys.exit(f"{name}: {explain(error, CONF)}")
    except AlignbenchError as error:
        if os.environ.get("ALIGNBENCH_DEBUG") == "1":
            traceback.print_exception(error)
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL if isinstance(error, LockedError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
