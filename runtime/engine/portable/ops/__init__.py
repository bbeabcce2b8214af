"""The operations, filed and named as coremltools files them; importing this package registers them all."""

from glassine.runtime.engine.portable.ops import (
    activation,
    conv,
    elementwise_binary,
    elementwise_unary,
    image_resizing,
    linear,
    normalization,
    reduction,
    scatter_gather,
    tensor_operation,
    tensor_transformation,
    transformers,
)

__all__ = [
    "activation",
    "conv",
    "elementwise_binary",
    "elementwise_unary",
    "image_resizing",
    "linear",
    "normalization",
    "reduction",
    "scatter_gather",
    "tensor_operation",
    "tensor_transformation",
    "transformers",
]
