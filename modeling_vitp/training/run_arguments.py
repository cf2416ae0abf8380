"""Arguments of every training, beside those of transformers."""

from dataclasses import dataclass, field

from .values import Arguments


@dataclass
class RunArguments(Arguments):
    """How a run stops and goes on, and what is seen of it meanwhile."""

    limits = {"watch_samples": "[0, inf)"}

    save_on_signal: list[str] = field(
        default_factory=lambda: ["SIGTERM"],
        metadata={
            "help": "Signals at which the run saves at the end of its step and stops with the command that goes on: "
            "SIGTERM (a scheduler's notice) and SIGINT (Ctrl-C; a second one stops at once), or none."
        },
    )
    allow_changed_data: bool = field(
        default=False,
        metadata={
            "help": "Goes on from a checkpoint though the data are not those that it was trained on, with a warning."
        },
    )

    watch_samples: int = field(
        default=4,
        metadata={
            "help": "Predictions and features of so many samples are drawn before training and at each evaluation, "
            "or at each checkpoint without any, to `watch` in output_dir and where report_to says; 0 for none."
        },
    )

    def __post_init__(self):
        if isinstance(self.save_on_signal, str):
            self.save_on_signal = self.save_on_signal.split()
        unknown = set(self.save_on_signal) - {"SIGTERM", "SIGINT", "none"}
        if unknown:
            raise ValueError(f"save_on_signal takes SIGTERM and SIGINT, or none; not {', '.join(sorted(unknown))}.")
        if hasattr(super(), "__post_init__"):
            super().__post_init__()

    @property
    def saving_signals(self) -> list[str]:
        return [name for name in self.save_on_signal if name != "none"]
