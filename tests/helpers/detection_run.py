"""Detection recipe in separate processes, which can be killed during training.

`python detection_run.py WORD …` runs the recipe with these arguments.
"""

import gc
import sys

from launching import processes
from training_run import KillAtStep, kill_while_saving


def train(words: list[str], kill: tuple[str, int] | None = None) -> None:
    """Run the recipe and exit with its status.

    Args:
        words: arguments of the recipe.
        kill: "step" or a stage of saving, see [`~training_run.kill_while_saving`], and the step.
    """
    from modeling_vitp.recipes.finetune_detection import main
    from modeling_vitp.tasks.detection.trainer import ViTPDetectionTrainer

    gc.freeze()  # As in `training_run.train`.
    begin = ViTPDetectionTrainer.__init__

    def begin_to_be_killed(trainer, *args, **kwargs):
        begin(trainer, *args, **kwargs)
        if kill[0] == "step":
            trainer.add_callback(KillAtStep(kill[1]))
        else:
            kill_while_saving(trainer, *kill)

    if kill is not None:
        ViTPDetectionTrainer.__init__ = begin_to_be_killed
    sys.exit(main(words))


def run(words: list[str], kill: tuple[str, int] | None = None) -> int:
    """Run the recipe in a separate process and return its exit status, which is negative if it was killed."""
    process = processes().Process(target=train, args=(words, kill))
    process.start()
    process.join()
    return process.exitcode


if __name__ == "__main__":
    train(sys.argv[1:])
