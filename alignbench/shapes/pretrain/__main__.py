"""``python -m alignbench.shapes.pretrain COMMAND``: one trainer each, imported when asked for."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from alignbench.errors import AlignbenchError
from alignbench.terminal import lasting

COMMANDS = {
    "vae": ("alignbench.shapes.pretrain.vae", "the autoencoder of the generator"),
    "generator": ("alignbench.shapes.pretrain.generator", "the generator, on the autoencoder's latents"),
    "card": ("alignbench.shapes.pretrain.card", "measures the generator and writes its model card"),
    "pickscore": ("alignbench.shapes.pretrain.preference", "the tiny PickScore"),
    "judge": ("alignbench.shapes.pretrain.preference", "the second judge"),
}
"""Module of each command; the module's ``main(command, arguments)`` runs it."""


@lasting()
def main(arguments: Sequence[str] | None = None) -> int:
    """Hands the arguments after the command to the command's module."""
    parser = argparse.ArgumentParser(prog="python -m alignbench.shapes.pretrain", description=__doc__, add_help=False)
    parser.add_argument(
        "command", choices=COMMANDS, help="; ".join(f"{name}: {what}" for name, (_, what) in COMMANDS.items())
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    command = parser.parse_args(given[:1]).command
    run: Callable[[str, list[str]], None] = import_module(COMMANDS[command][0]).main
    try:
        run(command, given[1:])
    except AlignbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
