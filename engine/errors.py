"""What ends a program with one line instead of a traceback."""


class UsageError(ValueError):
    """Something that the user can mend; the text says in one line what is wrong and where."""


class NotFinite(ArithmeticError):
    """Why a run stopped by itself, in one line."""


def first_line(error):
    """The first line of an error's text, at most 200 characters of it."""
    return str(error).strip().split("\n")[0][:200]
