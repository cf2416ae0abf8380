import itertools
import json
import multiprocessing
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset, Features, Image, List, Value
from internvl_oracle import build_native
from pictures import picture
from safetensors.torch import load_file, save_file
from tiny_models import TEXT, TOKENS_PER_TILE, VISION
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from modeling_vitp import (
    ViTPDataCollator,
    ViTPForConditionalGeneration,
    ViTPProcessor,
    ViTPTrainer,
    ViTPTrainingConfig,
)
from modeling_vitp.pretraining.loading import build_model
from modeling_vitp.training.callbacks import take_names

MESSAGES = List({"role": Value("string"), "content": Value("string")})


def conversation(answer):
    return [{"role": "user", "content": "How many trees?"}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def rows():
    sizes_and_answers = {
        "a": ([(56, 56)], "3"),
        "b": ([(112, 56)], "There are 12 trees."),
        "c": ([(56, 112), (56, 56)], "12 and 3"),
        "d": ([], "What trees?"),
        "e": ([(168, 56)], "7"),
        "f": ([(56, 56)], "top left"),
    }
    rows = []
    for seed, (name, (sizes, answer)) in enumerate(sizes_and_answers.items()):
        images = [picture(*size, 10 * seed + number) for number, size in enumerate(sizes)]
        rows.append({"id": name, "images": images, "messages": conversation(answer)})
    features = Features({"id": Value("string"), "images": List(Image()), "messages": MESSAGES})
    return Dataset.from_list(rows, features=features)


def make_trainer(tokenizer, rows, folder, drop_ratio=0.75, text=TEXT, **options):
    torch.manual_seed(0)
    model, processor = build_model(tokenizer, {**VISION, "drop_path_rate": 0.1}, text, {"max_patches": 4})
    settings = {"vrl_drop_ratio": drop_ratio, "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    settings |= {"logging_steps": 1, "bf16": False, "report_to": "none", "disable_tqdm": True, "watch_samples": 0}
    args = ViTPTrainingConfig(str(folder), **settings | {"gradient_checkpointing": False} | options)
    return ViTPTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=processor)


def losses(trainer):
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def test_evaluation_loss_is_without_drop(tokenizer, rows, tmp_path):
    evaluation, first_losses = set(), set()
    for ratio in (0.0, 0.9):
        trainer = make_trainer(tokenizer, rows, tmp_path / str(ratio), drop_ratio=ratio, max_steps=1)
        evaluation.add(trainer.evaluate()["eval_loss"])
        trainer.train()
        first_losses.add(losses(trainer)[0])
    assert len(evaluation) == 1 and len(first_losses) == 2


def test_evaluation_loss_counts_each_answer_token_once(tokenizer, rows, tmp_path):
    trainer = make_trainer(tokenizer, rows, tmp_path)
    batch = ViTPDataCollator(trainer.processing_class, vrl_drop_ratio=0.0)(list(rows))
    with torch.no_grad():
        expected = trainer.model.eval()(**batch, use_cache=False).loss.item()  # mean over all answer tokens
    for batch_size in (1, 3, len(rows)):
        trainer.args.per_device_eval_batch_size = batch_size
        for dataset in (rows, rows.select(range(len(rows) - 1, -1, -1))):
            assert trainer.evaluate(dataset)["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_logged_metrics_equal_a_plain_computation(tokenizer, rows, tmp_path):
    trainer = make_trainer(tokenizer, rows, tmp_path, max_steps=1, per_device_train_batch_size=6, learning_rate=0.0)
    trainer.model.model.vision_tower.config.drop_path_rate = 0.0
    for layer in trainer.model.model.vision_tower.encoder.layer:
        layer.drop_path.drop_prob = 0.0
    batch = ViTPDataCollator(trainer.processing_class, vrl_drop_ratio=0.75, seed=trainer.args.seed)(list(rows))
    with torch.no_grad():
        logits = trainer.model(**batch, use_cache=False).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    is_answer = targets != -100
    expected_loss = torch.nn.functional.cross_entropy(logits[is_answer], targets[is_answer]).item()
    expected_accuracy = (logits.argmax(-1) == targets)[is_answer].float().mean().item()

    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert float(log["loss"]) == pytest.approx(expected_loss, rel=1e-5)
    assert float(log["mean_token_accuracy"]) == pytest.approx(expected_accuracy, abs=1e-6)
    assert log["num_tokens"] == batch["attention_mask"].sum().item()
    num_tiles = len(batch["pixel_values"])
    num_image_tokens = (batch["input_ids"] == trainer.processing_class.image_token_id).sum().item()
    assert num_image_tokens == num_tiles * TOKENS_PER_TILE / 4


def test_loss_with_masked_answers_equals_internvl(tokenizer, rows, tmp_path):
    options = {"max_steps": 1, "per_device_train_batch_size": 6, "answer_mask_ratio": 0.5}
    trainer = make_trainer(tokenizer, rows, tmp_path, drop_ratio=0.0, **options)
    for layer in trainer.model.model.vision_tower.encoder.layer:
        layer.drop_path.drop_prob = 0.0
    native, pad_id = build_native(trainer.model), tokenizer.pad_token_id
    seed = trainer.args.seed
    batch = ViTPDataCollator(trainer.processing_class, answer_mask_ratio=0.5, seed=seed)(list(rows))
    whole = ViTPDataCollator(trainer.processing_class, seed=seed)(list(rows))
    labels = batch.pop("labels")
    assert torch.equal(labels, whole["labels"]) and not torch.equal(batch["input_ids"], whole["input_ids"])
    with torch.no_grad():
        logits = native(**batch).logits[:, :-1]
    targets = labels[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits[targets != -100], targets[targets != -100]).item()

    trainer.train()
    assert losses(trainer) == [pytest.approx(expected, rel=1e-5)]
    # The pad token replaces masked tokens, and its embedding is trained.
    assert native.get_input_embeddings().weight[pad_id].eq(0).all()
    assert trainer.model.get_input_embeddings().weight[pad_id].abs().min() > 0
    assert not trainer.eval_data_collator.answer_mask_ratio


def test_metrics_of_an_earlier_run_are_removed(tokenizer, rows, tmp_path):
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({"eval": {"eval_loss": 0.125}}))
    trainer = make_trainer(tokenizer, rows, tmp_path, max_steps=1, save_strategy="no")
    trainer.train()
    assert metrics.is_file()
    trainer.save_model()
    assert not metrics.is_file() and "0.125" not in (tmp_path / "README.md").read_text()
    metrics.write_text("{}")
    trainer.save_model()
    assert metrics.is_file()


def test_resumed_run_is_exact(tokenizer, rows, tmp_path):
    """An epoch has three steps. The run stops in an epoch."""
    whole = make_trainer(tokenizer, rows, tmp_path, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make_trainer(tokenizer, rows, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    assert losses(resumed) == losses(whole)
    assert len(losses(resumed)) == 6
    for (name, expected), actual in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(expected, actual), name


def test_checkpoint_with_other_keys_is_refused(tokenizer, rows, tmp_path):
    make_trainer(tokenizer, rows, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    weights_file = tmp_path / "checkpoint-1" / "model.safetensors"
    weights = load_file(weights_file)
    (tmp_path / "checkpoint-1" / "checkpoint.json").unlink()  # the record is deleted after an intended change
    missing = {name: weight for name, weight in weights.items() if not name.endswith("layer.0.lambda_1")}
    surplus = weights | {"surplus": torch.zeros(1)}
    for changed, named in ((missing, "missing keys.*lambda_1"), (surplus, "unexpected keys.*surplus")):
        save_file(changed, weights_file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=named):
            make_trainer(tokenizer, rows, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_model_with_tied_embeddings_resumes(tokenizer, rows, tmp_path):
    options = {"text": {**TEXT, "tie_word_embeddings": True}, "max_steps": 2, "save_steps": 1}
    first = make_trainer(tokenizer, rows, tmp_path, **options)
    first.train()
    second = make_trainer(tokenizer, rows, tmp_path, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert second.model.lm_head.weight is second.model.get_input_embeddings().weight
    assert torch.equal(first.model.lm_head.weight, second.model.lm_head.weight)


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_reaches_persistent_workers(tokenizer, rows, tmp_path, workers):
    options = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    options |= {"max_steps": 4, "per_device_train_batch_size": 1}
    trainer = make_trainer(tokenizer, rows.select([1]), tmp_path, drop_ratio=0.9, **options)
    seen = []
    forward = trainer.model.model.forward

    def recording(*args, **kwargs):
        seen.append(kwargs["visual_token_indices"].tolist())
        return forward(*args, **kwargs)

    trainer.model.model.forward = recording
    others = set(multiprocessing.active_children())
    trainer.train()
    assert set(multiprocessing.active_children()) <= others  # the workers end with the training
    collator = ViTPDataCollator(trainer.processing_class, vrl_drop_ratio=0.9, seed=trainer.args.seed)
    expected = []
    for epoch in range(4):
        collator.set_epoch(epoch)
        expected.append(collator([rows[1]])["visual_token_indices"].tolist())
    assert seen == expected
    assert len({tuple(indices) for indices in expected}) > 1


def test_rows_without_id_use_row_number(tokenizer, rows, tmp_path):
    trainer = make_trainer(tokenizer, rows.remove_columns("id"), tmp_path)
    assert trainer.train_dataset["id"] == list(range(6))


@pytest.mark.skipif(trl.__version__.startswith("1.15."), reason="the loss of TRL 1.15 needs Triton")
def test_sft_trainer_trains_with_vitp_collator(tokenizer, rows, tmp_path):
    model, processor = build_model(tokenizer, VISION, TEXT, {"max_patches": 4})
    settings = {"max_steps": 8, "per_device_train_batch_size": 6, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    args = SFTConfig(str(tmp_path), remove_unused_columns=False, **settings)
    collator = ViTPDataCollator(processor, vrl_drop_ratio=0.75)
    trainer = SFTTrainer(model, args, data_collator=collator, train_dataset=rows, processing_class=processor)
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]


def test_mismatched_parts_are_refused(model_and_processor, rows, tmp_path):
    model, processor = model_and_processor
    args = ViTPTrainingConfig(str(tmp_path), report_to="none", bf16=False)

    def start(args=args, **options):
        return ViTPTrainer(model, args, train_dataset=rows, processing_class=processor, **options)

    with pytest.raises(ValueError, match="ViTPTrainingConfig.*SFTConfig"):
        start(SFTConfig(str(tmp_path), use_cpu=True, bf16=False))
    with pytest.raises(ValueError, match="compute_loss_func"):
        start(compute_loss_func=lambda *_: None)
    processor.image_seq_length = 5
    with pytest.raises(ValueError, match="image_seq_length"):
        start()
    processor.image_seq_length = 4
    model.resize_token_embeddings(100)
    with pytest.raises(ValueError, match="only 100 embeddings"):
        start()


def test_trainer_accepts_model_folder(model_and_processor, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in model_and_processor:
        part.save_pretrained("start")
    for folder in ("start", Path("start")):
        trainer = ViTPTrainer(folder, train_dataset=rows)
        assert trainer.args.output_dir == "start-SFT" and trainer.processing_class.image_processor.max_patches == 6
        for name, weight in model_and_processor[0].state_dict().items():
            assert torch.equal(trainer.model.state_dict()[name], weight), name
    args = ViTPTrainingConfig("out", model_init_kwargs={"dtype": "bfloat16"}, bf16=False)
    trainer = ViTPTrainer("start", args, train_dataset=rows)
    assert trainer.model.dtype == torch.bfloat16 and trainer.args.model_init_kwargs == {"dtype": "bfloat16"}
    with pytest.raises(ValueError, match="train_dataset is required"):
        ViTPTrainer("start")


@pytest.mark.parametrize(
    "option",
    [
        {"completion_only_loss": False},
        {"packing": True},
        {"eval_packing": True},
        {"shuffle_dataset": True},
        {"pad_token": "<pad>"},
        {"chat_template_path": "Qwen/Qwen3-0.6B"},
        {"activation_offloading": True, "use_cpu": True},
        {"use_liger_kernel": True},
        {"label_smoothing_factor": 0.1},
    ],
    ids=str,
)
def test_unsupported_option_is_refused(tmp_path, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        ViTPTrainingConfig(str(tmp_path), bf16=False, **option)
    ViTPTrainingConfig(str(tmp_path), bf16=False, completion_only_loss=True, assistant_only_loss=True)


@pytest.mark.slow
def test_grpo_supports_several_images_per_sample(model, processor, tmp_path):
    """GRPO splits its batches by the tiles of each sample."""
    rows = []
    for count in (2, 1, 3, 1):
        images = [picture(60 + 56 * number, 56, number) for number in range(count)]
        rows.append({"images": images, "prompt": [{"role": "user", "content": "How many?"}]})
    message = {"role": Value("string"), "content": Value("string")}
    dataset = Dataset.from_list(rows, features=Features({"images": List(Image()), "prompt": List(message)}))
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4}
    args = GRPOConfig(tmp_path, use_cpu=True, bf16=False, report_to="none", save_strategy="no", **settings)
    seen = []

    def reward(completions, images, **kwargs):
        seen.extend(len(sample) for sample in images)
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = GRPOTrainer(model, reward, args, train_dataset=dataset, processing_class=processor)
    trainer.train()
    assert set(seen) - {1} and trainer.state.global_step == 2


def test_stream_is_shuffled_unless_sequential(tokenizer, rows, tmp_path):
    def epochs(strategy):
        trainer = make_trainer(tokenizer, rows.to_iterable_dataset(), tmp_path, train_sampling_strategy=strategy)
        names = [take_names([batch]) for batch in itertools.islice(trainer.get_train_dataloader(), 6)]
        return [sum(names[:3], []), sum(names[3:], [])]

    assert epochs("sequential") == [rows["id"], rows["id"]]
    first, second = shuffled = epochs("random")
    assert sorted(first) == sorted(second) == rows["id"] and len({*map(tuple, (rows["id"], *shuffled))}) == 3
    assert epochs("random") == shuffled


def test_save_model_leaves_model_processor_card_and_record(tokenizer, rows, tmp_path):
    ratios = {"vrl_apply_prob": 0.5, "vrl_warmup_steps": 3, "answer_mask_ratio": 0.9}
    trainer = make_trainer(tokenizer, rows, tmp_path / "run", 0.6, max_steps=2, save_strategy="no", **ratios)
    trainer.train()
    trainer.save_model()
    opened = ViTPForConditionalGeneration.from_pretrained(tmp_path / "run")
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], weight), name
    processor = ViTPProcessor.from_pretrained(tmp_path / "run")
    assert processor.image_processor.to_dict() == trainer.processing_class.image_processor.to_dict()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config.items() >= {"vrl_drop_ratio": 0.6, **ratios}.items()
    assert {path.name for path in (tmp_path / "run").rglob("*.bin")} <= {"training_args.bin"}
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"] == [{"samples": len(rows)}] and record["settings"]["max_steps"] == 2
    assert "vrl_drop_ratio" in record["settings"] and record["command"] is None
    card = (tmp_path / "run" / "README.md").read_text()
    assert "AutoModel" in card and "| max_steps | 2 |" in card
    trainer.save_model(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "run.json").read_text()) == record
    assert (tmp_path / "copy" / "README.md").is_file()
