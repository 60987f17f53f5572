"""``python -m server``: the same as ``collm serve``."""

import sys
from pathlib import Path


def _leave_current_folder() -> None:
    """Take the current folder off the module search path, where ``python -m`` has put it.

    A file ``engine.py`` there would otherwise be run in the place of the package. The folder stays if the package is
    imported from it (a checkout).
    """
    package_root = str(Path(__file__).resolve().parents[1])
    if not sys.flags.safe_path and sys.path[0] == str(Path.cwd()) != package_root:
        del sys.path[0]


if __name__ == "__main__":
    _leave_current_folder()
    from server.cli import main

    sys.exit(main())
