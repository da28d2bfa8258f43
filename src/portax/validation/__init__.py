"""`validate`: a converted model, loaded into an engine, generates tokens."""

from portax.validation.session import Engine, Generated, Loaded, Validation, validate

__all__ = ["Engine", "Generated", "Loaded", "Validation", "validate"]
