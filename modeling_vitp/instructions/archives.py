"""WebDataset's archives, each sample with all of its files.

The builder of `datasets` takes for columns what the first samples have, and drops what later ones have beside that:
images of another ending, a second image, fields of their JSON.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    DatasetInfo,
    Features,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    load_dataset,
    load_dataset_builder,
)
from datasets.builder import Key
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from .row_reader import KEY, MEMBERS, URL

FORMAT = "1"  # of what is stored in the cache


class Archives(WebDataset):
    """Samples as their key, their archive and their files, encoded, each with its ending for a name."""

    DECODERS = {}

    def _info(self) -> DatasetInfo:
        files = List({"name": Value("string"), "content": Value("large_binary")})
        return DatasetInfo(features=Features({KEY: Value("string"), URL: Value("string"), MEMBERS: files}))

    def _generate_examples(self, tar_paths: list[str], tar_iterators: list[Iterable]) -> Iterator[tuple[Key, dict]]:
        for number, (path, files) in enumerate(zip(tar_paths, tar_iterators)):
            for index, sample in enumerate(self._get_pipeline_from_tar(path, files)):
                origin = {name: sample.pop(name) for name in (KEY, URL)}
                members = [{"name": name, "content": content} for name, content in sample.items()]
                yield Key(number, index), {**origin, MEMBERS: members}


def load_stored(
    split: str | None = None, streaming: bool = False, **place
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """As `load_dataset`, but for archives, which are read as [`Archives`]."""
    found = load_dataset_builder(**place)
    if not isinstance(found, WebDataset):
        return load_dataset(**place, split=split, streaming=streaming)
    builder = Archives(
        cache_dir=place.get("cache_dir"),
        dataset_name=found.dataset_name,
        config_name=found.config.name,
        hash=FORMAT,
        base_path=found.base_path,
        repo_id=found.repo_id,
        data_files=found.config.data_files,
    )
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def columns_of(dataset: Dataset | IterableDataset) -> Mapping[str, Any]:
    """The columns with their features, or `None` where these are not known; of archives the first sample."""
    columns = dataset.features or dict.fromkeys(dataset.column_names or next(iter(dataset), {}))
    if MEMBERS not in columns:
        return columns
    first = next(dataset.iter(batch_size=1), {KEY: [None], MEMBERS: [[]]})
    return {name: values[0] for name, values in first.items()}
