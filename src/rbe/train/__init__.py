"""Training networks of seeds from a configuration file: data, model, recipe, run."""

from rbe.train.config import Config, load_config
from rbe.train.run import Progress, Result, load, train

__all__ = ["Config", "Progress", "Result", "load", "load_config", "train"]
