"""Arguments of the layer-wise decay of the learning rate."""

from dataclasses import dataclass, field

from .values import Arguments


@dataclass
class LayerDecayArguments(Arguments):
    """What [`~modeling_vitp.training.layer_decay.layer_decay_groups`] is called with."""

    limits = {"layer_decay": "(0, 1]"}

    layer_decay: float = field(
        default=0.9,
        metadata={"help": "The learning rate of a layer of the ViT is this times that of the next one. 1: no decay."},
    )
    level_embeddings_at_input: bool = field(
        default=False,
        metadata={
            "help": "Whether the adapter's level embeddings learn at the rate of the patch and position embeddings, as "
            "in the authors' release, and not at that of the adapter."
        },
    )
    position_weight_decay: bool = field(
        default=False,
        metadata={"help": "Whether position embeddings have weight decay, as in the authors' release."},
    )

    def layer_decay_settings(self) -> dict[str, float | bool | None]:
        """For the record of a run, where an option that is off is as in a record without it."""
        options = ("level_embeddings_at_input", "position_weight_decay")
        return {"layer_decay": self.layer_decay} | {name: getattr(self, name) or None for name in options}
