"""Checks of what visitors name or send, before it is opened: models, and image files.

The files and the configuration of a model are checked first, then its tokenizer, and the shapes of its weights before
it is built. Images are checked by their headers. The limits are in `limits.py`.
"""

import gzip
import itertools
import json
import math
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import limits
import nibabel
import PIL.Image
import pydicom
import rasterio
import tokenizer_check
import torch
from pydicom.uid import DeflatedExplicitVRLittleEndian
from rasterio.errors import RasterioError
from reading import UnreadableImage, is_volume, open_photograph, open_raster_alone
from safetensors import safe_open
from tokenizer_check import mappings
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from modeling_vitp.convert.tensor_files import not_finite
from modeling_vitp.image_decoding import JPEG_2000, PNG, TIFF
from modeling_vitp.images.dicom import open_dicom
from modeling_vitp.images.reading import is_dicom
from modeling_vitp.opening import check_timm

FILES = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|tokenizer|tokenizer_config|special_tokens_map)"
    r"\.json|[\w.-]+\.safetensors(\.index\.json)?"
)
"""Names of the files that a model may be opened from. Code, templates, pickles and folders are excluded."""
CLASSES = re.compile(
    r"(ViTP\w*|ViT|CLIP|Siglip2?|Bit|DINOv3ViT|GotOcr2)(ImageProcessor(Fast|Pil)?|FeatureExtractor)|InternVLVideoProcessor|"
    r"(Qwen2|Llama|Gemma|GPT2|PreTrained)Tokenizer(Fast)?|TokenizersBackend"
)
"""Names of the classes of processors and tokenizers that a visitor's model may have. Some others load further files."""


class UnavailableModel(ValueError):
    """Error for a model that cannot be opened. The message is one line for the visitor."""


def check_files(name: str, folder: Path) -> None:
    """Raise [`UnavailableModel`] if a file of the model is a link to another place or is too large.

    Args:
        name: name of the model, for the message.
        folder: plain folder, or snapshot in the Hub cache, whose files are links to blobs.
    """
    blobs = folder.resolve().parent.parent / "blobs"
    for path in sorted(folder.iterdir()):
        if not FILES.fullmatch(path.name):
            continue
        target = path.resolve()
        if not target.is_relative_to(folder.resolve()) and target.parent != blobs:
            raise UnavailableModel(f"{name}: {path.name} is a link out of the model's folder. Copy the file instead.")
        check_size(name, path.name, target.stat().st_size)
    for path in folder.glob("*.index.json"):
        shards = read_json(name, path).get("weight_map")
        if not isinstance(shards, dict) or not all(FILES.fullmatch(str(shard)) for shard in shards.values()):
            raise UnavailableModel(f"{name}: {path.name} must name only safetensors files in the same folder.")


def check_size(name: str, file: str, size: int) -> None:
    """Raise [`UnavailableModel`] if a file is too large. Only the total size of weights is limited."""
    limit = limits.TOKENIZER_FILE_BYTES if file == "tokenizer.json" else limits.CONFIG_BYTES
    if size > limit and not file.endswith(".safetensors"):
        raise UnavailableModel(f"{name}: {file} is larger than {limit / 1e6:g} MB.")


def check_settings(name: str, folder: Path, is_trusted: bool) -> dict[str, Any]:
    """Read the configuration of a model and check the values of its files against the limits.

    Args:
        is_trusted: whether the model was named when the app was started. It may have processors of any class.

    Raises:
        UnavailableModel: if a value, the quantization, a class or an argument of timm is not accepted.
    """
    config = read_json(name, folder / "config.json")
    for file in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        if not (folder / file).is_file():
            continue
        fields = read_json(name, folder / file)
        check_values(name, file, fields, has_numbers=file != "tokenizer_config.json")
        for mapping in mappings(fields):
            _check_keys(name, file, mapping, is_trusted)
    try:
        check_timm("config.json", config)
    except ValueError as error:
        raise UnavailableModel(f"{name}: {error}") from error
    return config


def _check_keys(
    name: str,
    file: str,
    mapping: dict[str, Any],
    is_trusted: bool,
) -> None:
    """Check the class names in one mapping of a JSON file, and that it has no setting that the app does not support."""
    for key, value in mapping.items():
        is_class = key in ("image_processor_type", "feature_extractor_type", "video_processor_type")
        if is_class and not is_trusted and not CLASSES.fullmatch(str(value)):
            raise UnavailableModel(f"{name}: {key} {str(value)[:60]!r} of {file} is not supported.")
        if key in ("quantization_config", "transformers_weights"):
            raise UnavailableModel(f"{name} has {key}, which this app does not support.")


def check_values(name: str, file: str, fields: Any, has_numbers: bool) -> None:
    """Check the values of a JSON file: numbers against the limits of their key, and the length of strings and lists."""
    for key, value in numbers_and_strings(name, file, fields):
        if isinstance(value, str):
            if len(value) > limits.STRING and key != "chat_template":
                raise UnavailableModel(
                    f"{name}: {key} of {file} has {len(value):,} characters, more than {limits.STRING:,}."
                )
        elif has_numbers:
            low, high = _range_of(key)
            if not low <= value <= high:
                raise UnavailableModel(f"{name}: expected {key} of {file} from {low:,} to {high:,}, got {value:g}.")
    for mapping in mappings(fields):
        image_size = height_and_width(mapping.get("image_size"))
        patch_size = height_and_width(mapping.get("patch_size"))
        if image_size is None or patch_size is None:
            continue
        rows = image_size[0] / patch_size[0]
        columns = image_size[1] / patch_size[1]
        if max(rows, columns) > limits.PATCHES_A_SIDE:
            raise UnavailableModel(
                f"{name}: {file} has {image_size[0] // patch_size[0]:,} patches a side, more than "
                f"{limits.PATCHES_A_SIDE}."
            )


def _range_of(key: str) -> tuple[int, int]:
    """Return the smallest and largest value of a number in a configuration, by the first matching pattern."""
    # The last pattern matches every key.
    ranges = [(low, high) for pattern, low, high in limits.NUMBERS if re.search(pattern, key)]
    return ranges[0]


def numbers_and_strings(
    name: str,
    file: str,
    value: Any,
    key: str = "",
    depth: int = 0,
) -> Iterator[tuple[str, float | str]]:
    """Yield every number and string of a JSON file with its nearest key, except the lists of class names."""
    if isinstance(value, (dict, list)):
        if len(value) > limits.ENTRIES or depth > 20:
            raise UnavailableModel(f"{name}: {file} has too many entries or levels under {key!r}.")
        items = value.items() if isinstance(value, dict) else [(key, item) for item in value]
        for item_key, item in items:
            if item_key not in ("id2label", "label2id"):
                yield from numbers_and_strings(name, file, item, str(item_key)[:80], depth + 1)
    elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
        yield key, value


def height_and_width(value: Any) -> tuple[float, float] | None:
    """Return a side, or height and width, as two positive numbers; `None` if the value is not valid."""
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2:
        return None
    for side in sides:
        if not isinstance(side, (int, float)) or not side > 0:
            return None
    return tuple(sides)


def check_tokenizer(name: str, folder: Path) -> None:
    """Raise [`UnavailableModel`] if a visitor's tokenizer is of an unknown class, or is slow, large or wrong.

    It is tried in a process of its own, see `tokenizer_check.py`.
    """
    class_name = str(read_json(name, folder / "tokenizer_config.json").get("tokenizer_class"))
    if not CLASSES.fullmatch(class_name):
        raise UnavailableModel(f"{name}: tokenizer_class {class_name[:60]!r} is not supported.")
    if not (folder / "tokenizer.json").is_file():
        raise UnavailableModel(f"{name} has no tokenizer.json, so it cannot be opened.")
    try:
        process = subprocess.run(
            [sys.executable, tokenizer_check.__file__, str(folder)],
            capture_output=True,
            text=True,
            timeout=limits.TOKENIZER_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableModel(
            f"{name}: its tokenizer takes more than {limits.TOKENIZER_SECONDS:g} seconds."
        ) from error
    if process.returncode != 0:
        raise UnavailableModel(f"{name}: its tokenizer.json is not valid, or takes too much memory.")
    complaint = process.stdout.strip()
    if complaint:
        raise UnavailableModel(f"{name}: its tokenizer {complaint}.")


def read_json(name: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UnavailableModel(f"{name} has no {path.name}, so it cannot be opened.")
    try:
        fields = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UnavailableModel(f"{name}: {path.name} is not valid JSON.") from error
    if not isinstance(fields, dict):
        raise UnavailableModel(f"{name}: {path.name} must contain a JSON object.")
    return fields


def check_shapes(
    name: str,
    folder: Path,
    model_class: Any,
    config: Any,
) -> int:
    """Compare a model with the headers of its weights and with the memory, before anything is allocated.

    The model is built on the meta device. Names in the files may differ from those in the model, so that the numbers of
    values are compared too.

    Returns:
        Size of the float32 model, in bytes.

    Raises:
        UnavailableModel: if the weights are of other shapes, or the model would exceed its share of memory.
    """
    shapes = _shapes_in_files(name, folder)
    model = _model_without_memory(name, model_class, config)
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > limits.model_bytes():
        raise UnavailableModel(
            f"{name} would take {size / 1e9:.1f} GB of memory, more than the limit of "
            f"{limits.model_bytes() / 1e9:.1f} GB for one model."
        )
    differing_keys = []
    for key, tensor in model.state_dict().items():
        if shapes.get(key, tensor.shape) != tuple(tensor.shape):
            differing_keys.append(key)
    if differing_keys:
        raise UnavailableModel(
            f"{name}: the weights do not match config.json. {len(differing_keys)} are of another shape, such as "
            f"{differing_keys[0]}."
        )
    num_expected = sum(parameter.numel() for parameter in model.parameters())
    num_in_files = sum(math.prod(shape) for shape in shapes.values())
    if num_expected > limits.MISSING_WEIGHTS + num_in_files:
        raise UnavailableModel(
            f"{name}: the weights do not match config.json. Expected {num_expected:,} values, but the files have "
            f"{num_in_files:,}."
        )
    return size


def _shapes_in_files(name: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in the safetensors files of a model, from their headers."""
    shapes = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > limits.HEADER_BYTES:
            raise UnavailableModel(f"{name}: the header of {path.name} has more than {limits.HEADER_BYTES} bytes.")
        with safe_open(path, "pt") as file:
            for key in file.keys():
                shapes[key] = tuple(file.get_slice(key).get_shape())
    return shapes


def _model_without_memory(name: str, model_class: Any, config: Any) -> nn.Module:
    """Build a model on the meta device, and stop if it has too many modules."""
    build = getattr(model_class, "_from_config", None) or model_class.from_config
    module_numbers = itertools.count()

    def count(*_) -> None:
        if next(module_numbers) > limits.MODULES:
            raise UnavailableModel(f"{name} has more than {limits.MODULES:,} modules.")

    hook = register_module_module_registration_hook(count)
    try:
        with torch.device("meta"):
            return build(config, dtype=torch.float32)
    finally:
        hook.remove()


def check_weights(name: str, model: nn.Module, loading: dict[str, Any]) -> None:
    """Raise [`UnavailableModel`] if weights are missing (and therefore random), NaN or infinite.

    Args:
        loading: loading info of `from_pretrained` with `output_loading_info=True`.
    """
    mismatched = [mismatch[0] for mismatch in loading["mismatched_keys"]]
    missing = sorted({*loading["missing_keys"], *mismatched})
    if missing:
        raise UnavailableModel(
            f"{name}: the weights do not match config.json. {len(missing)} are missing or of another shape, such as "
            f"{missing[0]}."
        )
    not_finite_keys = not_finite(dict(model.named_parameters()))
    if not_finite_keys:
        raise UnavailableModel(f"{name} has weights that are NaN or infinite, such as {not_finite_keys[0]}.")


def check_header(path: Path) -> None:
    """Raise `UnreadableImage` if an image would take more memory than `limits` allow.

    Files that are not images pass this check and are refused by the reader.
    """
    if is_volume(path):
        _check_volume(path)
        return
    with path.open("rb") as file:
        head = file.read(132)
    if is_dicom(head):  # The 128 bytes before are arbitrary and may look like a TIFF.
        _check_dicom(path)
    elif head[:4] in TIFF:
        _check_blocks(path)
    elif head.startswith(JPEG_2000):
        _check_bands(path)
    else:
        is_deep = head.startswith(PNG) and head[24:26] in (b"\x10\4", b"\x10\6")  # 16 bits with transparency
        _check_pixels(path, limits.DEEP_PIXELS if is_deep else limits.SOURCE_PIXELS)


def _check_pixels(path: Path, limit: int) -> None:
    try:
        with open_photograph(path) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError):
        return
    if width * height > limit:
        raise UnreadableImage(
            f"{path.name} has {width:,} × {height:,} pixels. At most {limit // 10**6} million can be opened as "
            f"{image.format}. Reduce the image or save it as a tiled GeoTIFF."
        )


def _check_blocks(path: Path) -> None:
    try:
        with open_raster_alone(path) as source:
            height = max(block_height for block_height, _ in source.block_shapes)
            width = max(block_width for _, block_width in source.block_shapes)
            is_interleaved = source.interleaving and source.interleaving.name == "pixel"
            bands = source.count if is_interleaved else 1
            size = height * width * bands * max(_bytes(dtype) for dtype in source.dtypes)
            pixels = _most_pixels_of_a_view(source)
    except (RasterioError, UnreadableImage):  # The reader reports it.
        return
    if pixels > limits.SCENE_PIXELS:
        raise UnreadableImage(
            f"{path.name} has {pixels / 1e9:,.0f} billion pixels to decode, more than "
            f"{limits.SCENE_PIXELS / 1e9:g} billion. Add overviews with gdaladdo."
        )
    if size > limits.BLOCK_BYTES:
        raise UnreadableImage(
            f"{path.name} is stored in blocks of {height:,} × {width:,} pixels, {size / 1e6:,.0f} MB each. At most "
            f"{limits.BLOCK_BYTES / 1e6:.0f} MB can be opened. Save it in tiles."
        )


def _most_pixels_of_a_view(source: rasterio.DatasetReader) -> float:
    """Return the largest number of pixels that are decoded for one view of a scene with overviews.

    A part of the scene is read from the largest level above its size on the screen, and the whole from the last level.
    """
    levels = [1, *source.overviews(1)]
    coarser_levels = [*levels[1:], levels[-1]]
    most_pixels = source.height * source.width / levels[-1] ** 2
    for level, coarser_level in zip(levels, coarser_levels):
        most_pixels = max(most_pixels, (limits.SIDE * coarser_level / level) ** 2)
    return most_pixels


def _check_bands(path: Path) -> None:
    """Check a JPEG 2000, of which all bands are decoded even if only some are read."""
    try:
        with open_raster_alone(path) as source:
            width = source.width
            height = source.height
            bands = source.count
    except (RasterioError, UnreadableImage):  # The reader reports it.
        return
    if 4 * width * height * bands > limits.JPEG_2000_BYTES or bands > 4:
        raise UnreadableImage(
            f"{path.name} has {width:,} × {height:,} pixels in {bands} band(s), too many for a JPEG 2000. Save it as a "
            "tiled GeoTIFF."
        )


def _bytes(dtype: str) -> int:
    """Return the bytes of a value of a data type of rasterio, such as `uint8` or `complex_int16`."""
    digits = "".join(character for character in dtype if character.isdigit())
    return int(digits or 128) // 8


def _check_volume(path: Path) -> None:
    try:
        if _nifti_offset(path) > limits.NIFTI_HEADER_BYTES:
            raise UnreadableImage(
                f"{path.name} has more than {limits.NIFTI_HEADER_BYTES / 1e6:g} MB before its values. Save it without "
                "header extensions."
            )
        image = nibabel.load(path)
        size = math.prod(image.shape) * image.get_data_dtype().itemsize
        if path.suffix.lower() == ".gz" and size <= limits.VOLUME_BYTES:
            size = max(size, _unpacked_size(path, limits.VOLUME_BYTES))
    except UnreadableImage:
        raise
    except Exception:  # nibabel raises many kinds of errors for a broken file. The reader reports them.
        return
    if size > limits.VOLUME_BYTES:
        raise UnreadableImage(
            f"{path.name} has {size / 1e6:,.0f} MB when unpacked, more than {limits.VOLUME_BYTES / 1e6:.0f} MB."
        )


def _unpacked_size(path: Path, limit: int) -> int:
    """Return the size of an unpacked gzip file, counted until it exceeds the limit."""
    size = 0
    with gzip.open(path) as file:
        while size <= limit:
            chunk = file.read(1 << 20)  # one MiB
            if not chunk:
                break
            size += len(chunk)
    return size


def _nifti_offset(path: Path) -> float:
    """Return the offset of the values in a NIfTI file, up to which nibabel reads the whole header."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        head = file.read(540)
    for byte_order in "<>":
        for header_size, position, number_format in ((348, 108, "f"), (540, 168, "q")):  # NIfTI-1, and 2
            (stated_size,) = struct.unpack_from(f"{byte_order}i", head)
            if stated_size == header_size:
                return struct.unpack_from(f"{byte_order}{number_format}", head, position)[0]
    return 0


def _check_dicom(path: Path) -> None:
    """Measure a deflated DICOM data set by inflating it in chunks that are not kept, and check the size of a frame."""
    try:
        meta = pydicom.filereader.read_file_meta_info(path)
    except (OSError, ValueError, AttributeError, KeyError, EOFError, pydicom.errors.InvalidDicomError):
        return
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        offset = 132 + 12 + meta.get("FileMetaInformationGroupLength", 0)
        if _inflated_size(path, offset, limits.BLOCK_BYTES) > limits.BLOCK_BYTES:
            raise UnreadableImage(
                f"{path.name} has more than {limits.BLOCK_BYTES / 1e6:.0f} MB when inflated. Save it uncompressed."
            )
    try:
        dataset = open_dicom(path, path.name, with_pixels=False)
    except ValueError:  # The reader reports it.
        return
    if (dataset.Rows or 0) * (dataset.Columns or 0) > limits.SOURCE_PIXELS:
        raise UnreadableImage(
            f"{path.name} has {dataset.Columns:,} × {dataset.Rows:,} pixels, more than "
            f"{limits.SOURCE_PIXELS // 10**6} million. Save it as a tiled GeoTIFF."
        )


def _inflated_size(path: Path, offset: int, limit: int) -> int:
    """Return the size of deflated data from an offset in a file, counted until it exceeds the limit."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
    size = 0
    while data and not decompressor.eof and size <= limit:
        size += len(decompressor.decompress(data, 1 << 20))
        data = decompressor.unconsumed_tail
    return size
