"""The token of a video, which transformers' InternVL asks its tokenizer for, and models without videos do not embed."""

from pathlib import Path

from ..cards.record import read_json, write_json

VIDEO_TOKEN = "<video>"


def drop_video_token(folder: Path, vocab_size: int) -> None:
    """Takes the video token out of the tokenizer saved in `folder` if the model has no embedding for it.

    transformers' InternVL replaces it before encoding; elsewhere, a text that holds it would stop the model.
    """
    state, config = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    kept = [token for token in state["added_tokens"] if token["content"] != VIDEO_TOKEN or token["id"] < vocab_size]
    if kept == state["added_tokens"]:
        return
    write_json(folder / "tokenizer.json", {**state, "added_tokens": kept}, ensure_ascii=False)
    named = config.pop("model_specific_special_tokens", {})
    config = {name: value for name, value in config.items() if name not in named}
    if "extra_special_tokens" in config:
        config["extra_special_tokens"] = [token for token in config["extra_special_tokens"] if token != VIDEO_TOKEN]
    write_json(folder / "tokenizer_config.json", config, ensure_ascii=False)
