"""What the Space takes from a visitor, at most; each limit with its reason.

A visitor names models and sends images, so both are checked before anything is made of them. Numbers are meant for the
hardware that the Hub gives to everyone, 2 cores and 16 GB, and leave room for every model that this package trains.
"""

import os
from pathlib import Path

SECONDS = 30.0
"""For an answer, waiting in line not counted: a model that computes for longer keeps all others from theirs."""
WAITING = 40
"""Visitors who wait for their turn; at a second or two for each, more would wait in vain."""
LOADING = 3
"""Models of visitors that are being loaded at once: each takes a share of network, memory and a core."""
SESSIONS = 100
"""Of pages and programs that are kept, those of the longest ago are forgotten; Gradio's own limit is 10,000, and each
keeps a copy of every component that it was shown, 0.6 MB and more."""
KEPT_MODELS = 6
"""That stay in memory, so that two visitors do not load theirs in turns; together in a quarter of it, see below."""
MAX_GB = 4.0
"""Of weights that are downloaded because a visitor typed an id: minutes, and the disk of a Space."""
JSON_BYTES = 40_000_000
"""Of a configuration or tokenizer: the largest vocabularies take 35 MB."""
CONFIG_BYTES = 1_000_000
"""Of `config.json`, which is read before anything else is known of a model."""
ENTRIES = 32_768
"""Of a list or mapping in a configuration: ImageNet-21k has 21,843 classes."""
PATCHES_A_SIDE = 128
"""Of an image at the model's own size: attention grows with the fourth power, at 128 it is 1 GB for a head."""
SOURCE_PIXELS = 64_000_000
"""Of an image that is decoded whole (PNG, JPEG, WebP): 256 MB in RGBA. GeoTIFF is read reduced and may be larger."""
BLOCK_BYTES = 256_000_000
"""Of one strip or tile of a TIFF, which is decoded at once, and of a DICOM data set that is deflated."""
BAND_VALUES = 3 * 1024**2
"""Of an image for a model of other bands than red, green and blue: floats, of which the last images are kept."""

JPEG_2000_BYTES = 1_500_000_000
"""Of all bands of a JPEG 2000, which are decoded in 32 bits: 10,980 pixels a side in red, green and blue, as Sentinel-2
has them."""
NIFTI_HEADER_BYTES = 1_000_000
"""Of what comes before the values of a NIfTI volume, and is read as a whole before anything is known of it."""
VOLUME_BYTES = 512_000_000
"""Of a NIfTI volume when it is unpacked, on the disk: a CT of 1,000 slices."""

# Numbers of a configuration by the end of their name: the smallest and the largest, the first that fits counts.
NUMBERS: tuple[tuple[str, int, int], ...] = (
    (
        r"(token_id|token_index|sliding_window|rope_theta)$",
        -(2**63),
        2**63,
    ),  # nothing is made of it
    (r"position_embeddings$", -1, 2**24),  # some make a number of each; Llama 4 has 10 million
    (r"image_seq_length$", 1, 4096),  # so many tokens are made of a tile
    (r"(seq_length|max_length|_pixels|_steps)$", -(2**63), 2**63),
    (r"(layers|layer|depths?|blocks|stages|levels|points|groups)$", -128, 128),  # a module, or a loop, for each
    (r"heads$", 1, 128),
    (r"patch_size$", 4, 64),  # at 1, an image of 448 pixels has 200,704 patches; 192 takes images of 9,216 pixels
    (r"(image_size|crop_size|height|width|_edge)$", 1, 2048),
    (r"(max|min)_patches$", 1, 40),  # tiles of an image; InternVL takes 12, and 40 for text
    (r"(_samples|_candidates)$", 0, 1_000_000),  # boxes that are drawn in training or kept
    (r"vocab_size$", 1, 400_000),  # Gemma has 262,144
    (r"(intermediate_size|mlp_dim|ffn_dim)$", 1, 65_536),
    (r"(hidden_size|_dim|_size|channels)$", 0, 16_384),  # widths: InternViT-6B has 3,200, a language model of 70B 8,192
    (r"", -(2**31), 65_536),  # whatever else there is
)


def memory() -> int:
    """Bytes that are there for this process: of the machine, or of the container if that has less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup", name)
        text = path.read_text().strip() if path.is_file() and os.access(path, os.R_OK) else ""
        found += [int(text)] if text.isdigit() else []
    return min(found)


def model_bytes() -> int:
    """Bytes that the weights of one model may take: half of what is there, so that a second one can be beside it."""
    return memory() // 2


def kept_bytes() -> int:
    """Bytes that the models of visitors may keep once their answers are given, beside the next one that is opened."""
    return memory() // 4
