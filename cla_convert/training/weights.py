"""Numbers for models that were built without any: each process reads its own rows of each tensor, one after another.

So no process ever holds a whole model that is divided among several, and beside what it keeps it needs the memory of
one tensor. Models are built on the meta device, sharded there if they are to be, and filled last.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils import swap_tensors
from transformers import PreTrainedModel

from ..models.checkpoint import Checkpoint
from ..models.export import empty_model, load_model, loading, refuse_missing, say_if_large
from ..models.packed import refuse_scales
from ..models.stored import StoredTensors
from .sharded import own_rows


class Unfilled:
    """A model whose weights are on the meta device until `fill`, and where in its files they lie."""

    model: PreTrainedModel
    quantised: bool
    """Then it is loaded already, as transformers does it, and is neither sharded nor trained."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: str) -> None:
        """Build it. Raises InputError if transformers cannot, or weights are missing, scaled or of another shape."""
        self.folder, self.device = folder, device
        checkpoint = Checkpoint.open(folder, as_stored=True)
        self.quantised = checkpoint.config.get("quantization_config") is not None
        if self.quantised:
            self.model = load_model(folder, dtype=dtype, device=device)
            return
        say_if_large(folder)
        self.model = empty_model(folder, dtype=dtype, device=device)
        with self._reading():
            self._stored = StoredTensors(checkpoint, self.model)
            self._check_shapes()
            self._names = self._stored_names()
            refuse_scales(self._stored.unused, checkpoint.tensors)

    def adopt(self, other: nn.Module) -> dict[str, nn.Parameter]:
        """Let what is frozen here use the memory of `other` where that holds the same bits; those parameters by name.

        Of models that are divided among processes the rows of this process count: both are divided alike.
        """
        shared = {}
        for name, parameter, twin in twins(self.model, other):
            if torch.equal(own_rows(twin), self._read(name, parameter)):
                _put(parameter, own_rows(twin))
                shared[name] = parameter
        return shared

    def fill(self) -> None:
        """Read everything that is still without numbers. Raises InputError if that fails."""
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if own_rows(tensor).is_meta:
                _put(tensor, self._read(name, tensor))

    @torch.no_grad()
    def _read(self, name: str, wanted: Tensor) -> Tensor:
        """This process's rows of a tensor, on its device and in its dtype."""
        with self._reading():
            return self._stored.read(self._names[name], _own_range(wanted)).to(self.device, wanted.dtype)

    def _check_shapes(self) -> None:
        for name, tensor in self.model.state_dict().items():
            if (stored := self._stored.shape(name)) not in (None, tensor.shape):
                raise ValueError(f"{name} has the shape {stored}, where config.json promises {tuple(tensor.shape)}")

    def _stored_names(self) -> dict[str, str]:
        """Name of each parameter and buffer -> that of its tensor in the files, which of tied ones may be any.

        Tied parameters that are both stored and differ are untied, as transformers does.
        """
        groups: dict[Tensor, list[str]] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            groups.setdefault(tensor, []).append(name)
        refuse_missing(self.folder, [names[0] for names in groups.values() if not self._stored.parts.keys() & names])
        found = {}
        for names in groups.values():
            first, *others = [name for name in names if name in self._stored.parts]
            found[names[0]] = first
            for other in others:
                if not torch.equal(self._stored.read(first), self._stored.read(other)):
                    _untie(self.model, other)
                    found[other] = other
        return found

    def _reading(self) -> AbstractContextManager[None]:
        return loading(f"The model in {self.folder} cannot be loaded", "Check that config.json belongs to the weights.")


def twins(model: nn.Module, other: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """What is frozen in a model, and what of another might be the same: of one name, dtype, shape and division."""
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        twin = theirs.get(name)
        if twin is not None and not parameter.requires_grad and _kind(twin) == _kind(parameter):
            yield name, parameter, twin


def _kind(tensor: Tensor) -> tuple[object, ...]:
    """What two tensors must have in common to be one."""
    divided = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
    return tensor.dtype, tensor.shape, divided


def _own_range(tensor: Tensor) -> slice:
    """Which rows of a tensor lie in this process."""
    if not isinstance(tensor, DTensor):
        return slice(None)
    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return slice(start[0], start[0] + shape[0])


def _put(tensor: Tensor, numbers: Tensor) -> None:
    """Give a tensor its numbers (of a sharded one, our rows). It stays the object that tied names and FSDP hold."""
    if isinstance(tensor, DTensor):
        place = tensor.device_mesh, tensor.placements
        numbers = DTensor.from_local(numbers, *place, run_check=False, shape=tensor.shape, stride=tensor.stride())
    if isinstance(tensor, nn.Parameter):
        numbers = nn.Parameter(numbers, requires_grad=tensor.requires_grad)
    swap_tensors(tensor, numbers)


def _untie(model: PreTrainedModel, name: str) -> None:
    """Make a tied parameter one of its own."""
    module, _, attribute = name.rpartition(".")
    owner = model.get_submodule(module)
    setattr(owner, attribute, nn.Parameter(torch.empty_like(getattr(owner, attribute))))
    model.all_tied_weights_keys.pop(name, None)
