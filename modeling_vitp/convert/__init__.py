"""Checkpoints in and out of other layouts, exact to the bit, and the exported backbone."""


def __getattr__(name: str):
    if name != "convert_checkpoint":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .checkpoint import convert_checkpoint  # when asked for: `vitp convert --help` needs none of it

    return convert_checkpoint
