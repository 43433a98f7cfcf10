"""The C++ kernels, called on NumPy arrays; frameworks pass views of their tensors.

The library is built when the package is installed. `why_unavailable()` says what is wrong where it is not there.

Environment: NEIGHBORHOOD_THREADS, the number of threads where no caller says one; NEIGHBORHOOD_INSTRUCTION_SET, one of
avx512, avx2, baseline, instead of the best that the machine has.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from neighborhood.arguments import MAX_AXES, check_arguments
from neighborhood.windows import PerAxis

LIBRARY = Path(__file__).with_name("libneighborhood.so")
# TensorFlow's ops, on top of LIBRARY: for tf.load_op_library, which needs nothing else of this package.
TENSORFLOW_LIBRARY = Path(__file__).with_name("libneighborhood_tensorflow.so")

DTYPES = ("float32", "float64", "float16", "bfloat16")
# Their numbers in the C interface. NumPy has no bfloat16: that of ml_dtypes, or its bits as uint16.
_TYPES = {name: number for number, name in enumerate(DTYPES)} | {"uint16": 3}


class NativeUnavailableError(RuntimeError):
    """The library is missing or cannot be loaded."""


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("batch", "depth", "height", "width", "heads", "head_dim"),
            *("kernel_depth", "kernel_height", "kernel_width"),
            *("dilation_depth", "dilation_height", "dilation_width"),
            "token_stride",
        )
    ]


@functools.cache
def load() -> ctypes.CDLL:
    """Returns the library.

    Raises:
        NativeUnavailableError: it was not built, or the system cannot load it.
    """
    if not LIBRARY.exists():
        raise NativeUnavailableError(
            f"{LIBRARY.name} was not built, for lack of a C++ compiler perhaps; install one (g++ 12 or clang) and then "
            "the package again"
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise NativeUnavailableError(f"{LIBRARY.name} cannot be loaded: {error}") from error
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    shape, scale, integer = ctypes.POINTER(_Shape), ctypes.c_double, ctypes.c_int
    library.neighborhood_forward.argtypes = [integer, shape, *[pointer] * 6, scale, integer, pointer]
    library.neighborhood_backward.argtypes = [integer, shape, *[pointer] * 10, scale, integer, pointer]
    library.neighborhood_set_instruction_set.argtypes = [text]
    library.neighborhood_set_threads.argtypes = [integer]
    library.neighborhood_set_threads.restype = None
    library.neighborhood_get_threads.restype = integer
    for function in ("forward", "backward", "instruction_set", "set_instruction_set"):
        getattr(library, f"neighborhood_{function}").restype = text
    return library


def why_unavailable() -> str | None:
    """Returns why the kernels cannot be had, or None when they can."""
    try:
        load()
    except NativeUnavailableError as error:
        return str(error)
    return None


def set_threads(threads: int) -> None:
    """Sets the number of threads for calls that name none; 0 is every core that this process may use."""
    load().neighborhood_set_threads(threads)


def get_threads() -> int:
    """Returns the number of threads of calls that name none."""
    return load().neighborhood_get_threads()


def instruction_set() -> str:
    """Returns the instruction set in use: avx512, avx2 or baseline."""
    return load().neighborhood_instruction_set().decode()


def set_instruction_set(name: str) -> None:
    """Chooses the instruction set; raises ValueError for one that this machine lacks."""
    _raise(load().neighborhood_set_instruction_set(name.encode()))


def neighborhood_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    *,
    rel_pos_bias: np.ndarray | None = None,
    scale: float | None = None,
    threads: int = 0,
) -> np.ndarray:
    """As `neighborhood.reference.neighborhood_attention`, in the dtype of `query`, see `forward`."""
    query, key, value = (np.ascontiguousarray(array) for array in (query, key, value))
    bias = None if rel_pos_bias is None else np.ascontiguousarray(rel_pos_bias)
    output = np.empty(query.shape, query.dtype)
    forward(query, key, value, bias, kernel_size, dilation, scale, output=output, threads=threads)
    return output


def forward(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    rel_pos_bias: np.ndarray | None,
    kernel_size: PerAxis,
    dilation: PerAxis,
    scale: float | None,
    *,
    output: np.ndarray,
    logsumexp: np.ndarray | None = None,
    threads: int = 0,
) -> None:
    """Writes neighborhood attention into `output`, and what `backward` needs into `logsumexp`.

    Args:
        query, key, value: (B, *spatial, heads, head_dim), one to three spatial axes, contiguous, float32, float64,
            float16 or bfloat16 (of ml_dtypes, or its bits as uint16); the last two are computed in float32.
        rel_pos_bias: (heads, 2 * kernel_size - 1 per axis), or None.
        kernel_size, dilation: a number, or one per axis.
        scale: factor on the dot products; head_dim**-0.5 when None.
        output: like query.
        logsumexp: (B, *spatial, heads), float64: the logarithm of the sum of the exponentials of a query's logits.
        threads: how many threads may work; 0 is the default.

    Raises:
        ValueError: arrays that do not go together, or a window that does not fit.
    """
    call = _Call(query, kernel_size, dilation)
    tokens = {"query": query, "key": key, "value": value, "output": output}
    pointers = call.pointers(tokens, {"rel_pos_bias": rel_pos_bias}, {"logsumexp": logsumexp})
    q, k, v, out, bias, lse = pointers
    run_at("forward", (q, k, v, bias, out, lse), *call.sizes, call.scale(scale), threads)


def backward(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    rel_pos_bias: np.ndarray | None,
    kernel_size: PerAxis,
    dilation: PerAxis,
    scale: float | None,
    logsumexp: np.ndarray,
    grad_output: np.ndarray,
    *,
    grad_query: np.ndarray,
    grad_key: np.ndarray,
    grad_value: np.ndarray,
    grad_rel_pos_bias: np.ndarray | None = None,
    threads: int = 0,
) -> None:
    """Writes the gradients of query, key, value and the bias.

    Args and errors as of `forward`, whose `logsumexp` comes in again; `grad_output` is the gradient of its `output`.
    """
    call = _Call(query, kernel_size, dilation)
    tokens = {"query": query, "key": key, "value": value, "grad_output": grad_output}
    grads = {"grad_query": grad_query, "grad_key": grad_key, "grad_value": grad_value}
    biases = {"rel_pos_bias": rel_pos_bias, "grad_rel_pos_bias": grad_rel_pos_bias}
    pointers = call.pointers(tokens | grads, biases, {"logsumexp": logsumexp})
    q, k, v, grad, grad_q, grad_k, grad_v, bias, grad_bias, lse = pointers
    ordered = (q, k, v, bias, lse, grad, grad_q, grad_k, grad_v, grad_bias)
    run_at("backward", ordered, *call.sizes, call.scale(scale), threads)


def run_at(
    direction: str,
    addresses: Sequence[int | None],
    dtype: str,
    shape: tuple[int, ...],
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    scale: float,
    threads: int,
    token_stride: int = 0,
    parallel: int | None = None,
) -> None:
    """As `forward` and `backward`, for callers that have checked their tensors and know where these lie in memory.

    Args:
        direction: "forward" or "backward".
        addresses: of query, key, value, rel_pos_bias (or None); then of output and logsumexp (or None), or of
            logsumexp, grad_output, grad_query, grad_key, grad_value and grad_rel_pos_bias (or None).
        dtype: one of DTYPES.
        shape: of query.
        kernel_size, dilation: one per axis.
        scale, threads: as of `forward`.
        token_stride: elements from one token to the next of query, key, value and their gradients, where these are not
            contiguous: heads and channels are, and samples, planes and rows follow one another.
        parallel: address of OpenMP's GOMP_parallel, of a caller whose operations run on OpenMP's threads, too. These
            look out for more work for a while after each, which would take cores from the library's own threads.
    """
    kernel = getattr(load(), f"neighborhood_{direction}")
    _raise(
        kernel(_TYPES[dtype], _shape(shape, kernel_size, dilation, token_stride), *addresses, scale, threads, parallel)
    )


@functools.lru_cache(maxsize=256)
def _shape(
    shape: tuple[int, ...], kernel_size: tuple[int, ...], dilation: tuple[int, ...], token_stride: int
) -> _Shape:
    one = (1,) * (MAX_AXES - len(kernel_size))  # a line is a volume of one plane and one row
    return _Shape(shape[0], *one, *shape[1:], *one, *kernel_size, *one, *dilation, token_stride)


class _Call:
    """The checked sizes of one call."""

    def __init__(self, query: np.ndarray, kernel_size: PerAxis, dilation: PerAxis):
        shape = query.shape
        kernel_size, dilation = check_arguments(shape, shape, shape, kernel_size, dilation)
        if query.dtype.name not in _TYPES:
            raise ValueError(f"query is {query.dtype.name}; the kernels take {', '.join(DTYPES)}")
        self.query = query
        self.sizes = (query.dtype.name, shape, kernel_size, dilation)
        self.bias_shape = (shape[-2], *(2 * kernel - 1 for kernel in kernel_size))

    def scale(self, scale: float | None) -> float:
        if scale is not None:
            return scale
        return max(self.query.shape[-1], 1) ** -0.5

    def pointers(self, tokens: dict, biases: dict, logsumexp: dict) -> list[int | None]:
        """Checks named arrays and returns where their data is."""
        dtype, shape = self.query.dtype, self.query.shape
        expected = [
            (tokens, shape, dtype),
            (biases, self.bias_shape, dtype),
            (logsumexp, shape[:-1], np.dtype(np.float64)),
        ]
        pointers = []
        for arrays, shape, dtype in expected:
            for name, array in arrays.items():
                if array is not None and (array.shape != shape or array.dtype != dtype):
                    raise ValueError(
                        f"{name} has shape {array.shape} and dtype {array.dtype.name}; "
                        f"it must have {shape} and {dtype.name}"
                    )
                if array is not None and not array.flags.c_contiguous:
                    raise ValueError(f"{name} is not contiguous")
                pointers.append(None if array is None else array.ctypes.data)
        return pointers


def _raise(problem: bytes | None) -> None:
    if problem is None:
        return
    text = problem.decode()
    raise MemoryError(text) if text.startswith("out of memory") else ValueError(text)
