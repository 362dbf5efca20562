"""main: run the command line. Help, the version and usage errors come without importing torch, which takes seconds."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence

from autotp.cli.options import BadModelError, check_options, parser
from autotp.errors import AutoTPError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0 fine, 1 not equal or not proved, 2 bad input."""
    options = parser().parse_args(arguments)
    gc.set_threshold(100_000)  # most objects of a command live until its end: collecting took a tenth of its time
    try:
        check_options(options)
        from autotp.cli.commands import COMMANDS

        return COMMANDS[options.command](options)
    except (BadModelError, AutoTPError) as error:
        print(f"autotp: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, a pager say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
