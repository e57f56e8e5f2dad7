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
