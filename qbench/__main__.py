"""Makes `python -m qbench` run the command `qbench`."""

import sys

from qbench.cli.main import main

sys.exit(main())
