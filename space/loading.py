"""Models of the app: folders and Hub ids that the app is started with, and Hub ids that visitors type.

Environment variables, read when the app starts:

- `VITP_MODEL`: Hub id or folder of the model that the page opens with, of any kind. Default: `outputs/quickstart` if it
  exists, otherwise the model in `space/quickstart`, otherwise a tiny random model.
- `VITP_BACKBONES`: further Hub ids or folders of models of any kind, separated by commas.
- `VITP_FINE_TUNED`: Hub ids or folders of fine-tuned models for the tab Apply, separated by commas.
- `VITP_TRUST_REMOTE_CODE`: `1` lets the models named here run code from their repositories, but never visitors' models.
- `VITP_MAX_GB`: the largest weights, in GB, that are downloaded for a Hub id typed by a visitor. Default: 4.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import limits
from checking import UnavailableModel, check_files, check_settings
from computing import BUILDING, device, seconds_left
from fetching import fetched
from kinds import (
    BACKBONE,
    FINE_TUNED,
    FULL,
    KINDS,
    kind_of,
    open_backbone,
    open_fine_tuned,
    open_full,
    random_twin,
    vit_of,
)
from opened import FineTuned, FullModel, LoadedBackbone
from safetensors import SafetensorError
from tiny import tiny_model

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
ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, ImportError)
ERRORS += (SafetensorError, RecursionError, MemoryError)


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
        model = model or next((str(one) for one in (QUICKSTART, PACKED) if (one / "config.json").is_file()), TINY)
        paths = list(dict.fromkeys(filter(None, [model, *backbones, *fine_tuned])))
        self._sources = dict(zip(names_of(paths), paths))
        """Folders or Hub ids of the models that the app was started with, by name."""
        self.default = next(iter(self._sources))
        self.trust_remote_code, self.max_gb = trust_remote_code, max_gb
        self._kinds: dict[str, str] = {}
        self._loaded: OrderedDict[tuple[str, str], Future] = OrderedDict()
        self._loading: list[str] = []
        self._lock = threading.Lock()
        kinds = {name: self._kind_at_start(name, where in fine_tuned) for name, where in self._sources.items()}
        self.names = list(self._sources)
        """Names of all models that the app was started with."""
        self.full_names = [name for name, kind in kinds.items() if kind == FULL]
        self.fine_tuned_names = [name for name, kind in kinds.items() if kind == FINE_TUNED]

    @classmethod
    def from_environment(cls) -> "Models":
        def names(variable: str) -> list[str]:
            return [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]

        return cls(
            os.environ.get("VITP_MODEL") or None,
            names("VITP_BACKBONES"),
            os.environ.get("VITP_TRUST_REMOTE_CODE") == "1",
            float(os.environ.get("VITP_MAX_GB") or limits.MAX_GB),
            names("VITP_FINE_TUNED"),
        )

    @property
    def is_random(self) -> bool:
        """True if the default model is the tiny random one."""
        return self.default == TINY

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
            return self._once(
                "backbone", name, lambda name: random_twin(name, self.backbone(name.removesuffix(RANDOM)))
            )
        if self.kind(name) == BACKBONE:
            return self._once("model", name, self._open)
        return self._once("backbone", name, lambda name: vit_of(name, self._once("model", name, self._open)))

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
        return FINE_TUNED if is_fine_tuned else FULL if name == self.default else BACKBONE

    def _once(self, what: str, name: str, opener: Callable[[str], Any]) -> Any:
        """Open a model in a thread of its own, so that a visitor can stop waiting and other visitors do not wait."""
        key, visitors = (what, name), name.removesuffix(RANDOM)
        with self._lock:
            future = self._loaded.get(key)
            if future is None:
                others = set(self._loading) - {visitors, *self._sources}
                if visitors not in self._loading and visitors not in self._sources and len(others) >= limits.LOADING:
                    raise UnavailableModel(f"{len(others)} models are being loaded. Try {name} again in a minute.")
                self._loading.append(visitors)
                future = self._loaded[key] = Future()
                threading.Thread(target=self._run, args=(key, opener, future), daemon=True).start()
            self._loaded.move_to_end(key)
        try:
            return future.result(seconds_left())
        except TimeoutError as error:
            raise UnavailableModel(f"{name} is still being loaded. Try again in a minute.") from error

    def _run(self, key: tuple[str, str], opener: Callable[[str], Any], future: Future) -> None:
        name, found, failure = key[1], None, None
        try:
            found = opener(name)
        except UnavailableModel as error:
            failure = error
        except ERRORS as error:
            reason = without_paths(error, self._sources.values())
            failure = UnavailableModel(f"{name} cannot be opened: {reason}")
        except BaseException as error:  # Raised again by `future.result`.
            failure = error
        with self._lock:
            self._loading.remove(name.removesuffix(RANDOM))
            if failure is not None:
                self._loaded.pop(key, None)
            future.set_exception(failure) if failure is not None else future.set_result(found)
            self._make_room(key)

    def _make_room(self, newest: tuple[str, str]) -> None:
        """Drop the least recently used models of visitors until the rest is within the limits."""
        sizes: dict[str, int] = {}
        for (_, name), future in self._loaded.items():
            model = getattr(future.result(), "model", None) if future.done() else None
            if model is not None and name not in self._sources:
                sizes.pop(name, None)  # Reinsertion keeps the names in the order of their last use.
                sizes[name] = sum(parameter.nbytes for parameter in model.parameters())
        for name in list(sizes):
            if len(sizes) <= limits.KEPT_MODELS and sum(sizes.values()) <= limits.kept_bytes():
                return
            if name != newest[1]:
                del sizes[name]
                for key in [key for key in self._loaded if key[1] == name and key[0] != "kind"]:
                    del self._loaded[key]

    def _read_kind(self, name: str) -> str:
        if name == TINY:
            self._kinds[name] = FULL
        else:
            with self._files(name, config_only=True) as folder:
                config = check_settings(name, folder, name in self._sources)
            is_own = self.trust_remote_code and name in self._sources
            has_code = "auto_map" in config and config.get("model_type") not in KINDS
            self._kinds[name] = BACKBONE if is_own and has_code else kind_of(name, config)
        return self._kinds[name]

    def _open(self, name: str) -> FullModel | LoadedBackbone | FineTuned:
        if name == TINY:
            with BUILDING:
                model, processor = tiny_model()
            model.set_attn_implementation("eager")
            return FullModel(name, model.eval().to(device()), processor)
        is_own, kind = name in self._sources, self.kind(name)
        with self._files(name) as folder:
            check_files(name, folder)
            check_settings(name, folder, is_own)
            with BUILDING:  # Downloads of other models and answers continue meanwhile.
                if kind == FULL:
                    return open_full(name, folder, is_own)
                if kind == FINE_TUNED:
                    return open_fine_tuned(name, folder)
                return open_backbone(name, folder, self.trust_remote_code and is_own)

    def _files(self, name: str, config_only: bool = False):
        return fetched(name, self._sources.get(name), self.max_gb, config_only)


def names_of(sources: Sequence[str]) -> list[str]:
    """Return the names of models: the Hub id, or as few of the last parts of a folder's path as are unique."""
    parts = [Path(source).resolve().parts if Path(source).is_dir() else (source,) for source in sources]
    generic = {"backbone", "model", "checkpoint"}
    lengths = [2 if one[-1] in generic and len(one) > 2 else 1 for one in parts]
    while True:
        names = ["/".join(one[-length:]) for one, length in zip(parts, lengths)]
        clashes = [index for index, name in enumerate(names) if names.count(name) > 1]
        longer = [index for index in clashes if lengths[index] < len(parts[index]) - 1]
        if not longer:
            return names
        for index in longer:
            lengths[index] += 1


def without_paths(error: BaseException, sources: Iterable[str]) -> str:
    """Return the message of an error in one line, without the paths of folders."""
    reason = " ".join(str(error).split()) or type(error).__name__
    for source in sources:
        if Path(source).is_dir():
            reason = reason.replace(str(Path(source).resolve()), Path(source).name).replace(source, Path(source).name)
    return reason[:300]
