"""The backend "portax" in vLLM's registry: this is also the entry point that every process of vLLM runs."""

BACKEND = "portax"


def register() -> None:
    """Makes `WeightTransferConfig(backend="portax")` known to the engines of this process; may be called again.

    vLLM calls it by itself, by the entry point group `vllm.general_plugins`, in every process that it starts.

    Raises:
        MissingPackageError: vLLM is not installed.
    """
    from portax.integrations.vllm.api import api

    factory = api().factory.WeightTransferEngineFactory
    if BACKEND not in factory._registry:  # its own check raises, and plugins are loaded more than once
        factory.register_engine(BACKEND, "portax.integrations.vllm.receiver", "Receiver")
