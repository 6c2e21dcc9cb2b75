"""Names of element-wise operations, as functions, methods and in-place forms. What they do to zeros is computed, not listed (``zeros``)."""

from __future__ import annotations

import operator

# fmt: off
# The same numbers in another form or place.
CASTS = (
    "clone", "contiguous", "detach", "to", "float", "half", "double", "bfloat16", "type", "cpu", "cuda", "requires_grad_", "positive",
    "data", "int", "long", "type_as", "real", "conj",
)
# The last tensor divides.
DIVISIONS = (
    "div", "divide", "true_divide", "floor_divide", "fmod", "remainder",
)
ELEMENTWISE = (
    "relu", "relu6", "leaky_relu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "hardswish", "tanh", "hardtanh", "mish", "softsign",
    "abs", "neg", "negative", "sqrt", "square", "sin", "sinh", "asin", "atan", "erf", "sign", "sgn", "floor", "ceil", "round", "trunc",
    "expm1", "log1p", "hardshrink", "tanhshrink", "softshrink", "nan_to_num", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "bool", "asinh", "atanh", "tan", "frac", "deg2rad", "sigmoid",
    "hardsigmoid", "softplus", "exp", "exp2", "cos", "cosh", "log", "log2", "log10", "rsqrt", "reciprocal", "logsigmoid", "erfc", "acos",
    "isnan", "isinf", "isfinite", "logical_not", "bitwise_not", "threshold", "logit", "digamma", "lgamma", "sinc", "erfinv", "signbit",
    "zero", "fill", "normal", "uniform", "bernoulli", "rsub", "clamp", "clip", "clamp_min", "clamp_max", "copy", "add", "sub",
    "subtract", "maximum", "minimum", "fmax", "fmin", "addcmul", "addcdiv", "lerp", "hypot", "complex", "mul", "multiply", "logical_and",
    "bitwise_and", "masked_fill", "copysign", "atan2", "polar", "pow", "eq", "ne", "lt", "le", "gt", "ge", "greater", "less",
    "not_equal", "less_equal", "greater_equal", "logical_or", "logical_xor", "bitwise_or", "bitwise_xor", "isclose", "heaviside",
    "xlogy", "logaddexp", "float_power", "angle", "absolute", "arctan", "arctan2", "arcsin", "arcsinh", "arccos", "arccosh", "acosh",
    "arctanh", "fix", "sigmoid_", "rad2deg", "ldexp", "nextafter", "gcd", "lcm", "bitwise_left_shift", "bitwise_right_shift",
    "logaddexp2", "special_xlog1py", "xlog1py", "i0", "i0e", "i1", "i1e", "ndtr", "erfcx", "entr", "expit", "log_ndtr", "polygamma",
    "mvlgamma", "isposinf", "isneginf", "isreal", "imag", "conj_physical", "resolve_conj", "resolve_neg", "threshold_", "dequantize",
)
# fmt: on
OPERATORS = tuple(
    getattr(operator, name)
    for name in (
        *("add", "sub", "iadd", "isub", "mul", "imul", "and_", "iand", "pow", "ipow", "eq", "ne", "lt", "le", "gt", "ge"),
        *("or_", "ior", "xor", "ixor", "invert", "neg", "pos", "abs", "lshift", "rshift"),
    )
)
