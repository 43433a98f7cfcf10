"""What one can choose to compare; imports nothing, so that the command line's help is there at once."""

LEVELS = ("outputs", "layers", "gradients", "training", "preprocessing", "weights", "op", "export")
DEFAULT_LEVELS = ("outputs", "layers")
WIDE_LEVELS = ("outputs", "weights")  # of every variant, when all of them are asked for at all levels
DTYPES = ("float64", "float32")
