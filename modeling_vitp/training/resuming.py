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
from .checkpointing import last_checkpoint, read_checkpoint_record
from .freezing import PROJECTOR, VISION

logger = logging.getLogger(__name__)
FREE = (
    "max_steps num_train_epochs lr_scheduler_type warmup_steps max_grad_norm bf16 fp16 per_device_train_batch_size "
    "gradient_accumulation_steps"
).split()
FREE_IF_USED = ("lr_scheduler_kwargs", "label_smoothing_factor", "neftune_noise_alpha")
OPTIMIZER = "learning_rate weight_decay optim adam_beta1 adam_beta2 adam_epsilon".split()
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
TRAINING_DATA, NUM_SAMPLES = "training data", "training samples"
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
    free = {name: getattr(args, name) for name in FREE} | {"num_processes": args.world_size}
    return free | {name: getattr(args, name) or None for name in FREE_IF_USED}


def optimizer_settings(args: TrainingArguments) -> dict[str, Any]:
    """Return the settings of the optimizer. A resumed run takes them from the checkpoint, so they must match."""
    return {name: getattr(args, name) for name in OPTIMIZER} | {"optim_args": args.optim_args or None}


def frozen_parts(model: nn.Module) -> dict[str, bool | int]:
    """Return the frozen parts of a model as arguments of [`~modeling_vitp.training.freezing.freeze`]."""
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad and "lora_" not in name]
    layers = {name: VISION_LAYER.search(name) for name in trained}
    freeze_vision = not any(VISION in name and layers[name] is None for name in trained)
    rest = [name for name in trained if VISION not in name and PROJECTOR not in name]
    return {
        "freeze_vision": freeze_vision,
        "freeze_projector": not any(PROJECTOR in name for name in trained),
        "freeze_language_model": not rest and not is_peft_model(model),
        "unfreeze_vision_layers": len({match[1] for match in layers.values() if match}) if freeze_vision else 0,
    }


def adapter_settings(model: nn.Module) -> dict[str, Any]:
    """Return the settings of a model's adapter, or `{"use_peft": False}` without one."""
    if not is_peft_model(model):
        return {"use_peft": False}
    config = model.active_peft_config
    values = {name: getattr(config, field, None) for name, field in ADAPTER.items()}
    in_order = {name: sorted(value) if isinstance(value, (list, set)) else value for name, value in values.items()}
    return {"use_peft": True} | in_order


def base_fingerprint(model: nn.Module, is_main: bool) -> str:
    """Hash the frozen base weights of a model with an adapter, see [`hash_of_weights`]."""
    return hash_of_weights(model, is_main, lambda name, weight: not weight.requires_grad)


def start_fingerprint(model: nn.Module, is_main: bool) -> str:
    """Hash the layers of the ViT and the language model, which are never newly initialized; see [`hash_of_weights`]."""
    return hash_of_weights(model, is_main, lambda name, weight: bool(PRETRAINED.search(name)))


def hash_of_weights(model: nn.Module, is_main: bool, is_chosen: Callable[[str, nn.Parameter], bool]) -> str:
    """Hash some values of every chosen weight in the main process, and return the hash in all processes."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters() if is_main else []:
        if is_chosen(name, weight):
            name = name.replace("original_module.", "").replace("base_layer.", "")  # names in modules wrapped by PEFT
            values = weight.detach().flatten()[:: max(1, weight.numel() // HASHED_VALUES)].float().cpu()
            digest.update(f"{name} {tuple(weight.shape)} ".encode() + values.numpy().tobytes())
    return broadcast_object_list([digest.hexdigest()[:16]])[0]


def default_warmup(args: TrainingArguments, data: Dataset | IterableDataset) -> int:
    """Return the default steps of VRL's warm-up for a language model from scratch, half of all steps.

    A resumed run keeps the number of the original run, even if the number of steps has changed.
    """
    checkpoint = args.resume_from_checkpoint or last_checkpoint(args.output_dir)
    record = read_checkpoint_record(checkpoint) if checkpoint is not None else {}
    if record:
        return record["settings"]["fixed"].get("vrl_warmup_steps") or 0
    num_rows = None if isinstance(data, IterableDataset) else len(data)
    return (args.number_of_steps(num_rows, args.world_size) or 0) // 2


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
        fixed = {name: value for name, value in settings["fixed"].items() if name not in (TRAINING_DATA, NUM_SAMPLES)}
        settings = settings | {"fixed": fixed}
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
    wrong, changed = [], []
    for kind in ("fixed", "model", "given", "free"):
        before = recorded.get(kind, {})
        for name, value in settings.get(kind, {}).items():
            if before.get(name) != value and (kind != "given" or name in before):
                found = f"{name} was {before.get(name)!r} and is {value!r}"
                (changed if kind == "free" else wrong).append(found)
    if wrong:
        start = " from its weights: set the checkpoint as model_name_or_path, and another output_dir."
        if recorded.get("model", {}).get("use_peft"):
            start = ": set another output_dir."  # a run cannot start from an adapter
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings: {'; '.join(wrong)}. Restore them to resume, or "
            f"start a new run{start}"
        )
    if changed:
        logger.warning(
            "Resuming from %s with changed settings; the result differs from an uninterrupted run: %s.",
            checkpoint,
            "; ".join(changed),
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
    unknown = [name for name in data if data[name] is None]
    if unknown:
        logger.warning("Changes of %s since %s cannot be detected.", ", ".join(map(repr, unknown)), checkpoint)
    names = [name for name in {**recorded, **data} if recorded.get(name) != data.get(name) and name not in unknown]
    if not names:
        return
    changed = f"{', '.join(map(repr, names))} changed since {checkpoint} was written"
    if not may_change:
        raise ValueError(
            f"The training data have changed: {changed} (contents, sizes or times of files, columns or prompt). "
            "Restore the data to resume exactly, or resume with the changed data by --allow_changed_data, or start a "
            "new run from the weights: set the checkpoint as model_name_or_path, and another output_dir."
        )
    logger.warning("Resuming with changed data; the result differs from an uninterrupted run: %s.", changed)


def check_tokenizer(checkpoint: str | Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise a `ValueError` if the tokenizer differs from that of a checkpoint.

    The tokenizer of a model from scratch changes if its training texts change.
    """
    file = Path(checkpoint) / "tokenizer.json"
    if not file.is_file():
        return
    stored, current = Tokenizer.from_file(str(file)).get_vocab(), tokenizer.get_vocab()
    if stored != current:
        raise ValueError(
            f"The tokenizer of {checkpoint} ({len(stored)} tokens) differs from that of the run ({len(current)} "
            "tokens). With from_scratch it is trained on the texts, which have changed. Restore them, or start a new "
            "run from the weights: set the checkpoint as model_name_or_path, and another output_dir."
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
        mixture, sources = dataclasses.asdict(data.mixture), data.mixture.sources
        mixture |= {"sources": [source.name for source in sources], "modalities": None}
        mixture["split_streams"] = getattr(data, "is_split", False)
        parts = {source.name: hash_source(source, part) for source, part in zip(sources, data.parts)}
        return {"how sources are mixed": digest([str(mixture)]), **parts}
    if isinstance(data, Dataset):
        return {"rows": hash_rows(data)}
    if isinstance(data, IterableDataset):
        return {"stream": hash_stream(data)}
    if isinstance(data, dict):
        return {
            f"{name}, {part}": value for name, item in data.items() for part, value in fingerprint_data(item).items()
        }
    if isinstance(data, list):
        return {"files": digest(file_states(data))}
    if isinstance(data, str):
        return {"annotations": digest([data])}
    return {"rows": None}


def hash_source(source: Source, part: Dataset | IterableDataset) -> str | None:
    # The order of a mixture depends on the number of rows that a stream is said to have.
    unused = NOT_ROWS - {"rows"} if isinstance(part, IterableDataset) else NOT_ROWS
    settings = {name: value for name, value in dataclasses.asdict(source).items() if name not in unused}
    if isinstance(part, Dataset):
        rows = hash_rows(part)
    elif source.annotation:
        rows = digest(file_states([source.annotation]))
    elif source.folder:
        rows = digest(file_states(path for path in sorted(Path(source.folder).rglob("*")) if path.is_file()))
    else:
        rows = hash_stream(retry(partial(load_columns, source)))
    return rows and digest([str(sorted(settings.items(), key=str)), rows])


def hash_rows(dataset: Dataset) -> str:
    """Hash the content of rows independently of their cache files."""
    seen = hashlib.sha256()
    paths: list[str] = []
    table = dataset.data
    step = 1 + table.nbytes // MOST_BYTES
    names = sorted(name for name in table.column_names)
    for start in range(0, table.num_rows, 1000):
        part = table.slice(start, 1000)
        for name in names:
            for chunk in part.column(name).chunks:
                hash_array(seen, chunk, paths, step)
    indices = getattr(dataset, "_indices", None)
    if indices is not None:
        for chunk in indices.column(0).chunks:
            hash_array(seen, chunk, paths)
    return digest([str(names), str(table.num_rows), seen.hexdigest(), *file_states(paths)])


def hash_array(seen: "hashlib._Hash", array: pa.Array, paths: list[str], step: int = 1) -> None:
    """Hash the values of an array, of binary values every `step`-th, and append the paths of image files to `paths`."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return hash_array(seen, array.storage, paths, step)
    if isinstance(kind, pa.StructType) and {field.name for field in kind} == IMAGE:
        in_files = array.filter(pc.is_null(pc.struct_field(array, "bytes")))
        paths += [path for path in pc.struct_field(in_files, "path").to_pylist() if path is not None]
        return hash_array(seen, pc.struct_field(array, "bytes"), paths, step)
    seen.update(array.is_valid().to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_dictionary(kind):
        hash_array(seen, array.dictionary_decode(), paths, step)
    elif pa.types.is_struct(kind):
        for child in array.flatten():
            hash_array(seen, child, paths, step)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        hash_array(seen, pc.list_value_length(array), paths, step)
        hash_array(seen, array.flatten(), paths, step)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        hash_array(seen, pc.binary_length(array), paths, step)
        seen.update("".join(array.drop_null().to_pylist()).encode("utf-8", "surrogatepass"))
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        hash_array(seen, pc.binary_length(array), paths, step)
        for value in array.drop_null()[::step]:
            seen.update(value.as_buffer())
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        seen.update(array.drop_null().to_numpy(zero_copy_only=False).tobytes())
    elif not pa.types.is_null(kind):
        seen.update(repr(array.to_pylist()).encode())


def hash_stream(dataset: IterableDataset) -> str | None:
    """Hash the files and rows that a stream reads, if they are known, and the columns and the prompt of its reader.

    Addresses on the Hub contain a commit.
    """
    rows, found, readers = [], [], []
    for item in walk(vars(dataset).get("_ex_iterable"), set(), 12):
        if isinstance(item, Dataset):
            rows.append(hash_rows(item))
        elif isinstance(item, pa.Table):
            rows.append(hash_rows(Dataset(item)))
        elif isinstance(item, RowReader | Source):
            readers.append(f"{item.columns} {item.prompt}")
        elif item.startswith(("hf://", "http://", "https://")) or os.path.isfile(item):
            found.append(item)
    local = sorted({path for path in found if os.path.isfile(path)})
    remote = sorted({path for path in found if not os.path.isfile(path)})
    return digest([*rows, *readers, *remote, *file_states(local)]) if rows or found else None


def walk(item: Any, seen: set[int], depth: int) -> Iterator[Dataset | pa.Table | RowReader | Source | str]:
    """Yield the tables, readers and texts in an object of `datasets` in its order."""
    if isinstance(item, str):
        yield item
        return
    if id(item) in seen or depth == 0:
        return
    seen.add(id(item))
    if isinstance(item, Dataset | pa.Table | RowReader):
        yield item
    elif isinstance(getattr(item, "table", None), pa.Table):  # a table of `datasets`
        yield item.table
    elif isinstance(item, Source):
        yield item
        yield from map(str, line_files(item))
    elif isinstance(item, partial):
        yield from walk([item.func, item.args, item.keywords], seen, depth - 1)
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from walk(value, seen, depth - 1)
    elif isinstance(item, list | tuple | set):
        for value in itertools.islice(item, MOST_FILES):
            yield from walk(value, seen, depth - 1)
    elif type(item).__module__.partition(".")[0] == "datasets":
        yield from walk(vars(item) if hasattr(item, "__dict__") else {}, seen, depth - 1)


def file_states(paths: Iterable[str | Path]) -> Iterator[str]:
    """Yield name, size and modification time of files."""
    paths = list(map(str, paths))
    yield str(len(paths))
    for path in paths[:: 1 + len(paths) // MOST_FILES]:
        try:
            stat = os.stat(path)
            yield f"{os.path.basename(path)}\0{stat.st_size}\0{stat.st_mtime_ns}"
        except OSError:
            yield f"{os.path.basename(path)}\0missing"


def digest(parts: Iterable[str]) -> str:
    seen = hashlib.sha256()
    for part in parts:
        seen.update(part.encode("utf-8", "surrogateescape") + b"\0\0")
    return seen.hexdigest()[:24]
