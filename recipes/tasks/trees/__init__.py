from .evaluation import evaluate
from .instructions import prepare, transform

__all__ = ["evaluate", "prepare", "transform"]
