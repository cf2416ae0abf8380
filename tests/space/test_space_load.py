"""Load test with fifty concurrent visitors, one of whom loads models and one of whom names hostile models.

    VITP_LOAD_SECONDS=120 pytest -n 0 -s -m slow tests/space/test_space_load.py

`VITP_LOAD_SECONDS` is the duration, 20 by default. The measurements are printed, with the load of other processes.
"""

import io
import itertools
import json
import os
import statistics
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch
from handlers import running_app
from loading import PACKED
from local_hub import LocalHub
from pictures import picture
from tiny_models import VISION

from modeling_vitp import ViTPVisionConfig, ViTPVisionModel, export_backbone

VISITORS, PAUSE = 50, 10.0  # PAUSE: seconds between an answer and the next question
SECONDS = float(os.environ.get("VITP_LOAD_SECONDS") or 20)
PADDING = {"strategy": {"Fixed": 10**10}, "direction": "Right", "pad_to_multiple_of": None}
PADDING |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
# Changes of config.json, and of tokenizer.json for a full model.
HOSTILE = {
    "layers": {"num_hidden_layers": 10**9},
    "heavy": {"num_hidden_layers": 128, "intermediate_size": 60_000},
    "padding": {"padding": PADDING},
}

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(tmp_path):
    """Return a Hub with valid and hostile models."""
    hub = LocalHub()
    torch.manual_seed(0)
    export_backbone(ViTPVisionModel(ViTPVisionConfig(**VISION, initializer_range=0.3)), tmp_path / "good")
    files = {path.name: path for path in (tmp_path / "good").iterdir() if path.suffix in (".json", ".safetensors")}
    for index in range(3):
        hub.create(f"tester/good{index}")
        hub.commit(f"tester/good{index}", files)
    full = {path.name: path for path in PACKED.iterdir()}
    for name, changes in HOSTILE.items():
        base, file = (full, "tokenizer.json") if name == "padding" else (files, "config.json")
        changed = json.loads(base[file].read_text()) | changes
        hub.create(f"tester/{name}")
        hub.commit(f"tester/{name}", base | {file: json.dumps(changed)})
    yield hub
    hub.close()


@pytest.fixture
def app(hub, tmp_path):
    """Start the app and return its address and process."""
    with running_app(tmp_path, hub.environment(tmp_path / "home")) as found:
        yield found


def cpu_seconds(process=psutil) -> float:
    """Return the CPU seconds of a process, or of the machine."""
    times = process.cpu_times()
    return times.user + times.system + getattr(times, "nice", 0.0)


class Visitor(threading.Thread):
    """Visitor that opens the page and repeatedly asks for the map of its own image.

    Args:
        names: backbones to ask for, in turn. Those of `HOSTILE` must be rejected with one line.
    """

    def __init__(self, url: str, index: int, folder: Path, names: list[str], ends: float):
        super().__init__(daemon=True)
        self.url, self.index, self.names, self.ends = url, index, names, ends
        self.image = folder / f"visitor_{index}.png"
        picture(120, 64 + index, index).save(self.image)
        self.pages, self.seconds, self.mistakes = [], [], []

    def run(self) -> None:
        time.sleep(PAUSE * self.index / VISITORS)
        with httpx.Client(base_url=self.url, timeout=60) as http:
            for name in itertools.cycle(self.names):
                if time.monotonic() > self.ends:
                    return
                try:
                    start = time.monotonic()
                    http.get("/").raise_for_status()
                    self.pages.append(time.monotonic() - start)
                    start = time.monotonic()
                    is_shown = self.ask(http, name)
                    self.seconds.append(time.monotonic() - start)
                    if is_shown != (name.partition("/")[2] not in HOSTILE):
                        self.mistakes.append(f"{name}: no answer for one that is good, or one for another")
                except Exception as error:  # reported by the main thread
                    self.mistakes.append(f"{name}: {error!r}")
                time.sleep(PAUSE)

    def ask(self, http: httpx.Client, name: str) -> bool:
        """Ask for a map, check the answer, and return whether it is a map and not an error of one line."""
        with self.image.open("rb") as file:
            path = http.post("/gradio_api/upload", files={"files": file}).json()[0]
        image = {"path": path, "meta": {"_type": "gradio.FileData"}}
        event = http.post("/gradio_api/call/v2/maps", json={"image": image, "backbone": name}).json()["event_id"]
        *_, kind, data = http.get(f"/gradio_api/call/v2/maps/{event}").text.strip().splitlines()
        answer = json.loads(data.removeprefix("data: "))
        if kind == "event: error":
            if not answer["error"] or "\n" in answer["error"]:
                self.mistakes.append(f"{name}: {answer}")
            return False
        with np.load(io.BytesIO(http.get(answer[2]["url"]).content)) as arrays:
            if arrays["image"] != self.image.name or arrays["backbones"].tolist() != [name]:
                self.mistakes.append(f"{name}: the answer of another")
        return True


def test_fifty_visitors_get_answers_without_memory_growth(app, tmp_path):
    url, process = app
    packed = ["quickstart"]
    Visitor(url, 0, tmp_path, packed, time.monotonic() + 1).run()
    ends = time.monotonic() + SECONDS
    names = {1: [f"tester/good{index}" for index in range(3)], 2: [f"tester/{name}" for name in HOSTILE]}
    visitors = [Visitor(url, index, tmp_path, names.get(index, packed), ends) for index in range(VISITORS)]
    start, busy, own, app_own = time.monotonic(), cpu_seconds(), time.process_time(), cpu_seconds(process)
    for visitor in visitors:
        visitor.start()
    grown = []
    while time.monotonic() < ends:
        time.sleep(SECONDS / 20)
        grown.append(process.memory_info().rss / 1e6)
    for visitor in visitors:
        visitor.join(120)
    own, app_own = time.process_time() - own, cpu_seconds(process) - app_own
    others = (cpu_seconds() - busy - own - app_own) / (time.monotonic() - start)
    seconds = sorted(value for visitor in visitors for value in visitor.seconds)
    mistakes = [mistake for visitor in visitors for mistake in visitor.mistakes]
    print(
        f"{len(seconds)} answers to {VISITORS} visitors in {SECONDS:g} s: median {statistics.median(seconds):.2f} s, "
        f"of ten the slowest from {seconds[len(seconds) * 9 // 10]:.2f} s on, the slowest {seconds[-1]:.2f} s; "
        f"hostile ones refused within {max(visitors[2].seconds):.2f} s; "
        f"a page opened within {max(max(one.pages) for one in visitors):.2f} s; "
        f"an answer takes {app_own / len(seconds):.2f} s of a core in the app and {own / len(seconds):.2f} s in its "
        f"visitor; others had {others:.1f} of {os.cpu_count()} cores; "
        f"memory in MB, twenty times: {', '.join(f'{value:.0f}' for value in grown)}"
    )
    assert mistakes == [] and process.poll() is None and all(visitor.seconds for visitor in visitors)
    assert app_own / len(seconds) * VISITORS / (PAUSE + 3) < os.cpu_count() / 2  # cores, with three seconds an answer
    assert statistics.median(seconds) < 2
    assert grown[-1] < grown[len(grown) // 2] * 1.1 + 50
