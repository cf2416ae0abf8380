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
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    BaseImageProcessor,
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
from ..modeling_vitp_backbone import VISION_PARTS, open_vit, open_vit_config
from ..vision_towers import TOWERS, pair

# Families whose image processors return patches, or take images of Pillow only.
OWN_PREPROCESSING = ("siglip2_vision_model", "timm_wrapper")


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
        own = InputSpec.from_dict(self.input_spec).band_names
        if not given:
            return self.input_spec
        spec = given if own is None else {"band_names": own, **given}
        check_same_bands(self.name, own, "the input spec", InputSpec.from_dict(spec).band_names)
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
        return self._split(self._run(pixels).last_hidden_state, pixels)

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
            return self.tokens(pixels)[1]
        states = self._run(pixels, output_hidden_states=True).hidden_states
        layers = states if self.model.config.model_type == "timm_wrapper" else states[1:]  # timm omits the embeddings
        num_layers = len(layers)
        if depths > num_layers:
            raise ValueError(f"depths must be at most {num_layers}, the number of layers of {self.name}, got {depths}.")
        chosen = [layers[round((index + 1) * num_layers / depths) - 1] for index in range(depths)]
        maps = [self._split(state, pixels)[1] for state in chosen]
        if len({item.shape for item in maps}) > 1:
            raise ValueError(f"The maps of the layers of {self.name} differ in size. Set depths=1, got {depths}.")
        return torch.cat(maps, dim=-1)

    @torch.no_grad()
    def _run(self, pixels: torch.Tensor, **options) -> ModelOutput:
        model, pixels = self.model, pixels.to(self.model.device, self.model.dtype)
        if model.config.model_type in TOWERS:
            return model(**TOWERS[model.config.model_type].inputs(model, pixels), **options)
        if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            options["interpolate_pos_encoding"] = True
        return model(pixel_values=pixels, **options)

    def _split(self, states: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = states.float()
        if states.ndim == 4:
            patch, size = self._patch(), pixels.shape[-2:]
            grid = None if patch is None else tuple(side // own for side, own in zip(size, patch))
            is_last = grid == states.shape[1:3] and grid != states.shape[2:]  # SAM's layers have the width last.
            maps = states if is_last else states.permute(0, 2, 3, 1)
            return states.new_zeros(len(states), 0, maps.shape[-1]), maps
        rows, columns = self._grid(states.shape[1], *pixels.shape[-2:])
        prefix = states.shape[1] - rows * columns
        return states[:, :prefix], states[:, prefix:].unflatten(1, (rows, columns))

    def in_patches(self, side: int) -> int:
        """Return `side`, the side of a square image in pixels, if it is a multiple of the patch size.

        Otherwise, the patch embedding would ignore pixels at the border, and labels would not match the patches.

        Raises:
            ValueError: If `side` is not a multiple of the patch size.
        """
        patch = self._patch()
        step = getattr(self.model.config, "patch_stride", None) or patch  # Patches with a smaller stride overlap.
        if patch is not None and step == patch and any(side % own for own in patch):
            raise ValueError(
                f"image_size must be a multiple of {patch[0]} x {patch[1]} pixels, the patch size of {self.name}, got "
                f"{side}. Set it to {math.ceil(side / math.lcm(*patch)) * math.lcm(*patch)}, for example."
            )
        return side

    def _patch(self) -> tuple[int, int] | None:
        patch = getattr(self.model.config, "patch_size", None)
        return (patch, patch) if isinstance(patch, int) else patch and tuple(patch)

    def _grid(self, tokens: int, height: int, width: int) -> tuple[int, int]:
        patch = self._patch()
        if patch is not None:
            rows, columns = height // patch[0], width // patch[1]
            if tokens >= rows * columns:
                return rows, columns
            merged = math.isqrt(rows * columns // tokens)  # Some models merge patches, such as Swin.
            if (rows // merged) * (columns // merged) == tokens:
                return rows // merged, columns // merged
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
        return prefix[:, 0] if pooling == "cls" else torch.cat([prefix[:, 0], mean], dim=-1)


class PatchPixels(Backbone):
    """Control without a model, whose features are the preprocessed pixels of each patch."""

    @classmethod
    def of(cls, backbone: Backbone) -> "PatchPixels":
        if backbone._patch() is None:
            raise ValueError(f"The pixel control needs a `patch_size`, which {backbone.name} does not have.")
        return cls(**{**vars(backbone), "name": f"{backbone.name}, pixels of its patches"})

    def maps(self, pixels: torch.Tensor, depths: int = 1) -> torch.Tensor:
        """Return patches, float32 `(batch, rows, columns, channels * patch height * patch width)`.

        `depths` is ignored.
        """
        height, width = self._patch()
        rows, columns = pixels.shape[2] // height, pixels.shape[3] // width
        pixels = pixels[:, :, : rows * height, : columns * width].to(self.model.device, torch.float32)
        patches = pixels.unflatten(3, (columns, width)).unflatten(2, (rows, height))
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3)


def load_backbone(
    name: str, device: str | torch.device = "cpu", dtype: str = "float32", random_seed: int | None = None
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
    where, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
    commit = None if Path(where).exists() else commit_of(where, revision or "main")
    revision = {"revision": commit or revision or "main"}
    try:
        config = AutoConfig.from_pretrained(where, **revision)
        is_other_family = config.model_type in {*TOWERS, *VISION_PARTS} - VISION_MODELS
        if is_other_family or type(config) not in MODEL_MAPPING:  # If so, an error names the way to its ViT.
            config = open_vit_config(where, **revision)
        if config.model_type in OWN_PREPROCESSING:
            side = pair(config.image_size)[0]
            size = {"height": side, "width": side}
            image_processor = ViTPImageProcessor.from_backbone(where, size=size, **revision)
        else:
            image_processor = AutoImageProcessor.from_pretrained(where, **revision)
        if random_seed is None:
            if is_other_family:
                model = open_vit(where, dtype=dtype, **revision)
            else:
                model, report = AutoModel.from_pretrained(where, dtype=dtype, output_loading_info=True, **revision)
                if config.model_type in VISION_MODELS and report["missing_keys"]:
                    raise ValueError(f"weights are missing: {sorted(report['missing_keys'])}")
        else:
            set_seed(random_seed)
            model = AutoModel.from_config(config, dtype=dtype)
            name = f"{name}, random weights"
    except (OSError, ValueError) as error:
        raise ValueError(f"The backbone {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    encoder = model.get_encoder(modality="image")
    if encoder.main_input_name != "pixel_values":
        raise ValueError(f"Expected a model with image input, got backbone {name} of type {config.model_type!r}.")
    spec = getattr(image_processor, "input_spec", None)
    if spec is not None:
        names = image_processor.band_names
        image_processor.input_spec = None if names is None else {"band_names": names}
    state = f"{folder_cache(where) or commit} {random_seed}"
    return Backbone(name, encoder.to(device).eval(), image_processor, spec, commit, state)


def load_with_controls(
    name: str, device: str | torch.device, dtype: str, random_control: bool, pixel_control: bool
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
        self.image_processor, self.image_size = image_processor, image_size
        off = ["crop_to_patches"] + (["do_resize", "do_center_crop", "do_pad"] if image_size else [])
        self.options = {name: False for name in off if getattr(image_processor, name, None) is not None}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Return the input of the backbone, float32 `(channels, height, width)`, from pixels of the same layout."""
        if self.image_size:
            size = [self.image_size, self.image_size]
            image = F.resize(image, size, InterpolationMode.BICUBIC, antialias=True)
            image = image.clamp(0, 1) if image.is_floating_point() else image
        options = {"input_data_format": ChannelDimension.FIRST, "return_tensors": "pt", **self.options}
        return self.image_processor(image, **options)["pixel_values"][0]


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
        self.indices, self.read, self.preprocessing = indices, read, preprocessing

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.preprocessing(self.read(self.indices[index]))


def state_of(images: datasets.Dataset | Iterable[Path], *settings: Any) -> str:
    """Return a text that changes if rows, files (by their modification time) or settings change."""
    if isinstance(images, datasets.Dataset):
        return f"{images._fingerprint} {settings}"
    return f"{[(path, path.stat().st_mtime_ns) for path in images]} {settings}"


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
    digest = hashlib.sha256(f"{backbone.name}\0{backbone.state}\0{backbone.model.dtype}\0{image_size}\0{key}".encode())
    path, rows = folder / f"{digest.hexdigest()[:20]}.npy", range(num_images)
    if shard and not path.is_file():  # Shards have whole batches, because features depend slightly on the batch.
        batches = shard.part(-(-num_images // batch_size))
        rows = rows[batches.start * batch_size : batches.stop * batch_size]
        path = path.with_suffix(f".{rows.start}-{rows.stop}.npy")
    if path.is_file():
        return np.load(path, mmap_mode="r")
    if not shard and (parts := find_parts(path)):
        save_features(joined(parts, num_images), num_images, path)
        for _, _, part in parts:
            part.unlink()
        return np.load(path, mmap_mode="r")
    pixels = Pixels(rows, read, Preprocessing(backbone.image_processor, image_size))
    loader = DataLoader(pixels, batch_size, num_workers=num_workers, collate_fn=collate_pixels)

    def encoded() -> Iterator[np.ndarray]:
        for number, batch in enumerate(tqdm(loader, desc=description)):
            features = encode(batch["pixel_values"]).cpu().numpy()
            if not np.isfinite(features).all():
                first = rows[number * batch_size]
                raise ValueError(f"Features of {backbone.name} are not finite for images from {first} on.")
            yield features

    if not rows:  # If there are more shards than batches, some shards are empty.
        return np.empty(0, np.float32)
    save_features(encoded(), len(rows), path)
    return np.load(path, mmap_mode="r")


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
    features, done = None, 0
    with appears_whole(path) as unfinished:
        for block in blocks:
            if features is None:
                shape = (length, *block.shape[1:])
                features = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape)
            features[done : done + len(block)] = block
            done += len(block)
        features.flush()


def find_parts(path: Path) -> list[tuple[int, int, Path]]:
    """Return the files of shards that belong to `path`: index of the first image, end, and path."""
    return sorted(
        (*map(int, part.suffixes[0][1:].split("-")), part) for part in path.parent.glob(f"{path.stem}.*-*.npy")
    )


def joined(parts: Sequence[tuple[int, int, Path]], length: int) -> Iterator[np.ndarray]:
    """Yield the features of shards in order; if a shard is missing, raise a `ValueError` with its first image."""
    done = 0
    for first, end, part in [*parts, (length, length, None)]:
        if first != done:
            raise ValueError(
                f"Features of images from {done} on, of {length}, not found in {parts[0][2].parent}. Extract the "
                "missing shards with the --batch_size of the others, or delete the files of the shards."
            )
        if part is not None:
            yield np.load(part, mmap_mode="r")
        done = end
