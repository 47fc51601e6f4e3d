"""Power sums of gradients, measured while backward() runs, for a ``clip()`` that then has the all-reduce left alone.

Who measures when is in the note of ``Overlap``. What was measured hangs on the gradient it was taken from, together
with the state that the gradient was in, and dies with it: a gradient that was exchanged, freed or written to since is
measured by ``clip()``, as is one that nobody measured. So nothing here has to be complete, or to agree between ranks
that reduce the norm. (Of ranks that do not, DDP's, all measure like this or none: it shows in the last bits.)

torch's version counters miss some writes: ``GradScaler.unscale_``, collectives of torch.distributed, all that goes
through ``.data``, ``torch._foreach_*`` on DTensors. Code that does so does it in every step, so some clips, the first
that hooks serve among them, measure all gradients anyway and compare.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from distclip import backward
from distclip.gradients import version_of
from distclip.kernels import kernels_for
from distclip.kernels.common import WIDE, taken
from distclip.layout import GradLayout
from distclip.layout.dtensor import is_dtensor
from distclip.layout.memory import Mark
from distclip.parameters import ModuleParameters
from distclip.plan import Plan
from distclip.reduction import may_leave_float64
from distclip.warning import warn

_MEASURED = "_distclip_measured"
# Elements that are waited for before kernels are started. On a CPU, reading 1 << 20 at a time amidst the backward took
# twice the time of reading all at its end; from here on it took as long.
_ENOUGH = 1 << 23
# Clips 1, 2, 4 ... up to this one, and then every so many, measure again what hooks have measured.
_COMPARED = 256


@dataclass(eq=False)
class Batch:
    """Power sums of some gradients, measured together."""

    sums: Tensor
    p: float
    stream: torch.Stream | None
    """On which they were measured; None on the CPU."""


class Measured(Mark):
    """Left on a gradient: what was measured of it. (As a Mark, it is not copied, and means nothing in a file.)"""

    def __init__(self, batch: Batch, index: int, grad: Tensor) -> None:
        self.batch, self.index, self._state = batch, index, _state_of(grad)

    def tells_of(self, grad: Tensor, p: float) -> bool:
        """Whether the gradient is still what was measured, by this p."""
        return self.batch.p == p and self._state == _state_of(grad)


def _state_of(grad: Tensor) -> tuple[int, int, int]:
    """What tells that a gradient was written to, as far as torch counts."""
    local = getattr(grad, "_local_tensor", grad)
    # Of a DTensor, its own counter knows of writes to it, its local tensor's of those below. ``.data = ...`` changes
    # the address alone.
    return grad._version, version_of(grad), local.data_ptr()


@dataclass
class _Waiting:
    """Gradients of one device that are there, and not measured yet."""

    stream: torch.Stream | None
    places: list[int] = field(default_factory=list)
    elements: int = 0


class Overlap:
    """The hooks of one ``GradClipper(overlap=True)``; they go when it does.

    - Plain parameters of a job of one rank, and DTensors, have a post-accumulate hook. FSDP2 calls it when the gradient
      is reduced. Gradients are measured when enough have come together, and at the end of backward().
    - DDP averages after such hooks: it is given a communication hook, and each bucket is measured when it is averaged.
    - Left to ``clip()`` are gradients that are whole later, or that users may reduce by hand: FSDP1's, plain ones in a
      job of several ranks without DDP, Partial and sparse ones, those of DTensors on a part of the job that FSDP2 does
      not manage, and of parameters that are offloaded; float64 ones too, whose powers have a range to be looked at.

    A hook that ran k times between two clips is taken to run k times again: gradients that are accumulated over
    micro-batches are measured in the last of them.
    """

    def __init__(self) -> None:
        self._plan: weakref.ref[Plan] | None = None
        self._params: weakref.ref[ModuleParameters] | None = None
        self._settings: tuple[object, ...] = ()
        self._p = 2.0
        self._active = True
        self._handles: list[RemovableHandle] = []
        # Hooks hold this object weakly, so that they do not keep it; it cannot take them away when it is gone.
        weakref.finalize(self, _remove, self._handles).atexit = False
        self._fired: list[int] = []
        self._usual: list[int] = []
        self._task = -1
        self._waiting: dict[torch.device, _Waiting] = {}
        self._owners: dict[int, int] = {}
        self._of_ddp: dict[int, int] = {}
        self._arrived: list[tuple[object, Batch, list[int]]] = []
        self._whole: set[object] = set()
        self._served = 0

    def follow(self, plan: Plan, params: ModuleParameters, p: float) -> None:
        """Have hooks on what is trained now, measure by this p. To be called before each clip; local."""
        self._usual = [fired or usual for fired, usual in zip(self._fired, self._usual, strict=True)]
        self._fired = [0] * len(self._usual)
        known = self._plan is not None and self._plan() is plan
        # In a job that has begun since, users may average plain gradients by hand.
        settings = (p, _world_size(), [param.requires_grad for param in params.tensors])
        if not self._active or (known and settings == self._settings):
            return
        self._plan, self._params = weakref.ref(plan), weakref.ref(params)
        self._settings, self._p = settings, p
        self._fired, self._usual = [0] * len(params.tensors), [1] * len(params.tensors)
        self._forget()
        if may_leave_float64(p, []):
            return
        watched = _averaged_by_hook(params.modules, self)
        tensor = 0
        for place, (layout, param) in enumerate(zip(plan.layouts, params.tensors, strict=True)):
            if param.requires_grad and param.dtype not in WIDE and param.numel():
                if id(param) in watched:
                    self._of_ddp[id(param)] = place
                    self._owners[tensor] = place
                elif _final_in_hook(param, layout):
                    hook = partial(_call, weakref.ref(self), place)
                    self._handles.append(param.register_post_accumulate_grad_hook(hook))
                    self._owners[tensor] = place
            tensor += len(layout.pieces)

    def power_sums(self, plan: Plan, device: torch.device, pieces: list[Tensor], places: list[int], p: float) -> Tensor:
        """As the kernels' own, of pieces of gradients; those are read that were not measured while backward() ran.

        What was measured is used once: kernels of Triton, which scale gradients, do not count their writes.
        """
        kernels = kernels_for(device)
        marks = self._taken(places, p)
        if not any(marks):
            return kernels.power_sums(pieces, p)
        missing = [piece for piece, mark in zip(pieces, marks, strict=True) if mark is None]
        sums = _put_together(marks, kernels.power_sums(missing, p) if missing else None)
        if not self._comparing:
            self._served += 1
            return sums
        fresh = kernels.power_sums(pieces, p)
        same = torch.isclose(sums, fresh, rtol=1e-6, atol=0.0, equal_nan=True).tolist()
        if not all(same):
            self.stop()
            warn(
                f"overlap=True is off from here on: the gradient of {plan.tensors[places[same.index(False)]]} was "
                "written to between backward() and clip() in a way that torch does not count (GradScaler.unscale_, a "
                "collective, .data). Clips are right without it. Leave unscale_() out and pass scaler=, write to .grad "
                "itself, or leave overlap= out.",
            )
        # Zeros and what is not finite look the same when they are written to.
        total = fresh.sum().item()
        self._served += 0.0 < total < float("inf")
        return fresh

    def stop(self) -> None:
        """Take all hooks away. (DDP keeps its own, which goes on to average.)"""
        self._active = False
        self._forget()

    def _forget(self) -> None:
        _remove(self._handles)
        for known in (self._waiting, self._owners, self._of_ddp):
            known.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return Overlap, ()  # a copied clipper has hooks of its own, on its own model

    @property
    def _comparing(self) -> bool:
        count = self._served + 1
        return count & (count - 1) == 0 or count % _COMPARED == 0

    def _taken(self, places: list[int], p: float) -> list[Measured | None]:
        """What is known of the tensors at these places, and is forgotten now."""
        params = self._params() if self._params is not None else None
        taken: list[Measured | None] = []
        for place in places:
            owner = self._owners.get(place)
            grad = None if owner is None or params is None else params.tensors[owner].grad
            mark = None if grad is None else vars(grad).pop(_MEASURED, None)
            taken.append(mark if isinstance(mark, Measured) and grad is not None and mark.tells_of(grad, p) else None)
        return taken

    def _begin(self) -> None:
        """In the first hook of a backward: have what is left over measured when it ends."""
        task = backward.task()
        if task != self._task:
            self._task = task
            # A backward that raised may have left something.
            self._arrived, self._whole = [], set()
            # FSDP2's last gradients, and DDP's averages, come in callbacks that may be queued after this one.
            end = partial(_call, weakref.ref(self), None)
            backward.at_the_end(lambda: backward.at_the_end(end))

    @torch.no_grad()
    def _come(self, place: int, param: Tensor) -> None:
        """What the hook of the parameter at ``place`` does."""
        self._fired[place] += 1
        local = _measurable(param)
        if self._fired[place] < self._usual[place] or local is None:
            return
        self._begin()
        device, stream = local.device, _stream_of(local.device)
        waiting = self._waiting.get(device)
        if waiting is not None and waiting.stream != stream:
            self._measure(device)
        waiting = self._waiting.setdefault(device, _Waiting(stream))
        waiting.places.append(place)
        waiting.elements += local.numel()
        if waiting.elements >= _ENOUGH:
            self._measure(device)

    def _measure(self, device: torch.device) -> None:
        """Measure what waits, unless it has been freed."""
        waiting = self._waiting.pop(device)
        found = [(param, _measurable(param)) for param in self._at(dict.fromkeys(waiting.places))]
        chosen = [(param.grad, local) for param, local in found if local is not None and local.device == device]
        if chosen:
            with _on(waiting.stream):
                sums = kernels_for(device).power_sums([local for _, local in chosen], self._p)
            _leave(Batch(sums, self._p, waiting.stream), [grad for grad, _ in chosen])

    def _at(self, places: Iterable[int]) -> list[Tensor]:
        """The parameters at these places; none where the clipper is gone."""
        params = self._params() if self._params is not None else None
        return [] if params is None else [params.tensors[place] for place in places]

    def places_of(self, params: Iterable[Tensor]) -> list[int]:
        """In the backward of a DDP model, when a bucket of these is full: where its parameters are in the plan, -1 for
        those to be left alone."""
        self._begin()
        return [self._of_ddp.get(id(param), -1) for param in params]

    @torch.no_grad()
    def arrived(self, ddp: object, grads: list[Tensor], places: list[int], last: bool) -> None:
        """A bucket of DDP was averaged. May run in any thread, on any stream."""
        chosen = [(grad, place) for grad, place in zip(grads, places, strict=True) if place >= 0]
        if chosen:
            pieces = [grad for grad, _ in chosen]
            device = pieces[0].device
            batch = Batch(kernels_for(device).power_sums(pieces, self._p), self._p, _stream_of(device))
            self._arrived.append((ddp, batch, [place for _, place in chosen]))
        if last:
            self._whole.add(ddp)

    @torch.no_grad()
    def _end(self) -> None:
        """After the last gradient of a backward; DDP has laid its averages where they belong."""
        for device in list(self._waiting):
            self._measure(device)
        # DDP lays down nothing where a bucket is missing (an unused parameter that it was not told of).
        arrived = [(batch, places) for ddp, batch, places in self._arrived if ddp in self._whole]
        for batch, places in arrived:
            _leave(batch, [param.grad for param in self._at(places)])
        self._arrived, self._whole, self._task = [], set(), -1


def _call(overlap: weakref.ref[Overlap], place: int | None, param: Tensor | None = None) -> None:
    """What a hook does that does not keep its owner."""
    owner = overlap()
    if owner is not None:
        if place is None:
            owner._end()
        elif param is not None:
            owner._come(place, param)


def _put_together(marks: list[Measured | None], fresh: Tensor | None) -> Tensor:
    """One tensor of what the marks tell, and, where there is none, of the ``fresh`` in their order."""
    starts: dict[Batch, int] = {}
    size = 0 if fresh is None else fresh.numel()
    read, order = iter(range(size)), []
    for mark in marks:
        if mark is not None and mark.batch not in starts:
            starts[mark.batch] = size
            size += mark.batch.sums.numel()
        order.append(next(read) if mark is None else starts[mark.batch] + mark.index)
    for batch in starts:
        _wait_for(batch)
    # Autograd's order is that of the step before: nothing has to be sent to the device.
    return taken(torch.cat(([] if fresh is None else [fresh]) + [batch.sums for batch in starts]), order)


def _leave(batch: Batch, grads: list[Tensor | None]) -> None:
    for index, grad in enumerate(grads):
        if grad is not None:
            setattr(grad, _MEASURED, Measured(batch, index, grad))


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _final_in_hook(param: Tensor, layout: GradLayout) -> bool:
    """Whether a gradient is all that it will be when a post-accumulate hook runs. Looks at the parameter alone."""
    if layout.local is not None or len(layout.pieces) != 1 or layout.pieces[0].span is not None or layout.partial:
        return False
    size = _world_size()
    if not is_dtensor(param):
        return layout.system == "plain" and size == 1
    # FSDP2 offloads gradients behind the backward's back, unless there are hooks.
    here = param.device_mesh.device_type == param._local_tensor.device.type
    # Its parameters have a guard. Other DTensors may be averaged by hand over the ranks outside their mesh.
    return here and (layout.guard is not None or param.device_mesh.size() == size)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _averaged_by_hook(modules: list[nn.Module], overlap: Overlap) -> set[int]:
    """The parameters (by id) of DDP modules that have, or could be given, a hook that measures."""
    if not dist.is_available():
        return set()
    from distclip.overlap_ddp import watch

    found: set[int] = set()
    for module in (module for root in modules for module in root.modules()):
        if isinstance(module, DistributedDataParallel) and watch(module, overlap):
            found |= {id(param) for param in module.parameters()}
    return found


def _measurable(param: Tensor) -> Tensor | None:
    """This rank's part of the gradient, if it can be measured now."""
    grad = param.grad
    if is_dtensor(param):
        if grad is None or not is_dtensor(grad) or grad.placements != param.placements:
            return None
        grad = grad._local_tensor
    if grad is None or grad.layout != torch.strided or grad.dtype in WIDE or not grad.numel() or grad.is_inference():
        return None
    # What a CUDA graph replays, it replays without this.
    return None if grad.is_cuda and torch.cuda.is_current_stream_capturing() else grad


def _stream_of(device: torch.device) -> torch.Stream | None:
    return None if device.type == "cpu" else torch.accelerator.current_stream(device)


def _on(stream: torch.Stream | None) -> Any:
    return stream if stream is not None else torch.no_grad()


def _wait_for(batch: Batch) -> None:
    """Let the current stream wait for what was measured on another. The host does not."""
    current = _stream_of(batch.sums.device)
    if batch.stream is not None and current is not None and current != batch.stream:
        current.wait_stream(batch.stream)
        batch.sums.record_stream(current)
