"""What the commands share: errors as one line on stderr, and an end by Ctrl-C or SIGTERM without a traceback."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

from engine.errors import CollmError
from training.launcher import is_main

FAILED, INTERRUPTED = 1, 130
GOES_ON = "what was finished is kept: the same command goes on from there"
GRACE = 10.0
"""Seconds in which the main process is expected to fail too, at what fails in all processes, and its launcher to end
the others."""


def run_command(work: Callable[[], None], *, interrupted: str = GOES_ON) -> int:
    """Do the work of a command; the exit status.

    Of several processes that fail alike, the main one alone says why: another speaks only if it is still there after
    ``GRACE``, since then the error may be its own.

    Args:
        interrupted: what is left behind where the command is interrupted.
    """
    # SIGINT too: a shell that starts a command in the background makes it ignored.
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        work()
    except (CollmError, OSError) as error:
        return _fail(str(error), FAILED)
    except KeyboardInterrupt:
        return _fail(f"interrupted; {interrupted}", INTERRUPTED)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, status: int) -> int:
    who = ""
    if not is_main():
        if status == INTERRUPTED:
            return status
        try:
            time.sleep(GRACE)
        except KeyboardInterrupt:
            return status
        who = f"process {os.environ['RANK']}: "
    print(f"error: {who}" + " ".join(message.split()), file=sys.stderr)
    return status
