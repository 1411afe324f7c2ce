"""The parts of a training run."""


class UserError(ValueError):
    """An error that is the user's to solve; its message says what is wrong, and what to do."""
