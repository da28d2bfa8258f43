"""A converted model is made to talk: `validate`."""

from portax.validation.session import Engine, Generated, Loaded, Validation, validate

__all__ = ["Engine", "Generated", "Loaded", "Validation", "validate"]
