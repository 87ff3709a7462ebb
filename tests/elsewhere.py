"""A device to rehearse on, with values: torch takes it for "meta", so that code takes its branches for devices and
autograd works, while the CPU computes. What only a real one can show: its kernels, their rounding, its speed."""

import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ATEN = torch.ops.aten
COPIES = {ATEN._to_copy, ATEN.copy_}
INDEXING = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_}  # an index may lie on the CPU
JOINING = {ATEN.cat, ATEN.stack}  # take not even a single number from the CPU
READS = {ATEN._local_scalar_dense, ATEN.equal, ATEN.nonzero, ATEN.masked_select, ATEN._unique2}


class There(torch.Tensor):
    """A tensor on the device: it says "meta", and holds its values in `held`, on the CPU. For use in `Elsewhere`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        layout = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype)
        there = torch.Tensor._make_wrapper_subclass(cls, held.shape, device="meta", **layout)
        there.held = held
        return there

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of Elsewhere")

    def tolist(self):  # torch's own takes no subclass
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):  # into a file go the values
        return self.detach().held.__reduce_ex__(protocol)


class Elsewhere(TorchDispatchMode):
    """Computes what is on the device. Tensors of two devices in one operation raise RuntimeError, unless one is an
    index or a single number. `waits`: operations so far in which the host would have waited for the device's queue:
    reading a value, blocking copies, masks and indices that come from the CPU."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, kind = kwargs or {}, func.overloadpacket
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if isinstance(x, There)]
        here = [x for x in tensors if not isinstance(x, There) and (x.ndim or kind in JOINING)]
        to = torch.device(kwargs.get("device") or ("meta" if there else "cpu")).type
        if kind in COPIES:
            places = {to, *(x.device.type for x in tensors)}
            wait = len(places) > 1 and not kwargs.get("non_blocking") and True not in args[2:]
        else:
            if there and here and kind not in INDEXING:
                raise RuntimeError(f"{func} got tensors of two devices, on the CPU {[tuple(x.shape) for x in here]}")
            masked = kind in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
            wait = bool(there) and (bool(here) or kind in READS or masked)
        self.waits += [str(func)] * wait

        ours = tree_map(lambda x: x.held if isinstance(x, There) else x, (args, dict(kwargs)))
        if kwargs.get("device") is not None and to == "meta":
            ours[1]["device"] = torch.device("cpu")
        out = func(*ours[0], **ours[1])
        if there and torch.Tag.inplace_view in func.tags:
            with no_dispatch():  # what the outside shows is transposed, too
                func(*args, **kwargs)
        if to != "meta":
            return out.clone() if kind is ATEN._to_copy else out
        written = {id(x.held): x for x in there}

        def wrapped(x):
            if not isinstance(x, torch.Tensor):
                return x
            return written.get(id(x)) if id(x) in written else There(x.resolve_conj().resolve_neg())

        return tree_map(wrapped, out)
