"""A run that ends before its last step, in one line and without exporting anything."""


class RunStopped(RuntimeError):
    """Args:
    message: what happened, and what to do next.
    status: the exit status of the command.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status
