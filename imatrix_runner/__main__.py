"""``python -m imatrix_runner`` is the ``imatrix-runner`` command."""

import os
import sys

_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 - nothing is imported before this
# -m puts the current directory first in the module search path. Unless this package itself is there, nothing in it is to be
# used:
# a json.py next to a downloaded model must not be imported.
if sys.path[:1] == [os.getcwd()] and sys.path[0] != _HOME:  # noqa: PTH109
    del sys.path[0]

from imatrix_runner.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
