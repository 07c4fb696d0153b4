"""The one error that a user's input can cause."""


class InputError(ValueError):
    """A value that a user gave and that cannot be used.

    The message is one line that names the value, says what was expected and what to do. Command lines print
    it as ``error: <message>`` and exit with code 2; everything else that is raised is a defect and keeps
    its traceback.
    """
