"""Training networks of seeds from a configuration file: data, model, recipe, run."""

from rbe.train.budget import Share
from rbe.train.config import Config
from rbe.train.reading import load_config
from rbe.train.result import Epoch, Progress, Result
from rbe.train.run import train
from rbe.train.store import load, read_result

__all__ = ["Config", "Epoch", "Progress", "Result", "Share", "load", "load_config", "read_result", "train"]
