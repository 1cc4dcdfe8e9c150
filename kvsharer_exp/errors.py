"""The one error that is the user's to mend; every other exception is ours."""


class InputError(ValueError):
    """Bad input: one line with the value, the rule and the way out. Exit code 2."""
