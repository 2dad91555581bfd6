"""Attention backends through diffusers' own switch, checked before a run starts."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

from align.errors import UserError
from align.schema import nearest

ALIASES = {"sdpa": "native", "math": "_native_math", "cudnn": "_native_cudnn", "efficient": "_native_efficient"}


class DispatchedJointAttention:
    """SD3's joint attention through `dispatch_attention_fn`.

    diffusers' `JointAttnProcessor2_0` calls torch's attention directly, so `set_attention_backend` has no effect on an
    SD3 transformer. This processor computes the same thing and obeys the switch.
    """

    _attention_backend: AttentionBackendName | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        def heads(x: torch.Tensor, norm: torch.nn.Module | None) -> torch.Tensor:
            x = x.unflatten(-1, (attn.heads, -1))  # (B, L, heads, dim), the layout dispatch_attention_fn expects
            return x if norm is None else norm(x)

        image_tokens = hidden_states.shape[1]
        query = heads(attn.to_q(hidden_states), attn.norm_q)
        key = heads(attn.to_k(hidden_states), attn.norm_k)
        value = heads(attn.to_v(hidden_states), None)
        if encoder_hidden_states is not None:
            query = torch.cat([query, heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)], dim=1)
            key = torch.cat([key, heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)], dim=1)
            value = torch.cat([value, heads(attn.add_v_proj(encoder_hidden_states), None)], dim=1)
        mixed = dispatch_attention_fn(query, key, value, backend=self._attention_backend).flatten(2).to(query.dtype)
        image = attn.to_out[1](attn.to_out[0](mixed[:, :image_tokens]))
        if encoder_hidden_states is None:
            return image
        text = mixed[:, image_tokens:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def set_attention(network: torch.nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Select attention backend `name` for `network` and prove that it runs there; returns diffusers' name of it.

    `auto` is torch's scaled-dot-product attention, but for half precision on CPUs: there the backward pass of the fused
    kernel is slower than that of plain matrix products.
    Raises: UserError if the backend is unknown, not installed, or has no kernel for this device, dtype and head size.
    """
    if name == "auto":
        name = "math" if device.type == "cpu" and dtype != torch.float32 else "sdpa"
    backend = ALIASES.get(name, name)
    known = [b.value for b in AttentionBackendName]
    if backend not in known:
        options = ["auto", *ALIASES, *known]
        raise UserError(
            f"model.attention: unknown backend '{name}'{nearest(name, options)}; one of: {', '.join(options)}"
        )
    heads = [m for m in network.modules() if isinstance(m, Attention)]
    for module in heads:
        if isinstance(module.processor, JointAttnProcessor2_0):
            module.set_processor(DispatchedJointAttention())
    try:
        network.set_attention_backend(backend)  # type: ignore[operator]
        probe = torch.ones(1, 16, 2, _head_dim(network), device=device, dtype=dtype)
        dispatch_attention_fn(probe, probe, probe, backend=AttentionBackendName(backend))
    except Exception as problem:  # every library reports a missing kernel in its own way
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise UserError(
            f"model.attention: backend '{name}' does not run here ({device}, {dtype}): {first}; use attention=sdpa"
        ) from problem
    return backend


def _head_dim(network: torch.nn.Module) -> int:
    config = getattr(network, "config", {})
    return int(config.get("attention_head_dim") or 64) if isinstance(config.get("attention_head_dim"), int) else 64
