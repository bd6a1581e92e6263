"""`python -m app`: the `metaserve` command where no script of that name is at hand."""

import sys

from app.cli import main

if __name__ == "__main__":
    sys.exit(main())
