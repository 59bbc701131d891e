"""The error for a user's mistake."""


class InputError(ValueError):
    """A mistake in the user's input: a file, a field, an argument.

    The message is one line that names the file and field, what was found and what is allowed.
    The command line prints it and exits with status 2; nothing has been written.
    """
