"""Models of transformers, on the CPU, with converted weights.

Importing this module imports torch and transformers. Tried with transformers 5.19.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from portax._text.timing import timed
from portax.checkpoints import config_json
from portax.checkpoints.hf_export import BUCKET_BYTES
from portax.errors import MissingPackageError, ValidationError
from portax.planning.jax_context import fetch
from portax.planning.plan import Plan
from portax.validation.session import Engine, Generated, Job, Loaded

try:
    import torch
    import transformers
except ModuleNotFoundError as error:
    raise MissingPackageError(
        f"portax.integrations.transformers: no module named {error.name!r}. It needs torch and transformers: "
        "pip install 'portax[transformers]'"
    ) from error


class Transformers(Engine):
    """An engine for `portax.validation.validate`.

    The converted tensors go from memory to memory through `from_pretrained(state_dict=...)`: transformers renames and
    stacks them as it does those of any checkpoint, ties what is tied, and says what it missed and what it did not use.
    """

    name = f"transformers {transformers.__version__}"

    def load(self, job: Job) -> Loaded:
        """Makes the model.

        Raises:
            ValidationError: transformers knows no such model, or did not take every tensor, or lacks one.
        """
        family, config = _model_class(job)
        with timed(job.seconds, "convert"):
            tensors = {
                name: _tensor(leaf)
                for bucket in job.converter.stream(job.params, bucket_bytes=BUCKET_BYTES)
                for name, leaf in bucket.items()
            }
        with timed(job.seconds, "load"), _quiet():
            self._model, report = family.from_pretrained(
                None, config=config, state_dict=tensors, dtype=_dtype(job.plan), output_loading_info=True
            )
        own = _check(report, job)
        return Loaded(dataclasses.replace(job.plan, engine_owned=own), _ties(self._model))

    def generate(self, tokens: Sequence[int], count: int) -> Generated:
        """Generates greedily, to an end-of-sequence token or to that many tokens."""
        prompt = torch.tensor([tokens])
        with _quiet():
            out = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=count,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        best, second = torch.stack(out.logits).float()[:, 0].topk(2).values.T.tolist()
        margins = tuple(first - other for first, other in zip(best, second, strict=True))
        return Generated(tuple(out.sequences[0, len(tokens) :].tolist()), margins)


def _model_class(job: Job) -> tuple[Any, Any]:
    names = job.hub_config.get("architectures") or ["none"]
    family = getattr(transformers, names[0], None)
    if family is None:
        raise ValidationError(
            f"the hub config's architectures name {names[0]}, which transformers {transformers.__version__} does not "
            "have: add the name, or install a transformers that has it"
        )
    with config_json.in_folder(job.hub_config, job.plan) as folder, _quiet():
        try:
            return family, family.config_class.from_pretrained(folder)
        except Exception as error:  # whatever it is, it says why
            raise ValidationError(
                f"transformers {transformers.__version__} cannot read the hub config ({error}). Likely cause: it is of "
                "another version of transformers"
            ) from error


def _tensor(leaf: jax.Array) -> "torch.Tensor":
    """Copies an array bit for bit: torch cannot read numpy's bfloat16."""
    host = np.array(fetch(leaf))
    if host.dtype == jnp.bfloat16:
        return torch.from_numpy(host.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(host)


def _dtype(plan: Plan) -> "torch.dtype":
    """Returns a dtype that holds all tensors without loss."""
    return getattr(torch, jnp.result_type(*{entry.dtype for entry in plan.entries}).name)


def _check(report: Mapping[str, Any], job: Job) -> tuple[str, ...]:
    """Refuses an incomplete model. Returns the leaves that no checkpoint of the language model fills."""
    own = tuple(sorted(name for name in report["missing_keys"] if job.converter.is_engine_owned(name)))
    odd = {
        "without a tensor": sorted({*report["missing_keys"]} - {*own}),
        "tensors that it does not have": sorted(report["unexpected_keys"]),
        "of another shape": sorted(map(str, report["mismatched_keys"])),
        "not loaded": sorted(report.get("error_msgs", ())),
    }
    if problems := [f"{what}: {', '.join(names[:5])} ({len(names)})" for what, names in odd.items() if names]:
        raise ValidationError(
            f"transformers {transformers.__version__} did not take the weights: {'; '.join(problems)}. Likely cause: "
            "the hub config is of another kind of model, or of another version of transformers"
        )
    return own


def _ties(model: Any) -> dict[str, str]:
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: to for name, to in names.items() if name != to}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the list of missing tensors, which a `Validation` reports."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
