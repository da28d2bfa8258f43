"""`TrainerConfig`: a trainer's configuration, as a model family derives a hub `config.json` from it."""

from collections.abc import Mapping
from typing import Any

from portax.config.hub import DENSE
from portax.config.model_config import ModelConfig, reader
from portax.errors import ConfigError

SILU, GELU = ["silu", "linear"], ["gelu", "linear"]
"""MaxText's `mlp_activations` of a gated MLP."""

UNSCALED_ROPE = {"rope_type": ("default", ""), "rope_linear_scaling_factor": (1,)}
WHOLE_ROPE = {**UNSCALED_ROPE, "partial_rotary_factor": (1,)}
"""For `TrainerConfig.same`: rotary frequencies are not scaled; and all of a head is rotated."""


class TrainerConfig:
    """A trainer's configuration; what it does not say, or a family's class on the hub does not have, is noted.

    Attributes:
        config: The family's own reading of it.
        problems: What has been noted so far.
    """

    def __init__(self, source: Any, config: ModelConfig):
        """Makes a reader.

        Args:
            source: MaxText's config object, a mapping, or the path of a YAML or JSON, in MaxText's keys.
            config: What `read_config` makes of it.
        """
        self.config = config
        self.problems: list[str] = []
        self._get = reader(source)

    def need(self, name: str) -> Any:
        """Returns a number on which the results depend: it has no default here, so that it is missing is noted."""
        value = _number(self._get(name))
        if value is None:
            self.problems.append(f"{name}: missing")
        elif isinstance(value, str):
            self.problems.append(f"{name}: {value!r} is no number")
        elif value < 0:
            self.problems.append(f"{name}: {value!r}, which is not set")
        return value

    def same(self, **fields: Any) -> None:
        """Notes fields that have none of the values which the family's class on the hub stands for."""
        for name, values in fields.items():
            value = _number(self._get(name))
            if value is not None and value not in values:
                self.problems.append(f"{name}: {value!r} has no place in a hub config of this family")

    def sizes(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Returns sizes under the hub's names.

        Args:
            names: What the hub calls each; see `portax.config.hub.DENSE`.
        """
        return {key: getattr(self.config, name) for name, key in names.items()}

    def layer_types(self, kind: str, period: int) -> list[str]:
        """Returns the hub's `layer_types`: of this kind, and full attention in the last layer of every period."""
        depth = self.config.num_decoder_layers
        return ([kind] * (period - 1) + ["full_attention"]) * (depth // period) + [kind] * (depth % period)

    def plain(
        self, model_type: str, architecture: str, names: Mapping[str, str] = DENSE, /, **rope: Any
    ) -> dict[str, Any]:
        """Returns the hub config of a decoder with one kind of attention and a gated SiLU MLP.

        Args:
            model_type: The hub's name of the family.
            architecture: The hub's name of the model class.
            names: As for `sizes`.
            **rope: Further `rope_parameters`.
        """
        self.same(mlp_activations=[SILU], sliding_window_size=(0,))
        self.same(final_logits_soft_cap=(0,), attn_logits_soft_cap=(0,))
        theta = self.need("rope_max_timescale")
        return {
            "architectures": [architecture],
            "model_type": model_type,
            **self.sizes(names),
            "hidden_act": "silu",
            "rms_norm_eps": self.need("normalization_layer_epsilon"),
            "rope_theta": theta,
            "rope_parameters": {"rope_theta": theta, "rope_type": "default", **rope},
            "tie_word_embeddings": self.config.logits_via_embedding,
        }

    def finish(self, derived: dict[str, Any]) -> dict[str, Any]:
        """Returns what was derived.

        Raises:
            ConfigError: Something was noted.
        """
        if self.problems:
            lines = "\n".join(f"  {problem}" for problem in self.problems)
            raise ConfigError(f"no config.json can be derived from this configuration:\n{lines}")
        return derived


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-6` as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
