"""Images without a framework: reading them, and turning them into the pixel values that the models take."""

from modelspec.images.processor import AutoImageProcessor, ImageBatch, ImageProcessor
from modelspec.images.reading import iterate_images, read_image

__all__ = ["AutoImageProcessor", "ImageBatch", "ImageProcessor", "iterate_images", "read_image"]
