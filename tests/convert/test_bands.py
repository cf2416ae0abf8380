"""A checkpoint for red, green and blue becomes one for other bands while it is converted."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import HEAD, adapter_config
from transformers import AutoImageProcessor, AutoModel

from modeling_vitp import (
    ViTPForSemanticSegmentation,
    ViTPSegmentationConfig,
    ViTPSegmentationImageProcessor,
    ViTPVisionModel,
    convert_checkpoint,
    spread_bands,
)
from modeling_vitp.convert import __main__ as command
from modeling_vitp.convert import tensor_files
from modeling_vitp.convert.checkpoint import load_tensor

SPEC = {"band_names": ["VV", "VH"], "window": [-25, 0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_vit_of_a_model_is_spread_as_the_function_spreads_it(fixture_as_vitp, tmp_path, dtype):
    convert_checkpoint(fixture_as_vitp, tmp_path / "three", "backbone")
    ViTPVisionModel.from_pretrained(tmp_path / "three", dtype=dtype).save_pretrained(tmp_path / "three")
    words = [str(tmp_path / "three"), str(tmp_path / "two"), "--license", "mit", "--input_spec", json.dumps(SPEC)]
    command.main([*words[:4], "--to", "backbone", *words[4:]])
    found = AutoModel.from_pretrained(tmp_path / "two")
    expected = spread_bands(ViTPVisionModel.from_pretrained(tmp_path / "three"), SPEC["band_names"])
    assert found.dtype == dtype and found.config.band_names == SPEC["band_names"] and found.config.num_channels == 2
    state = expected.state_dict()
    assert state.keys() == found.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in found.state_dict().items())
    image_processor = AutoImageProcessor.from_pretrained(tmp_path / "two")
    assert image_processor.input_spec == SPEC and len(image_processor.image_mean) == 2

    convert_checkpoint(tmp_path / "two", tmp_path / "again", input_spec={"window": [-30, 0]})
    same, other = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "again"))
    assert all(torch.equal(same[name], other[name]) for name in same)
    spec = AutoImageProcessor.from_pretrained(tmp_path / "again").input_spec
    assert spec == {"band_names": SPEC["band_names"], "window": [-30, 0]}
    with pytest.raises(ValueError, match=r"takes 2 bands \(VV, VH\), but the input spec has 1 band \(HH\)"):
        convert_checkpoint(tmp_path / "two", tmp_path / "wrong", input_spec={"band_names": ["HH"]})
    assert not (tmp_path / "wrong").exists()


def test_a_whole_model_keeps_its_language_model_and_is_none_for_other_libraries(fixture_as_vitp, tmp_path):
    folder = convert_checkpoint(fixture_as_vitp, tmp_path / "two", "vitp", input_spec=SPEC)
    before, after = (load_file(path / "model.safetensors") for path in (fixture_as_vitp, folder))
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.vision_tower.embeddings.patch_embeddings.projection.weight"]
    with pytest.raises(ValueError, match="which 'internvl' cannot say"):
        convert_checkpoint(fixture_as_vitp, tmp_path / "internvl", "internvl", input_spec=SPEC)


def test_the_stem_of_the_adapter_in_a_model_is_spread_too(tmp_path):
    model = ViTPForSemanticSegmentation(ViTPSegmentationConfig(backbone_config=adapter_config(), **HEAD))
    model.save_pretrained(tmp_path / "three")
    ViTPSegmentationImageProcessor().save_pretrained(tmp_path / "three")
    folder = convert_checkpoint(tmp_path / "three", tmp_path / "two", license="mit", input_spec=SPEC)
    found = ViTPForSemanticSegmentation.from_pretrained(folder).state_dict()
    expected = spread_bands(model, SPEC["band_names"]).state_dict()
    assert all(torch.equal(expected[name], value) for name, value in found.items())
    assert found["backbone.spatial_prior.stem.0.weight"].shape[1] == 2


def test_a_tensor_that_is_read_in_chunks_is_loaded_whole(tmp_path, monkeypatch):
    tensor = torch.randn(5, 7)
    save_file({"kernel": tensor}, tmp_path / "model.safetensors")
    monkeypatch.setattr(tensor_files, "BUFFER_BYTES", 16)
    assert torch.equal(load_tensor(tensor_files.read_checkpoint(tmp_path)["kernel"]), tensor)
