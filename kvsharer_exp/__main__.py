"""``python -m kvsharer_exp``: the same as the console script ``kvsharer``."""

import sys

from kvsharer_exp.cli.main import main

sys.exit(main())
