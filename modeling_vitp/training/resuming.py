"""Settings, data and tokenizer that must match on resume, and hashes of the data, which detect changes.

For rows, all texts, numbers and encoded images are hashed, 1.3 GB a second on 2 cores of an AMD EPYC. For data sets
above 4 GB, only every second, third … image is hashed, and the sizes of all images. For image files and the files of a
stream, sizes and modification times are hashed, for at most 100,000 evenly spaced files per source.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainingArguments

from ..hub.failures import retry
from ..instructions.mixture import MixtureDataset, MixtureStream
from ..instructions.schemas import RowReader
from ..instructions.sources import Source, line_files, load_columns
from .arguments import Part
from .checkpointing import last_checkpoint, read_checkpoint_record
from .freezing import PROJECTOR, VISION

logger = logging.getLogger(__name__)
FREE = (
    "max_steps",
    "num_train_epochs",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "bf16",
    "fp16",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)
FREE_IF_USED = ("lr_scheduler_kwargs", "label_smoothing_factor", "neftune_noise_alpha")
OPTIMIZER = ("learning_rate", "weight_decay", "optim", "adam_beta1", "adam_beta2", "adam_epsilon")
# Options of an adapter and the fields of PEFT's configuration.
ADAPTER = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
}
# Names of the settings that describe the training rows, and that count the samples of the other trainings.
TRAINING_DATA = "training data"
NUM_SAMPLES = "training samples"
HASHED_VALUES = 64  # approximate number of hashed values of each weight
VISION_LAYER = re.compile(rf"\b{VISION}\..*?\b(?:layer|layers|blocks)\.(\d+)\.")  # of any family of ViT
PRETRAINED = re.compile(rf"{VISION_LAYER.pattern}|\bencoder\.layer\.|\blanguage_model\.")
MOST_FILES = 100_000
MOST_BYTES = 4_000_000_000
IMAGE = {"bytes", "path"}
# Fields of a source that do not change its rows, or that the hash of the rows covers.
NOT_ROWS = {"dataset", "folder", "annotation", "hub", "image_root", "rows", "obtain", "make"}
NOT_ROWS |= {"modality", "tasks", "general"}


def free_settings(args: TrainingArguments) -> dict[str, Any]:
    """Return the settings that may differ on resume with a warning; unused settings are `None`."""
    settings = {name: getattr(args, name) for name in FREE}
    settings["num_processes"] = args.world_size
    for name in FREE_IF_USED:
        settings[name] = getattr(args, name) or None
    return settings


def optimizer_settings(args: TrainingArguments) -> dict[str, Any]:
    """Return the settings of the optimizer. A resumed run takes them from the checkpoint, so they must match."""
    settings = {name: getattr(args, name) for name in OPTIMIZER}
    settings["optim_args"] = args.optim_args or None
    return settings


def freezing_settings(model: nn.Module) -> dict[str, Any]:
    """Return the frozen parts of a model as options of the pretraining."""
    trains_projector = False
    trains_language_model = False
    trains_vit_outside_layers = False
    trained_vit_layers = set()
    for name, weight in model.named_parameters():
        if not weight.requires_grad or "lora_" in name:
            continue
        layer = VISION_LAYER.search(name)
        if layer is not None:
            trained_vit_layers.add(layer[1])
        elif VISION in name:
            trains_vit_outside_layers = True
        if PROJECTOR in name:
            trains_projector = True
        if VISION not in name and PROJECTOR not in name:
            trains_language_model = True
    frozen_parts: list[Part] = []
    if not trains_vit_outside_layers:
        frozen_parts.append("vision")
    if not trains_projector:
        frozen_parts.append("projector")
    if not trains_language_model and not is_peft_model(model):
        frozen_parts.append("language_model")
    return {
        "freeze": frozen_parts,
        "unfreeze_vision_layers": 0 if trains_vit_outside_layers else len(trained_vit_layers),
    }


def adapter_settings(model: nn.Module) -> dict[str, Any]:
    """Return the settings of a model's adapter, or `{"use_peft": False}` without one."""
    if not is_peft_model(model):
        return {"use_peft": False}
    settings = {"use_peft": True}
    for name, field in ADAPTER.items():
        value = getattr(model.active_peft_config, field, None)
        if isinstance(value, (list, set)):
            value = sorted(value)
        settings[name] = value
    return settings


def base_fingerprint(model: nn.Module, is_main: bool) -> str:
    """Hash the frozen base weights of a model with an adapter, see [`hash_of_weights`]."""
    return hash_of_weights(model, is_main, lambda name, weight: not weight.requires_grad)


def start_fingerprint(model: nn.Module, is_main: bool) -> str:
    """Hash the layers of the ViT and the language model, which are never newly initialized; see [`hash_of_weights`]."""
    return hash_of_weights(model, is_main, lambda name, weight: bool(PRETRAINED.search(name)))


def hash_of_weights(model: nn.Module, is_main: bool, is_chosen: Callable[[str, nn.Parameter], bool]) -> str:
    """Hash some values of every chosen weight in the main process, and return the hash in all processes."""
    weights_hash = hashlib.sha256()
    if is_main:
        for name, weight in model.named_parameters():
            if not is_chosen(name, weight):
                continue
            name = name.replace("original_module.", "").replace("base_layer.", "")  # names in modules wrapped by PEFT
            step = max(1, weight.numel() // HASHED_VALUES)
            some_values = weight.detach().flatten()[::step].float().cpu()
            weights_hash.update(f"{name} {tuple(weight.shape)} ".encode())
            weights_hash.update(some_values.numpy().tobytes())
    return broadcast_object_list([weights_hash.hexdigest()[:16]])[0]


def default_warmup(args: TrainingArguments, data: Dataset | IterableDataset) -> int:
    """Return the default steps of VRL's warm-up for a language model from scratch, half of all steps.

    A resumed run keeps the number of the original run, even if the number of steps has changed.
    """
    checkpoint = args.resume_from_checkpoint or last_checkpoint(args.output_dir)
    if checkpoint is not None:
        record = read_checkpoint_record(checkpoint)
        if record:
            return record["settings"]["fixed"].get("vrl_warmup_steps") or 0
    num_rows = None if isinstance(data, IterableDataset) else len(data)
    num_steps = args.number_of_steps(num_rows, args.world_size) or 0
    return num_steps // 2


def check_resume(
    checkpoint: str | Path,
    settings: dict[str, dict[str, Any]],
    data: dict[str, str | None],
    allow_changed_data: bool = False,
) -> None:
    """Raise a `ValueError` if a run cannot resume from a checkpoint.

    Settings are checked by [`check_resume_settings`], data by [`check_data`]. For a checkpoint without a record, such
    as that of another trainer, a warning is logged.
    """
    if not any(Path(checkpoint).glob("rng_state*.pth")):
        raise ValueError(
            f"{checkpoint} has only weights (save_only_model), so the run cannot resume. Start a new run: set the "
            "checkpoint as model_name_or_path, and another output_dir."
        )
    record = read_checkpoint_record(checkpoint)
    if not record:
        logger.warning("%s has no record of its run. Settings and data cannot be compared.", checkpoint)
        return
    check_data(checkpoint, record["data"] or {}, data, allow_changed_data)
    if allow_changed_data:
        fixed = dict(settings["fixed"])
        fixed.pop(TRAINING_DATA, None)
        fixed.pop(NUM_SAMPLES, None)
        settings = {**settings, "fixed": fixed}
    check_resume_settings(checkpoint, record["settings"], settings)


def check_resume_settings(
    checkpoint: str | Path, recorded: dict[str, dict[str, Any]], settings: dict[str, dict[str, Any]]
) -> None:
    """Compare the settings of a run with the settings of a checkpoint.

    Args:
        recorded: settings of the checkpoint.
        settings: settings of the run. `fixed` and `model` (trainable parts) must match; `free` may differ, with a
            warning; `given` (initial weights and input spec) must match if both have the setting.

    Raises:
        ValueError: if settings that must match differ; the message names them with both values.
    """
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the record
    wrong_settings = []
    changed_settings = []
    for kind in ("fixed", "model", "given", "free"):
        recorded_settings = recorded.get(kind, {})
        for name, value in settings.get(kind, {}).items():
            recorded_value = recorded_settings.get(name)
            if recorded_value == value or (kind == "given" and name not in recorded_settings):
                continue
            difference = f"{name} was {recorded_value!r} and is {value!r}"
            if kind == "free":
                changed_settings.append(difference)
            else:
                wrong_settings.append(difference)
    if wrong_settings:
        start = " from its weights: set the checkpoint as model_name_or_path, and another output_dir."
        if recorded.get("model", {}).get("use_peft"):
            start = ": set another output_dir."  # a run cannot start from an adapter
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings: {'; '.join(wrong_settings)}. Restore them to resume, "
            f"or start a new run{start}"
        )
    if changed_settings:
        logger.warning(
            "Resuming from %s with changed settings; the result differs from an uninterrupted run: %s.",
            checkpoint,
            "; ".join(changed_settings),
        )


def check_data(
    checkpoint: str | Path, recorded: dict[str, str | None], data: dict[str, str | None], may_change: bool = False
) -> None:
    """Compare the fingerprint of a run's data with the fingerprint of a checkpoint.

    Args:
        recorded: fingerprint of the checkpoint.
        data: fingerprint of the run.
        may_change: whether changed data cause a warning instead of an error.

    Raises:
        ValueError: if data have changed; the message names the changed parts.
    """
    unknown_parts = [name for name in data if data[name] is None]
    if unknown_parts:
        names = ", ".join(map(repr, unknown_parts))
        logger.warning("Changes of %s since %s cannot be detected.", names, checkpoint)
    changed_parts = []
    for name in {**recorded, **data}:  # in this order, without duplicates
        if name not in unknown_parts and recorded.get(name) != data.get(name):
            changed_parts.append(name)
    if not changed_parts:
        return
    change = f"{', '.join(map(repr, changed_parts))} changed since {checkpoint} was written"
    if not may_change:
        raise ValueError(
            f"The training data have changed: {change} (contents, sizes or times of files, columns or prompt). "
            "Restore the data to resume exactly, or resume with the changed data by --allow_changed_data, or start a "
            "new run from the weights: set the checkpoint as model_name_or_path, and another output_dir."
        )
    logger.warning("Resuming with changed data; the result differs from an uninterrupted run: %s.", change)


def check_tokenizer(checkpoint: str | Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise a `ValueError` if the tokenizer differs from that of a checkpoint.

    The tokenizer of a model from scratch changes if its training texts change.
    """
    file = Path(checkpoint) / "tokenizer.json"
    if not file.is_file():
        return
    stored_vocabulary = Tokenizer.from_file(str(file)).get_vocab()
    vocabulary = tokenizer.get_vocab()
    if stored_vocabulary != vocabulary:
        raise ValueError(
            f"The tokenizer of {checkpoint} ({len(stored_vocabulary)} tokens) differs from that of the run "
            f"({len(vocabulary)} tokens). With from_scratch it is trained on the texts, which have changed. Restore "
            "them, or start a new run from the weights: set the checkpoint as model_name_or_path, and another "
            "output_dir."
        )


def check_loaded(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise a `ValueError` if a checkpoint has missing or unexpected keys for a model."""
    if missing or unexpected:
        raise ValueError(
            f"The checkpoint does not match the model: missing keys {sorted(missing)}, unexpected keys "
            f"{sorted(unexpected)}. Resume with the configuration of the original run."
        )


def fingerprint_data(data: Any) -> dict[str, str | None]:
    """Return a hash for each part of the training data by name, `None` for data that cannot be hashed.

    Args:
        data: data set, stream, mixture, list of file paths, text that represents annotations, or dictionary of these.
    """
    if isinstance(data, MixtureDataset | MixtureStream):
        return fingerprint_mixture(data)
    if isinstance(data, Dataset):
        return {"rows": hash_rows(data)}
    if isinstance(data, IterableDataset):
        return {"stream": hash_stream(data)}
    if isinstance(data, dict):
        hashes = {}
        for name, item in data.items():
            for part_name, part_hash in fingerprint_data(item).items():
                hashes[f"{name}, {part_name}"] = part_hash
        return hashes
    if isinstance(data, list):
        return {"files": digest(file_states(data))}
    if isinstance(data, str):
        return {"annotations": digest([data])}
    return {"rows": None}


def fingerprint_mixture(data: MixtureDataset | MixtureStream) -> dict[str, str | None]:
    """Return a hash of the settings of a mixture, and a hash of each source by its name."""
    sources = data.mixture.sources
    settings = dataclasses.asdict(data.mixture)
    settings["sources"] = [source.name for source in sources]
    settings["modalities"] = None
    settings["split_streams"] = getattr(data, "is_split", False)
    hashes = {"how sources are mixed": digest([str(settings)])}
    for source, rows in zip(sources, data.parts):
        hashes[source.name] = hash_source(source, rows)
    return hashes


def hash_source(source: Source, rows: Dataset | IterableDataset) -> str | None:
    unused_fields = NOT_ROWS
    if isinstance(rows, IterableDataset):
        # The order of a mixture depends on the number of rows that a stream is said to have.
        unused_fields = NOT_ROWS - {"rows"}
    settings = dataclasses.asdict(source)
    for name in unused_fields:
        settings.pop(name, None)
    if isinstance(rows, Dataset):
        rows_hash = hash_rows(rows)
    elif source.annotation:
        rows_hash = digest(file_states([source.annotation]))
    elif source.folder:
        paths = sorted(Path(source.folder).rglob("*"))
        rows_hash = digest(file_states(path for path in paths if path.is_file()))
    else:
        rows_hash = hash_stream(retry(partial(load_columns, source)))
    if rows_hash is None:
        return None
    return digest([str(sorted(settings.items(), key=str)), rows_hash])


def hash_rows(dataset: Dataset) -> str:
    """Hash the content of rows independently of their cache files."""
    content_hash = hashlib.sha256()
    image_paths: list[str] = []
    table = dataset.data
    step = 1 + table.nbytes // MOST_BYTES
    names = sorted(table.column_names)
    for start in range(0, table.num_rows, 1000):
        some_rows = table.slice(start, 1000)
        for name in names:
            for chunk in some_rows.column(name).chunks:
                hash_array(content_hash, chunk, image_paths, step)
    indices = getattr(dataset, "_indices", None)
    if indices is not None:
        for chunk in indices.column(0).chunks:
            hash_array(content_hash, chunk, image_paths)
    states = file_states(image_paths)
    return digest([str(names), str(table.num_rows), content_hash.hexdigest(), *states])


def hash_array(content_hash: "hashlib._Hash", array: pa.Array, paths: list[str], step: int = 1) -> None:
    """Hash the values of an array, of binary values every `step`-th, and append the paths of image files to `paths`."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        hash_array(content_hash, array.storage, paths, step)
        return
    if isinstance(kind, pa.StructType) and {field.name for field in kind} == IMAGE:
        encoded_images = pc.struct_field(array, "bytes")
        images_in_files = array.filter(pc.is_null(encoded_images))
        for path in pc.struct_field(images_in_files, "path").to_pylist():
            if path is not None:
                paths.append(path)
        hash_array(content_hash, encoded_images, paths, step)
        return
    content_hash.update(array.is_valid().to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_dictionary(kind):
        hash_array(content_hash, array.dictionary_decode(), paths, step)
    elif pa.types.is_struct(kind):
        for child in array.flatten():
            hash_array(content_hash, child, paths, step)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        hash_array(content_hash, pc.list_value_length(array), paths, step)
        hash_array(content_hash, array.flatten(), paths, step)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        hash_array(content_hash, pc.binary_length(array), paths, step)
        text = "".join(array.drop_null().to_pylist())
        content_hash.update(text.encode("utf-8", "surrogatepass"))
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        hash_array(content_hash, pc.binary_length(array), paths, step)
        for value in array.drop_null()[::step]:
            content_hash.update(value.as_buffer())
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        content_hash.update(array.drop_null().to_numpy(zero_copy_only=False).tobytes())
    elif not pa.types.is_null(kind):
        content_hash.update(repr(array.to_pylist()).encode())


def hash_stream(dataset: IterableDataset) -> str | None:
    """Hash the files and rows that a stream reads, if they are known, and the columns and the prompt of its reader.

    Addresses on the Hub contain a commit.
    """
    row_hashes = []
    readers = []
    local_files = set()
    addresses = set()
    for item in walk(vars(dataset).get("_ex_iterable"), set(), 12):
        if isinstance(item, Dataset):
            row_hashes.append(hash_rows(item))
        elif isinstance(item, pa.Table):
            row_hashes.append(hash_rows(Dataset(item)))
        elif isinstance(item, RowReader | Source):
            readers.append(f"{item.columns} {item.prompt}")
        elif os.path.isfile(item):
            local_files.add(item)
        elif item.startswith(("hf://", "http://", "https://")):
            addresses.add(item)
    if not row_hashes and not local_files and not addresses:
        return None
    states = file_states(sorted(local_files))
    return digest([*row_hashes, *readers, *sorted(addresses), *states])


def walk(item: Any, visited: set[int], depth: int) -> Iterator[Dataset | pa.Table | RowReader | Source | str]:
    """Yield the tables, readers and texts in an object of `datasets` in its order.

    Args:
        visited: addresses of the objects that are not visited again.
        depth: most levels of nested objects to visit.
    """
    if isinstance(item, str):
        yield item
        return
    if id(item) in visited or depth == 0:
        return
    visited.add(id(item))
    inner_items = []
    if isinstance(item, Dataset | pa.Table | RowReader):
        yield item
    elif isinstance(getattr(item, "table", None), pa.Table):  # a table of `datasets`
        yield item.table
    elif isinstance(item, Source):
        yield item
        for file in line_files(item):
            yield str(file)
    elif isinstance(item, partial):
        inner_items = [[item.func, item.args, item.keywords]]
    elif isinstance(item, Mapping):
        inner_items = item.values()
    elif isinstance(item, list | tuple | set):
        inner_items = itertools.islice(item, MOST_FILES)
    elif type(item).__module__.partition(".")[0] == "datasets" and hasattr(item, "__dict__"):
        inner_items = [vars(item)]
    for inner_item in inner_items:
        yield from walk(inner_item, visited, depth - 1)


def file_states(paths: Iterable[str | Path]) -> Iterator[str]:
    """Yield name, size and modification time of files."""
    paths = list(map(str, paths))
    yield str(len(paths))
    step = 1 + len(paths) // MOST_FILES
    for path in paths[::step]:
        name = os.path.basename(path)
        try:
            stat = os.stat(path)
            yield f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}"
        except OSError:
            yield f"{name}\0missing"


def digest(texts: Iterable[str]) -> str:
    texts_hash = hashlib.sha256()
    for text in texts:
        texts_hash.update(text.encode("utf-8", "surrogateescape") + b"\0\0")
    return texts_hash.hexdigest()[:24]
