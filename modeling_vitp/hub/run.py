"""What a recipe does about sharing: before it trains, and at its end."""

import logging
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer

from ..cards.record import write_record
from .contents import pack, write_card
from .failures import FAILURES, explain, one_line
from .upload import push

logger = logging.getLogger("sharing")


def begin(
    trainer: Trainer,
    argv: Sequence[str] | None,
    sources: Sequence[str | None],
    data: list[dict[str, Any]],
    evaluated_on: dict[str, str] | None,
) -> None:
    """Records what the run is, see [`write_record`]; each push while it trains has a card."""
    if trainer.is_world_process_zero():
        output_dir = Path(trainer.args.output_dir)
        write_record(output_dir, argv, trainer, sources, data, evaluated_on)
        trainer.write_card = partial(write_card, "model", source=output_dir, repo_id=trainer.hub_model_id)


def finish(trainer: Trainer) -> int:
    """Writes the card, and pushes the output folder if `push_to_hub` is set; the exit status."""
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    write_card("model", output_dir, repo_id=trainer.hub_model_id)
    if not args.push_to_hub:
        return 0
    trainer._finish_current_push()
    api = HfApi(token=args.hub_token)
    try:
        with tempfile.TemporaryDirectory() as work:
            package = pack("model", str(output_dir), trainer.hub_model_id, Path(work))
            done = push(api, package, trainer.hub_model_id, args.hub_private_repo, args.hub_revision, "End of training")
    except FAILURES as error:
        cause = explain(error, trainer.hub_model_id)
    except (ValueError, OSError) as error:
        cause = one_line(str(error)).rstrip(".")
    else:
        print(f"On the Hub: {done.commit_url}")
        return 0
    command = f"python recipes/push_to_hub.py {output_dir} {trainer.hub_model_id} --what model"
    logger.error("The run is complete in %s, but not on the Hub: %s. Go on with: %s", output_dir, cause, command)
    return 1
