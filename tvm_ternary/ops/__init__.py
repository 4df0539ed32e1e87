"""Single compiled operators, for those who have arrays and no model."""

from tvm_ternary.ops.cached_attention import CachedAttention, cached_attention
from tvm_ternary.ops.linear import Linear, linear

__all__ = ["CachedAttention", "Linear", "cached_attention", "linear"]
