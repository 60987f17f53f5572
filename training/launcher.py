"""What a launcher such as torchrun says in the environment of a process; read without waiting for torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from training.errors import SettingsError


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes there are; 1 without a launcher.

    Raises:
        SettingsError: the variable holds something else.
    """
    return _number(environment, "WORLD_SIZE", 1)


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """This process's number, from 0; 0 without a launcher.

    Raises:
        SettingsError: a variable holds something else, or a number that there is no process of.
    """
    count = world_size(environment)
    if count == 1:
        return 0
    found = _number(environment, "RANK", 0)
    if found >= count:
        raise SettingsError(f"RANK is {found}, but WORLD_SIZE is {count}: start the processes with torchrun")
    return found


def is_main(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process speaks for all; also where the variables make no sense, since each has to say so then."""
    try:
        return rank(environment) == 0
    except SettingsError:
        return True


def _number(environment: Mapping[str, str], name: str, least: int) -> int:
    value = environment.get(name, str(least))
    # Digits only: int() also takes "1_0".
    if not (value.isascii() and value.isdigit()) or int(value) < least:
        raise SettingsError(
            f"{name} is {value!r}, which is not a whole number from {least} up: "
            "unset it for one process, or start several with torchrun, which sets it"
        )
    return int(value)
