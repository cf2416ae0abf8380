"""Data of pretraining."""

import pytest

from modeling_vitp.instructions.mixture import load_mixture
from modeling_vitp.pretraining.arguments import PretrainArguments
from modeling_vitp.pretraining.data import open_data


def test_evaluation_on_mixture_is_refused(data_folder):
    mixture = load_mixture({"sources": [{"name": "mine", "folder": str(data_folder)}]})
    with pytest.raises(ValueError, match="eval_strategy: no"):
        open_data(PretrainArguments(mixture={"sources": []}), mixture, 0, evaluates=True)
