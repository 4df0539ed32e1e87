"""Ternary tensors as data: the canonical planes, the packed layouts of the kernels, and checkpoint files."""

from tvm_ternary.formats.checkpoint import FORMAT_VERSION, load_metadata, load_tensors, save_tensors
from tvm_ternary.formats.dense import pack_dense, unpack_dense
from tvm_ternary.formats.factors import share_scales, with_shared_scales
from tvm_ternary.formats.granularity import Granularity, PerChannel, PerGroup, PerTensor, row_blocks
from tvm_ternary.formats.layouts import (
    BITS_BLOCK,
    CODES_BLOCK,
    DENSE_BLOCK,
    LANES,
    group_segments,
    pack_bits,
    pack_codes,
    pack_scale,
    pack_shared,
    pad_groups,
    padded_k,
    unpack_bits,
    unpack_codes,
)
from tvm_ternary.formats.planes import pack_planes, plane_words, unpack_planes
from tvm_ternary.formats.scheme import (
    ACTIVATION_BITS,
    MAX_PLANES,
    PACKINGS,
    SHARED_SCALES,
    Scheme,
    granularity_from_suffix,
    parse_packed,
    require_packing,
)
from tvm_ternary.formats.ternary import TernaryTensor

__all__ = [
    "ACTIVATION_BITS",
    "BITS_BLOCK",
    "CODES_BLOCK",
    "DENSE_BLOCK",
    "FORMAT_VERSION",
    "LANES",
    "MAX_PLANES",
    "PACKINGS",
    "SHARED_SCALES",
    "Granularity",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "Scheme",
    "TernaryTensor",
    "granularity_from_suffix",
    "group_segments",
    "load_metadata",
    "load_tensors",
    "pack_bits",
    "pack_codes",
    "pack_dense",
    "pack_planes",
    "pack_scale",
    "pack_shared",
    "pad_groups",
    "padded_k",
    "parse_packed",
    "plane_words",
    "require_packing",
    "row_blocks",
    "save_tensors",
    "share_scales",
    "unpack_bits",
    "unpack_codes",
    "unpack_dense",
    "unpack_planes",
    "with_shared_scales",
]
