"""The command line: ``autotp inspect``, ``check``, ``verify``, ``fuzz``.

Commands and options are added here, and how a model is named on the command line. It knows no graphs and no processes:
it calls what a user can call, and prints the values that it gets back.
"""

from autotp.cli.main import main

__all__ = ["main"]
