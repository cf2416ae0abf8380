"""transformers' InternVL in our classes."""

import json

import torch
from transformers import InternVLForConditionalGeneration

from modeling_vitp import convert_checkpoint
from modeling_vitp.convert.internvl import from_internvl, internvl_processor


def test_the_processor_of_internvl_has_the_tokens_of_its_images_whatever_the_configuration_states(
    tmp_path, model, processor
):
    """transformers' own configuration does not compute them: 256 stands there unless somebody set them."""
    model.save_pretrained(tmp_path / "vitp")
    processor.save_pretrained(tmp_path / "vitp")
    convert_checkpoint(tmp_path / "vitp", tmp_path / "native", "internvl")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    (tmp_path / "native" / "config.json").write_text(json.dumps(config | {"image_seq_length": 256}))
    native = InternVLForConditionalGeneration.from_pretrained(tmp_path / "native")
    assert native.config.image_seq_length == 256
    converted = from_internvl(native)
    assert internvl_processor(tmp_path / "native").image_seq_length == converted.config.image_seq_length == 4
    assert all(torch.equal(value, converted.state_dict()[name]) for name, value in model.state_dict().items())
