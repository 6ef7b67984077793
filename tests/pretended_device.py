"""A device that is not there: tensors that say they lie on an accelerator, and compute their numbers on the CPU.

Operations on them keep an accelerator's rules, and what would make the host wait for it is written down. So code for
a GPU runs here to the end, must give the CPU's numbers, and breaks where it mixes devices.

The device calls itself `lazy`: the one kind besides the CPU that every build of torch lets tensors claim.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

aten = torch.ops.aten
DEVICE = torch.device("lazy:0")
_COPIES = (aten._to_copy, aten.copy_)
_INDEXING = (aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_)
_ASKING = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.equal)
"""Operations whose result, or its size, the host has to wait for."""


class DeviceTensor(torch.Tensor):
    """A tensor on the pretended device; `held` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> DeviceTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.held!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("expected a tensor on the CPU")
        return self.cpu().numpy()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} on the pretended device outside of `pretended_device()`")


_CPUGenerator = torch.Generator


class Generator(_CPUGenerator):
    """In the place of `torch.Generator`: one of the device says so, and draws a CPU generator's numbers."""

    of_device: ClassVar[dict[int, Generator]] = {}

    def __new__(cls, device: Any = "cpu") -> Any:
        if torch.device(device).type != DEVICE.type:
            return _CPUGenerator(device)
        made = super().__new__(cls)
        cls.of_device[made._cdata] = made
        return made

    @property
    def device(self) -> torch.device:
        return DEVICE


def _held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, DeviceTensor) else tensor


def _of_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """`value` with the function's results in place of its tensors; a list or tuple is looked into."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return type(value)([_of_tensors(function, part) for part in value]) if isinstance(value, list | tuple) else value


class Waits(TorchDispatchMode):
    """Executes everything, and counts what the host waits for.

    Attributes:
        counts: times the host waited, by reason: `download`, `upload` (a copy to the device that blocks), or the
            operation whose result the host asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nobody compiles here, and loading the compiler takes seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors: list[torch.Tensor] = []
        _of_tensors(tensors.append, [args, *kwargs.values()])
        on_device = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
        wanted = kwargs.get("device")
        if wanted is not None:
            to_device = torch.device(wanted).type == DEVICE.type
        elif func.overloadpacket is aten.copy_:
            to_device = isinstance(args[0], DeviceTensor)
        else:
            to_device = on_device
        self._check(func, tensors, args, kwargs, on_device=on_device)
        generator = kwargs.get("generator")
        if generator is not None and (generator._cdata in Generator.of_device) != to_device:
            raise RuntimeError(f"{func}: the generator is of another device than the tensor")
        self._count(func, args, kwargs, on_device=on_device, to_device=to_device)
        if not (on_device or to_device):
            return func(*args, **kwargs)
        held_args = _of_tensors(_held, args)
        held_kwargs = {name: _of_tensors(_held, value) for name, value in kwargs.items()}
        if wanted is not None:
            held_kwargs = {**held_kwargs, "device": torch.device("cpu")}
        if func.overloadpacket is aten._to_copy and to_device != on_device:
            held_kwargs.pop("non_blocking", None)
        out = func(*held_args, **held_kwargs)
        if to_device:
            out = _of_tensors(DeviceTensor, out)
        elif func.overloadpacket is aten._to_copy:
            return out
        return return_and_correct_aliasing(func, args, kwargs, out) if to_device and on_device else out

    def _check(self, func, tensors, args, kwargs, *, on_device: bool) -> None:
        if not on_device or func.overloadpacket in _COPIES:
            return
        if func.overloadpacket in _INDEXING:  # indices may lie on the host
            tensors = [args[0], *args[2:3]]
        stray = [x for x in tensors if not isinstance(x, DeviceTensor) and x.dim() > 0]
        if stray or (not isinstance(tensors[0], DeviceTensor) and func.overloadpacket in _INDEXING):
            raise RuntimeError(
                f"{func}: expected all tensors on one device, found {[t.shape for t in stray]} on the CPU"
            )

    def _count(self, func, args, kwargs, *, on_device: bool, to_device: bool) -> None:
        packet = func.overloadpacket
        if packet in _COPIES:
            source = args[1] if packet is aten.copy_ else args[0]
            from_device = isinstance(source, DeviceTensor)
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            if from_device and not to_device:
                self.counts["download"] += 1
            elif to_device and not from_device and blocking and source.dim() > 0:
                self.counts["upload"] += 1
        elif on_device and packet in _ASKING:
            self.counts[packet.__name__] += 1
        elif on_device and packet in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            one_value = len(args) > 2 and args[2].numel() == 1
            # A mask that is filled with one number is `masked_fill`; any other is `nonzero` first.
            if any(index.dtype == torch.bool for index in indices) and not one_value:
                self.counts["nonzero"] += 1
            if any(not isinstance(index, DeviceTensor) for index in indices):
                self.counts["upload"] += 1


@contextlib.contextmanager
def pretended_device(monkeypatch):
    """Makes `DEVICE` usable; gives the `Waits` that counts."""
    before = torch._C._only_lift_cpu_tensors()
    with monkeypatch.context() as patch, Waits() as waits:
        patch.setattr(torch, "Generator", Generator)
        # It has neither autocast nor kernels of its own.
        patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        for module in (sys.modules["torch.optim.adam"], sys.modules["torch.optim.optimizer"]):
            supported = "_get_fused_kernels_supported_devices"
            patch.setattr(module, supported, lambda: ["cpu", DEVICE.type], raising=False)
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=DEVICE)` asks us for the copy
        try:
            yield waits
        finally:
            torch._C._set_only_lift_cpu_tensors(before)
            Generator.of_device.clear()
