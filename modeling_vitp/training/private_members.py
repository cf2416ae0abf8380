"""The private members of transformers' and TRL's trainers that ours override or read, each for want of a public one.

They are looked for when training is first imported: what a release lacks is said here, and not in the middle
of a run.
"""

import inspect
from importlib.metadata import version

from transformers import Trainer
from trl import SFTTrainer

TESTED = {"transformers": "5.24", "trl": "1.16"}  # setup.cfg caps there

# Overridden: by name, the parameters that are passed by name or relied on.
OVERRIDDEN = {
    # Which rows make a batch, with which collator.
    "_get_dataloader": {"dataset", "description", "batch_size", "is_training"},
    "_get_train_sampler": {"train_dataset"},
    "_get_eval_sampler": {"eval_dataset"},
    # Tiles that are normalised on the device.
    "_prepare_inputs": {"inputs"},
    # The epoch reaches the collator, and a run that was at its last step trains no further one.
    "_run_epoch": {"epoch", "epochs_trained", "resume_from_checkpoint", "steps_trained_in_current_epoch"},
    # Where a stream was.
    "_init_training_state": {"max_steps", "num_update_steps_per_epoch", "num_train_epochs", "trial"},
    "_save_rng_state": {"output_dir"},
    "_load_rng_state": {"checkpoint"},
    # Checkpoints that are whole or not there, without a token, and loaded strictly.
    "_get_output_dir": {"trial"},
    "_save": {"output_dir", "state_dict"},
    "_save_checkpoint": {"model", "trial"},
    "_issue_warnings_after_load": {"load_result"},
    # Layers that are compiled by themselves.
    "_build_accelerator_args": {"kwargs"},
    # Pushes of the model's files alone.
    "_push_from_checkpoint": {"checkpoint_folder"},
    "_finish_current_push": set(),
}
# Read and written: running sums, which a checkpoint has to keep.
READ = {
    Trainer: ("_tr_loss", "_globalstep_last_logged", "_train_batch_size"),
    SFTTrainer: ("_metrics", "_total_train_tokens"),
}


def missing_members() -> list[str]:
    """What of these the installed releases lack, in words."""
    missing = []
    for name, parameters in OVERRIDDEN.items():
        method = getattr(Trainer, name, None)
        lacking = parameters - set(inspect.signature(method).parameters) if method else None
        if lacking is None:
            missing.append(f"Trainer.{name}")
        elif lacking:
            missing.append(f"the parameter {', '.join(sorted(lacking))} of Trainer.{name}")
    for trainer, names in READ.items():
        code = (getattr(member, "__code__", None) for member in vars(trainer).values())
        known = {name for part in code if part is not None for name in part.co_names}
        missing += [f"{trainer.__name__}.{name}" for name in names if name not in known]
    return missing


def check_members() -> None:
    """Raises an `ImportError` that says which releases are needed."""
    missing = missing_members()
    if missing:
        found = ", ".join(f"{name} {version(name)}" for name in TESTED)
        needed = " ".join(f"'{name}=={release}.*'" for name, release in TESTED.items())
        raise ImportError(f"Training does not work with {found}, which lack {'; '.join(missing)}: pip install {needed}")


check_members()
