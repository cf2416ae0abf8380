"""Backbones of any type, their patch tokens as maps, and features of all images that are stored in files."""

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm
from transformers import (
    MODEL_MAPPING,
    AutoImageProcessor,
    AutoModel,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.image_utils import ChannelDimension
from transformers.modeling_outputs import ModelOutput
from transformers.utils.hub import resolve_revision

from ..bands import check_same_bands
from ..command.paths import Shard
from ..data.rows import folder_cache
from ..image_processing_vitp import ViTPImageProcessor
from ..images.large import appears_whole
from ..input_spec import InputSpec
from ..modeling_vitp import VISION_MODELS
from ..modeling_vitp_backbone import open_vit, open_vit_config
from ..opening import open_config, read_config_fields, without_remote_code
from ..vision_parts import cuts_images, vision_part
from ..vision_towers import TOWERS, other_families, pair

# Families whose image processors return patches, or take images of Pillow only.
OWN_PREPROCESSING = ("siglip2_vision_model", "qwen3_vl_vision", "timm_wrapper")


@dataclass
class Backbone:
    """Backbone with its image processor.

    Args:
        name: display name.
        model: vision model, or the vision part of a larger model, in evaluation mode.
        image_processor: image processor of the model, without its input spec.
        input_spec: input spec of the image processor for images that are not 8-bit RGB, see
            [`~modeling_vitp.InputSpec`]. The caller applies it, or another one, with
            [`~modeling_vitp.images.pixels.to_pixels`].
        revision: commit of a model from the Hub.
        state: text that changes if files or weights change, to identify stored features.
    """

    name: str
    model: PreTrainedModel
    image_processor: BaseImageProcessor
    input_spec: dict | None
    revision: str | None
    state: str

    def reading(self, given: dict | None) -> dict | None:
        """Return the input spec for reading images: `given`, or that of the backbone if `given` is empty.

        Raises:
            ValueError: If its bands differ from those of the backbone.
        """
        band_names = InputSpec.from_dict(self.input_spec).band_names
        if not given:
            return self.input_spec
        spec = given
        if band_names is not None:
            spec = {"band_names": band_names, **given}
        check_same_bands(self.name, band_names, "the input spec", InputSpec.from_dict(spec).band_names)
        return spec

    def tokens(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens of images.

        Args:
            pixels: float32 `(batch, channels, height, width)`.

        Returns:
            Prefix tokens such as the CLS token, float32 `(batch, tokens, width)`, and patch tokens as maps, float32
            `(batch, rows, columns, width)`.

        Raises:
            ValueError: If the output of the model cannot be converted to maps.
        """
        output = self._run(pixels)
        return self._split(output.last_hidden_state, pixels)

    def maps(self, pixels: torch.Tensor, depths: int = 1) -> torch.Tensor:
        """Return the patch tokens of several depths, concatenated.

        Args:
            pixels: float32 `(batch, channels, height, width)`.
            depths: number of evenly spaced layers, including the last one (6, 12, 18 and 24 for 4 depths of a ViT-L);
                1 for the output of the model.

        Returns:
            float32 `(batch, rows, columns, depths * width)`.

        Raises:
            ValueError: If the model has fewer layers, or the maps of its layers differ in size.
        """
        if depths == 1:
            _, maps = self.tokens(pixels)
            return maps
        layers = self._run(pixels, output_hidden_states=True).hidden_states
        if self.model.config.model_type != "timm_wrapper":
            layers = layers[1:]  # The first are the embeddings, which timm omits.
        if depths > len(layers):
            raise ValueError(
                f"depths must be at most {len(layers)}, the number of layers of {self.name}, got {depths}."
            )
        maps = []
        for index in range(depths):
            layer_number = round((index + 1) * len(layers) / depths)
            _, map_of_layer = self._split(layers[layer_number - 1], pixels)
            maps.append(map_of_layer)
        if len({map_of_layer.shape for map_of_layer in maps}) > 1:
            raise ValueError(f"The maps of the layers of {self.name} differ in size. Set depths=1, got {depths}.")
        return torch.cat(maps, dim=-1)

    @torch.no_grad()
    def _run(self, pixels: torch.Tensor, **options) -> ModelOutput:
        model = self.model
        model_type = model.config.model_type
        pixels = pixels.to(model.device, model.dtype)
        if model_type in TOWERS:
            return TOWERS[model_type].run(model, pixels, **options)
        if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            options["interpolate_pos_encoding"] = True
        return model(pixel_values=pixels, **options)

    def _split(self, states: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return prefix tokens and maps, see [`tokens`], of the output of a layer."""
        states = states.float()
        if states.ndim == 4:
            maps = states if self._has_width_last(states, pixels) else states.permute(0, 2, 3, 1)
            no_tokens = states.new_zeros(len(states), 0, maps.shape[-1])
            return no_tokens, maps
        num_tokens = states.shape[1]
        height, width = pixels.shape[-2:]
        rows, columns = self._grid(num_tokens, height, width)
        num_prefix_tokens = num_tokens - rows * columns
        prefix = states[:, :num_prefix_tokens]
        maps = states[:, num_prefix_tokens:].unflatten(1, (rows, columns))
        return prefix, maps

    def _has_width_last(self, maps: torch.Tensor, pixels: torch.Tensor) -> bool:
        """Return whether maps are `(batch, rows, columns, width)`, as those of SAM's layers, instead of width first."""
        patch = self._patch()
        if patch is None:
            return False
        height, width = pixels.shape[-2:]
        grid = (height // patch[0], width // patch[1])
        return grid == maps.shape[1:3] and grid != maps.shape[2:]

    def in_patches(self, side: int) -> int:
        """Return `side`, the side of a square image in pixels, if it is a multiple of the patch size.

        Otherwise, the patch embedding would ignore pixels at the border, and labels would not match the patches.

        Raises:
            ValueError: If `side` is not a multiple of the patch size.
        """
        patch = self._patch()
        if patch is None:
            return side
        stride = getattr(self.model.config, "patch_stride", None) or patch
        is_cut = any(side % patch_side for patch_side in patch)
        if is_cut and stride == patch:  # Patches with a smaller stride overlap.
            multiple = math.lcm(*patch)
            larger_side = math.ceil(side / multiple) * multiple
            raise ValueError(
                f"image_size must be a multiple of {patch[0]} x {patch[1]} pixels, the patch size of {self.name}, got "
                f"{side}. Set it to {larger_side}, for example."
            )
        return side

    def _patch(self) -> tuple[int, int] | None:
        patch = getattr(self.model.config, "patch_size", None)
        if patch is None:
            return None
        if isinstance(patch, int):
            return (patch, patch)
        return tuple(patch)

    def _grid(self, tokens: int, height: int, width: int) -> tuple[int, int]:
        patch = self._patch()
        if patch is not None:
            rows = height // patch[0]
            columns = width // patch[1]
            if tokens >= rows * columns:
                return rows, columns
            # Some models merge patches, such as Swin.
            merged_side = math.isqrt(rows * columns // tokens)
            merged_rows = rows // merged_side
            merged_columns = columns // merged_side
            if merged_rows * merged_columns == tokens:
                return merged_rows, merged_columns
        raise ValueError(
            f"The {tokens} tokens of {self.name} for an image of {width} x {height} pixels do not form a map."
        )

    def pool(self, pixels: torch.Tensor, pooling: str) -> torch.Tensor:
        """Return a vector for each image, float32 `(batch, width)`; `cls_mean` has twice the width."""
        prefix, maps = self.tokens(pixels)
        mean = maps.mean((1, 2))
        if pooling == "mean":
            return mean
        if not prefix.shape[1]:
            raise ValueError(f"pooling={pooling!r} needs a CLS token, which {self.name} does not have. Use 'mean'.")
        cls_token = prefix[:, 0]
        if pooling == "cls":
            return cls_token
        return torch.cat([cls_token, mean], dim=-1)


class PatchPixels(Backbone):
    """Control without a model, whose features are the preprocessed pixels of each patch."""

    @classmethod
    def of(cls, backbone: Backbone) -> "PatchPixels":
        if backbone._patch() is None:
            raise ValueError(f"The pixel control needs a `patch_size`, which {backbone.name} does not have.")
        return cls(
            name=f"{backbone.name}, pixels of its patches",
            model=backbone.model,
            image_processor=backbone.image_processor,
            input_spec=backbone.input_spec,
            revision=backbone.revision,
            state=backbone.state,
        )

    def maps(self, pixels: torch.Tensor, depths: int = 1) -> torch.Tensor:
        """Return patches, float32 `(batch, rows, columns, channels * patch height * patch width)`.

        `depths` is ignored.
        """
        height, width = self._patch()
        rows = pixels.shape[2] // height
        columns = pixels.shape[3] // width
        pixels = pixels[:, :, : rows * height, : columns * width]
        pixels = pixels.to(self.model.device, torch.float32)
        patches = pixels.unflatten(3, (columns, width)).unflatten(2, (rows, height))
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3)

    def pool(self, pixels: torch.Tensor, pooling: str) -> torch.Tensor:
        """Return the mean of each patch and channel, float32 `(batch, rows * columns * channels)`.

        `pooling` is ignored.
        """
        channels = pixels.shape[1]
        patches = self.maps(pixels).unflatten(3, (channels, -1))
        return patches.mean(4).flatten(1)


def load_backbone(
    name: str,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    random_seed: int | None = None,
) -> Backbone:
    """Load a backbone with its image processor.

    Args:
        name: folder or Hub id of an exported backbone or of another model of `AutoModel`; `ID@REVISION` for a branch,
            tag or commit.
        device: device of the model.
        dtype: dtype of the model.
        random_seed: seed of random weights, which replace those of the model.

    Raises:
        ValueError: If the model or its image processor is not found, or the model does not take images.
    """
    location = name
    revision = "main"
    commit = None
    if not Path(name).exists():
        location, _, named_revision = name.partition("@")
        revision = named_revision or revision
    if not Path(location).exists():
        commit = commit_of(location, revision)
        revision = commit or revision
    try:
        config = open_config(location, revision=revision)
        part = vision_part(read_config_fields(location, revision=revision))
        is_part = config.model_type in TOWERS.keys() - VISION_MODELS
        if part is not None:
            is_part = part.model_type in TOWERS
        if is_part or type(config) not in MODEL_MAPPING:  # If not in the mapping, an error names the way to its ViT.
            config = open_vit_config(location, revision=revision)
        image_processor = open_image_processor(location, revision, config)
        if random_seed is not None:
            set_seed(random_seed)
            model = AutoModel.from_config(config, dtype=dtype)
            name = f"{name}, random weights"
        elif is_part:
            model = open_vit(location, dtype=dtype, revision=revision)
        else:
            model = open_whole_model(location, revision, config, dtype)
    except (OSError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"The backbone {name} cannot be loaded: {cause}") from error
    encoder = model.get_encoder(modality="image")
    if config.model_type not in TOWERS and encoder.main_input_name != "pixel_values":
        raise ValueError(
            f"Expected a model with image input, got backbone {name} of type {config.model_type!r}. Families of ViT "
            f"that are read from larger models: {', '.join(other_families())}. Describe another with register_tower."
        )
    spec = getattr(image_processor, "input_spec", None)
    if spec is not None:
        band_names = image_processor.band_names
        image_processor.input_spec = None if band_names is None else {"band_names": band_names}
    return Backbone(
        name=name,
        model=encoder.to(device).eval(),
        image_processor=image_processor,
        input_spec=spec,
        revision=commit,
        state=f"{folder_cache(location) or commit} {random_seed}",
    )


def open_image_processor(location: str, revision: str, config: PreTrainedConfig) -> BaseImageProcessor:
    """Return the image processor of a model, or ours where its own does not return one image, but tiles or patches."""
    is_of_vlm = config.model_type in TOWERS and cuts_images(location, revision=revision)
    if config.model_type not in OWN_PREPROCESSING and not is_of_vlm:
        return without_remote_code(AutoImageProcessor.from_pretrained, location, revision=revision)
    side, _ = pair(config.image_size)
    return ViTPImageProcessor.from_backbone(
        location,
        size={"height": side, "width": side},
        revision=revision,
    )


def open_whole_model(location: str, revision: str, config: PreTrainedConfig, dtype: str) -> PreTrainedModel:
    """Load a model whose vision part needs no conversion.

    Raises:
        ValueError: If weights of a vision model are missing, which transformers would draw at random.
    """
    model, report = without_remote_code(
        AutoModel.from_pretrained,
        location,
        revision=revision,
        dtype=dtype,
        output_loading_info=True,
    )
    missing_weights = sorted(report["missing_keys"])
    if config.model_type in VISION_MODELS and missing_weights:
        raise ValueError(f"weights are missing: {missing_weights}")
    return model


def load_with_controls(
    name: str,
    device: str | torch.device,
    dtype: str,
    random_control: bool,
    pixel_control: bool,
) -> Iterator[Backbone]:
    """Yield a backbone and, on request, the backbone with random weights and the pixels of its patches."""
    yield load_backbone(name, device, dtype)
    if random_control:
        yield load_backbone(name, device, dtype, random_seed=0)
    if pixel_control:
        yield PatchPixels.of(load_backbone(name, device, dtype))


def commit_of(repo_id: str, revision: str) -> str | None:
    """Return the commit of a revision, from the Hub or offline from the cache, or `None` if it is unknown."""
    return getattr(resolve_revision(repo_id, revision), "resolved", None)


class Preprocessing:
    """Preprocessing of images by the image processor of a backbone.

    Args:
        image_processor: image processor of the backbone.
        image_size: side in pixels of the square that images are resized to (bicubic), instead of the resizing, cropping
            and padding of the image processor.
    """

    def __init__(self, image_processor: BaseImageProcessor, image_size: int | None):
        self.image_processor = image_processor
        self.image_size = image_size
        disabled_steps = ["crop_to_patches"]
        if image_size:
            disabled_steps += ["do_resize", "do_center_crop", "do_pad"]
        self.options = {}
        for step in disabled_steps:
            if getattr(image_processor, step, None) is not None:
                self.options[step] = False

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Return the input of the backbone, float32 `(channels, height, width)`, from pixels of the same layout."""
        if self.image_size:
            size = [self.image_size, self.image_size]
            image = F.resize(image, size, InterpolationMode.BICUBIC, antialias=True)
            if image.is_floating_point():
                image = image.clamp(0, 1)
        inputs = self.image_processor(
            image,
            input_data_format=ChannelDimension.FIRST,
            return_tensors="pt",
            **self.options,
        )
        return inputs["pixel_values"][0]


def square_size(image_processor: BaseImageProcessor) -> int:
    """Return the side of the tile of an image processor, in pixels."""
    for name in ("crop_size", "size"):
        size = getattr(image_processor, name, None)
        if size is not None and (size.height or size.shortest_edge):
            return size.height or size.shortest_edge
    raise ValueError(f"Image size of {type(image_processor).__name__} not found. Set image_size.")


class Pixels(Dataset):
    """Data set of preprocessed images, float32 `(channels, height, width)`, of the given indices."""

    def __init__(self, indices: range, read: Callable[[int], torch.Tensor], preprocessing: Preprocessing):
        self.indices = indices
        self.read = read
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = self.read(self.indices[index])
        return self.preprocessing(image)


def state_of(images: datasets.Dataset | Iterable[Path], *settings: Any) -> str:
    """Return a text that changes if rows, files (by their modification time) or settings change."""
    if isinstance(images, datasets.Dataset):
        return f"{images._fingerprint} {settings}"
    files = [(path, path.stat().st_mtime_ns) for path in images]
    return f"{files} {settings}"


def collate_pixels(pixels: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    sizes = sorted({tuple(image.shape) for image in pixels})
    if len(sizes) > 1:
        raise ValueError(
            f"The image processor returns images of different sizes, {sizes[0]} and {sizes[1]}. Set image_size."
        )
    return default_collate([{"pixel_values": image} for image in pixels])


def extract(
    backbone: Backbone,
    num_images: int,
    read: Callable[[int], torch.Tensor],
    encode: Callable[[torch.Tensor], torch.Tensor],
    image_size: int | None,
    key: str,
    folder: Path,
    batch_size: int = 32,
    num_workers: int = 0,
    description: str = "",
    shard: Shard | None = None,
) -> np.ndarray:
    """Return the features of all images, in order.

    Features are extracted only if they are not yet in `folder`, in one file or in the files of all shards.

    Args:
        backbone: backbone.
        num_images: number of images.
        read: function that returns an image by its index, as from [`~modeling_vitp.images.pixels.to_pixels`].
        encode: function from a batch of pixels, float32 `(batch, channels, height, width)`, to features, `(batch, …)`.
        image_size: image size in pixels, see [`~modeling_vitp.probing.backbones.Preprocessing`].
        key: text that identifies the images and settings on which the features depend.
        folder: folder of the files.
        batch_size: number of images per batch.
        num_workers: number of processes that read images.
        description: label of the progress bar.
        shard: part of the batches to extract and return; all by default.

    Returns:
        Memory-mapped features, float32 `(images, …)`.

    Raises:
        ValueError: If `image_size` is not a multiple of the patch size, an image cannot be read, its features are not
            finite, or a shard is missing.
    """
    if image_size is not None:
        backbone.in_patches(image_size)
    identity = f"{backbone.name}\0{backbone.state}\0{backbone.model.dtype}\0{image_size}\0{key}"
    digest = hashlib.sha256(identity.encode()).hexdigest()
    path = folder / f"{digest[:20]}.npy"
    indices = range(num_images)
    if shard and not path.is_file():
        indices = shard.part(num_images, unit=batch_size)  # Features depend slightly on the batch.
        path = path.with_suffix(f".{indices.start}-{indices.stop}.npy")
    if not path.is_file():
        shard_files = [] if shard else find_shard_files(path)
        if shard_files:
            join_shards(shard_files, num_images, path)
        elif not indices:  # If there are more shards than batches, some shards are empty.
            return np.empty(0, np.float32)
        else:
            pixels = Pixels(indices, read, Preprocessing(backbone.image_processor, image_size))
            loader = DataLoader(pixels, batch_size, num_workers=num_workers, collate_fn=collate_pixels)
            batches = tqdm(loader, desc=description)
            save_features(encoded(backbone, batches, encode, indices), len(indices), path)
    return np.load(path, mmap_mode="r")


def encoded(
    backbone: Backbone,
    batches: Iterable[dict[str, torch.Tensor]],
    encode: Callable[[torch.Tensor], torch.Tensor],
    indices: range,
) -> Iterator[np.ndarray]:
    """Yield the features of each batch of the images of the given indices."""
    num_encoded = 0
    for batch in batches:
        features = encode(batch["pixel_values"]).cpu().numpy()
        if not np.isfinite(features).all():
            first = indices[num_encoded]
            raise ValueError(f"Features of {backbone.name} are not finite for images from {first} on.")
        num_encoded += len(features)
        yield features


def extract_maps(
    backbone: Backbone,
    num_images: int,
    read: Callable[[int], torch.Tensor],
    depths: int,
    image_size: int | None,
    key: str,
    folder: Path,
    **loading,
) -> np.ndarray:
    """Return the patch tokens of all images, float32 `(images, rows, columns, width)`; see [`extract`].

    Args:
        backbone, num_images, read, key, folder, loading: see [`extract`].
        depths: number of depths, see [`Backbone.maps`].
        image_size: image size in pixels; by default that of the image processor.
    """
    side = image_size or square_size(backbone.image_processor)
    encode = partial(backbone.maps, depths=depths)
    return extract(backbone, num_images, read, encode, side, f"{key} {depths}", folder, **loading)


def save_features(blocks: Iterable[np.ndarray], length: int, path: Path) -> None:
    """Write `length` rows of float32 features block by block. The file is renamed to `path` when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = None
    num_written = 0
    with appears_whole(path) as unfinished:
        for block in blocks:
            if features is None:
                shape = (length, *block.shape[1:])
                features = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape)
            features[num_written : num_written + len(block)] = block
            num_written += len(block)
        features.flush()


def find_shard_files(path: Path) -> list[tuple[int, int, Path]]:
    """Return the files of shards that belong to `path`: index of the first image, end, and path."""
    shard_files = []
    for shard_path in path.parent.glob(f"{path.stem}.*-*.npy"):
        indices = shard_path.suffixes[0].removeprefix(".")
        first, end = indices.split("-")
        shard_files.append((int(first), int(end), shard_path))
    return sorted(shard_files)


def join_shards(shard_files: Sequence[tuple[int, int, Path]], length: int, path: Path) -> None:
    """Write the features of all shards, in order, to one file, and delete those of the shards.

    Raises:
        ValueError: If a shard is missing; the message has its first image.
    """
    expected_first = 0
    for first, end, _ in shard_files:
        if first != expected_first:
            break
        expected_first = end
    if expected_first != length:
        raise ValueError(
            f"Features of images from {expected_first} on, of {length}, not found in {path.parent}. Extract the "
            "missing shards with the --batch_size of the others, or delete the files of the shards."
        )
    shard_paths = [shard_path for _, _, shard_path in shard_files]
    features_of_shards = (np.load(shard_path, mmap_mode="r") for shard_path in shard_paths)
    save_features(features_of_shards, length, path)
    for shard_path in shard_paths:
        shard_path.unlink()
