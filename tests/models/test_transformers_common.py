"""transformers' common tests on our models and processors; the test files are downloaded and cached by pytest."""

import importlib
import unittest
from types import SimpleNamespace

import pytest
import torch
import transformers_tests
from tiny_models import HEAD, adapter_config
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_BACKBONE_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from modeling_vitp import (
    ViTPAdapter,
    ViTPBackbone,
    ViTPBackboneConfig,
    ViTPChangeDetectionConfig,
    ViTPConfig,
    ViTPDetectionImageProcessor,
    ViTPFeaturePyramid,
    ViTPFeaturePyramidConfig,
    ViTPForChangeDetection,
    ViTPForConditionalGeneration,
    ViTPForImageClassification,
    ViTPForInstanceSegmentation,
    ViTPForObjectDetection,
    ViTPForOrientedObjectDetection,
    ViTPForSemanticSegmentation,
    ViTPImageClassificationConfig,
    ViTPImageProcessor,
    ViTPInstanceSegmentationConfig,
    ViTPModel,
    ViTPObjectDetectionConfig,
    ViTPOrientedObjectDetectionConfig,
    ViTPProcessor,
    ViTPSegmentationConfig,
    ViTPSegmentationImageProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")]
pytest.importorskip("parameterized", reason="transformers' tests need it: pip install -e '.[test]'")

VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": [64, 64],
    "patch_size": [16, 16],
}
TEXT = {
    "model_type": "qwen2",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
IMAGE_TOKEN_ID, IMAGE_TOKENS = 60, 4
SIZE = {"height": 20, "width": 20}


STAGES = {"test_config": "its stages are the maps at four strides, not the layers with the embeddings as stem"}
FOUR_BANDS = "an array of four bands is not taken for RGBA: it may as well be RGB and near infrared, so it is refused"
RGBA = {"test_call_numpy_4_channels": FOUR_BANDS, "test_convert_to_rgb_mixed_input_batch_2": FOUR_BANDS}
CONVOLUTION = {"test_model_get_set_embeddings": "a ViT's input embeddings are a convolution; InternVL's fail it too"}
FOUR_LAYERS = {"test_num_layers_is_small": "the adapter interacts four times, with one layer at least"}
MAPS = {"test_retain_grad_hidden_states_attentions": "the first output of a backbone is a tuple of maps"}
UPERNET = {"test_model_get_set_embeddings": "UPerNet has no input embeddings, transformers' own neither"}
DETECTIONS = {
    "test_model_get_set_embeddings": "a detector has no input embeddings",
    "test_can_load_ignoring_mismatched_shapes": "it makes numbers of all settings with _std in their names",
    "test_retain_grad_hidden_states_attentions": "without labels there are detections, which have no gradient",
}
# Tests that are left out, with the reason. Others skip themselves and state the reason in the output.
LEFT_OUT: dict[str, dict[str, str]] = {
    "language": {
        "test_generation_tester_mixin_inheritance": "its mixin is not distributed; test_modeling.py tests generation",
        **{
            f"test_model_rope_scaling_from_config_{kind}": "random ids have image tokens, without images"
            for kind in ("0_linear", "1_dynamic", "2_yarn")
        },
    },
    "vision": CONVOLUTION,
    "backbone": CONVOLUTION | MAPS,
    "adapter": CONVOLUTION | MAPS | FOUR_LAYERS,
    "pyramid": CONVOLUTION | MAPS,
    "classification": CONVOLUTION
    | {"test_can_load_ignoring_mismatched_shapes": "it waits for a RuntimeError; test_classification.py has both ways"},
    "segmentation": UPERNET | FOUR_LAYERS,
    "change": UPERNET
    | FOUR_LAYERS
    | {"test_retain_grad_hidden_states_attentions": "it gives states in pairs, through which the network does not go"},
    **dict.fromkeys(("boxes", "oriented boxes", "instances"), FOUR_LAYERS | DETECTIONS),
    "adapter as a backbone": STAGES,
    "pyramid as a backbone": STAGES,
    "processor": {
        "test_model_input_names": "position_ids and visual_token_indices, which are named too, come with VRL only",
    },
    "tiles": RGBA,
    "images and masks": RGBA,
    "images and objects": RGBA
    | {"test_post_process_test_mixin_inheritance": "what makes maps of outputs is DETR's, and of its outputs alone"},
}


@pytest.fixture(scope="session")
def common(request):
    """Modules of transformers' tests by name."""
    transformers_tests.open_package(transformers_tests.unpack(request.config.cache.mkdir("transformers_tests")))
    names = ("configuration", "modeling", "backbone", "processing", "image_processing")
    return SimpleNamespace(
        **{name: importlib.import_module(f"{transformers_tests.PACKAGE}.test_{name}_common") for name in names}
    )


class Inputs:
    """Configuration with inputs for it, with the attributes that transformers' mixins read."""

    batch_size, is_training, num_channels, image_size, patch_size = 3, True, 3, 64, 16
    hidden_size, num_attention_heads, num_masks, mask_length = 32, 4, 5, 16

    def __init__(self, config: PreTrainedConfig, num_hidden_layers: int = 2, seq_length: int = 17):
        self.config, self.num_hidden_layers, self.seq_length = config, num_hidden_layers, seq_length

    def get_config(self) -> PreTrainedConfig:
        return type(self.config).from_dict(self.config.to_dict())

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        pixels = torch.rand(self.batch_size, 3, self.image_size, self.image_size)
        if isinstance(self.config, ViTPChangeDetectionConfig):
            return self.get_config(), {"pixel_values_before": pixels, "pixel_values_after": pixels.flip(-1)}
        return self.get_config(), {"pixel_values": pixels}


class InputsWithText(Inputs):
    text_config, vision_config, with_images = TEXT, VISION, True

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        config, inputs = super().prepare_config_and_inputs_for_common()
        ids = torch.randint(3, IMAGE_TOKEN_ID, (self.batch_size, self.seq_length))
        if self.with_images:
            ids[:, :IMAGE_TOKENS] = IMAGE_TOKEN_ID
        return config, {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def language_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    return config_class(
        vision_config=VISION,
        text_config=TEXT,
        image_token_id=IMAGE_TOKEN_ID,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
        pad_token_id=2,
    )


VISION_WITH_MASKS = {**VISION, "use_mask_token": True}
CLASSES = {"backbone_config": {**VISION, "model_type": "vitp_vision"}, "num_labels": 3}
DENSE = {"backbone_config": adapter_config(), **HEAD}
BOXES = {"backbone_config": adapter_config(), "neck_channels": 16, "head_hidden_size": 32, "num_labels": 3}
BOXES |= {"rpn_candidates_train": 50, "rpn_proposals_train": 30, "rpn_candidates_eval": 30, "rpn_proposals_eval": 20}
BOXES |= {"rpn_samples": 4096, "roi_samples": 4096}  # more than exist, so that none is sampled at random
MODELS = {
    "language": (
        InputsWithText(language_config(ViTPConfig), seq_length=7 + IMAGE_TOKENS),
        [ViTPForConditionalGeneration, ViTPModel],
    ),
    "vision": (Inputs(ViTPVisionConfig(**VISION_WITH_MASKS)), [ViTPVisionModel]),
    "backbone": (Inputs(ViTPBackboneConfig(**VISION_WITH_MASKS, out_indices=[0, 1, 2])), [ViTPBackbone]),
    "adapter": (Inputs(adapter_config(), 4, 16), [ViTPAdapter]),
    "pyramid": (Inputs(ViTPFeaturePyramidConfig(**VISION, pyramid_channels=16)), [ViTPFeaturePyramid]),
    "classification": (Inputs(ViTPImageClassificationConfig(**CLASSES)), [ViTPForImageClassification]),
    "segmentation": (Inputs(ViTPSegmentationConfig(**DENSE), 4, 16), [ViTPForSemanticSegmentation]),
    "change": (Inputs(ViTPChangeDetectionConfig(**DENSE), 4, 16), [ViTPForChangeDetection]),
    "boxes": (Inputs(ViTPObjectDetectionConfig(**BOXES), 4, 16), [ViTPForObjectDetection]),
    "oriented boxes": (Inputs(ViTPOrientedObjectDetectionConfig(**BOXES), 4, 16), [ViTPForOrientedObjectDetection]),
    "instances": (Inputs(ViTPInstanceSegmentationConfig(**BOXES), 4, 16), [ViTPForInstanceSegmentation]),
}


DETECTORS = [ViTPForObjectDetection, ViTPForOrientedObjectDetection, ViTPForInstanceSegmentation]


def objects_of(tester: Inputs) -> list[dict[str, torch.Tensor]]:
    """Return labels of a batch, with boxes, corners and masks."""
    corners = torch.tensor([[[0.2, 0.3], [0.6, 0.3], [0.6, 0.8], [0.2, 0.8]]])
    masks = torch.ones(1, tester.image_size, tester.image_size)
    one = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.4, 0.55, 0.4, 0.5]])}
    return [one | {"corners": corners, "masks": masks} for _ in range(tester.batch_size)]


@pytest.fixture
def listed(monkeypatch):
    """Register our classes in transformers' tables of models with and without a loss."""
    for mapping, classes in (
        (MODEL_MAPPING_NAMES, [ViTPModel, ViTPVisionModel]),
        (MODEL_FOR_BACKBONE_MAPPING_NAMES, [ViTPBackbone, ViTPAdapter, ViTPFeaturePyramid]),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, [ViTPForConditionalGeneration]),
        (MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES, DETECTORS),
        (MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, [ViTPForImageClassification]),
    ):
        for model_class in classes:
            monkeypatch.setitem(mapping, model_class.config_class.model_type, model_class.__name__)


@pytest.mark.parametrize("name", MODELS)
def test_models_pass_common_tests(common, listed, name):
    tester, classes = MODELS[name]
    mixin = common.modeling.ModelTesterMixin

    def with_labels(self, inputs: dict, model_class: type, return_labels: bool = False) -> dict:
        inputs = mixin._prepare_for_class(self, inputs, model_class, return_labels)
        if return_labels and name == "change":
            inputs["labels"] = torch.zeros(tester.batch_size, tester.image_size, tester.image_size).long()
        elif return_labels and model_class in DETECTORS:
            inputs["labels"] = objects_of(tester)
        return inputs

    def set_up(self) -> None:
        self.model_tester = tester
        if name == "language":
            # The tests of attention pass only the ids, and image tokens without images are an error.
            tester.with_images = "eager_matches_sdpa" not in self._testMethodName

    contents = {
        "all_model_classes": tuple(classes),
        "setUp": set_up,
        "_prepare_for_class": with_labels,
        "test_resize_embeddings": name == "language",
        "_is_composite": name == "language",
    }
    left_out = LEFT_OUT.get(name, {})
    if name == "change":
        of_attention = [test for test in dir(mixin) if test.startswith("test_eager_matches_sdpa_inference_")]
        left_out = left_out | dict.fromkeys(of_attention, "it gives the first image alone; segmentation passes it")
    failed = transformers_tests.run(name, [mixin], contents, left_out)
    assert not failed, "\n\n".join(f"{test}: {trace}" for test, trace in failed.items())


@pytest.mark.parametrize("name", MODELS)
def test_configurations_pass_common_tests(common, name):
    config_class, case = type(MODELS[name][0].config), unittest.TestCase()
    case.model_tester = MODELS[name][0]
    settings = {"vrl_drop_ratio": 0.5} if name == "language" else {}
    settings = {"drop_path_rate": 0.1, "hidden_size": 64} if config_class.model_type.endswith("vision") else settings
    common.configuration.ConfigTester(case, config_class, has_text_modality=False, **settings).run_common_tests()


@pytest.mark.parametrize("name", ["backbone", "adapter", "pyramid"])
def test_backbones_pass_common_tests(common, name):
    tester, classes = MODELS[name]
    contents = {
        "all_model_classes": tuple(classes),
        "config_class": type(tester.config),
        "has_attentions": True,
        "setUp": lambda self: setattr(self, "model_tester", tester),
    }
    left_out = LEFT_OUT.get(f"{name} as a backbone", {})
    failed = transformers_tests.run(name, [common.backbone.BackboneTesterMixin], contents, left_out)
    assert not failed, "\n\n".join(f"{test}: {trace}" for test, trace in failed.items())


def test_processor_passes_common_tests(common, tokenizer, monkeypatch):
    # Saving also writes our code and records that in the object, which would fail the comparison.
    for processor_class in (ViTPProcessor, ViTPImageProcessor):
        monkeypatch.setattr(processor_class, "_auto_class", None)
    contents = {
        "processor_class": ViTPProcessor,
        "_setup_tokenizer": classmethod(lambda cls: tokenizer),
        "_setup_image_processor": classmethod(lambda cls: ViTPImageProcessor(size=SIZE, max_patches=1)),
        "prepare_processor_dict": staticmethod(lambda: {"image_seq_length": IMAGE_TOKENS}),
    }
    failed = transformers_tests.run(
        "processor", [common.processing.ProcessorTesterMixin], contents, LEFT_OUT.get("processor", {})
    )
    assert not failed, "\n\n".join(f"{test}: {trace}" for test, trace in failed.items())


IMAGE_PROCESSORS = {
    "tiles": ViTPImageProcessor,
    "images and masks": ViTPSegmentationImageProcessor,
    "images and objects": ViTPDetectionImageProcessor,
}


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_image_processors_pass_common_tests(common, name):
    class ImageTester(common.image_processing.ImageProcessingTester):
        num_labels = 3

        def __init__(self, parent):
            super().__init__(
                parent, size=SIZE, do_resize=True, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3
            )

        def _get_image_processing_classes(self):
            return {"torchvision": IMAGE_PROCESSORS[name]}

    mixins = [common.image_processing.ImageProcessingTestMixin]
    if name == "images and masks":
        mixins.append(common.image_processing.PostProcessSemanticSegmentationTestMixin)
    failed = transformers_tests.run(
        name,
        mixins,
        {"image_processor_tester_class": ImageTester},
        LEFT_OUT.get(name, {}),
    )
    assert not failed, "\n\n".join(f"{test}: {trace}" for test, trace in failed.items())
