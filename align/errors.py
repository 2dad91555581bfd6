"""The one exception a person is meant to read."""


class UserError(Exception):
    """A mistake in the input or the setup, told in one line that says what to do. Shown without a traceback."""
