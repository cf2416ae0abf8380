"""Export of the backbone and of the models of all tasks as `torch.export` programs and as ONNX."""

import builtins
import inspect
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch import nn
from torch._decomp import decomposition_table
from torch.export import Dim, ExportedProgram
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel

from .. import detection_boxes, modeling_vitp_detection
from ..auto.registry import MODELS, find_model
from ..image_processing_vitp import ViTPImageProcessor
from ..modeling_vitp import LANGUAGE_MODELS, VISION_MODELS, ViTPVisionModel
from ..modeling_vitp_backbone import open_vit
from ..modeling_vitp_detection import ViTPForObjectDetection, ViTPForOrientedObjectDetection
from ..modeling_vitp_multi_scale import BACKBONES
from ..opening import naming, read_config_fields, without_remote_code
from ..rotated_boxes import align_in_image
from ..vision_parts import cuts_images, vision_part
from ..vision_towers import TOWERS, pair

TOLERANCE = 1e-3
SHARE_OF_DETECTIONS = 0.9
MULTI_SCALE_STEP = 32  # pixels: models with a neck pad their images to multiples of it


class FeaturesDiffer(RuntimeError):
    """Error raised if the outputs of the graph differ from those of the model."""

    status = 1  # the exit status of a command


class Graph(nn.Module):
    """Model as a function of images alone, which returns the tensors named in `outputs`.

    Args:
        model: model of a registered type with `graph_outputs`.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.outputs = find_model(model.config.model_type).graph_outputs
        self.inputs = [name for name in inspect.signature(model.forward).parameters if name.startswith("pixel_values")]
        vit_config = getattr(model.config, "backbone_config", model.config)
        has_neck = vit_config.model_type in BACKBONES
        self.step = (MULTI_SCALE_STEP, MULTI_SCALE_STEP) if has_neck else pair(vit_config.patch_size)
        self.image_size = pair(vit_config.image_size)
        self.num_channels = vit_config.num_channels
        self.tower = TOWERS.get(model.config.model_type)  # `None` for the models of tasks
        # A detector runs on one image, because proposals of several images have no common number, of at least three
        # steps, because its coarsest map, at stride 64, needs two cells.
        self.is_detector = isinstance(model, ViTPForObjectDetection)
        self.min_steps = 3 if self.is_detector else 2

    def forward(self, *pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.is_detector:
            outputs = detect(self.model, *pixel_values)
        elif self.tower is not None:
            outputs = self.tower.run(self.model, *pixel_values)
        else:
            outputs = self.model(*pixel_values)
        return tuple(outputs[name] for name in self.outputs)


def detect(model: ViTPForObjectDetection, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the detections of one image as [`ViTPForObjectDetection`] does, without a threshold of the score.

    Oriented boxes are returned before non-maximum suppression, which ONNX does not have for them.
    """
    sizes = torch.tensor([pixel_values.shape[-2:]], dtype=torch.float32, device=pixel_values.device)
    feature_maps = model.run_backbone(pixel_values).feature_maps
    view = model.view(feature_maps)
    (proposals,) = model.propose_by_all([view], sizes)
    image_indices = torch.zeros_like(proposals[:, 0], dtype=torch.long)
    scored_boxes, probabilities = model.score(view, proposals, image_indices, sizes)
    if isinstance(model, ViTPForOrientedObjectDetection):
        scores = probabilities[:, :-1]  # without the background
        return {"scores": scores[None], "boxes": scored_boxes[None]}
    with mock.patch.object(model.config, "score_threshold", 0.0):
        boxes, scores, labels = model.choose(scored_boxes, probabilities)
    detections = {"scores": scores, "labels": labels}
    detections |= model.write_boxes(boxes, sizes[0])
    image_indices = torch.zeros_like(labels)
    detections |= model.further_detections([view], boxes, image_indices, labels, sizes)
    return {name: tensor[None] for name, tensor in detections.items()}


# As one operator, because the loop over the labels of the boxes cannot be traced.
nms_by_label = torch.library.custom_op("modeling_vitp::nms_by_label", detection_boxes.nms_by_label, mutates_args=())


@nms_by_label.register_fake
def _(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, labels: torch.Tensor) -> torch.Tensor:
    return labels.new_empty(torch.library.get_ctx().new_dynamic_size())


def onnx_nms_by_label(boxes, scores, iou_threshold: float, labels):
    """Build [`nms_by_label`] of ONNX operators: each label is a class of NonMaxSuppression, others score -1 in it."""
    from onnxscript import opset18 as op

    num_classes = op.Add(op.ReduceMax(labels, keepdims=0), 1)
    classes = op.Unsqueeze(op.Range(0, num_classes, 1), [1])
    is_of_class = op.Equal(classes, labels)
    scores_of_class = op.Where(is_of_class, scores, -1.0)
    batch_of_boxes = op.Unsqueeze(boxes, [0])
    batch_of_scores = op.Unsqueeze(scores_of_class, [0])
    most_boxes = 2**62
    selections = op.NonMaxSuppression(batch_of_boxes, batch_of_scores, most_boxes, iou_threshold, -0.5)
    box_indices = op.Gather(selections, 2, axis=1)
    _, order = op.TopK(op.Gather(scores, box_indices), op.Shape(box_indices))
    return op.Gather(box_indices, order)


def shape_samples(features: torch.Tensor, grid: torch.Tensor, *options) -> torch.Tensor:
    """Return an empty tensor of the shape of `grid_sampler_2d`, without the hundred operators of its own rule."""
    return features.new_empty(*features.shape[:2], *grid.shape[1:3])


SHAPE_RULES = {torch.ops.aten.grid_sampler_2d.default: shape_samples}


def pool_adaptively(features: torch.Tensor, cells: int) -> torch.Tensor:
    """Pool maps to `(…, cells, cells)` as `adaptive_avg_pool2d` does, by a matrix product for each direction."""
    for _ in range(2):
        side = features.shape[-2]
        positions = torch.arange(side, device=features.device)
        cell_indices = torch.arange(cells, device=features.device)[:, None]
        starts = cell_indices * side // cells
        ends = ((cell_indices + 1) * side + cells - 1) // cells
        is_inside = (positions >= starts) & (positions < ends)
        weights = is_inside / is_inside.sum(1, keepdim=True)
        features = (weights @ features).mT  # the other direction is pooled next
    return features


@contextmanager
def any_size() -> Iterator[None]:
    """Replace the functions that fix the size of the images when they are traced by ones with the same results."""

    def length(values) -> int | torch.SymInt:  # Python's own returns an integer
        return values.shape[0] if isinstance(values, torch.Tensor) else builtins.len(values)

    def chunk(values: torch.Tensor, chunks: int, dim: int = 0) -> tuple[torch.Tensor, ...]:  # of equal lengths
        return values.unflatten(dim, (chunks, -1)).unbind(dim)

    def roi_align_rotated(features, boxes, image_indices, output_size: int, spatial_scale: float) -> torch.Tensor:
        return align_in_image(features, boxes, output_size, spatial_scale)

    detectors = mock.patch.multiple(
        modeling_vitp_detection,
        create=True,
        len=length,
        min=torch.sym_min,
        nms_by_label=nms_by_label,
        roi_align_rotated=roi_align_rotated,
    )
    # At their own size the ViT does not interpolate the position embeddings, and a graph traced without interpolation
    # could not be used at other sizes. When tracing, transformers interpolates at every size; at their own size this
    # does not change them.
    with (
        mock.patch("torch.jit.is_tracing", return_value=True),
        mock.patch("torch.nn.functional.adaptive_avg_pool2d", pool_adaptively),
        mock.patch.object(torch.Tensor, "chunk", chunk),
        mock.patch.object(detection_boxes, "len", length, create=True),
        detectors,
        mock.patch.dict(decomposition_table, SHAPE_RULES),
        torch._dynamo.config.patch(fake_tensor_cache_enabled=False),  # It costs more than it saves.
    ):
        yield


def open_model(name: str | Path) -> PreTrainedModel:
    """Load an exported backbone or a model of a task, a folder or Hub id, in float32 and in evaluation mode.

    Raises:
        ValueError: if the folder has a model type that cannot be exported.
        OSError: if the model is missing.
    """
    fields = read_config_fields(name)
    model_type = fields.get("model_type")
    if model_type in VISION_MODELS | LANGUAGE_MODELS.keys():  # loading the latter raises with advice
        return ViTPVisionModel.from_pretrained(name, dtype=torch.float32).eval()
    part = vision_part(fields)
    if part is not None:
        model_type = part.model_type
    if model_type not in MODELS or not MODELS[model_type].graph_outputs:
        types = sorted(VISION_MODELS | {entry.model_type for entry in MODELS.values() if entry.graph_outputs})
        raise ValueError(
            f"{name} is of type {model_type!r}, which cannot be exported. Expected one of {', '.join(types)}. Create a "
            "backbone with `vitp export_backbone CHECKPOINT FOLDER`."
        )
    if model_type in TOWERS:
        return open_vit(name).eval()
    auto_class = getattr(transformers, MODELS[model_type].auto_class)
    return without_remote_code(auto_class.from_pretrained, name, dtype=torch.float32).eval()


def export_program(model: PreTrainedModel | str | Path) -> ExportedProgram:
    """Return a model as a `torch.export` program for images of any size.

    Height and width are multiples of 32 pixels, or of a patch for a backbone or a classifier, and at least two of them.

    Args:
        model: ViT or model of a task in evaluation mode, or its folder or Hub id.

    Returns:
        A program with input `pixel_values`, float32 `(batch_size, channels, height, width)`; for change detection
        `pixel_values_before` and `pixel_values_after`. The outputs of a backbone are `last_hidden_state`,
        `(batch_size, 1 + patches, hidden_size)`, and `pooler_output`, `(batch_size, hidden_size)`, the mean of the
        patch tokens. Those of the other models are in the table of the page `recipes/export_onnx.md`.

    Raises:
        ValueError: if the folder has a model type that cannot be exported.
    """
    if isinstance(model, (str, Path)):
        model = open_model(model)
    graph = Graph(model).eval()
    height, width = graph.step
    rows = Dim("rows", min=graph.min_steps)
    columns = Dim("columns", min=graph.min_steps)
    dynamic_dims = {2: height * rows, 3: width * columns}
    batch_size = 1
    if not graph.is_detector:
        dynamic_dims[0] = Dim("batch")
        batch_size = 2  # 1 would be taken for a constant
    shape = (batch_size, graph.num_channels, 5 * height, 7 * width)
    examples = tuple(torch.zeros(shape) for _ in graph.inputs)  # one tensor twice would be one input
    dynamic_shapes = {"pixel_values": tuple(dynamic_dims for _ in examples)}
    with torch.no_grad(), any_size():
        return torch.export.export(graph, examples, dynamic_shapes=dynamic_shapes)


def describe_inputs(name: str | Path, model: PreTrainedModel) -> dict[str, str]:
    """Return the metadata of a graph: settings of the image processor and names of the classes, each as JSON."""
    config = model.config
    with naming(name, BaseImageProcessor):
        # For timm, transformers makes its transform, without the input spec.
        if config.model_type == "timm_wrapper" or cuts_images(name):
            height, width = pair(config.image_size)
            image_processor = ViTPImageProcessor.from_backbone(name, size={"height": height, "width": width})
        else:
            image_processor = without_remote_code(AutoImageProcessor.from_pretrained, name)
    settings = image_processor.to_dict()
    setting_names = ["image_mean", "image_std", "rescale_factor", "do_resize", "input_spec"]
    if settings.get("do_resize"):
        setting_names += ["size", "resample"]
    metadata = {"model_type": config.model_type}
    for setting_name in setting_names:
        metadata[setting_name] = settings.get(setting_name)
    config_names = []
    if config.model_type not in TOWERS:
        config_names += ["id2label", "problem_type"]
    if isinstance(model, ViTPForOrientedObjectDetection):  # left to do after the graph
        config_names += ["score_threshold", "nms_threshold", "max_detections"]
    for config_name in config_names:
        metadata[config_name] = getattr(config, config_name)
    return {key: json.dumps(value) for key, value in metadata.items() if value is not None}


def export_onnx(
    model: str | Path, file: str | Path, tolerance: float = TOLERANCE
) -> list[tuple[tuple[int, int, int], float]]:
    """Write a model as ONNX, for images of any size, after comparing its outputs with the model's.

    Inputs and outputs have the names and shapes of [`export_program`]. Weights over 2 GB, the limit of one file, are
    written to `FILE.data` beside it. The file's metadata has the settings of the image processor and the names of the
    classes.

    Args:
        model: folder or Hub id of an exported backbone or of a model of a task, with its image processor.
        file: file to write, in an existing folder. It does not change if an error occurs.
        tolerance: maximum difference of an output, in units of its standard deviation. For detections, see
            [`difference`].

    Returns:
        The compared sizes, `(batch_size, height, width)`, all of them different from the traced one, and the largest
        difference at each, in the unit of `tolerance`.

    Raises:
        ModuleNotFoundError: if the extra `onnx` is not installed.
        ValueError: if the file is a folder or its folder does not exist, or the model has a type that cannot be
            exported, or no image processor.
        FeaturesDiffer: if the difference is larger than `tolerance` at some size.
    """
    file = Path(file)
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"{file} cannot be written. Expected the path of a file in an existing folder.")
    import onnxruntime

    opened_model = open_model(model)
    metadata = describe_inputs(model, opened_model)
    graph = Graph(opened_model).eval()
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        temporary_file = Path(folder) / file.name
        write_onnx(opened_model, temporary_file, metadata, graph)
        session = onnxruntime.InferenceSession(temporary_file, providers=["CPUExecutionProvider"])
        differences = [(size, difference(graph, session, size)) for size in sizes_to_compare(graph)]
        del session  # it has the file open
        for size, largest_difference in differences:
            if not largest_difference <= tolerance:  # NaN is not
                raise FeaturesDiffer(
                    f"At {' x '.join(map(str, size))} (batch, height, width) the outputs of the graph differ from the "
                    f"model's by {largest_difference:.1e} standard deviations, expected at most {tolerance:.1e}. "
                    f"{file} was not written."
                )
        for path in Path(folder).iterdir():
            os.replace(path, file.parent / path.name)
    return differences


def write_onnx(model: PreTrainedModel, file: Path, metadata: dict[str, str], graph: Graph) -> None:
    """Write a model as ONNX, without comparing its outputs."""
    from onnxscript import ir, rewriter

    with (
        warnings.catch_warnings(action="ignore"),  # about torch's own code
        mock.patch.dict(decomposition_table, SHAPE_RULES),
        # It compares each node with all others, and no graph has its pattern.
        mock.patch.object(rewriter.rules.common.slice_split_rule, "try_rewrite", return_value=None),
    ):
        program = torch.onnx.export(
            export_program(model),
            input_names=graph.inputs,
            output_names=list(graph.outputs),
            custom_translation_table={torch.ops.modeling_vitp.nms_by_label.default: onnx_nms_by_label},
            dynamo=True,
            verbose=False,
        )
        ir.passes.common.ClearMetadataAndDocStringPass()(program.model)  # stack traces, with paths of this machine
        program.model.metadata_props.update(metadata)
        program.save(file)


def sizes_to_compare(graph: Graph) -> Iterator[tuple[int, int, int]]:
    """Yield batch size, height and width: near the position embeddings' size, and at smaller and larger sizes."""
    height, width = graph.step
    least_steps = graph.min_steps
    steps = max(graph.image_size[0] // height, least_steps)
    half_steps = max(steps // 2 + 1, least_steps)
    sizes_in_steps = [(1, steps, steps), (3, half_steps, steps + 3), (2, steps + 2, least_steps)]
    for batch_size, rows, columns in sizes_in_steps:
        if graph.is_detector:
            batch_size = 1
        yield batch_size, rows * height, columns * width


@torch.no_grad()
def difference(graph: Graph, session, size: tuple[int, int, int]) -> float:
    """Return the largest difference between outputs of model and graph on noise, in standard deviations.

    A detection is compared with the most similar one of the other side, and the tenth of them with the largest
    differences is left out, because rounding changes the order of equal scores and the choice between equal boxes.
    """
    batch_size, height, width = size
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(batch_size, graph.num_channels, height, width, generator=generator) for _ in graph.inputs]
    session_inputs = {name: image.numpy() for name, image in zip(graph.inputs, images)}
    session_outputs = session.run(list(graph.outputs), session_inputs)
    session_outputs = [torch.from_numpy(output).float() for output in session_outputs]
    model_outputs = [output.float() for output in graph(*images)]
    scales = [output.std(correction=0).clamp(min=1e-12) for output in model_outputs]
    if graph.is_detector:
        return difference_of_detections(session_outputs, model_outputs, scales)
    differences = []
    for session_output, model_output, scale in zip(session_outputs, model_outputs, scales):
        largest_difference = (session_output - model_output).abs().max()
        differences.append(largest_difference / scale)
    return torch.stack(differences).max().item()


def difference_of_detections(
    outputs: list[torch.Tensor],
    other_outputs: list[torch.Tensor],
    scales: list[torch.Tensor],
) -> float:
    """Return the difference that `SHARE_OF_DETECTIONS` of the detections have to the most similar of the others."""
    vectors = []
    for tensors in (outputs, other_outputs):
        scaled_tensors = [tensor.reshape(*tensor.shape[:2], -1) / scale for tensor, scale in zip(tensors, scales)]
        vectors.append(torch.cat(scaled_tensors, -1))
    detections, other_detections = vectors
    distances = torch.cdist(detections, other_detections, p=torch.inf)
    nearest_distances = torch.cat([distances.amin(1), distances.amin(2)], 1)
    return nearest_distances.quantile(SHARE_OF_DETECTIONS).item()
