"""What is wrong with an input, in one sentence: what was expected, what came, what to do."""


class InputError(ValueError):
    """Base of the errors a user can mend. Pages and the command line show the message alone, without a traceback."""
