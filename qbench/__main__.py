"""`python -m qbench` is the command `qbench`."""

import sys

from qbench.cli import main

sys.exit(main())
