"""Images that are named by URL are not fetched, and where that is asked for, within limits."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from pictures import picture
from sample_rows import encoded_image

from modeling_vitp import ViTPDataCollator
from modeling_vitp.images import reading
from modeling_vitp.instructions.lengths import SampleLength
from modeling_vitp.instructions.mixture_file import Source
from modeling_vitp.instructions.rows import image_size, load_images
from modeling_vitp.instructions.sources import read_source

PNG = encoded_image(picture(30, 20))


@pytest.fixture
def server():
    """Serves a picture, one without end, one that comes byte by byte, and one that is elsewhere; counts requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            if self.path == "/none":
                return self.send_error(404)
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                return self.end_headers()
            self.send_response(200)
            self.end_headers()
            try:
                while self.path == "/endless":
                    self.wfile.write(b"x" * 4096)
                while self.path == "/slow":
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    threading.Event().wait(0.05)
                self.wfile.write(PNG)
            except OSError:
                pass  # the client has gone

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.daemon_threads = [], True
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def asked_for(monkeypatch):
    monkeypatch.setenv(reading.FETCH_VARIABLE, "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def rows_of(url):
    part = {"type": "image"}
    answer = {"role": "assistant", "content": "3"}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "How many?"}]}, answer]
    return [
        {"images": [url], "messages": messages},
        {"image": {"path": url, "bytes": None}, "messages": messages},
        *(
            {"images": [], "messages": [{"role": "user", "content": [odd, {"type": "text", "text": "?"}]}, answer]}
            for odd in (
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "image", "url": url},
                {"type": "image", "image": url},
            )
        ),
    ]


@pytest.mark.parametrize("offline", [False, True])
def test_nothing_is_fetched_that_is_not_asked_for(server, processor, monkeypatch, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    if offline:
        monkeypatch.setenv(reading.FETCH_VARIABLE, "1")
    collator = ViTPDataCollator(processor)
    for row in rows_of(f"{server.url}/a.png"):
        with pytest.raises(ValueError, match="is a URL, |names an image in a part of its own"):
            collator([row])
        SampleLength.of(collator)(row)
    assert server.asked == []


@pytest.mark.parametrize("path", ["file:///etc/passwd", "ftp://x/a.png", "s3://b/a.png", "zip://a.png::http://x/a.zip"])
def test_only_the_web_is_fetched_from(asked_for, path):
    with pytest.raises(ValueError, match="not on the web"):
        load_images({"images": [path]})


def test_what_is_asked_for_is_fetched(server, asked_for, processor):
    url = f"{server.url}/a.png"
    (image,) = load_images({"images": [url]})
    assert image.tobytes() == picture(30, 20).tobytes()
    assert image_size(url) == (20, 30)
    for row in rows_of(url)[:2]:
        assert "pixel_values" in ViTPDataCollator(processor)([row])


def test_fetching_has_an_end(server, asked_for, monkeypatch):
    monkeypatch.setattr(reading, "FETCH_SECONDS", 1)
    monkeypatch.setattr(reading, "FETCH_BYTES", 3 << 20)
    for name, said in (("endless", "more than 3 MiB"), ("slow", "after 1 s"), ("none", "404"), ("moved", "fetched")):
        start = time.monotonic()
        with pytest.raises(ValueError, match=f"{server.url}/{name}.*{said}"):
            load_images({"images": [f"{server.url}/{name}"]})
        assert time.monotonic() - start < 5
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/a.png"
        with pytest.raises(ValueError, match=rf"{url}.*after 1 s|{url} cannot be fetched"):
            load_images({"images": [url]})


@pytest.mark.parametrize("streaming", [False, True])
def test_parts_that_name_an_image_are_errors_of_their_rows(tmp_path, streaming):
    rows = [{"conversations": row["messages"]} for row in rows_of("https://example.org/a.png")[2:]]
    rows += [{"image": "hf://datasets/a/b/c.png", "conversations": rows_of("")[0]["messages"]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = Source("s", annotation=str(tmp_path / "a.jsonl"), streaming=streaming, rows=4)
    errors = [row["error"] for row in read_source(source)]
    assert all("message 0 names an image in a part of its own" in error for error in errors[:3])
    assert "neither a path nor a URL of the web" in errors[3]
