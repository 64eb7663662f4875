"""What PyTorch's operations do to a signal, by their names in ``aten`` without overloads and leading underscores."""

from __future__ import annotations

MOST_BETWEEN = 200
"""Values between two places where the signal is made anew, at most: a scan over time steps has thousands."""

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "convolution", "linear", "trilinear"}
"""Operations that sum products of an input with a weight."""

NORMALIZATIONS = {
    "native_layer_norm",
    "native_group_norm",
    "native_batch_norm",
    "native_batch_norm_legit",
    "native_batch_norm_legit_no_training",
    "batch_norm_with_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "fused_rms_norm",
}

ATTENTIONS = {
    "softmax",
    "safe_softmax",
    "scaled_dot_product_flash_attention",
    "scaled_dot_product_flash_attention_for_cpu",
    "scaled_dot_product_efficient_attention",
    "scaled_dot_product_cudnn_attention",
    "scaled_dot_product_attention_math",
}

LOOKUPS = {"embedding", "embedding_bag", "index_select", "index", "gather"}

LINEAR = {
    *("view", "unsafe_view", "reshape_alias", "t", "transpose", "transpose_", "permute", "expand", "as_strided"),
    *("unsqueeze", "unsqueeze_", "squeeze", "squeeze_", "select", "slice", "unfold", "unbind", "index", "where"),
    *("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "cat", "stack", "repeat", "flip", "roll"),
    *("clone", "detach", "alias", "to_copy", "copy_", "constant_pad_nd", "reflection_pad2d"),
    *("neg", "sum", "mean", "native_dropout", "masked_fill", "masked_fill_", "im2col", "col2im", "pixel_shuffle"),
    *("avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d"),
}
"""Operations that are linear in what they read, if only one of their tensors is data or all are alike."""

LINEAR_IN_ONE = {"mul", "mul_", "div", "div_"}
"""Linear if only one factor is data, and that is no divisor."""

SUMS = {"add", "add_", "sub", "sub_", "rsub", "addcmul", "lerp"}
