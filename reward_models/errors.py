"""The one error type of this package; `diffalign` is not imported, so it cannot be its `UserError`."""


class ScorerError(ValueError):
    """Report a mistake a user can fix: the message names the value, what was expected and the fix."""
