"""What is possible at all: the quickstart's ViT, trained by supervision on as many views of the same ground.

    python -m modeling_vitp.recipes.tasks.trees.ceiling --output_dir outputs/ceiling

A linear layer on the patch tokens, which is thrown away, says of each patch whether it is tree. Views, steps, batches,
rates and jitter are those of the quickstart. What is then read from the frozen ViT is what answers in text can hope
for.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import yaml
from datasets import load_dataset
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup, set_seed

from modeling_vitp import ViTPImageProcessor, ViTPVisionConfig, ViTPVisionModel, export_backbone
from modeling_vitp.probing.gains import gains_table, load_arms, measure_gains
from modeling_vitp.training.command_line import find_config, find_data, parse_words, run

from .instructions import cell_means
from .probe_data import write_probe_data
from .views import Ground, collage, view_of


def random_view(grounds: list[Ground], rng: np.random.Generator) -> Ground:
    """Half of the views are collages, a quarter mosaics, a quarter crops."""
    if rng.random() < 0.5:
        view = collage(grounds, rng)
    else:
        view = view_of(grounds[rng.integers(len(grounds))], 1 + rng.integers(2), rng)
    return view.jittered(rng)


def train(model: ViTPVisionModel, grounds: list[Ground], settings: dict, seed: int) -> None:
    """Trains in place, with the `settings` of the quickstart."""
    rng, device = np.random.default_rng(seed), model.device
    height, width = model.config.image_size
    rows = height // model.config.patch_size[0]
    image_processor = ViTPImageProcessor(size={"height": height, "width": width}, max_patches=1)
    head = torch.nn.Linear(model.config.hidden_size, 1).to(device)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, settings["learning_rate"], (0.9, settings["adam_beta2"]), weight_decay=settings["weight_decay"]
    )
    steps = settings["max_steps"]
    schedule = get_cosine_schedule_with_warmup(optimizer, round(settings["warmup_steps"] * steps), steps)
    model.train()
    for _ in tqdm(range(steps), desc="Training with masks"):
        views = [random_view(grounds, rng) for _ in range(settings["per_device_train_batch_size"])]
        pixels = image_processor([view.image for view in views], return_tensors="pt")["pixel_values"]
        is_tree = torch.tensor(np.stack([cell_means(view.crowns, rows).ravel() > 0.5 for view in views]))
        logits = head(model(pixels.to(device)).last_hidden_state[:, 1:])[..., 0]
        loss = F.binary_cross_entropy_with_logits(logits, is_tree.float().to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="for the ViT at the start and at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int, help="instead of the quickstart's")
    args = parse_words(parser, argv)

    settings = yaml.safe_load(find_config("quickstart").read_text())
    settings |= {} if args.max_steps is None else {"max_steps": args.max_steps}
    datasets = load_dataset(find_data(settings["dataset_name"]))
    set_seed(args.seed)
    model = ViTPVisionModel(ViTPVisionConfig(**settings["from_scratch"]["vision_config"]))
    model.to(torch.accelerator.current_accelerator() or "cpu")
    start, end = (args.output_dir / name for name in ("backbone_at_start", "backbone"))
    export_backbone(model, start)
    train(model, [Ground.of(row["image"], row["boxes"]) for row in datasets["train"]], settings, args.seed)
    export_backbone(model, end)
    data = write_probe_data(datasets, args.output_dir / "probe" / "data", args.seed)
    arms = load_arms(end, start, args.seed, model.device)
    measured = measure_gains(data, "train", "test", "second_scene", arms=arms, folder=args.output_dir / "probe")
    (args.output_dir / "metrics.json").write_text(json.dumps(measured, indent=2) + "\n")
    for split, found in measured.items():
        print(f"\n{split}\n\n{gains_table(found)}")
    return 0


if __name__ == "__main__":
    run(main)
