"""Text of the About box: model, license, date and citation."""

import html
from datetime import datetime, timezone
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from kinds import FINE_TUNED, FULL
from loading import TINY, Models
from torch import nn

CITATION = """@article{vitp2025,
  title   = {Visual Instruction Pretraining for Domain-Specific Foundation Models},
  author  = {Li, Yuxuan and Zhang, Yicheng and Tang, Wenhao and Dai, Yimian and Cheng, Ming-Ming and Li, Xiang and
             Yang, Jian},
  journal = {arXiv preprint arXiv:2509.17562},
  year    = {2025},
  url     = {https://arxiv.org/abs/2509.17562}
}"""


def about(models: Models, name: str) -> str:
    """Return Markdown about a model, the app and the method."""
    kind = models.kind(name)
    vit = models.backbone(name)
    license, date = _license_and_date(models, name)
    side = vit.native * vit.patch[0]
    rows = {
        "Model": f"`{html.escape(name.replace('`', ''))}`, a {kind}",
        "License": plain(license),
        "Date": date,
        "ViT": f"{vit.depth} layers, width {vit.model.config.hidden_size}, {_millions(vit.model)} M parameters, "
        f"{side} × {side} pixels in patches of {vit.patch[0]}",
    }
    if kind == FULL:
        model = models.full(name).model
        rows["Whole model"] = (
            f"{_millions(model)} M parameters, language model {plain(model.config.text_config.model_type)}, "
            f"trained with a drop ratio of {model.config.vrl_drop_ratio:g}"
        )
    if kind == FINE_TUNED:
        rows["Classes"] = plain(", ".join(models.fine_tuned(name).names)[:500])
    rows["This app"] = (
        "modeling-vitp, Apache-2.0. Example images: NEON, from DeepForest (MIT); CT slice from pydicom (MIT)"
    )
    table = "\n".join(f"| **{key}** | {value.replace('|', '/')} |" for key, value in rows.items())
    return f"| | |\n|---|---|\n{table}\n\nTo cite the method:\n\n```bibtex\n{CITATION}\n```"


def plain(text: str) -> str:
    """Return Markdown that shows a text of a model as it is, without pictures and links to other servers."""
    return "".join(char if char.isalnum() or char in " ,.-" else f"&#{ord(char)};" for char in text)


def _millions(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.3g}"


def _license_and_date(models: Models, name: str) -> tuple[str, str]:
    """Return license and date of a model, from its card and repository or its folder."""
    if name == TINY:
        return "Apache-2.0 (random weights, made by this app)", f"{datetime.now(timezone.utc):%Y-%m-%d}"
    source, card, date = models.source(name), None, None
    try:
        if source is not None and Path(source).is_dir():
            date = datetime.fromtimestamp(Path(source, "config.json").stat().st_mtime, timezone.utc)
            card = ModelCard.load(Path(source, "README.md")).data
        else:
            info = HfApi(token=None if source is not None else False).model_info(source or name, timeout=5)
            card, date = info.card_data, info.last_modified
    except Exception:  # Without a card or the Hub, the box says that license and date are not known.
        pass
    license = getattr(card, "license", None)
    return str(license or "not stated"), f"{date:%Y-%m-%d}" if date else "not known"
