"""The About box: what model this is, under which licence, of when, and what to cite."""

import html
from datetime import datetime, timezone
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from loading import TINY, FullModel, Models

CITATION = """@article{vitp2025,
  title   = {Visual Instruction Pretraining for Domain-Specific Foundation Models},
  author  = {Li, Yuxuan and Zhang, Yicheng and Tang, Wenhao and Dai, Yimian and Cheng, Ming-Ming and Li, Xiang and
             Yang, Jian},
  journal = {arXiv preprint arXiv:2509.17562},
  year    = {2025},
  url     = {https://arxiv.org/abs/2509.17562}
}"""


def about(models: Models, full: FullModel) -> str:
    """Markdown about the model, the app and the method."""
    vision, text = full.model.config.vision_config, full.model.config.text_config
    license, date = _license_and_date(models, full.name)
    height, width = vision.image_size
    millions = sum(parameter.numel() for parameter in full.model.parameters()) / 1e6
    vision_millions = sum(parameter.numel() for parameter in full.model.model.vision_tower.parameters()) / 1e6
    rows = {
        "Model": f"`{html.escape(full.name.replace('`', ''))}`",
        "Licence": html.escape(license),
        "Date": date,
        "ViT": f"{vision.num_hidden_layers} layers, width {vision.hidden_size}, {vision_millions:.3g} M parameters, "
        f"{height} × {width} pixels in patches of {vision.patch_size[0]}",
        "Whole model": f"{millions:.3g} M parameters, language model {html.escape(text.model_type)}, trained with a "
        f"drop ratio of {full.model.config.vrl_drop_ratio:g}",
        "This app": "modeling-vitp, Apache-2.0. Example images: NEON, from DeepForest (MIT); "
        "CT slice from pydicom (MIT)",
    }
    table = "\n".join(f"| **{name}** | {value.replace('|', '/')} |" for name, value in rows.items())
    return f"| | |\n|---|---|\n{table}\n\nTo cite the method:\n\n```bibtex\n{CITATION}\n```"


def _license_and_date(models: Models, name: str) -> tuple[str, str]:
    """As the model's card and repo say, or its folder."""
    if name == TINY:
        return "Apache-2.0 (random weights, made by this app)", f"{datetime.now(timezone.utc):%Y-%m-%d}"
    folder, card, date = Path(name), None, None
    try:
        if folder.is_dir():
            date = datetime.fromtimestamp((folder / "config.json").stat().st_mtime, timezone.utc)
            card = ModelCard.load(folder / "README.md").data
        else:
            info = HfApi(token=None if name in models.backbones else False).model_info(name)
            card, date = info.card_data, info.last_modified
    except Exception:  # no card, or no way to the Hub: the box says so
        pass
    license = getattr(card, "license", None)
    return str(license or "not stated"), f"{date:%Y-%m-%d}" if date else "not known"
