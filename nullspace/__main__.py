"""`python -m nullspace` is `nullspace`."""

import sys

from nullspace.cli import main

if __name__ == "__main__":
    sys.exit(main())
