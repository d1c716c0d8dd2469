"""`python -m anaphora` is the `anaphora` command."""

import sys

from anaphora.cli import main

if __name__ == "__main__":
    sys.exit(main())
