"""The backend "portax" in vLLM's registry: this is also the entry point that every process of vLLM runs."""

from portax.integrations.vllm.missing import missing_vllm

BACKEND = "portax"


def register() -> None:
    """Makes `WeightTransferConfig(backend="portax")` known to the engines of this process; may be called again.

    vLLM calls it by itself, by the entry point group `vllm.general_plugins`, in every process that it starts.

    Raises:
        MissingPackageError: vLLM is not installed.
    """
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ModuleNotFoundError as error:
        raise missing_vllm(error) from error
    if BACKEND not in WeightTransferEngineFactory._registry:  # its own check raises; plugins are loaded more than once
        WeightTransferEngineFactory.register_engine(BACKEND, "portax.integrations.vllm.receiver", "Receiver")
