"""A checkpoint for red, green and blue as one for other bands."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..bands import FIRST_CONVOLUTIONS, spread_config, spread_kernel
from .reading import DTYPES, Checkpoint
from .tensor_files import TensorBytes


@dataclass(frozen=True)
class ChangedTensor(TensorBytes):
    """What takes the place of a tensor in a file."""

    content: bytes

    def read(self) -> Iterator[bytes]:
        yield self.content


def read_by(checkpoint: Checkpoint, input_spec: dict) -> None:
    """Has images read by an input spec. If it names bands, weights for red, green and blue are spread over them, see
    [`~modeling_vitp.spread_bands`], and so are mean and standard deviation.

    Raises:
        ValueError: if the checkpoint is for other bands.
    """
    checkpoint.image_processor = checkpoint.image_processor.with_input_spec(input_spec)
    if checkpoint.processor is not None:
        checkpoint.processor.image_processor = checkpoint.image_processor
    names = checkpoint.image_processor.band_names
    if names is None or not spread_config(checkpoint.config, names):
        return
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(tuple(f"{convolution}.weight" for convolution in FIRST_CONVOLUTIONS)):
            kernel = spread_kernel(loaded(tensor), names)
            content = kernel.contiguous().view(torch.uint8).numpy().tobytes()
            checkpoint.tensors[name] = ChangedTensor(
                tensor.path, tensor.start, tensor.dtype, tuple(kernel.shape), content
            )


def loaded(tensor: TensorBytes) -> torch.Tensor:
    content = bytearray()
    for chunk in tensor.read():
        content += chunk
    return torch.frombuffer(content, dtype=getattr(torch, DTYPES[tensor.dtype])).view(tensor.shape)
