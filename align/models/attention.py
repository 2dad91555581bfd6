"""Attention backends through diffusers' own switch, checked before a run starts."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0

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


class DispatchedAttention:
    """Self and cross attention of a UNet's transformer blocks through `dispatch_attention_fn`.

    diffusers' `AttnProcessor2_0` calls torch's attention directly too. It also serves layers with norms or residuals of
    their own; those keep it (see `_is_plain`).
    """

    _attention_backend: AttentionBackendName | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1))  # (B, L, heads, dim)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
        )
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, source.shape[1], len(source))
            attention_mask = mask.view(len(source), attn.heads, -1, mask.shape[-1])
        mixed = dispatch_attention_fn(query, key, value, attention_mask, backend=self._attention_backend)
        return attn.to_out[1](attn.to_out[0](mixed.flatten(2).to(query.dtype)))


def set_attention(network: torch.nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Select attention backend `name` for `network` and prove that it runs there; returns diffusers' name of it.

    `auto` is torch's scaled-dot-product attention, but for half precision on CPUs: there the backward pass of the fused
    kernel is slower than that of plain matrix products.
    Raises: UserError if the backend is unknown, not installed, or has no kernel for this device, dtype and head size.
    """
    half_on_cpu = device.type == "cpu" and dtype != torch.float32
    chosen = name if name != "auto" else "math" if half_on_cpu else "sdpa"
    backend = ALIASES.get(chosen, chosen)
    known = [b.value for b in AttentionBackendName]
    if backend not in known:
        options = ["auto", *ALIASES, *known]
        raise UserError(
            f"model.attention: unknown backend '{name}'{nearest(name, options)}; one of: {', '.join(options)}"
        )
    layers = [m for m in network.modules() if isinstance(m, Attention)]
    for layer in layers:
        if isinstance(layer.processor, JointAttnProcessor2_0):
            layer.set_processor(DispatchedJointAttention())
        elif _is_plain(layer):
            layer.set_processor(DispatchedAttention())  # type: ignore[arg-type]
    fixed = {type(m.processor).__name__ for m in layers if not hasattr(m.processor, "_attention_backend")}
    if fixed and name not in ("auto", "sdpa"):
        raise UserError(
            f"model.attention: layers with {', '.join(sorted(fixed))} ignore the choice of a backend; use attention=auto"
        )
    try:
        network.set_attention_backend(backend)  # type: ignore[operator]
        for size in sorted({m.inner_dim // m.heads for m in layers} or {64}):
            probe = torch.ones(1, 16, 2, size, device=device, dtype=dtype)
            dispatch_attention_fn(probe, probe, probe, backend=AttentionBackendName(backend))
    except Exception as problem:  # every library reports a missing kernel in its own way
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise UserError(
            f"model.attention: backend '{name}' does not run here ({device}, {dtype}): {first}; use attention=sdpa"
        ) from problem
    return backend


def _is_plain(layer: Attention) -> bool:
    """Whether `AttnProcessor2_0` does nothing for this layer that `DispatchedAttention` leaves out."""
    extras = (layer.spatial_norm, layer.group_norm, layer.norm_cross, layer.norm_q, layer.norm_k)
    return (
        type(layer.processor) is AttnProcessor2_0
        and all(extra is None for extra in extras)
        and not layer.residual_connection
        and layer.rescale_output_factor == 1
    )
