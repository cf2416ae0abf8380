import functools
import gc
import os
import sys
import time
from types import SimpleNamespace

if "PYTEST_XDIST_WORKER" in os.environ:
    gc.disable()  # until the imports of all tests are done
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # Tests run in parallel.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")  # It would look for pip, after which torch.compile fails.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import accelerate.utils.memory
import datasets
import huggingface_hub
import hypothesis
import pytest
import torch
import transformers
from datasets import Dataset, Features, Image, List, Value
from local_hub import LocalHub
from pictures import picture
from tiny_models import TEXT, VISION

from modeling_vitp.data.layouts import LAYOUTS
from modeling_vitp.instructions import answer_prior
from modeling_vitp.instructions.schemas import SCHEMAS
from modeling_vitp.pretraining.loading import build_model, build_tokenizer
from modeling_vitp.probing.heads import fit_nonlinear
from modeling_vitp.tasks import TASKS
from modeling_vitp.tasks.segmentation import probe as segmentation_probe
from modeling_vitp.training import results

hypothesis.settings.register_profile("same_examples", derandomize=True)
hypothesis.settings.load_profile("same_examples")
pytest.register_assert_rewrite("annotated_images", "internvl_checkpoints", "sample_rows", "training_run")


def pytest_collection_finish():
    """Exclude objects of the imports from garbage collection, which shortens the suite by 14%."""
    gc.collect()
    gc.freeze()
    gc.enable()
    # Each run of a trainer collects garbage, to free the memory of an accelerator.
    accelerate.utils.memory.gc = SimpleNamespace(collect=lambda: None)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(["How many trees are there? There are 12 trees in the top left quarter."], vocab_size=400)


@pytest.fixture
def model_and_processor(tokenizer):
    torch.manual_seed(0)
    return build_model(tokenizer, VISION, TEXT, {"max_patches": 6})


@pytest.fixture
def model(model_and_processor):
    return model_and_processor[0]


@pytest.fixture
def processor(model_and_processor):
    return model_and_processor[1]


@pytest.fixture
def forget_plugins():
    """Forget after a test the tasks, layouts and schemas that it registered."""
    tasks = dict(TASKS)
    layouts = dict(LAYOUTS)
    schemas = list(SCHEMAS)
    yield
    for registry, before in ((TASKS, tasks), (LAYOUTS, layouts)):
        registry.clear()
        registry.update(before)
    SCHEMAS[:] = schemas
    for name in list(sys.modules):
        if name.startswith("vitp_plugin_"):
            del sys.modules[name]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Start a local Hub and connect the clients of this process to it, without a token.

    Settings that are read from `HF_ENDPOINT` and similar variables at import are patched for one test. The environment
    of a new process is `hub.environment(folder)`.
    """
    hub = LocalHub()
    constants, home = huggingface_hub.constants, tmp_path / "home"
    for module, name, value in [
        (constants, "ENDPOINT", hub.url),
        (constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
        (constants, "HF_HUB_OFFLINE", False),
        (constants, "HF_HUB_DISABLE_XET", True),
        (constants, "HF_HUB_CACHE", str(home / "hub")),
        (constants, "HF_TOKEN_PATH", str(home / "token")),
        (constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens")),
        (huggingface_hub.hf_api.api, "endpoint", hub.url),
        (transformers.utils.hub, "_hf_api", None),
        (datasets.config, "HF_ENDPOINT", hub.url),
        (datasets.config, "HF_HUB_OFFLINE", False),
        (datasets.config, "HF_DATASETS_CACHE", str(home / "datasets")),
    ]:
        monkeypatch.setattr(module, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    hub.close()
    huggingface_hub.utils.close_session()
    assert hub.errors == []


@pytest.fixture
def quick_probe(monkeypatch):
    """Fit nonlinear probes of segmentation in five steps, for tests that do not compare their scores."""
    monkeypatch.setattr(segmentation_probe, "fit_nonlinear", functools.partial(fit_nonlinear, steps=5))


@pytest.fixture
def quick_prior(monkeypatch):
    """Train models of the answer prior for five steps, for tests that do not compare its figures."""
    monkeypatch.setattr(answer_prior, "STEPS", 5)


@pytest.fixture
def no_loss_picture(monkeypatch):
    """Do not draw the losses at the end of a run, which takes longer than the training of a tiny model."""
    monkeypatch.setattr(results, "draw_losses", lambda *args: None)


@pytest.fixture
def pauses(monkeypatch):
    """Replace `time.sleep` and return the list of requested seconds."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def logged_in(hub, monkeypatch):
    """Set the token of the user in the environment and return it."""
    token = hub.token()
    monkeypatch.setenv("HF_TOKEN", token)
    return token


@pytest.fixture
def data_folder(tmp_path):
    """Write training rows as Parquet and return the folder."""
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3 trees"}]
    rows = [{"images": [picture(60, 56, seed)], "messages": messages} for seed in range(4)]
    part = List({"role": Value("string"), "content": Value("string")})
    dataset = Dataset.from_list(rows, features=Features({"images": List(Image()), "messages": part}))
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        dataset.to_parquet(tmp_path / "data" / f"{split}.parquet")
    return tmp_path / "data"
