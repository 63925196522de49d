"""`python -m alignbench.report results/`: draw the report of every run below one or several folders."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from alignbench.errors import AlignbenchError
from alignbench.report.page import build
from alignbench.terminal import lasting

CLAIMS = Path("experiments/claims")


@lasting()
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 with a page, 1 where there is nothing to show or the output cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m alignbench.report", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="folders to search for runs, such as results/")
    parser.add_argument(
        "--output", type=Path, default=Path("results/report"), help="folder of the report (default: %(default)s)"
    )
    parser.add_argument(
        "--claims", type=Path, help=f"folder of published claims, a YAML file a paper (default: {CLAIMS}, if it exists)"
    )
    options = parser.parse_args(arguments)
    claims = options.claims or (CLAIMS if CLAIMS.is_dir() else None)
    try:
        build(options.paths, options.output, claims=claims)
    except AlignbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
