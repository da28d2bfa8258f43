"""`validate`: converts a trainer's checkpoint, loads it into an engine, and generates."""

import abc
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType

from portax._text.report import Report
from portax._text.tables import new_table, text_lines
from portax._text.timing import timed
from portax.checkpoints import config_json
from portax.checkpoints.reading import Checkpoint, open_checkpoint
from portax.converters import converter_for
from portax.converters.base import BaseConverter
from portax.errors import ValidationError
from portax.layouts import HuggingFace
from portax.planning.plan import Plan
from portax.trainer.param_tree import Params
from portax.validation.coverage import Coverage, coverage, coverage_table
from portax.validation.prompts import Prompt, make_prompt, read_tokenizer

DEFAULT_TOKENS = tuple(range(3, 11))
MAX_NEW_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Generated:
    """The tokens that an engine generated.

    Attributes:
        tokens: Token ids.
        margins: For each token, the distance from its logit to the second best.
    """

    tokens: tuple[int, ...]
    margins: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The weights that an engine was loaded with.

    Attributes:
        plan: The plan of the written leaves, with those that the engine fills itself.
        ties: The engine's leaves that repeat others.
    """

    plan: Plan
    ties: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Job:
    """A validation, checked as far as possible without an engine.

    Attributes:
        converter: The converter to the hub's tensors.
        params: The trainer's tree.
        hub_config: The hub's `config.json` of the model.
        plan: The conversion.
        prompt: The prompt.
        tokenizer: The tokenizer, for text; None without one.
        max_new_tokens: Most tokens to generate.
        seconds: Seconds of each phase so far.
    """

    converter: BaseConverter
    params: Params
    hub_config: Mapping[str, Any]
    plan: Plan
    prompt: Prompt
    tokenizer: Any
    max_new_tokens: int
    seconds: dict[str, float]

    def coverage(self, loaded: Loaded | None = None) -> tuple[Coverage, ...]:
        """Returns the coverage of the loaded weights, or of the plan if nothing was loaded."""
        loaded = loaded or Loaded(self.plan, self.plan.ties)
        others = self.params.others if isinstance(self.params, Checkpoint) else ()
        return coverage(loaded.plan, ties=loaded.ties, others=others)


class Engine(abc.ABC):
    """An engine that generates; `portax.integrations` has `transformers.Transformers` and `vllm.Vllm`.

    Attributes:
        name: Name and version.
    """

    name: str

    @abc.abstractmethod
    def load(self, job: Job) -> Loaded:
        """Loads all of the model's weights; adds the seconds of its phases to `job.seconds`."""

    @abc.abstractmethod
    def generate(self, tokens: Sequence[int], count: int) -> Generated:
        """Generates greedily, up to an end-of-sequence token or that many tokens."""


@dataclasses.dataclass(frozen=True)
class Validation(Report):
    """A report of a validation: the generated tokens, and how they came about. Its `str` is a table.

    Attributes:
        engine: Name and version of the engine.
        prompt: Token ids of the prompt.
        bos: The `<bos>` that was added in front of the prompt because it lacked one.
        tokens: Token ids that it generated, greedily.
        margins: For each token, the distance from its logit to the second best. Another program, which computes in
            another order, may choose differently if a margin is small.
        text: The generated tokens as text; None without a tokenizer.
        seconds: Time of each phase. `plan` includes the opening of the checkpoint.
        coverage: The leaves of the trainer that were read, those of the engine that were written, and all others.
    """

    engine: str
    prompt: tuple[int, ...]
    bos: int | None
    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    text: str | None
    seconds: Mapping[str, float]
    coverage: tuple[Coverage, ...]

    def __rich__(self) -> RenderableType:
        phases = new_table("phase", ("seconds", "right"))
        for phase, seconds in self.seconds.items():
            phases.add_row(phase, f"{seconds:.3f}")
        lines = [
            f"engine     {self.engine}",
            prompt_line(Prompt(self.prompt, self.bos)),
            f"generated  {_listed(self.tokens)}",
            f"margins    {', '.join(f'{margin:.3g}' for margin in self.margins)}",
        ]
        if self.text is not None:
            lines.append(f"text       {self.text}")
        return Group(coverage_table(self.coverage), phases, text_lines(lines))

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it, as values for JSON."""
        return dataclasses.asdict(self)


def validate(
    checkpoint: str | os.PathLike | Params,
    hub_config: Mapping[str, Any],
    prompt: str | Sequence[int] = DEFAULT_TOKENS,
    *,
    engine: Engine,
    config: Any = None,
    tokenizer: str | os.PathLike | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    scratch: str | os.PathLike | None = None,
) -> Validation:
    """Converts a trainer's checkpoint, loads it into an engine, and generates greedily.

    Args:
        checkpoint: A path for `open_checkpoint`, or parameters for `converter.convert`.
        hub_config: The content of this model's hub `config.json`; it is checked against the checkpoint.
        prompt: Text, or token ids. `<bos>` is added in front if the family needs it and the prompt has none.
        engine: `portax.integrations.transformers.Transformers()` or `portax.integrations.vllm.Vllm()`.
        config: The trainer's configuration: anything that `portax.read_config` reads; None for the hub's.
        tokenizer: A local folder with a tokenizer; text needs one.
        max_new_tokens: Most tokens to generate.
        scratch: As for `open_checkpoint`.

    Returns:
        A report with the tokens, the seconds of each phase, and the leaves that were read and written.

    Raises:
        CheckpointError, ConfigError, PlanError, ValidationError: The checkpoint, the configurations, the conversion or
            the prompt; before anything is converted or loaded.
        MissingPackageError: The engine's packages are not installed.

    Example:
        >>> print(validate("checkpoints/1000/items", hub_config, [2, 50429, 563], engine=Transformers()))
    """
    return carry_out(
        prepare(
            checkpoint,
            hub_config,
            prompt,
            config=config,
            tokenizer=tokenizer,
            max_new_tokens=max_new_tokens,
            scratch=scratch,
        ),
        engine,
    )


def prepare(
    checkpoint: str | os.PathLike | Params,
    hub_config: Mapping[str, Any],
    prompt: str | Sequence[int] = DEFAULT_TOKENS,
    *,
    config: Any = None,
    tokenizer: str | os.PathLike | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    scratch: str | os.PathLike | None = None,
) -> Job:
    """Opens, plans and checks; needs no engine, and loads nothing. Arguments and errors are those of `validate`."""
    if max_new_tokens < 1:
        raise ValidationError(f"max_new_tokens={max_new_tokens}: nothing would be generated; give at least 1")
    if isinstance(prompt, str) and tokenizer is None:
        raise ValidationError("a prompt of text needs a tokenizer: give a folder that holds one, or token ids")
    seconds: dict[str, float] = {}
    with timed(seconds, "plan"):
        if isinstance(checkpoint, str | os.PathLike):
            checkpoint = open_checkpoint(checkpoint, scratch=scratch)
        converter = converter_for(hub_config if config is None else config, layout=HuggingFace())
        plan = converter.plan(checkpoint)
        config_json.check(hub_config, converter, plan)
        reader: Any = None if tokenizer is None else read_tokenizer(tokenizer)
        tokens = reader(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        start = make_prompt(tokens, converter, hub_config)
    return Job(converter, checkpoint, hub_config, plan, start, reader, max_new_tokens, seconds)


def carry_out(job: Job, engine: Engine) -> Validation:
    """Loads the engine and generates.

    Raises:
        ValidationError: The engine did not take all weights.
        MissingPackageError, PlanError, SyncError: As the engine's `load` and `generate`.
    """
    loaded = engine.load(job)
    with timed(job.seconds, "generate"):
        generated = engine.generate(job.prompt.tokens, job.max_new_tokens)
    return Validation(
        engine=engine.name,
        prompt=job.prompt.tokens,
        bos=job.prompt.bos,
        tokens=generated.tokens,
        margins=generated.margins,
        text=None if job.tokenizer is None else job.tokenizer.decode(generated.tokens),
        seconds=job.seconds,
        coverage=job.coverage(loaded),
    )


def prompt_line(prompt: Prompt) -> str:
    """Describes the prompt, with the `<bos>` that was added, for people."""
    note = "" if prompt.bos is None else f" (<bos>, {prompt.bos}, was put in front: this model's prompts begin with it)"
    return f"prompt     {_listed(prompt.tokens)}{note}"


def _listed(tokens: Sequence[int]) -> str:
    return ", ".join(map(str, tokens))
