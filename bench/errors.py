"""The one exception a user sees as a message instead of a traceback."""


class BenchError(Exception):
    """What is wrong and what to do about it, in one sentence each."""
