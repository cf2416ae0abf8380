"""The models that the app opens: by Hub id, and by folder where the person who deploys the app names it.

Environment variables, read when the app starts:

- `VITP_MODEL`: Hub id or folder of the full model. `outputs/quickstart` if it is there, otherwise a tiny random model.
- `VITP_BACKBONES`: further Hub ids or folders, separated by commas, of backbones or full models to choose from.
- `VITP_FINE_TUNED`: Hub ids or folders of fine-tuned models, as many, for the tab Apply; none if not given.
- `VITP_TRUST_REMOTE_CODE`: `1` lets models run code from their repos. Off otherwise.
- `VITP_MAX_GB`: the largest weights, in GB, that a visitor may have downloaded by typing a Hub id; 4 if not given.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from computing import device
from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from tiny import tiny_model
from transformers import AutoConfig, AutoModel, InternVLForConditionalGeneration, PreTrainedConfig, PreTrainedModel

from modeling_vitp import (
    ViTPDetectionImageProcessor,
    ViTPForChangeDetection,
    ViTPForConditionalGeneration,
    ViTPForInstanceSegmentation,
    ViTPForObjectDetection,
    ViTPForOrientedObjectDetection,
    ViTPForSemanticSegmentation,
    ViTPImageProcessor,
    ViTPProcessor,
    ViTPSegmentationImageProcessor,
    ViTPVisionModel,
)
from modeling_vitp.cards.examples import num_bands
from modeling_vitp.convert.export import image_settings
from modeling_vitp.convert.internvl import from_internvl, internvl_processor

QUICKSTART = "outputs/quickstart"
TINY = "tiny random model"
UNTRAINED = "untrained ViT"
MAX_LOADED = 3
MAPS = (ViTPForSemanticSegmentation, ViTPForChangeDetection)
DETECTORS = (ViTPForObjectDetection, ViTPForOrientedObjectDetection, ViTPForInstanceSegmentation)


class UnavailableModel(ValueError):
    """A model that cannot be opened; the message is one line for the person who asked for it."""


@dataclass(frozen=True)
class FullModel:
    """A vision-language model, in evaluation mode on the device, its ViT with eager attention."""

    name: str
    model: ViTPForConditionalGeneration
    processor: ViTPProcessor


@dataclass(frozen=True)
class LoadedBackbone:
    """A ViT, in evaluation mode on the device, with eager attention."""

    name: str
    model: PreTrainedModel
    image_processor: ViTPImageProcessor
    """Its mean and std, for 8-bit RGB."""
    input_spec: dict | None
    """How it was taught to see images that are not 8-bit RGB."""

    @classmethod
    def of(cls, name: str, model: PreTrainedModel, image_processor: ViTPImageProcessor) -> "LoadedBackbone":
        plain = ViTPImageProcessor(**{**image_settings(image_processor), "input_spec": None})
        return cls(name, model.eval().to(device()), plain, image_processor.input_spec)


@dataclass(frozen=True)
class FineTuned:
    """A detector, or a model of maps of classes or of changes, in evaluation mode on the device."""

    name: str
    model: PreTrainedModel
    image_processor: ViTPDetectionImageProcessor | ViTPSegmentationImageProcessor
    """For 8-bit RGB."""
    input_spec: dict | None
    """How it was taught to see images that are not 8-bit RGB."""

    @property
    def is_detector(self) -> bool:
        return isinstance(self.model, DETECTORS)

    @property
    def takes_pairs(self) -> bool:
        return isinstance(self.model, ViTPForChangeDetection)

    @property
    def names(self) -> list[str]:
        """Of its classes."""
        return [self.model.config.id2label[index] for index in range(self.model.config.num_labels)]


class Models:
    """What every tab gets: opens models by name, each once, and keeps the last few.

    Args:
        model: the full model that the app starts with.
        backbones: further names to choose from.
        trust_remote_code: whether models may run code from their repos.
        max_gb: the largest weights to download for a name that is not among those.
        fine_tuned: names of fine-tuned models to choose from.
    """

    def __init__(
        self,
        model: str | None = None,
        backbones: Sequence[str] = (),
        trust_remote_code: bool = False,
        max_gb: float = 4.0,
        fine_tuned: Sequence[str] = (),
    ):
        self.default = model or (QUICKSTART if Path(QUICKSTART, "config.json").is_file() else TINY)
        self.backbones = list(dict.fromkeys([self.default, *backbones, UNTRAINED]))
        """Names for a choice of backbones; of a full model it is its ViT."""
        self.names = [self.default]
        """Names for a choice of full models."""
        self.fine_tuned_names = list(dict.fromkeys(fine_tuned))
        """Names for a choice of fine-tuned models."""
        self.trust_remote_code = trust_remote_code
        self.max_gb = max_gb
        self._loaded: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = threading.RLock()

    @classmethod
    def from_environment(cls) -> "Models":
        def names(variable: str) -> list[str]:
            return [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]

        return cls(
            os.environ.get("VITP_MODEL") or None,
            names("VITP_BACKBONES"),
            os.environ.get("VITP_TRUST_REMOTE_CODE") == "1",
            float(os.environ.get("VITP_MAX_GB") or 4),
            names("VITP_FINE_TUNED"),
        )

    def full(self, name: str | None = None) -> FullModel:
        """The full model of this name, the app's own if none is given.

        Raises:
            UnavailableModel: if there is no such model, or it is of another kind.
        """
        return self._once("full", name or self.default, self._open_full)

    def backbone(self, name: str | None = None) -> LoadedBackbone:
        """The backbone of this name: of a full model its ViT, the same weights in memory.

        Raises:
            UnavailableModel: if there is no such model, or it is of another kind.
        """
        return self._once("backbone", name or self.default, self._open_backbone)

    def fine_tuned(self, name: str) -> FineTuned:
        """The fine-tuned model of this name.

        Raises:
            UnavailableModel: if there is no such model, or it is of another kind.
        """
        return self._once("fine-tuned", name, lambda name: self._try(name, self._read_fine_tuned))

    def _once(self, kind: str, name: str, opener: Callable[[str], Any]) -> Any:
        with self._lock:
            if (kind, name) not in self._loaded:
                self._loaded[kind, name] = opener(name)
            self._loaded.move_to_end((kind, name))
            while len(self._loaded) > 2 * MAX_LOADED:
                self._loaded.popitem(last=False)
            return self._loaded[kind, name]

    def _open_full(self, name: str) -> FullModel:
        if name == TINY:
            model, processor = tiny_model()
        else:
            model, processor = self._try(name, self._read_full)
        model.model.vision_tower.set_attn_implementation("eager")
        return FullModel(name, model.eval().to(device()), processor)

    def _open_backbone(self, name: str) -> LoadedBackbone:
        if name == UNTRAINED:
            return self._untrained()
        if name == TINY or self._model_type(name) in ("vitp", "internvl"):
            full = self.full(name)
            return LoadedBackbone.of(name, full.model.model.vision_tower, full.processor.image_processor)
        return LoadedBackbone.of(name, *self._try(name, self._read_backbone))

    def _untrained(self) -> LoadedBackbone:
        trained = self.backbone()
        config = type(trained.model.config).from_dict(trained.model.config.to_dict())
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = ViTPVisionModel._from_config(config, attn_implementation="eager")
        return LoadedBackbone(UNTRAINED, model.eval().to(device()), trained.image_processor, trained.input_spec)

    def _read_full(self, name: str, options: dict) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
        if self._model_type(name) == "vitp":
            model = ViTPForConditionalGeneration.from_pretrained(name, use_safetensors=True, **options)
            return model, ViTPProcessor.from_pretrained(name, **options)
        if self._model_type(name) != "internvl":
            raise UnavailableModel(f"{name} is a {self._model_type(name)!r} model, not a full one (vitp or internvl).")
        native = InternVLForConditionalGeneration.from_pretrained(name, use_safetensors=True, **options)
        return from_internvl(native), internvl_processor(name, **options)

    def _read_backbone(self, name: str, options: dict) -> tuple[PreTrainedModel, ViTPImageProcessor]:
        kind = self._model_type(name)
        if kind not in ("internvl_vision", "vitp_vision") and not self.trust_remote_code:
            raise UnavailableModel(f"{name} is a {kind!r} model; backbones here are internvl_vision or vitp_vision.")
        model = AutoModel.from_pretrained(
            name,
            config=AutoConfig.from_pretrained(name, trust_remote_code=self.trust_remote_code, **options),
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=self.trust_remote_code,
            **options,
        )
        return model, ViTPImageProcessor.from_pretrained(name, **options)

    def _read_fine_tuned(self, name: str, options: dict) -> FineTuned:
        classes = {one.config_class.model_type: one for one in (*MAPS, *DETECTORS)}
        kind = self._model_type(name)
        if kind not in classes:
            raise UnavailableModel(f"{name} is a {kind!r} model; fine-tuned ones here are {', '.join(classes)}.")
        model = classes[kind].from_pretrained(name, use_safetensors=True, **options)
        processors = ViTPDetectionImageProcessor if isinstance(model, DETECTORS) else ViTPSegmentationImageProcessor
        image_processor = processors.from_pretrained(name, **options)
        input_spec, image_processor.input_spec = image_processor.input_spec, None
        return FineTuned(name, model.eval().to(device()), image_processor, input_spec)

    def _model_type(self, name: str) -> str | None:
        config = self._try(name, lambda name, options: PreTrainedConfig.get_config_dict(name, **options)[0])
        bands = num_bands(config)
        if bands is not None:
            raise UnavailableModel(f"{name} takes {bands} bands; what is shown here is of red, green and blue.")
        return config.get("model_type")

    def _try(self, name: str, read: Callable[[str, dict], Any]) -> Any:
        """Calls `read` with the name and options of `from_pretrained`; what goes wrong is told in one line."""
        options = {} if name in (*self.backbones, *self.fine_tuned_names) else self._visitors_options(name)
        try:
            return read(name, options)
        except UnavailableModel:
            raise
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UnavailableModel(f"{name} cannot be opened: {reason}") from error

    def _visitors_options(self, name: str) -> dict:
        """For a name that a visitor typed: a Hub id, no folder, of limited size, and without the deployer's token."""
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UnavailableModel(f"{name[:100]!r} is no Hub id such as 'organisation/model'.") from error
        if Path(name).exists():
            raise UnavailableModel(f"{name} is a folder; folders are opened only if the app was started with them.")
        try:
            files = HfApi(token=False).model_info(name, files_metadata=True).siblings
        except Exception as error:  # of the client and of the HTTP library below it, which changes with its versions
            raise UnavailableModel(f"there is no public model {name!r} on the Hub, or it cannot be reached.") from error
        gigabytes = sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors")) / 1e9
        if not 0 < gigabytes <= self.max_gb:
            raise UnavailableModel(
                f"{name} has {gigabytes:.1f} GB of safetensors; up to {self.max_gb:g} GB are opened."
            )
        return {"token": False}
