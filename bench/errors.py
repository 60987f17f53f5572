"""The error of everything in the bench."""


class BenchError(Exception):
    """The bench cannot go on; the message is one line."""
