"""What a user's mistake looks like everywhere in Poise."""


class InputError(ValueError):
    """A mistake in what the user gave: a file, a field, an argument.

    The message is one line that names the file and field, what was found and what is allowed.
    The command line prints it and ends with exit status 2; nothing has been written.
    """
