"""`WeightSource`: a trainer's weights as vLLM's own senders take them."""

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from portax.converters.base import BaseConverter
from portax.execution.byte_counts import byte_count
from portax.integrations.vllm.hub_layout import check_hub_layout
from portax.integrations.vllm.missing import missing_vllm
from portax.integrations.vllm.torch_views import torch_dtype, torch_view
from portax.trainer.param_tree import Params

try:
    from vllm.distributed.weight_transfer import base
except ModuleNotFoundError as error:
    raise missing_vllm(error) from error

if TYPE_CHECKING:
    import torch

_IS_0_33 = hasattr(base.WeightSource, "iter_full")  # there `metadata` has to be a cached property


class WeightSource(base.WeightSource):
    """The hub tensors of a trainer, a layer at a time, for vLLM's senders (`nccl`, `ipc`, ...).

    Nothing is copied: each tensor is a view of a converted JAX array. On meshes, each is gathered when its turn comes;
    in several processes, every one has to iterate in step.

    Example:
        >>> source = portax.integrations.vllm.WeightSource(converter, lambda: state.params)
        >>> sender = WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=source)
        >>> sender.send_weights()
    """

    def __init__(self, converter: BaseConverter, params: Callable[[], Params], *, bucket_bytes: int = 2**28):
        """Plans the weights; converts none.

        Args:
            converter: A converter with the layout `HuggingFace`.
            params: Returns the trainer's newest parameters; called anew for every pass.
            bucket_bytes: Most bytes of one conversion.

        Raises:
            ConfigError: `bucket_bytes` is no number of bytes.
            LayoutError: The converter's layout is another one.
            PlanError: As `converter.plan`.
        """
        check_hub_layout(converter)
        self._converter = converter
        self._params = params
        self._bucket_bytes = byte_count("bucket_bytes", bucket_bytes)
        self._entries = converter.plan(params()).entries

    def _metadata(self) -> list[Any]:
        return [base.ParamMeta(entry.name, torch_dtype(entry.dtype), entry.shape) for entry in self._entries]

    def __iter__(self) -> "Iterator[tuple[str, torch.Tensor]]":
        for bucket in self._converter.stream(self._params(), bucket_bytes=self._bucket_bytes):
            for name in list(bucket):
                yield name, torch_view(bucket.pop(name))

    def iter_groups(self) -> "Iterator[tuple[list[str], list[torch.Tensor]]]":
        """Yields names and tensors of a layer at a time, in vLLM's order of layers.

        Tensors that come before their layer's turn are kept until then.
        """
        early: dict[str, torch.Tensor] = {}
        arriving = iter(self)
        for names in self.groups():
            while not early.keys() >= set(names):
                name, tensor = next(arriving)
                early[name] = tensor
            yield names, [early.pop(name) for name in names]

    if _IS_0_33:

        @functools.cached_property
        def metadata(self) -> list[Any]:
            """Name, dtype and shape of every tensor, in the order of iteration."""
            return self._metadata()

        def iter_full(self) -> "Iterator[tuple[str, torch.Tensor]]":
            """Yields every whole tensor by name."""
            return iter(self)

    else:

        def metadata(self) -> list[Any]:
            """Returns name, dtype and shape of every tensor, in the order of iteration."""
            return self._metadata()
