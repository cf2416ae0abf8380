import medical_set_data  # noqa: F401, which adds its miniatures
import pytest
import yaml
from paths import CONFIGS
from public_set_data import MINIATURES

from modeling_vitp.instructions.dry_run import make_command
from modeling_vitp.instructions.mixture import load_mixture
from modeling_vitp.instructions.sources import read_source
from modeling_vitp.recipes.datasets import make_public_set
from modeling_vitp.recipes.datasets.public_set_rows import load_public_set

RELEASED = {  # the names of a set's parts in the released mixture, where they are others
    "gmai_mmbench": ["gmai_mmbench_val"],
    "open_i": ["openi"],
    "quilt_instruct": ["quit_instruct_107k", "quilt_instruct_conv_desc", "quilt_instruct_complex_abductive"],
}


@pytest.mark.parametrize("name", ["remote_sensing_paper", "medical_paper"])
def test_every_source_of_the_papers_mixtures_is_made_of_a_public_set(name):
    for source in load_mixture(CONFIGS / f"{name}.yaml").sources:
        kind = load_public_set(source.name)
        assert (source.obtain, source.rows, source.tasks) == (kind.obtain, kind.paper_rows, kind.tasks), source.name
        assert source.general == kind.general and (source.general or source.modality == kind.modality)
        assert make_command(source) == f"vitp make_public_set {source.name} {source.image_root}"


@pytest.mark.parametrize("name", ["remote_sensing_paper", "medical_paper"])
def test_the_commands_of_the_dry_run_build_the_whole_of_the_papers_mixtures(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["mixture"]
    sources = load_mixture(settings).sources
    assert all(source.missing() for source in sources)
    for source in sources:
        MINIATURES[source.name](tmp_path / source.image_root)
    for source in sources:
        command = make_command(source).split()
        assert make_public_set.main(command[2:]) == 0
    for source in load_mixture(settings).sources:
        assert source.missing() is None
        assert not [row["error"] for row in read_source(source) if row["error"]]


def test_the_released_rows_of_the_medical_and_general_sets_are_those_of_the_released_mixture():
    released = load_mixture(CONFIGS / "medical_released.yaml").sources
    rows = {source.name: source.rows for source in released}
    for source in load_mixture(CONFIGS / "medical_paper.yaml").sources:
        parts = [one.name for one in released if one.general] if source.general else RELEASED.get(source.name)
        parts = parts or [source.name]
        assert load_public_set(source.name).released_rows == sum(rows[part] for part in parts), source.name
