"""The command line: ``autotp inspect``, ``check``, ``verify``, ``fuzz``.

Change it to add commands, options, or ways to name a model on the command line. It knows no graphs and no processes: it
calls the functions that users call, and prints the values that they return.
"""

from autotp.cli.main import main

__all__ = ["main"]
