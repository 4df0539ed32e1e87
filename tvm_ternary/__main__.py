"""``python -m tvm_ternary``: the command line."""

import sys

from tvm_ternary.cli import main

sys.exit(main())
