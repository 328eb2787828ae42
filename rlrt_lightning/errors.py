"""The one error that the user can mend: a wrong setting or a wrong input."""


class ConfigError(ValueError):
    """A setting or an input is wrong. The message names it and says what to do; the command line prints it as one
    line and ends with exit code 2."""


def first_line(error: BaseException) -> str:
    """What an error says first; libraries add pages."""
    return str(error).strip().split("\n")[0]
