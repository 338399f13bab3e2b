"""Metamorphosed models of transformers: a cache of constant size for `generate`, and folders that never load as softmax attention.

from vidrial.kernels.power_retention import hf
from vidrial.kernels.power_retention.metamorphosis import metamorphose
model = metamorphose(AutoModelForCausalLM.from_pretrained("Qwen3-0.6B"))
model.generate(tokens, attention_mask=mask, max_new_tokens=100)  # the state is as large as it was
model.save_pretrained("folder")
model = hf.from_pretrained("folder")

Needs transformers 5.20 or later: pip install vidrial-dsl[hf]
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from vidrial import ArgumentError, ToolchainError, UnsupportedError
from vidrial.kernels.power_retention import PowerState
from vidrial.kernels.power_retention.metamorphosis import metamorphose

try:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionLayer
except ImportError as error:
    raise ToolchainError(f"transformers cannot be imported ({error}); install it, 5.20 or later: pip install 'vidrial-dsl[hf]'") from None

__all__ = ["PowerLayer", "adopt", "from_pretrained", "power_cache"]

# Of the model_type of a metamorphosed model's config: transformers knows no such type, and refuses its folder.
PREFIX = "vidrial_power_"


class PowerLayer(LinearAttentionLayer, CacheLayerMixin):  # type: ignore[misc]
    """A layer of a cache that is the state of one power retention: S and Z, float32, as large after a million tokens as after one."""

    is_compileable = False
    is_sliding = False

    def __init__(self) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=2)
        self.is_initialized, self.seen = True, 0

    @property
    def power_state(self) -> PowerState[Any] | None:
        """The state behind the tokens so far; None before the first."""
        return PowerState(self.recurrent_states[0], self.recurrent_states[1]) if self.is_recurrent_states_initialized[0] else None

    def keep(self, state: PowerState[Any], tokens: int) -> None:
        """Hold a copy of `state`, `tokens` further on."""
        self.device, self.dtype = state.S.device, state.S.dtype
        for i, x in enumerate((state.S, state.Z)):
            self.update_recurrent_state(x.detach(), i)
        self.seen += tokens

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Refuse keys: nothing keeps them.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "past_key_values: softmax attention asks a layer of power retention to keep keys; make the cache by power_cache"
        )

    def get_seq_length(self) -> int:
        """Tokens so far, padding included: positions and masks count from there."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask is made for, and the first one's place."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.seen = 0


def power_cache(model: Any) -> Cache:
    """An empty cache for a metamorphosed model: states for its layers of power retention, keys and values for the others.

    Raises:
        ArgumentError: no layer is power retention, or one is interpolated. UnsupportedError: a degree without a state.
    """
    layers: list[Any] = []
    for layer in model.get_decoder().layers:
        one = getattr(layer.self_attn, "metamorphosis", None)
        if one is None:
            layers.append(DynamicLayer())
            continue
        if one.interpolate > 0:
            raise ArgumentError(
                f"interpolate={one.interpolate:g}: softmax attention has no state; call set_interpolate(model, 0), or pass use_cache=False"
            )
        if one.degree != 2:
            raise UnsupportedError(f"degree={one.degree}: only degree 2 has a state small enough; pass use_cache=False")
        layers.append(PowerLayer())
    if not any(isinstance(layer, PowerLayer) for layer in layers):
        raise ArgumentError("model: none of its layers is power retention; call metamorphose(model) before")
    return Cache(layers=layers)


def from_pretrained(folder: str | Path, **options: Any) -> Any:
    """The metamorphosed model that `save_pretrained` wrote into a folder; `options` are those of transformers' from_pretrained.

    Raises:
        ArgumentError: the folder holds none.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ArgumentError(f"{path}: no such file; accepted: a folder that save_pretrained of a metamorphosed model wrote")
    kind = str(json.loads(path.read_text(encoding="utf-8")).get("model_type"))
    if not kind.startswith(PREFIX):
        raise ArgumentError(f"{path}: a {kind} as it was published; load it by transformers, and call metamorphose(model)")
    config: Any = type(AutoConfig.for_model(kind.removeprefix(PREFIX)))
    return _classes(MODEL_FOR_CAUSAL_LM_MAPPING[config], config).from_pretrained(folder, **options)


def adopt(model: Any) -> None:
    """Give a metamorphosed model, and its config, classes of their own, which its folder names: `metamorphose` does so by itself."""
    if PREFIX not in str(getattr(type(model.config), "model_type", "")):
        kinds: list[Any] = [type(model), type(model.config)]
        made = _classes(*kinds)
        model.config.__class__ = made.config_class
        model.__class__ = made
    # Training keeps no cache, and `generate` makes its own.
    model.config.use_cache = False


@cache
def _config_class(config: Any) -> Any:
    made: Any = type(f"Power{config.__name__}", (config,), {"model_type": PREFIX + config.model_type, "__module__": __name__})
    AutoConfig.register(made.model_type, made, exist_ok=True)
    return made


@cache
def _classes(model: Any, config: Any) -> Any:
    """The model's class, and as its config_class the config's, known to transformers' auto classes from now on."""
    power_config = _config_class(config)

    def init(self: Any, its_config: Any, *args: Any, **kwargs: Any) -> None:
        model.__init__(self, its_config, *args, **kwargs)
        metamorphose(self, **{**its_config.vidrial, "gates": tuple(its_config.vidrial["gates"])})

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.setdefault("use_cache", True) and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = power_cache(self)
        return model.generate(self, *args, **kwargs)

    members = {"config_class": power_config, "__init__": init, "generate": generate, "__module__": __name__}
    power_model: Any = type(f"Power{model.__name__}", (model,), members)
    # A model without a head, say, has a class of its own, but is not what a folder is loaded as.
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(config, None) is model:
        AutoModelForCausalLM.register(power_config, power_model, exist_ok=True)
    return power_model
