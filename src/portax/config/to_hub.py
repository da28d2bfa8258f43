"""`TrainerConfig`: a trainer's configuration, read by a model family to derive a hub `config.json`."""

from collections.abc import Mapping
from typing import Any

from portax.config.hub import DENSE
from portax.config.model_config import ConfigSource, ModelConfig, reader
from portax.errors import ConfigError

SILU, GELU = ["silu", "linear"], ["gelu", "linear"]
"""MaxText's `mlp_activations` of a gated MLP."""

UNSCALED_ROPE = {"rope_type": ("default", ""), "rope_linear_scaling_factor": (1,)}
WHOLE_ROPE = {**UNSCALED_ROPE, "partial_rotary_factor": (1,)}
"""For `TrainerConfig.same`: rotary frequencies are not scaled; for the second, the whole head is rotated, too."""


class TrainerConfig:
    """A trainer's configuration, with a list of what keeps a `config.json` from being derived from it.

    Attributes:
        config: The same as a `ModelConfig` of the family.
        problems: Fields that are missing or have no place in the hub's config, with the reason.

    Example:
        >>> trainer = TrainerConfig({**config, "rope_max_timescale": 1_000_000}, portax.read_config(config))
        >>> trainer.need("rope_max_timescale"), trainer.need("num_experts_per_tok"), trainer.problems
        (1000000, None, ['num_experts_per_tok: missing'])
    """

    def __init__(self, source: ConfigSource, config: ModelConfig):
        """Makes a reader.

        Args:
            source: MaxText's config object, a mapping, or the path of a YAML or JSON, in MaxText's keys.
            config: The result of `read_config` for it.
        """
        self.config = config
        self.problems: list[str] = []
        self._get = reader(source)

    def need(self, name: str) -> Any:
        """Returns a number on which results depend. There is no default: a missing number is noted as a problem."""
        value = _number(self._get(name))
        if value is None:
            self.problems.append(f"{name}: missing")
        elif isinstance(value, str):
            self.problems.append(f"{name}: {value!r} is no number")
        elif value < 0:
            self.problems.append(f"{name}: {value!r}, which is not set")
        return value

    def find(self, name: str) -> Any:
        """Returns a number; None if it is missing."""
        return _number(self._get(name))

    def same(self, **fields: Any) -> None:
        """Notes as a problem each field whose value is none of those that the hub's model class stands for."""
        for name, values in fields.items():
            value = _number(self._get(name))
            if value is not None and value not in values:
                self.problems.append(f"{name}: {value!r} has no place in a hub config of this family")

    def sizes(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Returns sizes under the hub's names.

        Args:
            names: The hub's name of each; see `portax.config.hub.DENSE`.
        """
        return {key: getattr(self.config, name) for name, key in names.items()}

    def layer_types(self, kind: str, period: int) -> list[str]:
        """Returns the hub's `layer_types`: `kind`, with full attention in the last layer of every period."""
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
        return self.decoder(model_type, architecture, names, **rope)

    def decoder(
        self, model_type: str, architecture: str, names: Mapping[str, str] = DENSE, /, **rope: Any
    ) -> dict[str, Any]:
        """Returns the fields that the hub configs of all decoders have; the family states what else must hold.

        Args:
            model_type: As for `plain`.
            architecture: As for `plain`.
            names: As for `sizes`.
            **rope: Further `rope_parameters`.
        """
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

    def yarn(self) -> dict[str, Any]:
        """Returns the `rope_parameters` of frequencies that YaRN scales, without their base."""
        rope_type = self._get("rope_type")
        if rope_type != "yarn":
            self.problems.append(f"rope_type: {rope_type!r}; models of this family have yarn")
        return {
            "rope_type": "yarn",
            "factor": self.need("rope_factor"),
            "beta_fast": self.need("beta_fast"),
            "beta_slow": self.need("beta_slow"),
            "original_max_position_embeddings": self.need("original_max_position_embeddings"),
        }

    def finish(self, derived: dict[str, Any]) -> dict[str, Any]:
        """Returns the derived config, if nothing was noted.

        Raises:
            ConfigError: Something was noted.
        """
        if self.problems:
            lines = "\n".join(f"  {problem}" for problem in self.problems)
            raise ConfigError(f"no config.json can be derived from this configuration:\n{lines}")
        return derived


def _number(value: Any) -> Any:
    """Returns a float for text that spells one: YAML 1.1 reads `1e-6` as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
