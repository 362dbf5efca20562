"""``python -m autotp``."""

import sys

from autotp.cli.main import main

sys.exit(main())
