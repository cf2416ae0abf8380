import pytest
from loading import PACKED, TINY, Models
from pictures import picture


@pytest.fixture(scope="session")
def models():
    """Return the app's models with the tiny random one."""
    return Models(TINY)


@pytest.fixture(scope="session")
def packed():
    """Return the app's models with the packed one."""
    return Models(str(PACKED))


@pytest.fixture
def scene(tmp_path):
    """Return the path of an image of 2 × 3 tiles of the tiny model."""
    picture(336, 224).save(tmp_path / "scene.png")
    return str(tmp_path / "scene.png")
