"""The models that the app opens: by Hub id, and by folder where the person who runs the app names it.

Environment variables, read when the app starts:

- `VITP_MODEL`: Hub id or folder of the model that the page begins with, of any kind. Without it `outputs/quickstart` if
  that is there, otherwise the quickstart's model that lies beside this file, otherwise a tiny random one.
- `VITP_BACKBONES`: further Hub ids or folders, separated by commas, of models of any kind to choose from.
- `VITP_FINE_TUNED`: the same; for fine-tuned models, which are offered in the tab Apply.
- `VITP_TRUST_REMOTE_CODE`: `1` lets the models named here run code from their repos; never those of visitors.
- `VITP_MAX_GB`: the largest weights, in GB, that a visitor may have downloaded by typing a Hub id; 4 if not given.
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
"""Public models whose ViTs are offered to compare with; others, such as DINOv3, can be typed or named at the start."""
RANDOM = ", random weights"
"""What follows the name of a ViT for the same with the weights that it would begin training with."""
ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, ImportError)
ERRORS += (SafetensorError, RecursionError, MemoryError)


class Models:
    """What every tab gets: opens models by name, each once and beside the serving of others, and keeps the last few.

    Names are those that visitors see: a Hub id, or of a folder its own name and not where it lies.

    Args:
        model: the model that the app starts with: a folder or Hub id.
        backbones, fine_tuned: further ones to choose from.
        trust_remote_code: whether these models may run code from their repos.
        max_gb: the largest weights to download for a name that is not among those.
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
        given = list(dict.fromkeys(filter(None, [model, *backbones, *fine_tuned])))
        self._places = dict(zip(names_of(given), given))
        """Where the models that the app was started with are: folders or Hub ids, by their names."""
        self.default = next(iter(self._places))
        self.trust_remote_code, self.max_gb = trust_remote_code, max_gb
        self._kinds: dict[str, str] = {}
        self._loaded: OrderedDict[tuple[str, str], Future] = OrderedDict()
        self._loading: list[str] = []
        self._lock = threading.Lock()
        kinds = {name: self._kind_at_start(name, where in fine_tuned) for name, where in self._places.items()}
        self.names = list(self._places)
        """All names to choose from."""
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
        """Whether the app's own model has learned nothing."""
        return self.default == TINY

    def place(self, name: str) -> str | None:
        """The folder or Hub id of a model that the app was started with."""
        return self._places.get(name)

    def kind(self, name: str) -> str:
        """Of the model of this name: `FULL`, `BACKBONE` or `FINE_TUNED`.

        Raises:
            UnavailableModel: if there is no such model, or it is of no known kind.
        """
        name = name.removesuffix(RANDOM)
        if name not in self._kinds:
            self._once("kind", name, self._read_kind)
        return self._kinds[name]

    def full(self, name: str | None = None) -> FullModel:
        """The full model of this name, the app's own if none is given.

        Raises:
            UnavailableModel: if there is no such model, or it is of another kind.
        """
        name = name or self.default
        if self.kind(name) != FULL:
            raise UnavailableModel(f"{name} is a {self.kind(name)}, which answers nothing: choose a full model above.")
        return self._once("model", name, self._open)

    def backbone(self, name: str | None = None) -> LoadedBackbone:
        """The backbone of this name: of a full or fine-tuned model its ViT, the same weights in memory.

        Raises:
            UnavailableModel: if there is no such model, or it is of another kind.
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
        """The fine-tuned model of this name.

        Raises:
            UnavailableModel: if there is no such model, or it is of another kind.
        """
        if self.kind(name) != FINE_TUNED:
            raise UnavailableModel(f"{name} is a {self.kind(name)}, which was not fine-tuned for a task.")
        return self._once("model", name, self._open)

    def _kind_at_start(self, name: str, is_fine_tuned: bool) -> str:
        """Of a folder, and of the model that the page begins with, as its configuration says; for others the Hub is
        not asked before the page is there.
        """
        if Path(self._places[name]).is_dir() or name == TINY:
            return self.kind(name)
        if name == self.default:
            with suppress(UnavailableModel):  # which is told where it is opened
                return self.kind(name)
        return FINE_TUNED if is_fine_tuned else FULL if name == self.default else BACKBONE

    def _once(self, what: str, name: str, opener: Callable[[str], Any]) -> Any:
        """Opens in a thread of its own, so that who waits for it can stop waiting, and nobody else waits."""
        key, visitors = (what, name), name.removesuffix(RANDOM)
        with self._lock:
            future = self._loaded.get(key)
            if future is None:
                others = set(self._loading) - {visitors, *self._places}
                if visitors not in self._loading and visitors not in self._places and len(others) >= limits.LOADING:
                    raise UnavailableModel(f"{len(others)} models are being loaded: try {name} again in a minute.")
                self._loading.append(visitors)
                future = self._loaded[key] = Future()
                threading.Thread(target=self._run, args=(key, opener, future), daemon=True).start()
            self._loaded.move_to_end(key)
        try:
            return future.result(seconds_left())
        except TimeoutError as error:
            raise UnavailableModel(f"{name} is still being loaded: ask again in a minute.") from error

    def _run(self, key: tuple[str, str], opener: Callable[[str], Any], future: Future) -> None:
        name, found, failure = key[1], None, None
        try:
            found = opener(name)
        except UnavailableModel as error:
            failure = error
        except ERRORS as error:
            reason = without_paths(error, self._places.values())
            failure = UnavailableModel(f"{name} cannot be opened: {reason}")
        except BaseException as error:  # nobody would hear of it in this thread
            failure = error
        with self._lock:
            self._loading.remove(name.removesuffix(RANDOM))
            if failure is not None:
                self._loaded.pop(key, None)
            future.set_exception(failure) if failure is not None else future.set_result(found)
            self._make_room(key)

    def _make_room(self, newest: tuple[str, str]) -> None:
        """Forgets the models that were used longest ago, until the others are few enough and small enough."""
        sizes: dict[str, int] = {}
        for (_, name), future in self._loaded.items():
            model = getattr(future.result(), "model", None) if future.done() else None
            if model is not None and name not in self._places:
                sizes.pop(name, None)  # so that names are in the order of their last use
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
                config = check_settings(name, folder, name in self._places)
            is_own = self.trust_remote_code and name in self._places
            has_code = "auto_map" in config and config.get("model_type") not in KINDS
            self._kinds[name] = BACKBONE if is_own and has_code else kind_of(name, config)
        return self._kinds[name]

    def _open(self, name: str) -> FullModel | LoadedBackbone | FineTuned:
        if name == TINY:
            with BUILDING:
                model, processor = tiny_model()
            model.set_attn_implementation("eager")
            return FullModel(name, model.eval().to(device()), processor)
        is_own, kind = name in self._places, self.kind(name)
        with self._files(name) as folder:
            check_files(name, folder)
            check_settings(name, folder, is_own)
            with BUILDING:  # beside the downloads of others, and their answers
                if kind == FULL:
                    return open_full(name, folder, is_own)
                if kind == FINE_TUNED:
                    return open_fine_tuned(name, folder)
                return open_backbone(name, folder, self.trust_remote_code and is_own)

    def _files(self, name: str, config_only: bool = False):
        return fetched(name, self._places.get(name), self.max_gb, config_only)


def names_of(places: Sequence[str]) -> list[str]:
    """What models are called: by Hub id, and of folders by as few of their last parts as tell them apart."""
    parts = [Path(place).resolve().parts if Path(place).is_dir() else (place,) for place in places]
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


def without_paths(error: BaseException, places: Iterable[str]) -> str:
    """The reason of a failure in one line, without where folders lie."""
    reason = " ".join(str(error).split()) or type(error).__name__
    for place in places:
        if Path(place).is_dir():
            reason = reason.replace(str(Path(place).resolve()), Path(place).name).replace(place, Path(place).name)
    return reason[:300]
