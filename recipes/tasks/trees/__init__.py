from .evaluation import evaluate
from .instructions import TreeInstructions as transform
from .instructions import prepare

__all__ = ["COLUMNS", "SPLITS", "evaluate", "prepare", "transform"]

COLUMNS, SPLITS = {"id", "image", "boxes"}, {"train", "test", "second_scene"}  # of the data that the task reads
