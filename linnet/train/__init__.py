"""Training: recipes, the loop, checkpoints, metrics and the report."""

from linnet.train.recipe import Recipe
from linnet.train.report import write_report
from linnet.train.sft import SftRecipe
from linnet.train.trainer import Trainer

__all__ = ["Recipe", "SftRecipe", "Trainer", "write_report"]
