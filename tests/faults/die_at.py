"""``python die_at.py N ARGUMENTS``: the command line, killed by SIGKILL right after it renamed its N-th file.

Everything that lasts is a rename (of the journal, of a finished file), so the moments between two renames are all the states
that a kill can leave behind. Counted are renames below the current directory, but not those of owner files: they serve a
living process only.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from imatrix_runner.cli.main import main

_replace = Path.replace


def die_after(count: int) -> None:
    done = 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal done
        result = _replace(self, target)
        if target.name != ".owner.json" and Path.cwd() in target.parents:
            done += 1
        if done == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Path.replace = replace  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    die_after(int(sys.argv[1]))
    main(sys.argv[2:])
