"""The self-calibrated convolution with its batch norms folded into weights and biases, in the framework's operators."""

from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from cascadeops.reference.self_calibrated_gate import self_calibrated_gate


def self_calibrated_conv2d(
    x: Tensor,
    k2_weight: Tensor,
    k3_weight: Tensor,
    k4_weight: Tensor,
    k2_bias: Tensor | None = None,
    k3_bias: Tensor | None = None,
    k4_bias: Tensor | None = None,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    pooling: int = 4,
) -> Tensor:
    pooled = avg_pool2d(x, (min(pooling, x.size(2)), min(pooling, x.size(3))))
    k2 = conv2d(pooled, k2_weight, k2_bias, 1, dilation, dilation, groups)
    k3 = conv2d(x, k3_weight, k3_bias, 1, dilation, dilation, groups)
    return conv2d(self_calibrated_gate(x, k3, k2), k4_weight, k4_bias, stride, dilation, dilation, groups)
