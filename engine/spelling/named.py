"""What requests name: apart, so that whoever reads or checks a request loads none of this package's libraries."""

from __future__ import annotations

from typing import Literal

Score = Literal["first", "mass"]
"""What a member gives to a string that is none of its tokens. "first", as published: what it gives to the first token
of its spelling, though that may be the beginning of many others. "mass": what all its tokens have together that begin
with the string; as "first" where there is none. A string that a member cannot spell has nothing from it.
"""
