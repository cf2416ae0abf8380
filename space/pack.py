"""Pack a trained model with the Space: in half precision, and without files that the Space does not need.

python space/pack.py outputs/quickstart space/quickstart
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from modeling_vitp import ViTPForConditionalGeneration, ViTPProcessor


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    source, target = (Path(argument) for argument in arguments)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        model = ViTPForConditionalGeneration.from_pretrained(source)
        model.half().save_pretrained(work)
        ViTPProcessor.from_pretrained(source).save_pretrained(work)
        for path in sorted(Path(work).glob("*.json")):
            fields = json.loads(path.read_text(), object_hook=without_code)
            indent = None if path.name == "tokenizer.json" else 2
            text = json.dumps(fields, indent=indent, ensure_ascii=False)
            (target / path.name).write_text(text + "\n")
        shutil.copyfile(Path(work, "model.safetensors"), target / "model.safetensors")
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{target}: {size / 1e6:.1f} MB")
    return 0


def without_code(fields: dict) -> dict:
    """Remove `auto_map`, because the code that it names is not packed."""
    return {key: value for key, value in fields.items() if key != "auto_map"}


if __name__ == "__main__":
    sys.exit(main())
