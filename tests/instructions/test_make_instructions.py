import os
import subprocess
import sys

import pytest
from annotated_images import NAMES, make, write_voc

from modeling_vitp.command.errors import WrongArguments
from modeling_vitp.recipes import make_instructions


def test_another_process_makes_the_same_bytes_and_another_seed_does_not(tmp_path):
    root = tmp_path / "data"
    write_voc(root, "train", NAMES["train"][:20])
    for name, seed in (("a", 0), ("c", 5)):
        make("voc", root, tmp_path / name, "--seed", seed)
    command = [sys.executable, make_instructions.__file__, "voc", str(root), "--output_dir", str(tmp_path / "b")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "3"})
    a, b, c = ((tmp_path / name / "train-00000.parquet").read_bytes() for name in "abc")
    assert a == b != c


def test_kinds_that_the_annotation_cannot_answer_are_refused(tmp_path):
    with pytest.raises(WrongArguments, match="folders cannot answer counting"):
        make_instructions.main(["folders", str(tmp_path), "--output_dir", str(tmp_path), "--kinds", "counting"])
