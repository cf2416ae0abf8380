"""Downstream tasks: fine-tuning of a ViT, with one task object for each in `TASKS`."""

from .base import TASKS, FineTuningOptions, Task, find_task, register_task
from .classification.task import ClassificationTask
from .detection.task import DetectionTask
from .segmentation.task import ChangeDetectionTask, SegmentationTask

__all__ = [
    "TASKS",
    "ChangeDetectionTask",
    "ClassificationTask",
    "DetectionTask",
    "FineTuningOptions",
    "SegmentationTask",
    "Task",
    "find_task",
    "register_task",
]
