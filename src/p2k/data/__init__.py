"""Floor 3: generators first, checksummed downloads second."""

from p2k.data.image_data import ImageData, as_float

__all__ = ["ImageData", "as_float"]
