import pytest
from internvl_checkpoints import FIXTURE

from modeling_vitp import convert_checkpoint


@pytest.fixture(scope="module")
def fixture_as_vitp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fixture") / "vitp"
    convert_checkpoint(FIXTURE, folder, image_token_id=7)
    return folder
