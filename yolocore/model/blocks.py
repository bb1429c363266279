"""The blocks of YOLOv5, each carrying a stack of K models (`num_slots`) side by side in its channels.

A feature map is [B, K*C, H, W], slot-major: channels 0..C-1 belong to slot 0. Convolutions keep the slots apart as
groups, BatchNorm and SiLU work per channel and need no help, concatenation interleaves per slot. With K=1 every block
is the plain one, with no additional copy.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FUSED_INFERENCE = hasattr(torch.ops.mkldnn, "_convolution_pointwise")  # not in builds without oneDNN
_FUSED_TYPES = (torch.float32, torch.bfloat16)

BN_EPS = 1e-3
BN_MOMENTUM = 0.03
FRESH_RUNNING_VAR = 0.9
"""Running variance of a new model: one probe with a zero image at BatchNorm's own momentum 0.1 (0.9*1 + 0.1*0)."""


def concat_slots(maps: Sequence[Tensor], num_slots: int) -> Tensor:
    """Concatenate feature maps along the channels of each slot.

    Args:
        maps: Tensors [B, K*C_i, H, W], slot-major.
        num_slots: K.

    Returns:
        [B, K*sum(C_i), H, W], slot-major, in the memory format of the first map.
    """
    if num_slots == 1:
        return torch.cat(tuple(maps), 1)
    if maps[0].is_contiguous(memory_format=torch.channels_last):
        # Split on the innermost dimension, so that the pieces are contiguous and the result stays channels_last.
        last = [torch.unflatten(m.permute(0, 2, 3, 1), 3, (num_slots, -1)) for m in maps]
        return torch.cat(last, 4).flatten(3).permute(0, 3, 1, 2)
    return torch.cat([torch.unflatten(m, 1, (num_slots, -1)) for m in maps], 2).flatten(1, 2)


def spread_slots(x: Tensor, cohorts: Tensor, copies: int) -> Tensor:
    """Give every slot the feature map of its cohort.

    Args:
        x: [B, G*C, H, W], copy-major.
        cohorts: [K] which of the G copies each slot uses.
        copies: G.

    Returns:
        [B, K*C, H, W], slot-major, in the memory format of `x`.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        last = torch.unflatten(x.permute(0, 2, 3, 1), 3, (copies, -1))
        return last.index_select(3, cohorts).flatten(3).permute(0, 3, 1, 2)
    return torch.unflatten(x, 1, (copies, -1)).index_select(1, cohorts).flatten(1, 2)


class SlotBatchNorm(nn.BatchNorm2d):
    """BatchNorm over K*C channels with a batch counter per slot (`num_batches_tracked` is [K])."""

    num_batches_tracked: Tensor

    def __init__(self, channels: int, num_slots: int) -> None:
        super().__init__(channels * num_slots, eps=BN_EPS, momentum=BN_MOMENTUM)
        self.register_buffer("num_batches_tracked", torch.ones(num_slots, dtype=torch.long))
        nn.init.constant_(self.get_buffer("running_var"), FRESH_RUNNING_VAR)


class Conv(nn.Module):
    """Convolution without bias, BatchNorm, SiLU.

    Args:
        c_in: Channels of one slot's input.
        c_out: Channels of one slot's output.
        kernel: Side of the kernel in pixels.
        stride: Stride in pixels.
        padding: Padding in pixels, half the kernel if None.
        num_slots: K.
        shared_input: The input is one map for all slots [B, c_in, H, W]: the image, or what a shared trunk gives.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int | None = None,
        *,
        num_slots: int = 1,
        shared_input: bool = False,
    ) -> None:
        super().__init__()
        groups = 1 if shared_input else num_slots
        pad = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(c_in * groups, c_out * num_slots, kernel, stride, pad, groups=groups, bias=False)
        self.bn = SlotBatchNorm(c_out, num_slots)

    def forward(self, x: Tensor) -> Tensor:
        """[B, K*c_in, H, W] -> [B, K*c_out, H/stride, W/stride]."""
        if not self.training and _FUSED_INFERENCE and x.device.type == "cpu" and not torch.is_grad_enabled():
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.conv.weight.dtype
            if dtype in _FUSED_TYPES:
                return self._fused(x.to(dtype))
        return F.silu(self.bn(self.conv(x)))

    def _fused(self, x: Tensor) -> Tensor:
        """Evaluation in one pass: the running statistics folded into the weights, SiLU in the same kernel."""
        conv, bn = self.conv, self.bn
        mean, variance = bn.get_buffer("running_mean"), bn.get_buffer("running_var")
        scale = bn.weight * torch.rsqrt(variance + bn.eps)
        weight, bias = conv.weight * scale.view(-1, 1, 1, 1), bn.bias - mean * scale
        geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        # The operator that torch.compile puts such layers into.
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, weight.to(x.dtype), bias.to(x.dtype), *geometry, "swish", [], ""
        )
        return out


class Bottleneck(nn.Module):
    """1x1 and 3x3 convolution on `channels` per slot, added to the input if `shortcut`."""

    def __init__(self, channels: int, *, shortcut: bool, num_slots: int) -> None:
        super().__init__()
        self.cv1 = Conv(channels, channels, 1, num_slots=num_slots)
        self.cv2 = Conv(channels, channels, 3, num_slots=num_slots)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[B, K*channels, H, W] -> the same shape."""
        out: Tensor = self.cv2(self.cv1(x))
        return x + out if self.shortcut else out


class C3(nn.Module):
    """Two 1x1 branches of half the width, one through `repeats` bottlenecks, concatenated into a 1x1 convolution."""

    def __init__(
        self, c_in: int, c_out: int, repeats: int, *, shortcut: bool, num_slots: int, shared_input: bool = False
    ) -> None:
        super().__init__()
        half = c_out // 2
        self.num_slots = num_slots
        self.cv1 = Conv(c_in, half, num_slots=num_slots, shared_input=shared_input)
        self.cv2 = Conv(c_in, half, num_slots=num_slots, shared_input=shared_input)
        self.cv3 = Conv(2 * half, c_out, num_slots=num_slots)
        self.m = nn.Sequential(*(Bottleneck(half, shortcut=shortcut, num_slots=num_slots) for _ in range(repeats)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, K*c_in, H, W] -> [B, K*c_out, H, W]."""
        out: Tensor = self.cv3(concat_slots((self.m(self.cv1(x)), self.cv2(x)), self.num_slots))
        return out


class SPPF(nn.Module):
    """1x1 convolution, three chained max-pools, all four concatenated into a 1x1 convolution."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 5, *, num_slots: int, shared_input: bool = False) -> None:
        super().__init__()
        half = c_in // 2
        self.num_slots = num_slots
        self.kernel = kernel
        self.cv1 = Conv(c_in, half, num_slots=num_slots, shared_input=shared_input)
        self.cv2 = Conv(4 * half, c_out, num_slots=num_slots)

    def forward(self, x: Tensor) -> Tensor:
        """[B, K*c_in, H, W] -> [B, K*c_out, H, W]."""
        maps: list[Tensor] = [self.cv1(x)]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], self.kernel, stride=1, padding=self.kernel // 2))
        out: Tensor = self.cv2(concat_slots(maps, self.num_slots))
        return out


class Upsample(nn.Module):
    """Nearest neighbour, twice the height and width."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, K*C, H, W] -> [B, K*C, 2H, 2W]."""
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Concat(nn.Module):
    """Concatenation along the channels of each slot."""

    def __init__(self, num_slots: int) -> None:
        super().__init__()
        self.num_slots = num_slots

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Tensors [B, K*C_i, H, W] -> [B, K*sum(C_i), H, W]."""
        return concat_slots(maps, self.num_slots)


class Detect(nn.Module):
    """One 1x1 convolution with bias per level; holds the anchors and strides that give its output a meaning.

    Args:
        c_in: Channels of one slot's input map, per level.
        num_classes: C.
        anchors: [L, A, 2] grid units, shared by the slots.
        strides: [L] pixels.
        num_slots: K.
    """

    anchors: Tensor
    strides: Tensor

    def __init__(
        self, c_in: Sequence[int], num_classes: int, anchors: Tensor, strides: Tensor, *, num_slots: int
    ) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.num_anchors = anchors.shape[1]
        self.num_outputs = 5 + num_classes
        self.register_buffer("anchors", anchors)
        self.register_buffer("strides", strides, persistent=False)
        out = num_slots * self.num_anchors * self.num_outputs
        self.m = nn.ModuleList(nn.Conv2d(c * num_slots, out, 1, groups=num_slots) for c in c_in)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, K*C_i, H, W] per level -> raw outputs [K, B, A, H, W, 5+C] per level, views."""
        return [self._arrange(conv(x)) for conv, x in zip(self.m, maps, strict=True)]

    def _arrange(self, raw: Tensor) -> Tensor:
        """[B, K*A*(5+C), H, W] -> [K, B, A, H, W, 5+C]."""
        split = torch.unflatten(raw, 1, (self.num_slots, self.num_anchors, self.num_outputs))
        return split.permute(1, 0, 2, 4, 5, 3)  # no copy: the loss and the decoder read any strides
