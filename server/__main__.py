"""``python -m server --config demo.toml``; see ``python -m server --help``."""

import sys

from server.cli import main

if __name__ == "__main__":
    sys.exit(main())
