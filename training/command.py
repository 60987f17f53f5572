"""What the commands share: errors as one line on stderr, and an end by Ctrl-C or SIGTERM without a traceback."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from engine.errors import CollmError

FAILED, INTERRUPTED = 1, 130
GOES_ON = "what was finished is kept: the same command goes on from there"


def run_command(work: Callable[[], None], *, interrupted: str = GOES_ON) -> int:
    """Do the work of a command; the exit status.

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
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return status
