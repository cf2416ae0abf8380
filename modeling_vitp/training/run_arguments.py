"""Arguments of every training, beside those of transformers."""

from dataclasses import dataclass, field

from .values import Arguments


@dataclass
class RunArguments(Arguments):
    """How a run stops and goes on."""

    allow_changed_data: bool = field(
        default=False,
        metadata={
            "help": "Goes on from a checkpoint though the data are not those that it was trained on, with a warning."
        },
    )
