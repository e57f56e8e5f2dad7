"""Adapters: modules whose forward uses a weight functionally, instead of calling the layer that owns it.

An adapter is a function registered under the dotted name of a module class, so that the class need not be imported. It
takes the module and returns the names of the weights that its forward uses: its own parameters, which get a rule of their
own, or "child.weight", which shares the rule of that converted child:

    @fahooks.register_adapter("my_package.attention.Attention")
    def attention(module):
        return ["qkv.weight"]
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fahooks import plugins

register_adapter = plugins.adapters.register


@register_adapter("torch.nn.modules.activation.MultiheadAttention")
def multihead_attention(module: nn.MultiheadAttention) -> Sequence[str]:
    """The in-projection, packed or separate, and the out-projection."""
    if module._qkv_same_embed_dim:
        return ["in_proj_weight", "out_proj.weight"]
    return ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]


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
