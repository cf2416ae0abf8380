"""Images that data name by URL: not fetched unless that is asked for, and then within limits of size and time."""

import os
import re
import time
from threading import Thread

import httpx2
import huggingface_hub

VARIABLE = "VITP_FETCH_IMAGES"  # of the environment, so that the workers of a loader know it too
MOST_BYTES, MOST_SECONDS = 32 << 20, 20  # of one image
IS_URL = re.compile(r"[a-z][a-z0-9+.-]+:/+|[^/]*::[a-z]", re.IGNORECASE)
OF_THE_WEB = re.compile(r"https?://", re.IGNORECASE)


def is_url(path: str) -> bool:
    """Whether a path is none on this machine: it has a scheme, or a chain of them as `fsspec` knows it."""
    return bool(IS_URL.match(path)) and not os.path.exists(path)


def check_asked_for(url: str) -> None:
    """Raises a `ValueError` unless images may be fetched from this URL."""
    if not OF_THE_WEB.match(url):
        raise ValueError(f"{url[:200]} is no path of a file, and not on the web (http, https): download the image.")
    if os.environ.get(VARIABLE, "0") in ("", "0"):
        raise ValueError(
            f"{url[:200]} is a URL, which is not fetched unless {VARIABLE}=1 is in the environment. Better download "
            "the images once, and name the files."
        )
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError(f"{url[:200]} is a URL, and HF_HUB_OFFLINE is set: unset it to fetch the image.")


def fetch(url: str) -> bytes:
    """What lies at a URL.

    Raises:
        ValueError: if that is not asked for, does not answer as it should, is larger than `MOST_BYTES`, or is not there
            after `MOST_SECONDS`, whatever has come by then.
    """
    check_asked_for(url)
    found: list[bytes | Exception] = []
    # A thread of its own, because the client's timeouts are for each piece and not for the whole.
    reader = Thread(target=lambda: found.append(read(url)), daemon=True)
    reader.start()
    reader.join(MOST_SECONDS)
    if not found:
        raise ValueError(f"{url[:200]} was not there after {MOST_SECONDS} s.")
    if isinstance(found[0], Exception):
        raise ValueError(f"{url[:200]} cannot be fetched: {' '.join(str(found[0]).split())}") from found[0]
    return found[0]


def read(url: str) -> bytes | Exception:
    content, start = bytearray(), time.monotonic()
    try:
        options = {"follow_redirects": True, "timeout": MOST_SECONDS, "headers": {"Accept-Encoding": "identity"}}
        with httpx2.stream("GET", url, **options) as response:
            response.raise_for_status()
            for piece in response.iter_raw():
                content += piece
                if len(content) > MOST_BYTES:
                    return ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
                if time.monotonic() > start + MOST_SECONDS:
                    return ValueError(f"it was not there after {MOST_SECONDS} s")
    except Exception as error:  # for the thread that waits
        return error
    return bytes(content)
