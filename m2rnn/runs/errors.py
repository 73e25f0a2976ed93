"""What a run that cannot start raises."""


class SettingsError(ValueError):
    """A setting that cannot work: the message names its value, what was expected and what to do."""
