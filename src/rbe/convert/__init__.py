"""A dense model to seeds and back: validated first, interrupted at any moment, visible only when complete."""

from rbe.convert.encoding import Encoded, Progress
from rbe.convert.pipeline import Conversion, compress
from rbe.convert.restore import decompress

__all__ = ["Conversion", "Encoded", "Progress", "compress", "decompress"]
