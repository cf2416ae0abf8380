"""TRL's own trainers take the model and the processor as they are."""

import pytest
from datasets import Dataset, Features, Image, List, Value
from pictures import picture
from trl import GRPOConfig, GRPOTrainer


@pytest.mark.slow
def test_grpo_with_several_images_a_sample(model, processor, tmp_path):
    """It cuts its batches by the tiles of each sample, which share the sample's budget."""
    image_counts = [2, 1, 3, 1]
    rows = [
        {
            "images": [picture(60 + 56 * number, 56, number) for number in range(count)],
            "prompt": [{"role": "user", "content": "How many?"}],
        }
        for count in image_counts
    ]
    message = {"role": Value("string"), "content": Value("string")}
    dataset = Dataset.from_list(rows, features=Features({"images": List(Image()), "prompt": List(message)}))
    args = GRPOConfig(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    seen = []

    def reward(completions, images, **kwargs):
        seen.extend(len(sample) for sample in images)
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = GRPOTrainer(model, reward, args, train_dataset=dataset, processing_class=processor)
    trainer.train()
    assert set(seen) - {1} and trainer.state.global_step == 2
