"""Limits on what a visitor may send or name, with their reasons.

Models and images of visitors are checked before they are opened. The limits fit the free hardware of the Hub, 2 cores
and 16 GB, and accept every model that this package trains.
"""

import os
from pathlib import Path

SECONDS = 30.0
"""Time limit of an answer, without the time in line. Other visitors wait while an answer is computed."""
ENDING = 2.0
"""Seconds that a stopped handler has to end before the next module of a model, before its thread is interrupted."""
WAITING = 40
"""Number of visitors in line. An answer takes a second or two, so more visitors would wait too long."""
LOADING = 3
"""Number of visitors' models that are loaded at once. Each needs network, memory and a core."""
SESSIONS = 100
"""Number of sessions that Gradio keeps; the oldest are dropped. Gradio's default is 10,000, and each session keeps a
copy of every component, 0.6 MB or more."""
KEPT_MODELS = 6
"""Number of visitors' models that stay in memory, so that two visitors do not reload theirs in turn. All of them and
the next one must also fit into `model_bytes`."""
MAX_GB = 4.0
"""Largest weights, in GB, that are downloaded for a visitor. More takes minutes and fills the disk of a Space."""
FILES = 100
"""Number of files that are downloaded for a visitor. A model has a file of weights for a gigabyte or more."""
TOKENIZER_FILE_BYTES = 40_000_000
"""Largest `tokenizer.json`. The largest vocabularies have 35 MB."""
CONFIG_BYTES = 2_000_000
"""Largest other JSON file, which is read before all other checks. The `tokenizer_config.json` of Gemma 3 has 1.2 MB."""
HEADER_BYTES = 10_000_000
"""Largest header of a safetensors file. A tensor takes 150 bytes, and a model has at most some 10,000."""
MISSING_WEIGHTS = 10_000_000
"""Number of values of a model that its files may lack before it is built: 40 MB. The names are compared later."""
MODULES = 10_000
"""Number of modules of a model, which is built before its weights are read. A language model of 70B has 1,300."""
ENTRIES = 32_768
"""Number of entries of a list or mapping in a configuration. ImageNet-21k has 21,843 classes."""
STRING = 1_000
"""Number of characters of a string in a configuration, and of a token. An image token is repeated 10,000 times."""
PATCHES_A_SIDE = 128
"""Number of patches a side at the model's own image size. It bounds the activations of all layers."""
ATTENTION_BYTES = 3_000_000_000
"""Size of the attention of one layer, in all heads and tiles, of which two copies exist at a time. It grows with the
fourth power of the side: 128 patches take 1 GB a head. InternVL3-1B takes 2.5 GB for a pair of images of 13 tiles."""
MAP_CLASSES = 400
"""Number of classes of a class map, which has a value for each class and pixel: 1.7 GB at 1024 pixels a side."""
QUESTION = 2_000
"""Number of characters of a question."""
TOKENIZER_STEPS = 10_000
"""Size of all steps of a tokenizer except vocabulary and merges, as JSON. Those of Llama 3 have 1,500 characters. Steps
can add text, and each step runs for each text."""
TOKENS = 1_000_000
"""Number of entries of a vocabulary, or of merges. Gemma has 262,144 tokens and 580,604 merges."""
TOKENS_OF_QUESTION = 100_000
"""Number of tokens of a question. Normalization makes up to 18 characters of one, and each byte may be a token."""
TOKENIZER_SECONDS = 20.0
"""Time limit for trying a tokenizer in a process of its own, which yields to answers. 262,000 tokens take 1.5 seconds
of a core."""
TOKENIZER_BYTES = 2_000_000_000
"""Memory of that process. 262,000 tokens take 0.4 GB."""
SOURCE_PIXELS = 64_000_000
"""Number of pixels of a PNG, JPEG or WebP, which is decoded whole: 256 MB in RGBA. GeoTIFF is read at reduced size and
may be larger."""
DEEP_PIXELS = 4_000_000
"""Number of pixels of a 16-bit PNG with transparency. GDAL reduces 4 million in a second, and 64 million in minutes."""
SIDE = 2_048
"""Number of pixels of the longer side of an image that was opened."""
SCENE_PIXELS = 2_000_000_000
"""Number of pixels of a GeoTIFF that are decoded for one view, in about 10 seconds that cannot be interrupted. Scenes
with overviews may have any size."""
BLOCK_BYTES = 256_000_000
"""Size of one strip or tile of a TIFF, which is decoded at once, and of an inflated DICOM data set."""
BAND_VALUES = 3 * 1024**2
"""Number of float values of an image with other bands than RGB. The last images are kept in memory."""
JPEG_2000_BYTES = 1_500_000_000
"""Size of all bands of a JPEG 2000, decoded in 32 bits. It accepts Sentinel-2 tiles, 10,980 pixels a side in RGB."""
NIFTI_HEADER_BYTES = 1_000_000
"""Size of the header of a NIfTI volume, which is read whole."""
VOLUME_BYTES = 512_000_000
"""Size of an unpacked NIfTI volume on disk. It accepts a CT of 1,000 slices."""

# Smallest and largest value of the numbers in a configuration, by the end of their key. The first match applies.
NUMBERS: tuple[tuple[str, int, int], ...] = (
    (r"(token_id|token_index|sliding_window|rope_theta)$", -(2**63), 2**63),  # no memory depends on them
    (r"position_embeddings$", -1, 2**24),  # some models allocate a number for each; Llama 4 has 10 million
    (r"image_seq_length$", 1, 4096),  # tokens of a tile
    (r"(seq_length|max_length|_pixels|_steps)$", -(2**63), 2**63),
    (r"(layers|layer|depths?|blocks|stages|levels|points|groups)$", -128, 128),  # each is a module or a loop
    (r"heads$", 1, 128),
    (r"patch_size$", 4, 64),  # at 1, an image of 448 pixels has 200,704 patches; 192 takes images of 9,216 pixels
    (r"(image_size|crop_size|pad_size|^size|height|width|_edge)$", 1, 2048),
    (r"(divisor|multiple)$", 1, 128),  # sides of images are padded to a multiple of it
    (r"(max|min)_patches$", 1, 40),  # tiles of an image; InternVL uses 12, and 40 for text
    (r"(_samples|_candidates)$", 0, 1_000_000),  # boxes that are sampled in training or kept
    (r"vocab_size$", 1, 400_000),  # Gemma has 262,144
    (r"(intermediate_size|mlp_dim|ffn_dim)$", 1, 65_536),
    (r"(hidden_size|_dim|_size|channels)$", 0, 16_384),  # InternViT-6B has 3,200, a 70B language model 8,192
    (r"", -(2**31), 65_536),  # all other numbers
)


def memory() -> int:
    """Return the memory of the machine, or of the container if it has less, in bytes."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup", name)
        if not path.is_file() or not os.access(path, os.R_OK):
            continue
        text = path.read_text().strip()
        if text.isdigit():  # A container without a limit says "max".
            sizes.append(int(text))
    return min(sizes)


def used() -> int:
    """Return the memory that this process uses, in bytes; 0 where Linux does not tell."""
    path = Path("/proc/self/statm")
    if not path.is_file():
        return 0
    num_pages = int(path.read_text().split()[1])
    return num_pages * os.sysconf("SC_PAGE_SIZE")


def model_bytes() -> int:
    """Return the largest size of visitors' models in memory: half of it. The rest is for the app and its answers."""
    return memory() // 2
