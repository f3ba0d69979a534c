"""Training networks of seeds from a configuration file: data, model, recipe, run."""

from rbe.train.config import Config, load_config
from rbe.train.run import Result, train

__all__ = ["Config", "Result", "load_config", "train"]
