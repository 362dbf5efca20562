"""__main__: ``python -m autotp`` runs the command line."""

import sys

from autotp.cli.main import main

sys.exit(main())
