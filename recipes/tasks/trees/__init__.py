from .evaluation import evaluate
from .instructions import TreeInstructions as transform
from .instructions import prepare

__all__ = ["evaluate", "prepare", "transform"]
