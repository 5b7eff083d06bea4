"""The exceptions a user sees as a message instead of a traceback."""


class BenchError(Exception):
    """What is wrong and what to do about it, in one sentence each."""


class NotHere(BenchError):
    """What was asked cannot run on this machine: nobody's fault, and no failure in ``bench all``."""
