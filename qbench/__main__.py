"""`python -m qbench` is the command `qbench`."""

import sys

from qbench.cli.main import main

sys.exit(main())
