"""Export of the backbone as a `torch.export` program and as ONNX."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from ..configuration_vitp import ViTPVisionConfig, patch_grid
from ..modeling_vitp import LANGUAGE_MODELS, VISION_MODELS, ViTPVisionModel
from ..opening import naming

OUTPUTS = ("last_hidden_state", "pooler_output")
TOLERANCE = 1e-3


class FeaturesDiffer(RuntimeError):
    """Error raised if the features of the graph differ from those of the model."""

    status = 1  # the exit status of a command


class Features(nn.Module):
    """ViT with its outputs as a tuple, in the order of `OUTPUTS`."""

    def __init__(self, backbone: ViTPVisionModel):
        super().__init__()
        self.backbone = backbone

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.backbone(pixel_values)
        return tuple(outputs[name] for name in OUTPUTS)


def open_backbone(name: str | Path) -> ViTPVisionModel:
    """Load an exported backbone, a folder or Hub id, in float32 and in evaluation mode.

    Raises:
        ValueError: if the folder has another model type.
        OSError: if the model is missing.
    """
    with naming(name, ViTPVisionConfig):
        model_type = ViTPVisionConfig.get_config_dict(name)[0].get("model_type")
    if model_type not in VISION_MODELS | LANGUAGE_MODELS.keys():  # loading the latter raises with advice
        raise ValueError(
            f"Expected an exported backbone, got {name} of type {model_type!r}. Create one with `vitp export_backbone "
            "CHECKPOINT FOLDER`. Segmentation and detection models cannot be exported for images of any size."
        )
    return ViTPVisionModel.from_pretrained(name, dtype=torch.float32).eval()


def export_program(backbone: ViTPVisionModel | str | Path) -> ExportedProgram:
    """Return the backbone as a `torch.export` program for any batch size, height and width (at least two patches).

    Args:
        backbone: ViT, or the folder or Hub id of an exported backbone.

    Returns:
        A program with input `pixel_values`, float32 `(batch_size, channels, height, width)`, of whole patches, and
        outputs `last_hidden_state`, `(batch_size, 1 + patches, hidden_size)`, and `pooler_output`,
        `(batch_size, hidden_size)`, the mean of the patch tokens.

    Raises:
        ValueError: if the folder has another model type.
    """
    if isinstance(backbone, (str, Path)):
        backbone = open_backbone(backbone)
    height, width = backbone.config.patch_size
    sides = {2: height * Dim("rows", min=2), 3: width * Dim("columns", min=2)}
    example = torch.zeros(2, backbone.config.num_channels, 5 * height, 7 * width)
    # At their own size the ViT does not interpolate the position embeddings, and a graph traced without interpolation
    # could not be used at other sizes. When tracing, transformers interpolates at every size; at their own size this
    # does not change them.
    with torch.no_grad(), mock.patch("torch.jit.is_tracing", return_value=True):
        return torch.export.export(
            Features(backbone).eval(), (example,), dynamic_shapes={"pixel_values": {0: Dim("batch"), **sides}}
        )


def export_onnx(
    backbone: str | Path, file: str | Path, tolerance: float = TOLERANCE
) -> list[tuple[tuple[int, int, int], float]]:
    """Write a backbone as ONNX, for any batch size, height and width, after comparing its features with the model's.

    Inputs and outputs have the names and shapes of [`export_program`]. Weights over 2 GB, the limit of one file, are
    written to `FILE.data` beside it.

    Args:
        backbone: folder or Hub id of an exported backbone.
        file: file to write, in an existing folder. It does not change if an error occurs.
        tolerance: maximum difference of a feature, in units of the features' standard deviation.

    Returns:
        The compared sizes, `(batch_size, height, width)`, all of them different from the traced one, and the largest
        difference at each, in the unit of `tolerance`.

    Raises:
        ModuleNotFoundError: if the extra `onnx` is not installed.
        ValueError: if the folder has another model type.
        IsADirectoryError: if the file is a folder.
        FileNotFoundError: if the file's folder does not exist.
        FeaturesDiffer: if the difference is larger than `tolerance` at some size.
    """
    file = Path(file)
    if file.is_dir():
        raise IsADirectoryError(21, "expected a file to write, got a folder", str(file))
    if not file.parent.is_dir():
        raise FileNotFoundError(2, "the folder of the output file does not exist", str(file.parent))
    import onnxruntime
    import onnxscript  # noqa: F401  (fails early; torch imports it after tracing)

    model = open_backbone(backbone)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        written = Path(folder) / file.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's own code
            program = torch.onnx.export(
                export_program(model),
                input_names=["pixel_values"],
                output_names=list(OUTPUTS),
                dynamo=True,
                verbose=False,
            )
            program.save(written)
        session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
        found = [(size, difference(model, session, size)) for size in sizes_to_compare(model)]
        del session
        for size, largest in found:
            if not largest <= tolerance:
                raise FeaturesDiffer(
                    f"At {' x '.join(map(str, size))} (batch, height, width) the features of the graph differ from the "
                    f"model's by {largest:.1e} standard deviations, expected at most {tolerance:.1e}. {file} was not "
                    "written."
                )
        for path in Path(folder).iterdir():
            os.replace(path, file.parent / path.name)
    return found


def sizes_to_compare(model: ViTPVisionModel) -> Iterator[tuple[int, int, int]]:
    """Yield batch size, height and width: at the position embeddings' size, and at smaller and larger sizes."""
    patch_height, patch_width = model.config.patch_size
    side = patch_grid(model.config)[0]
    for batch, rows, columns in ((1, side, side), (3, side // 2 + 1, side + 3), (2, side + 2, 2)):
        yield batch, rows * patch_height, columns * patch_width


@torch.no_grad()
def difference(model: ViTPVisionModel, session, size: tuple[int, int, int]) -> float:
    """Return the largest difference between outputs of model and graph on noise, in standard deviations."""
    batch, height, width = size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, model.config.num_channels, height, width, generator=generator)
    found = map(torch.from_numpy, session.run(list(OUTPUTS), {"pixel_values": pixels.numpy()}))
    wanted = Features(model)(pixels)
    return torch.stack([(one - other).abs().max() / other.std() for one, other in zip(found, wanted)]).max().item()
