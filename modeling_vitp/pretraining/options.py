"""Options of a pretraining, from the command line or from a mapping."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl import ModelConfig

from ..training.command_line import parse, read_settings
from .arguments import SFT_MODULES, PretrainArguments, VRLArguments

if TYPE_CHECKING:
    from .config import ViTPTrainingConfig

CLASSES = (
    "modeling_vitp.pretraining.arguments.PretrainArguments",
    "modeling_vitp.pretraining.config.ViTPTrainingConfig",
    "trl.ModelConfig",
)


@dataclass
class PretrainingOptions:
    """Options of a pretraining.

    Args:
        data: training data, start of the model, frozen parts, and what is scored at the end.
        training: training arguments.
        model: TRL's options of the model: its name, its attention and LoRA.
    """

    data: PretrainArguments
    training: "ViTPTrainingConfig"
    model: ModelConfig


def parse_options(argv: Sequence[str] | None, description: str) -> PretrainingOptions:
    """Parse the command line of a pretraining, see [`~modeling_vitp.training.command_line.parse`].

    Raises:
        WrongArguments: if an option is unknown or has a wrong value.
    """
    data, training, model = parse(
        argv,
        description,
        recipe_classes=(PretrainArguments, VRLArguments, ModelConfig),
        all_classes=CLASSES,
        inherited_modules=SFT_MODULES,
    )
    return PretrainingOptions(data, training, model)


def make_options(settings: Mapping[str, Any]) -> PretrainingOptions:
    """Return the options of a pretraining from a mapping, which may be a configuration of `vitp pretrain`.

    Raises:
        ValueError: if a field is unknown or has a wrong value.
    """
    data, training, model = read_settings(settings, CLASSES)
    return PretrainingOptions(data, training, model)
