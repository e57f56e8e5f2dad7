"""Adapters: modules whose forward uses a weight functionally, instead of calling the layer that owns it.

An adapter is a function registered under the dotted name of a module class, so that the class need not be imported. It
takes the module and returns the names of the weights that its forward uses: its own parameters, which get a rule of their
own, or "child.weight", which shares the rule of that converted child. Calls of linear maps, convolutions and products are routed
that use such a weight, or a part of it. "weight.mT" is the weight of a linear map that is kept as [in, out]:

    @fahooks.register_adapter("my_package.attention.Attention")
    def attention(module):
        return ["qkv.weight"]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from fahooks import plugins
from fahooks.plugins import InputError

Adapter = TypeVar("Adapter", bound=Callable[[Any], Sequence[str]])


def register_adapter(name: str, *, summary: str = "", paper: str = "") -> Callable[[Adapter], Adapter]:
    """Decorate a function from a module to the names of the weights that its forward uses.

    Arguments:
        name: the dotted name of the module's class, such as "my_package.attention.Attention".
        summary: one line; by default the first line of the docstring.
        paper: the publication, with a link.

    Raises:
        InputError: the name has no dot, or what is decorated is no function.
        NameClash: there is another adapter for the class.
    """
    if not isinstance(name, str) or "." not in name:
        raise InputError(f"an adapter is registered by the dotted name of a class, my_package.attention.Attention, got {name!r}")
    return plugins.adapters.register(name, summary=summary, paper=paper)


@register_adapter("torch.nn.modules.activation.MultiheadAttention")
def multihead_attention(module: nn.MultiheadAttention) -> Sequence[str]:
    """The in-projection, packed or separate, and the out-projection."""
    if module._qkv_same_embed_dim:
        return ["in_proj_weight", "out_proj.weight"]
    return ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]


@register_adapter("torch.nn.modules.linear.Bilinear")
def bilinear(module: nn.Bilinear) -> Sequence[str]:
    """The one weight of two inputs, through which each of them gets its error."""
    return ["weight"]


@register_adapter("timm.models.beit.Attention")
@register_adapter("timm.models.eva.EvaAttention")
@register_adapter("timm.models.swin_transformer_v2.WindowAttention")
def packed_projection(module: nn.Module) -> Sequence[str]:
    """The packed projection, called with a bias put together from those of queries and values; absent where it is split."""
    return ["qkv.weight"] if getattr(module, "qkv", None) is not None else []


@register_adapter("torchvision.models.swin_transformer.ShiftedWindowAttention")
@register_adapter("torchvision.models.video.swin_transformer.ShiftedWindowAttention3d")
def window_attention(module: nn.Module) -> Sequence[str]:
    """The packed projection and the output projection, handed to a function."""
    return ["qkv.weight", "proj.weight"]


@register_adapter("timm.models.naflexvit.NaFlexEmbeds")
def patch_projection(module: nn.Module) -> Sequence[str]:
    """The patch projection, handed to the interpolator of patch sizes."""
    return ["proj.weight"]


@register_adapter("timm.layers.bottleneck_attn.PosEmbedRel")
@register_adapter("timm.layers.halo_attn.PosEmbedRel")
def relative_positions(module: nn.Module) -> Sequence[str]:
    """The embeddings of relative positions, of which there is a product with the queries."""
    return ["height_rel", "width_rel"]


@register_adapter("timm.layers.lambda_layer.LambdaLayer")
def lambda_positions(module: nn.Module) -> Sequence[str]:
    """The embeddings of relative positions; absent where a convolution stands in for them."""
    return [] if module.pos_emb is None else ["pos_emb"]


@register_adapter("timm.models.mvitv2.MultiScaleAttention")
@register_adapter("timm.models.vision_transformer_sam.Attention")
def spatial_positions(module: nn.Module) -> Sequence[str]:
    """The embeddings of relative positions, where attention has any."""
    return ["rel_pos_h", "rel_pos_w"] if hasattr(module, "rel_pos_h") else []


@register_adapter("timm.models.swiftformer.EfficientAdditiveAttention")
def additive_attention(module: nn.Module) -> Sequence[str]:
    """The vector that queries are multiplied by."""
    return ["w_g"]


@register_adapter("timm.layers.cond_conv2d.CondConv2d")
def conditional_convolution(module: nn.Module) -> Sequence[str]:
    """The kernels, and biases, that are mixed for every sample."""
    return ["weight"] if module.bias is None else ["weight", "bias"]


@register_adapter("transformers.pytorch_utils.Conv1D")
def transposed_linear(module: nn.Module) -> Sequence[str]:
    """A linear map that keeps its weight as [in, out]."""
    return ["weight.mT"]
