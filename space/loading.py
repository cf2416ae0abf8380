"""Models of the app: folders and Hub ids that the app is started with, and Hub ids that visitors type.

Environment variables, read when the app starts:

- `VITP_MODEL`: Hub id or folder of the model that the page opens with, of any kind. Default: `outputs/quickstart` if it
  exists, otherwise the model in `space/quickstart`, otherwise a tiny random model.
- `VITP_BACKBONES`: further Hub ids or folders of models of any kind, separated by commas.
- `VITP_FINE_TUNED`: Hub ids or folders of fine-tuned models for the tab Apply, separated by commas.
- `VITP_TRUST_REMOTE_CODE`: `1` lets the models named here run code from their repositories, but never visitors' models.
- `VITP_MAX_GB`: the largest weights, in GB, that are downloaded for a Hub id typed by a visitor. Default: 4.
"""

import gc
import inspect
import math
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import limits
import torch
from checking import (
    FILES,
    UnavailableModel,
    check_files,
    check_settings,
    check_shapes,
    check_size,
    check_tokenizer,
    check_weights,
)
from computing import BUILDING, device, seconds_left
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    BaseImageProcessor,
    GenerationConfig,
    InternVLForConditionalGeneration,
    InternVLVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.output_capturing import OutputRecorder

from modeling_vitp import (
    ViTPAdapter,
    ViTPBackbone,
    ViTPChangeDetectionConfig,
    ViTPConfig,
    ViTPFeaturePyramid,
    ViTPForConditionalGeneration,
    ViTPImageClassificationConfig,
    ViTPImageProcessor,
    ViTPProcessor,
    ViTPSegmentationConfig,
    ViTPVisionConfig,
    ViTPVisionModel,
)
from modeling_vitp.auto.registry import MODELS
from modeling_vitp.conversations import CHAT_TEMPLATE
from modeling_vitp.convert.internvl import from_internvl, internvl_processor
from modeling_vitp.modeling_vitp_backbone import ViTPMultiScaleBackbone
from modeling_vitp.opening import without_remote_code
from modeling_vitp.pretraining.loading import build_model, build_tokenizer
from modeling_vitp.tasks.detection.one_stage import DETECTORS
from modeling_vitp.vision_towers import TOWERS

QUICKSTART = Path("outputs/quickstart")
PACKED = Path(__file__).parent / "quickstart"
TINY = "tiny random model"
REFERENCES = (
    "facebook/dinov2-small",
    "google/siglip-base-patch16-224",
    "openai/clip-vit-large-patch14",
    "OpenGVLab/InternVL3-1B-hf",
)
"""Public models whose ViTs are offered for comparison. Others, such as DINOv3, can be typed or named at the start."""
RANDOM = ", random weights"
"""Suffix of the name of a ViT for the same ViT with randomly initialized weights."""
ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    RuntimeError,
    ImportError,
    SafetensorError,
    RecursionError,
    MemoryError,
)

FULL = "full model"
BACKBONE = "backbone"
FINE_TUNED = "fine-tuned model"
LANGUAGE_MODELS = ("qwen2", "qwen3", "llama", "mistral", "phi3", "gemma2", "gemma3_text")
WITH_MAPS = {
    model_class.config_class.model_type: model_class for model_class in (ViTPBackbone, ViTPAdapter, ViTPFeaturePyramid)
}
ON_PATCHES = ("internvl_vision", "vitp_vision", *WITH_MAPS)
REFERENCE_TYPES = (
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "clip",
    "clip_vision_model",
    "siglip",
    "siglip_vision_model",
    "siglip2_vision_model",
    "vit",
    "vit_mae",
    "ijepa",
)


def _classes_of_heads() -> dict[str, tuple[type, type]]:
    """Return the model class and the image processor class of each type of fine-tuned model."""
    classes = dict(DETECTORS)
    for model_type, entry in MODELS.items():
        if model_type not in ("vitp", "vitp_vision") and entry.image_processor_class is not None:
            classes[model_type] = (entry.model_class, entry.image_processor_class)
    return classes


HEADS = _classes_of_heads()
KINDS = {
    "vitp": FULL,
    "internvl": FULL,
    **dict.fromkeys(ON_PATCHES, BACKBONE),
    **dict.fromkeys(REFERENCE_TYPES, BACKBONE),
    **dict.fromkeys(HEADS, FINE_TUNED),
}
MAPS = (ViTPSegmentationConfig.model_type, ViTPChangeDetectionConfig.model_type)
TINY_VISION = {
    "image_size": [112, 112],
    "patch_size": [14, 14],
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "attention_bias": True,
    "layer_scale_init_value": 1.0,
}
TINY_TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MULTIPLE = 32  # The ViT of a detector or segmentation model pads image sides to a multiple of this.


@dataclass(frozen=True)
class FullModel:
    """Vision-language model with its processor, in evaluation mode on the device, with eager attention."""

    name: str
    model: ViTPForConditionalGeneration
    processor: ViTPProcessor


@dataclass(frozen=True)
class LoadedBackbone:
    """ViT of any type with its image processor, in evaluation mode on the device, with eager attention."""

    name: str
    model: PreTrainedModel
    image_processor: ViTPImageProcessor
    """Image processor with the mean and std of the model, for 8-bit RGB or for its bands."""
    input_spec: dict | None
    """Input spec with which the model was trained on images that are not 8-bit RGB."""

    @classmethod
    def of(cls, name: str, model: PreTrainedModel, image_processor: BaseImageProcessor) -> "LoadedBackbone":
        """Wrap a ViT and take mean, std and bands from an image processor of any class."""
        model = getattr(model, "vit", model)  # of another family, in a model with feature maps
        settings = {}
        for key in ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample"):
            value = getattr(image_processor, key, None)
            if value is not None:
                settings[key] = value
        bands = getattr(image_processor, "band_names", None)
        band_spec = {"band_names": bands} if bands else None
        return cls(
            name=name,
            model=model.eval().to(device()),
            image_processor=ViTPImageProcessor(**settings, input_spec=band_spec),
            input_spec=getattr(image_processor, "input_spec", None),
        )

    @property
    def band_names(self) -> list[str] | None:
        """Names of the model's bands, if they are not RGB."""
        return self.image_processor.band_names

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.model.config.num_hidden_layers

    @property
    def heads(self) -> int:
        return self.model.config.num_attention_heads

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        size = self.model.config.patch_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def native(self) -> int:
        """Number of patches a side at the image size of the configuration."""
        size = self.model.config.image_size
        height = size if isinstance(size, int) else size[0]
        return height // self.patch[0]

    @property
    def is_padded(self) -> bool:
        """True for the ViT of a detector or segmentation model, which pads images."""
        return isinstance(self.model, ViTPMultiScaleBackbone)

    def states(self, pixel_values: torch.Tensor, layer: int) -> torch.Tensor:
        """Return the patch features after a layer, from 1, of shape `(channels, rows, columns)`.

        For the last layer, the result is `last_hidden_state`, which includes the final norm if the ViT has one.
        """
        # Backbones with `stage_names` do not return a last_hidden_state.
        is_last = layer == self.depth and not hasattr(self.model, "stage_names")
        if is_last:
            states = self.run(pixel_values, output_hidden_states=False).last_hidden_state
        else:
            self.check_recorded()
            states = self.run(pixel_values, output_hidden_states=True).hidden_states[layer]
        rows, columns = self.grid(pixel_values)
        patch_states = states[0, -rows * columns :]
        features = patch_states.T.unflatten(1, (rows, columns))
        image_height, image_width = pixel_values.shape[-2:]
        patch_height, patch_width = self.patch
        return features[:, : image_height // patch_height, : image_width // patch_width]

    def grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Return rows and columns of patches of an image, including padding."""
        height, width = pixel_values.shape[-2:]
        if self.is_padded:
            height = MULTIPLE * math.ceil(height / MULTIPLE)
            width = MULTIPLE * math.ceil(width / MULTIPLE)
        patch_height, patch_width = self.patch
        return height // patch_height, width // patch_width

    @torch.no_grad()
    def run(self, pixel_values: torch.Tensor, **options):
        tower = TOWERS.get(self.model.config.model_type)
        if tower is not None:  # A masked autoencoder would shuffle the patches.
            return tower.run(self.model, pixel_values, **options)
        if "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters:
            options["interpolate_pos_encoding"] = True
        return self.model(pixel_values=pixel_values, **options)

    def check_recorded(self) -> None:
        """Raise a `ValueError` for a ViT of timm, which does not return the outputs of its layers."""
        if self.model.config.model_type == "timm_wrapper":
            raise ValueError(f"{self.name}: only the features of the last layer of a ViT of timm can be shown.")

    def attention_layers(self) -> list[tuple[nn.Module, int]]:
        """Return the attention module of each layer and the index of the attention weights in its outputs."""
        self.check_recorded()
        recorder = self.model._can_record_outputs["attentions"]
        if isinstance(recorder, OutputRecorder):
            attention_class = recorder.target_class
            index = recorder.index
        else:
            attention_class = recorder
            index = 1
        return [(module, index) for module in self.model.modules() if isinstance(module, attention_class)]


@dataclass(frozen=True)
class FineTuned:
    """Model for detection, classification, segmentation or change detection, in evaluation mode on the device."""

    name: str
    model: PreTrainedModel
    image_processor: BaseImageProcessor
    """Image processor for 8-bit RGB or for the bands of the model."""
    input_spec: dict | None
    """Input spec with which the model was trained on images that are not 8-bit RGB."""

    @property
    def band_names(self) -> list[str] | None:
        """Names of the model's bands, if they are not RGB."""
        return getattr(self.image_processor, "band_names", None)

    @property
    def is_detector(self) -> bool:
        return self.model.config.model_type not in MAPS and not self.is_classifier

    @property
    def is_classifier(self) -> bool:
        """True for a model that classifies whole images."""
        return self.model.config.model_type == ViTPImageClassificationConfig.model_type

    @property
    def takes_pairs(self) -> bool:
        return self.model.config.model_type == ViTPChangeDetectionConfig.model_type

    @property
    def names(self) -> list[str]:
        """Names of the classes."""
        config = self.model.config
        return [config.id2label[index] for index in range(config.num_labels)]


class Models:
    """Cache of models that opens each model once, in a thread of its own, and keeps the most recent ones.

    Models are identified by the name that visitors see: the Hub id, or the name of a folder without its path.

    Args:
        model: folder or Hub id of the model that the page opens with.
        backbones, fine_tuned: folders or Hub ids of further models.
        trust_remote_code: whether these models may run code from their repositories.
        max_gb: largest weights that are downloaded for other models, in GB.
    """

    def __init__(
        self,
        model: str | None = None,
        backbones: Sequence[str] = (),
        trust_remote_code: bool = False,
        max_gb: float = limits.MAX_GB,
        fine_tuned: Sequence[str] = (),
    ):
        paths = [model or _default_model(), *backbones, *fine_tuned]
        paths = list(dict.fromkeys(path for path in paths if path))
        self._sources = dict(zip(names_of(paths), paths))
        """Folders or Hub ids of the models that the app was started with, by name."""
        self.names = list(self._sources)
        """Names of all models that the app was started with."""
        self.default = self.names[0]
        self.trust_remote_code = trust_remote_code
        self.max_gb = max_gb
        self._kinds: dict[str, str] = {}
        self._loaded: OrderedDict[tuple[str, str], Future] = OrderedDict()
        self._loading: list[str] = []
        self._lock = threading.Lock()
        self._process = os.getpid()
        self.full_names = []
        self.fine_tuned_names = []
        for name, source in self._sources.items():
            kind = self._kind_at_start(name, source in fine_tuned)
            if kind == FULL:
                self.full_names.append(name)
            elif kind == FINE_TUNED:
                self.fine_tuned_names.append(name)

    @classmethod
    def from_environment(cls) -> "Models":
        return cls(
            model=os.environ.get("VITP_MODEL") or None,
            backbones=_names_in_variable("VITP_BACKBONES"),
            trust_remote_code=os.environ.get("VITP_TRUST_REMOTE_CODE") == "1",
            max_gb=float(os.environ.get("VITP_MAX_GB") or limits.MAX_GB),
            fine_tuned=_names_in_variable("VITP_FINE_TUNED"),
        )

    def source(self, name: str) -> str | None:
        """Return the folder or Hub id of a model that the app was started with."""
        return self._sources.get(name)

    def kind(self, name: str) -> str:
        """Return the kind of a model: `FULL`, `BACKBONE` or `FINE_TUNED`.

        Raises:
            UnavailableModel: if the model is not found or its type is not supported.
        """
        name = name.removesuffix(RANDOM)
        if name not in self._kinds:
            self._once("kind", name, self._read_kind)
        return self._kinds[name]

    def full(self, name: str | None = None) -> FullModel:
        """Return a full model, the default one if no name is given.

        Raises:
            UnavailableModel: if the model is not found or of another kind.
        """
        name = name or self.default
        if self.kind(name) != FULL:
            raise UnavailableModel(f"{name} is a {self.kind(name)} and cannot answer. Choose a full model above.")
        return self._once("model", name, self._open)

    def backbone(self, name: str | None = None) -> LoadedBackbone:
        """Return a backbone, or the ViT of a full or fine-tuned model, which shares its weights.

        Raises:
            UnavailableModel: if the model is not found or cannot be opened.
        """
        name = name or self.default
        if name.endswith(RANDOM):
            return self._once("backbone", name, self._build_twin)
        if self.kind(name) == BACKBONE:
            return self._once("model", name, self._open)
        return self._once("backbone", name, self._open_vit)

    def fine_tuned(self, name: str) -> FineTuned:
        """Return a fine-tuned model.

        Raises:
            UnavailableModel: if the model is not found or of another kind.
        """
        if self.kind(name) != FINE_TUNED:
            raise UnavailableModel(f"{name} is a {self.kind(name)}. Choose a model that was fine-tuned for a task.")
        return self._once("model", name, self._open)

    def _kind_at_start(self, name: str, is_fine_tuned: bool) -> str:
        """Return the kind of a model before the page is served.

        It is read from the configuration of folders and of the default model. Other models on the Hub are not requested
        yet, so that the app starts fast.
        """
        if Path(self._sources[name]).is_dir() or name == TINY:
            return self.kind(name)
        if name == self.default:
            with suppress(UnavailableModel):  # The error is shown when the model is opened.
                return self.kind(name)
        if is_fine_tuned:
            return FINE_TUNED
        return FULL if name == self.default else BACKBONE

    def _once(self, subject: str, name: str, opener: Callable[[str], Any]) -> Any:
        """Open a model in a thread of its own, so that a visitor can stop waiting and other visitors do not wait.

        Args:
            subject: what is opened, `kind`, `model` or `backbone`, because a model may be opened as several of them.
        """
        if self._process != os.getpid():
            self._forget_threads()
        key = (subject, name)
        with self._lock:
            future = self._loaded.get(key)
            if future is None:
                self._check_number_of_loading(name)
                self._loading.append(name.removesuffix(RANDOM))
                future = Future()
                self._loaded[key] = future
                threading.Thread(target=self._run, args=(key, opener, future), daemon=True).start()
            self._loaded.move_to_end(key)
        try:
            return future.result(seconds_left())
        except TimeoutError as error:
            raise UnavailableModel(f"{name} is still being loaded. Try again in a minute.") from error

    def _forget_threads(self) -> None:
        """Forget the models that are being loaded. In a fork, a worker of ZeroGPU, their threads do not exist."""
        self._lock = threading.Lock()
        self._loading = []
        self._process = os.getpid()
        self._loaded = OrderedDict((key, future) for key, future in self._loaded.items() if future.done())

    def _check_number_of_loading(self, name: str) -> None:
        """Raise [`UnavailableModel`] if too many other models of visitors are being loaded."""
        plain_name = name.removesuffix(RANDOM)
        if plain_name in self._loading or plain_name in self._sources:
            return
        other_models = set(self._loading) - set(self._sources)
        if len(other_models) >= limits.LOADING:
            raise UnavailableModel(f"{len(other_models)} models are being loaded. Try {name} again in a minute.")

    def _run(self, key: tuple[str, str], opener: Callable[[str], Any], future: Future) -> None:
        name = key[1]
        model = None
        failure = None
        try:
            model = opener(name)
        except UnavailableModel as error:
            failure = UnavailableModel(*error.args)
        except ERRORS as error:
            reason = without_paths(error, self._sources.values())
            failure = UnavailableModel(f"{name} cannot be opened: {reason}")
        except BaseException as error:  # Raised again by `future.result`.
            failure = error
        if failure is not None:
            gc.collect()  # The errors above are not kept, because their tracebacks refer to the model.
        with self._lock:
            self._loading.remove(name.removesuffix(RANDOM))
            if failure is not None:
                self._loaded.pop(key, None)
                future.set_exception(failure)
            else:
                future.set_result(model)

    def _make_room(self, name: str, size: int) -> None:
        """Drop the least recently used models of visitors until a model of `size` bytes is within the limits.

        Raises:
            UnavailableModel: if answers still use the memory.
        """
        if name in self._sources:
            return
        with self._lock:
            sizes = self._sizes_of_other_models(name)
            while sizes and (len(sizes) >= limits.KEPT_MODELS or sum(sizes.values()) + size > limits.model_bytes()):
                oldest_name = next(iter(sizes))
                del sizes[oldest_name]
                for key in list(self._loaded):
                    subject, loaded_name = key
                    if loaded_name == oldest_name and subject != "kind":
                        del self._loaded[key]
        gc.collect()
        if limits.used() + size > limits.memory():
            raise UnavailableModel(f"The memory is in use. Try {name} again in a minute.")

    def _sizes_of_other_models(self, name: str) -> dict[str, int]:
        """Return the sizes in bytes of visitors' models in memory, except one, in the order of their last use."""
        sizes = {}
        for (_, loaded_name), future in self._loaded.items():
            if loaded_name in self._sources or loaded_name == name or not future.done():
                continue
            model = getattr(future.result(), "model", None)
            if model is not None:
                sizes.pop(loaded_name, None)  # Reinsertion keeps the order of the last use.
                sizes[loaded_name] = bytes_of(model)
        return sizes

    def _read_kind(self, name: str) -> str:
        if name == TINY:
            self._kinds[name] = FULL
            return FULL
        is_trusted = name in self._sources
        with fetched(name, self._sources.get(name), self.max_gb, config_only=True) as folder:
            config = check_settings(name, folder, is_trusted)
        has_code = "auto_map" in config and config.get("model_type") not in KINDS
        if has_code and is_trusted and self.trust_remote_code:
            kind = BACKBONE
        else:
            kind = kind_of(name, config)
        self._kinds[name] = kind
        return kind

    def _open(self, name: str) -> FullModel | LoadedBackbone | FineTuned:
        if name == TINY:
            with BUILDING:
                model, processor = tiny_model()
            model.set_attn_implementation("eager")
            return FullModel(name, model.eval().to(device()), processor)
        is_trusted = name in self._sources
        kind = self.kind(name)
        with fetched(name, self._sources.get(name), self.max_gb) as folder:
            check_files(name, folder)
            check_settings(name, folder, is_trusted)
            if kind == FULL and not is_trusted:
                check_tokenizer(name, folder)
            make_room = partial(self._make_room, name)
            with BUILDING:  # Downloads of other models and answers continue meanwhile.
                if kind == FULL:
                    return open_full(name, folder, is_trusted, make_room)
                if kind == FINE_TUNED:
                    return open_fine_tuned(name, folder, make_room)
                return open_backbone(name, folder, self.trust_remote_code and is_trusted, make_room)

    def _open_vit(self, name: str) -> LoadedBackbone:
        """Return the ViT of a full or fine-tuned model."""
        return vit_of(name, self._once("model", name, self._open))

    def _build_twin(self, name: str) -> LoadedBackbone:
        trained = self.backbone(name.removesuffix(RANDOM))
        self._make_room(name, bytes_of(trained.model))
        return random_twin(name, trained)


def _default_model() -> str:
    """Return the folder of the user's quickstart or of the packed model, or the name of the tiny model without both."""
    for folder in (QUICKSTART, PACKED):
        if (folder / "config.json").is_file():
            return str(folder)
    return TINY


def _names_in_variable(variable: str) -> list[str]:
    """Return the names, separated by commas, in an environment variable."""
    names = [name.strip() for name in os.environ.get(variable, "").split(",")]
    return [name for name in names if name]


def bytes_of(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@contextmanager
def fetched(
    name: str,
    source: str | None,
    max_gb: float,
    config_only: bool = False,
) -> Iterator[Path]:
    """Provide the folder of a model.

    Args:
        name: name of the model in the page.
        source: folder or Hub id of a model that the app was started with; `None` for a model that a visitor named. The
            latter must be public and limited in size, and its files are deleted after the block.
        max_gb: largest weights of a visitor's model, in GB.
        config_only: whether only the configuration is needed.

    Raises:
        UnavailableModel: if the model is not found or too large.
    """
    if source is not None and Path(source).is_dir():
        yield Path(source)
        return
    if source is not None:
        patterns = ["*.json"] if config_only else ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "*.py"]
        yield Path(snapshot_download(source, allow_patterns=patterns))
        return
    with tempfile.TemporaryDirectory(prefix="visitor") as folder:
        download_public(name, Path(folder), max_gb, config_only)
        yield Path(folder)


def download_public(
    name: str,
    folder: Path,
    max_gb: float,
    config_only: bool,
) -> None:
    """Check the sizes of the files of a public model on the Hub and download them, see [`fetched`]."""
    sizes, revision = files_of(name)
    required_files = []
    weight_bytes = 0
    for file, size in sizes.items():
        if file.endswith(".safetensors"):
            weight_bytes += size
        if FILES.fullmatch(file) and (file.endswith("config.json") or not config_only):
            required_files.append(file)
    gigabytes = weight_bytes / 1e9
    if not 0 < gigabytes <= max_gb:
        raise UnavailableModel(
            f"{name} has {gigabytes:.1f} GB of safetensors, expected more than 0 and up to {max_gb:g}."
        )
    if len(required_files) > limits.FILES:
        raise UnavailableModel(f"{name} has {len(required_files):,} files, more than {limits.FILES}.")
    for file in required_files:
        check_size(name, file, sizes[file])
    for file in required_files:
        hf_hub_download(
            name,
            file,
            revision=revision,
            local_dir=folder,
            token=False,
            etag_timeout=10,
        )


def files_of(name: str) -> tuple[dict[str, int], str | None]:
    """Return the file sizes of a public model, in bytes, and its commit. Names are Hub ids, never folders."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UnavailableModel(f"Expected a Hub id such as 'organization/model', got {name[:100]!r}.") from error
    if Path(name).exists():
        raise UnavailableModel(f"{name} is a folder. Only folders that the app was started with can be opened.")
    try:
        info = HfApi(token=False).model_info(name, files_metadata=True, timeout=10)
    except Exception as error:  # The HTTP library, and so its errors, differ between versions of the client.
        raise UnavailableModel(f"No public model {name!r} found on the Hub, or the Hub cannot be reached.") from error
    return {file.rfilename: file.size or 0 for file in info.siblings}, info.sha


def kind_of(name: str, config: dict[str, Any]) -> str:
    """Return the kind of a model, or raise [`UnavailableModel`] if its type is not supported."""
    model_type = config.get("model_type")
    if model_type not in KINDS:
        raise UnavailableModel(f"{name} has the model type {str(model_type)[:60]!r}, which this app does not support.")
    return KINDS[model_type]


def open_full(
    name: str,
    folder: Path,
    is_trusted: bool,
    make_room: Callable[[int], None],
) -> FullModel:
    """Open a full model with its processor.

    Args:
        is_trusted: whether the model was named when the app was started. Otherwise its chat template is replaced, and
            of its generation settings only the special tokens are used.
        make_room: function that is called with the size of the model, in bytes, before it is built.
    """
    config = ViTPConfig.get_config_dict(folder)[0]
    language = config["text_config"].get("model_type")
    if not is_trusted and language not in LANGUAGE_MODELS:
        raise UnavailableModel(
            f"{name}: expected one of the language models {', '.join(LANGUAGE_MODELS)}, got {str(language)[:60]!r}."
        )
    if config["model_type"] == "vitp":
        model = load(name, folder, ViTPForConditionalGeneration, make_room)
        processor = ViTPProcessor.from_pretrained(folder, local_files_only=True)
    else:
        # The conversion builds the model a second time.
        source = load(name, folder, InternVLForConditionalGeneration, lambda size: make_room(2 * size))
        model = from_internvl(source)
        limit_attention(model)
        processor = internvl_processor(str(folder), local_files_only=True)
    if processor.image_seq_length != model.config.image_seq_length:
        raise UnavailableModel(
            f"{name}: the processor has {processor.image_seq_length} visual tokens a tile, but the model has "
            f"{model.config.image_seq_length}."
        )
    if not is_trusted:
        processor.chat_template = CHAT_TEMPLATE
        processor.tokenizer.chat_template = None
        settings = model.generation_config
        model.generation_config = GenerationConfig(
            bos_token_id=settings.bos_token_id,
            eos_token_id=settings.eos_token_id,
            pad_token_id=settings.pad_token_id,
        )
    model.set_attn_implementation("eager")
    return FullModel(name, model.eval().to(device()), processor)


def open_backbone(
    name: str,
    folder: Path,
    trust_remote_code: bool,
    make_room: Callable[[int], None],
) -> LoadedBackbone:
    model_type = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    options = {"trust_remote_code": True} if trust_remote_code else {}
    model = load(name, folder, WITH_MAPS.get(model_type, AutoModel), make_room, **options)
    processors = ViTPImageProcessor if model_type in ON_PATCHES else AutoImageProcessor
    processor = without_remote_code(processors.from_pretrained, folder, local_files_only=True)
    return LoadedBackbone.of(name, model.get_encoder(modality="image"), processor)


def open_fine_tuned(name: str, folder: Path, make_room: Callable[[int], None]) -> FineTuned:
    config = PreTrainedConfig.get_config_dict(folder)[0]
    model_class, processors = HEADS[config["model_type"]]
    if config["model_type"] in MAPS:
        num_classes = model_class.config_class(**config).num_labels
        if num_classes > limits.MAP_CLASSES:
            raise UnavailableModel(f"{name} has {num_classes:,} classes, more than {limits.MAP_CLASSES}.")
    image_processor = without_remote_code(processors.from_pretrained, folder, local_files_only=True)
    input_spec = getattr(image_processor, "input_spec", None)
    if input_spec is not None:
        bands = image_processor.band_names
        image_processor.input_spec = {"band_names": bands} if bands else None
    model = load(name, folder, model_class, make_room)
    return FineTuned(name, model.eval().to(device()), image_processor, input_spec)


def load(
    name: str,
    folder: Path,
    model_class: Any,
    make_room: Callable[[int], None],
    **options,
) -> PreTrainedModel:
    """Load a model and check its shapes before, and that its weights are complete and finite after.

    Weights are loaded in float32, because another dtype would change the default dtype of other threads meanwhile. On
    an accelerator they are converted to the dtype in which they were saved.
    """
    configs = model_class.config_class if hasattr(model_class, "config_class") else AutoConfig
    config = without_remote_code(configs.from_pretrained, folder, **options)
    if config.model_type in REFERENCE_TYPES and config.model_type in TOWERS:
        config = TOWERS[config.model_type].prepare(config)  # Without masking.
    saved_dtype = config.dtype or torch.float32
    make_room(check_shapes(name, folder, model_class, config))
    model, loading = without_remote_code(
        model_class.from_pretrained,
        folder,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `check_weights` reports them together with missing weights.
        **options,
    )
    check_weights(name, model, loading)
    limit_attention(model)
    return model if device().type == "cpu" else model.to(saved_dtype)


def limit_attention(model: PreTrainedModel) -> None:
    """Let each attention of a model raise a `ValueError` before it takes more memory than the limit."""
    for module in model.modules():
        class_name = type(module).__name__
        if not class_name.endswith("Attention") or "Deformable" in class_name:
            continue
        heads = _number_of_heads(module)
        if heads is not None:
            module.register_forward_pre_hook(partial(check_attention, heads), with_kwargs=True)


def _number_of_heads(module: nn.Module) -> int | None:
    """Return the number of heads of an attention module, from its attributes or its configuration."""
    for owner in (module, getattr(module, "config", None)):
        for key in ("num_heads", "num_attention_heads"):
            if hasattr(owner, key):
                return getattr(owner, key)
    return None


def check_attention(
    heads: int,
    module: nn.Module,
    arguments: tuple,
    named: dict[str, Any],
) -> None:
    hidden_states = arguments[0] if arguments else named["hidden_states"]
    batch, *sides, _ = hidden_states.shape
    size = 4 * batch * heads * math.prod(sides) ** 2
    if size > limits.ATTENTION_BYTES:
        raise ValueError(
            f"The attention of one layer would take {size / 1e9:.1f} GB, more than the limit of "
            f"{limits.ATTENTION_BYTES / 1e9:g} GB. Use a smaller image, fewer patches or a smaller model."
        )


def vit_of(name: str, container: FullModel | FineTuned) -> LoadedBackbone:
    """Return the ViT inside another model, sharing its weights."""
    if isinstance(container, FullModel):
        vision_tower = container.model.model.vision_tower
        return LoadedBackbone.of(name, vision_tower, container.processor.image_processor)
    if hasattr(container.model, "backbone"):
        vit = container.model.backbone
    else:
        vit = container.model.model.backbone.model
    backbone = LoadedBackbone.of(name, vit, container.image_processor)
    return replace(backbone, input_spec=container.input_spec)


def random_twin(name: str, trained: LoadedBackbone) -> LoadedBackbone:
    """Return the same ViT with randomly initialized weights."""
    config = type(trained.model.config).from_dict(trained.model.config.to_dict())
    model_class = type(trained.model)
    if isinstance(trained.model, InternVLVisionModel) and not trained.is_padded:
        # Its own initialization has zero position embeddings, see ViTPVisionModel.
        config = ViTPVisionConfig.from_dict({**config.to_dict(), "model_type": ViTPVisionConfig.model_type})
        model_class = ViTPVisionModel
    with BUILDING, torch.random.fork_rng():
        torch.manual_seed(1)
        model = model_class._from_config(config, attn_implementation="eager", dtype=torch.float32)
    limit_attention(model)
    return replace(trained, name=name, model=model.eval().to(device(), trained.model.dtype))


def tiny_model(seed: int = 0) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    """Build a random model: a ViT of 3 layers for 112 pixels, a language model of 2 layers, and a byte tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_tokenizer([], vocab_size=0)
        return build_model(tokenizer, TINY_VISION, TINY_TEXT, {"max_patches": 6})


def names_of(sources: Sequence[str]) -> list[str]:
    """Return the names of models: the Hub id, or as few of the last parts of a folder's path as are unique."""
    paths = [Path(source).resolve().parts if Path(source).is_dir() else (source,) for source in sources]
    lengths = []
    for path in paths:
        is_generic = path[-1] in {"backbone", "model", "checkpoint"}
        lengths.append(2 if is_generic and len(path) > 2 else 1)
    while True:
        names = ["/".join(path[-length:]) for path, length in zip(paths, lengths)]
        ambiguous_indices = []
        for index, name in enumerate(names):
            if names.count(name) > 1 and lengths[index] < len(paths[index]) - 1:
                ambiguous_indices.append(index)
        if not ambiguous_indices:
            return names
        for index in ambiguous_indices:
            lengths[index] += 1


def without_paths(error: BaseException, sources: Iterable[str]) -> str:
    """Return the message of an error in one line, without the paths of folders."""
    reason = " ".join(str(error).split()) or type(error).__name__
    for source in sources:
        folder = Path(source)
        if folder.is_dir():
            reason = reason.replace(str(folder.resolve()), folder.name)
            reason = reason.replace(source, folder.name)
    return reason[:300]
