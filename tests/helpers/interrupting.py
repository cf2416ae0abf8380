"""Models that are killed while they predict."""


class Killed(Exception):
    """Exception that stands for the end of the process."""


def killed_after(model, monkeypatch, calls, method="forward"):
    """Let a method of a model raise an error after a number of calls."""
    original = getattr(model, method)
    remaining = iter(range(calls))

    def dying(*args, **kwargs):
        if next(remaining, None) is None:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(model, method, dying)
