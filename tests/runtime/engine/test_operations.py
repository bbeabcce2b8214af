"""Every operation against an oracle: coremltools' own NumPy inference where it has one, PyTorch elsewhere."""

from __future__ import annotations

import itertools

import coremltools as ct
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, types
from torch import Tensor

from glassine.errors import EngineError
from glassine.runtime.engine.portable.registry import op

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4, 5)).astype(np.float32)
POSITIVE = np.abs(X) + 0.5
UNIT = np.clip(X, -0.9, 0.9)
Y = RNG.standard_normal((3, 1, 5)).astype(np.float32)
INTS = np.array([[7, -7, 3], [5, 2, -8]], np.int32)
SMALL = np.array([[2, 2, -2], [3, -5, 3]], np.int32)

ELEMENTWISE = ["abs", "ceil", "cos", "cosh", "erf", "exp", "exp2", "floor", "identity", "relu", "relu6", "round"]
ELEMENTWISE += ["sigmoid", "sign", "sin", "sinh", "softplus", "softsign", "square", "tanh"]
ARITHMETIC = ["add", "sub", "mul", "floor_div", "mod", "maximum", "minimum"]
COMPARISONS = ["equal", "not_equal", "greater", "greater_equal", "less", "less_equal"]
REDUCTIONS = ["mean", "sum", "max", "min", "prod", "l1_norm", "l2_norm", "log_sum", "log_sum_exp", "sum_square"]

# (operation, inputs that are tensors, parameters): the oracle is the operation's own value_inference.
INFERRED = [
    *[(name, {"x": X}, {}) for name in ELEMENTWISE],
    *[(name, {"x": UNIT}, {}) for name in ["acos", "asin", "atan", "atanh", "tan"]],
    *[(name, {"x": POSITIVE}, {}) for name in ("sqrt", "log", "rsqrt", "inverse")],
    ("clip", {"x": X}, {"alpha": -0.5, "beta": 0.7}),
    ("threshold", {"x": X}, {"alpha": 0.2}),
    ("elu", {"x": X}, {"alpha": 0.7}),
    ("leaky_relu", {"x": X}, {"alpha": 0.1}),
    ("linear_activation", {"x": X}, {"alpha": 0.5, "beta": 2.0}),
    ("scaled_tanh", {"x": X}, {"alpha": 0.5, "beta": 2.0}),
    ("sigmoid_hard", {"x": X}, {"alpha": 0.3, "beta": 0.4}),
    ("thresholded_relu", {"x": X}, {"alpha": 0.3}),
    ("clamped_relu", {"x": X}, {"alpha": 0.2, "beta": 0.8}),
    ("prelu", {"x": X}, {"alpha": np.array([0.1, 0.2, 0.3], np.float32)}),
    ("softplus_parametric", {"x": X}, {
        "alpha": np.array([1, 2, 3], np.float32), "beta": np.array([0.5, 1, 2], np.float32)
    }),
    *[("gelu", {"x": X}, {"mode": mode}) for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")],
    *[("softmax", {"x": X}, {"axis": axis}) for axis in (-1, 1)],
    *[(name, {"x": X, "y": Y}, {}) for name in [*ARITHMETIC, "real_div"]],
    *[(name, {"x": INTS, "y": SMALL}, {}) for name in ARITHMETIC],
    ("pow", {"x": POSITIVE, "y": Y}, {}),
    *[(name, {"x": X, "y": X[:1]}, {}) for name in COMPARISONS],
    *[(f"reduce_{name}", {"x": POSITIVE}, {"axes": [1, -1], "keep_dims": keep})
      for name, keep in itertools.product(REDUCTIONS, (True, False))],
    ("reduce_sum", {"x": INTS}, {"axes": [0], "keep_dims": False}),
    *[(name, {"x": X}, {"axis": 2, "keep_dims": keep}) for name, keep in itertools.product(
        ("reduce_argmax", "reduce_argmin"), (True, False)
    )],
    ("matmul", {"x": X, "y": X}, {"transpose_y": True}),
    ("matmul", {"x": X, "y": X}, {"transpose_x": True}),
    ("matmul", {"x": INTS, "y": SMALL}, {"transpose_y": True}),
    ("linear", {"x": X}, {"weight": Y[:, 0].copy(), "bias": np.array([1, 2, 3], np.float32)}),
    ("layer_norm", {"x": X}, {"axes": [-1], "gamma": Y[0, 0].copy(), "beta": Y[1, 0].copy(), "epsilon": 1e-3}),
    ("layer_norm", {"x": X}, {"axes": [1], "gamma": Y[:, 0, 0].copy(), "beta": Y[:, 0, 1].copy(), "epsilon": 1e-5}),
    ("layer_norm", {"x": X}, {"axes": [1, 3], "epsilon": 1e-5}),
    ("l2_norm", {"x": X}, {"epsilon": 1e-4}),
    ("expand_dims", {"x": X[0]}, {"axes": [0, -1]}),
    ("squeeze", {"x": Y}, {"axes": [1]}),
    ("reshape", {"x": X}, {"shape": [2, -1, 10]}),
    ("transpose", {"x": X}, {"perm": [0, 2, 3, 1]}),
    ("reverse", {"x": X}, {"axes": [1, -1]}),
    ("slice_by_index", {"x": X}, {"begin": [0, -2, 1, 4], "end": [2, 3, 4, 0], "stride": [1, 1, 2, -2]}),
    ("slice_by_index", {"x": X}, {
        "begin": [1, 0, 1, 2], "end": [0, 2, 0, 9], "begin_mask": [False, True, False, False],
        "end_mask": [False, False, True, False], "squeeze_mask": [True, False, False, False],
    }),
    ("slice_by_size", {"x": X}, {"begin": [0, 1, 0, 2], "size": [2, -1, 3, 2]}),
    ("slice_update", {"x": X, "update": np.zeros((2, 1, 2, 5), np.float32)}, {
        "begin": [0, 1, 0, 0], "end": [2, 2, 4, 5], "stride": [1, 1, 2, 1]
    }),
    *[("pad", {"x": X}, {"pad": [1, 2, 3, 0], "mode": mode, "constant_val": 0.5})
      for mode in ("constant", "reflect", "replicate")],
    ("tile", {"x": X}, {"reps": [1, 2, 1, 3]}),
    ("band_part", {"x": X}, {"lower": 1, "upper": 0}),
    ("flatten2d", {"x": X}, {"axis": 2}),
    ("cumsum", {"x": X}, {"axis": 1, "exclusive": False, "reverse": True}),
    ("argsort", {"x": X}, {"axis": 3, "ascending": True}),
    ("topk", {"x": X}, {"k": 2, "axis": -1, "ascending": True}),
    ("fill_like", {"ref_tensor": X}, {"value": 3.0}),
    ("gather", {"x": X}, {"indices": np.array([[2, 0], [1, 1]], np.int32), "axis": 1}),
    ("gather", {"x": X}, {"indices": np.array([[2, 0], [1, 1]], np.int32), "axis": 1, "batch_dims": 1}),
    ("gather_along_axis", {"x": X}, {"indices": np.array(RNG.integers(0, 5, (2, 3, 4, 7)), np.int32), "axis": 3}),
    ("split", {"x": X}, {"axis": 3, "split_sizes": [1, 3, 1], "num_splits": 3}),
    ("scaled_dot_product_attention", {"query": X, "key": X[:, :, ::-1].copy(), "value": X}, {
        "attn_mask": np.tril(np.ones((4, 4), bool))
    }),
]  # fmt: skip


def numpy_inference(name: str, inputs: dict[str, np.ndarray], parameters: dict[str, object]) -> list[np.ndarray]:
    """What coremltools itself computes of constants."""
    with Function({}, opset_version=ct.target.iOS18):
        # Copies: some of these functions (thresholded_relu's) write into their argument.
        constants = {key: mb.const(val=value.copy()) for key, value in inputs.items()}
        result = getattr(mb, name)(**constants, **parameters)
    return [np.asarray(x.val) for x in (result if isinstance(result, list | tuple) else [result])]


def cast_if_bool(x):
    return mb.cast(x=x, dtype="int32") if x.dtype == types.bool else x


@pytest.mark.parametrize(
    ("name", "inputs", "parameters"), [pytest.param(*case, id=f"{n}-{case[0]}") for n, case in enumerate(INFERRED)]
)
def test_equals_coremltools_own_inference(run, name, inputs, parameters):
    def build(**variables):
        result = getattr(mb, name)(**variables, **parameters)
        return [cast_if_bool(x) for x in (result if isinstance(result, list | tuple) else [result])]

    expected = numpy_inference(name, inputs, parameters)
    actual = run(build, **inputs)
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        if np.issubdtype(theirs.dtype, np.floating):
            np.testing.assert_allclose(ours, theirs, rtol=3e-6, atol=2e-6)  # measured: 2.3e-7 beyond rtol
        else:
            np.testing.assert_array_equal(ours, theirs.astype(np.int32))


def tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


W = RNG.standard_normal((6, 3, 3, 2)).astype(np.float32)
B = RNG.standard_normal(6).astype(np.float32)
GROUPED = RNG.standard_normal((6, 1, 3, 2)).astype(np.float32)
POINT = RNG.standard_normal((6, 3, 1, 1)).astype(np.float32)
T = RNG.standard_normal((3, 4, 3, 2)).astype(np.float32)
V = RNG.standard_normal(3).astype(np.float32)
NORM = {"mean": V, "variance": np.abs(V) + 1, "gamma": V[::-1].copy(), "beta": V, "epsilon": np.float32(1e-3)}
IMAGE = RNG.standard_normal((1, 2, 5, 6)).astype(np.float32)
BOXES = np.array([[[0, 1], [1, 2]], [[1, 0], [0, 2]]], np.int32)

# (name, what builds it, inputs, what PyTorch says)
AGAINST_TORCH = {
    "silu": (lambda x: mb.silu(x=x), [X], F.silu),
    "conv": (lambda x: mb.conv(x=x, weight=W, bias=B), [X], lambda x: F.conv2d(x, tensor(W), tensor(B))),
    "conv strides, dilations": (
        lambda x: mb.conv(x=x, weight=W, strides=[2, 1], dilations=[1, 2], pad_type="custom", pad=[1, 1, 2, 2]),
        [X],
        lambda x: F.conv2d(x, tensor(W), stride=(2, 1), dilation=(1, 2), padding=(1, 2)),
    ),
    "conv asymmetric": (
        lambda x: mb.conv(x=x, weight=W, pad_type="custom", pad=[0, 1, 2, 0]),
        [X],
        lambda x: F.conv2d(F.pad(x, [2, 0, 0, 1]), tensor(W)),
    ),
    "conv same": (
        lambda x: mb.conv(x=x, weight=W, strides=[2, 2], pad_type="same"),
        [X],
        lambda x: F.conv2d(F.pad(x, [0, 1, 0, 1]), tensor(W), stride=2),
    ),
    "conv same_lower": (
        lambda x: mb.conv(x=x, weight=W, strides=[2, 2], pad_type="same_lower"),
        [X],
        lambda x: F.conv2d(F.pad(x, [1, 0, 1, 0]), tensor(W), stride=2),
    ),
    "conv groups": (
        lambda x: mb.conv(x=x, weight=GROUPED, groups=3),
        [X],
        lambda x: F.conv2d(x, tensor(GROUPED), groups=3),
    ),
    "conv 1x1": (lambda x: mb.conv(x=x, weight=POINT, bias=B), [X], lambda x: F.conv2d(x, tensor(POINT), tensor(B))),
    "conv 1x1 of one cell": (
        lambda x: mb.conv(x=x, weight=POINT, bias=B),
        [X[:, :, :1, :1].copy()],
        lambda x: F.conv2d(x, tensor(POINT), tensor(B)),
    ),
    "conv 1d": (
        lambda x: mb.conv(x=x, weight=W[:, :, :, 0].copy(), bias=B),
        [X[:, :, 0].copy()],
        lambda x: F.conv1d(x, tensor(W[:, :, :, 0]), tensor(B)),
    ),
    "conv_transpose": (
        lambda x: mb.conv_transpose(x=x, weight=T, strides=[2, 3], pad_type="custom", pad=[1, 1, 0, 0]),
        [X],
        lambda x: F.conv_transpose2d(x, tensor(T), stride=(2, 3), padding=(1, 0)),
    ),
    "conv_transpose beyond its windows": (
        lambda x: mb.conv_transpose(x=x, weight=T, strides=[2, 3], output_shape=[2, 4, 10, 15]),
        [X],
        lambda x: F.conv_transpose2d(x, tensor(T), stride=(2, 3), output_padding=(1, 1)),
    ),
    "batch_norm": (
        lambda x: mb.batch_norm(x=x, **NORM),
        [X],
        lambda x: F.batch_norm(x, *(tensor(NORM[k]) for k in ("mean", "variance", "gamma", "beta")), eps=1e-3),
    ),
    "instance_norm": (
        lambda x: mb.instance_norm(x=x, gamma=V, beta=V, epsilon=1e-2),
        [X],
        lambda x: F.instance_norm(x, weight=tensor(V), bias=tensor(V), eps=1e-2),
    ),
    "local_response_norm": (
        lambda x: mb.local_response_norm(x=x, size=3, alpha=0.1, beta=0.6, k=2.0),
        [X],
        lambda x: F.local_response_norm(x, 3, 0.1, 0.6, 2.0),
    ),
    "einsum": (
        lambda x, y: mb.einsum(values=(x, y), equation="nchw,nwhu->nchu"),
        [X, RNG.standard_normal((2, 5, 4, 7)).astype(np.float32)],
        lambda x, y: torch.einsum("nchw,nwhu->nchu", x, y),
    ),
    "concat interleaved": (
        lambda x, y: mb.concat(values=(x, y), axis=1, interleave=True),
        [X, X + 1],
        lambda x, y: torch.stack([x, y], 2).flatten(1, 2),
    ),
    "stack": (lambda x, y: mb.stack(values=(x, y), axis=-1), [X, X + 1], lambda x, y: torch.stack([x, y], -1)),
    "upsample_nearest_neighbor": (
        lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2.0, scale_factor_width=3.0),
        [X],
        lambda x: x.repeat_interleave(2, -2).repeat_interleave(3, -1),
    ),
    "upsample_bilinear": (
        lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2.0, scale_factor_width=3.0, align_corners=True),
        [X],
        lambda x: F.interpolate(x, scale_factor=(2, 3), mode="bilinear", align_corners=True),
    ),
    "resize_bilinear": (
        lambda x: mb.resize_bilinear(x=x, target_size_height=7, target_size_width=3, sampling_mode="UNALIGN_CORNERS"),
        [X],
        lambda x: F.interpolate(x, size=(7, 3), mode="bilinear", align_corners=False),
    ),
    "resize_nearest_neighbor": (
        lambda x: mb.resize_nearest_neighbor(x=x, target_size_height=7, target_size_width=3),
        [X],
        lambda x: F.interpolate(x, size=(7, 3), mode="nearest"),
    ),
    "pixel_shuffle": (
        lambda x: mb.pixel_shuffle(x=x, upscale_factor=2),
        [RNG.standard_normal((1, 8, 2, 3)).astype(np.float32)],
        lambda x: torch.pixel_shuffle(x, 2),
    ),
    "max_pool": (
        lambda x: mb.max_pool(
            x=x, kernel_sizes=[2, 3], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1], ceil_mode=True
        ),
        [IMAGE],
        lambda x: F.max_pool2d(x, (2, 3), 2, (1, 1), ceil_mode=True),
    ),
    "avg_pool": (
        lambda x: mb.avg_pool(
            x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1], ceil_mode=True
        ),
        [IMAGE],
        lambda x: F.avg_pool2d(x, 2, 2, 1, ceil_mode=True),
    ),
    "avg_pool without padding": (
        lambda x: mb.avg_pool(
            x=x, kernel_sizes=[2, 2], pad_type="custom", pad=[1, 1, 1, 1], exclude_padding_from_average=True
        ),
        [IMAGE],
        lambda x: F.avg_pool2d(x, 2, 1, 1, count_include_pad=False),
    ),
    "gather_nd": (
        lambda x: mb.gather_nd(x=x, indices=BOXES),
        [X],
        lambda x: x[tensor(BOXES[..., 0]).long(), tensor(BOXES[..., 1]).long()],
    ),
    "scatter_nd": (
        lambda x: mb.scatter_nd(
            data=x, indices=np.array([[0], [0], [1]], np.int32), updates=np.ones((3, 3, 4, 5), np.float32)
        ),
        [X],
        lambda x: x + torch.tensor([2.0, 1.0]).reshape(2, 1, 1, 1),
    ),
    "select": (
        lambda x, y: mb.select(cond=mb.greater(x=x, y=y), a=x, b=y),
        [X, X[::-1].copy()],
        torch.maximum,
    ),
}


@pytest.mark.parametrize("name", AGAINST_TORCH)
def test_equals_torch(run, name):
    build, arrays, reference = AGAINST_TORCH[name]
    inputs = {"x": arrays[0], **({"y": arrays[1]} if len(arrays) == 2 else {})}
    (actual,) = run(build, **inputs)
    expected = reference(*map(tensor, arrays)).numpy()
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=4e-6)  # measured 4.2e-7 absolute


def test_integers_are_exact(run):
    # 2^24 + 1 is no float32: whatever passes through floats loses it.
    x = np.array([2**24 + 1, -(2**31), 2**31 - 1], np.int32)
    add, product, total = run(
        lambda x: [mb.add(x=x, y=np.int32(2)), mb.mul(x=x, y=np.int32(3)), mb.reduce_sum(x=x, axes=[0])], x=x
    )
    np.testing.assert_array_equal(add, np.array([2**24 + 3, -(2**31) + 2, -(2**31) + 1], np.int64).astype(np.int32))
    np.testing.assert_array_equal(product, (x.astype(np.int64) * 3).astype(np.int32))
    assert total.item() == 2**24


def test_negative_indices_count_from_the_end_up_to_ios16(run):
    indices = np.array([-1, 0], np.int32)
    (actual,) = run(lambda x: mb.gather(x=x, indices=indices, axis=1), opset=ct.target.iOS16, x=X)
    np.testing.assert_array_equal(actual, X[:, [2, 0]])


def test_indices_out_of_range_from_ios17_on(run):
    def build(x, indices, *, validate):
        return mb.gather(x=x, indices=indices, axis=1, validate_indices=validate)

    indices = np.array([-1, 7], np.int32)
    (actual,) = run(lambda x, indices: build(x, indices, validate=False), x=X, indices=indices)
    np.testing.assert_array_equal(actual, X[:, [0, 2]])
    with pytest.raises(EngineError, match="an index is out of range: -1 to 7, expected 0 to 2"):
        run(lambda x, indices: build(x, indices, validate=True), x=X, indices=indices)


def test_loops_and_choices(run):
    def build(x):
        _, total = mb.while_loop(
            _cond=lambda i, total: mb.less(x=i, y=np.int32(5)),
            _body=lambda i, total: (mb.add(x=i, y=np.int32(1)), mb.mul(x=total, y=np.float32(2))),
            loop_vars=(mb.const(val=np.int32(0)), x),
        )
        large = mb.greater(x=mb.reduce_max(x=total, axes=[0], keep_dims=False), y=np.float32(100))
        return mb.cond(pred=large, _true_fn=lambda: mb.sub(x=total, y=x), _false_fn=lambda: mb.identity(x=x))

    x = np.array([1.0, 4.0], np.float32)
    np.testing.assert_array_equal(run(build, x=x)[0], 31 * x)
    np.testing.assert_array_equal(run(build, x=x / 4)[0], x / 4)


def test_registering_an_operation_twice_is_refused():
    with pytest.raises(ValueError, match="'conv' is registered twice"):

        @op("conv")
        def conv(x: Tensor) -> Tensor:
            return x


def test_scalars_gather_and_concatenate(run):
    x = np.array([5.0, 6.0], np.float32)

    def build(x):
        first, last = (mb.gather(x=x, indices=np.int32(i), axis=0) for i in (0, 1))
        return mb.concat(values=(last, first), axis=0)

    np.testing.assert_array_equal(run(build, opset=ct.target.iOS16, x=x)[0], [6, 5])
