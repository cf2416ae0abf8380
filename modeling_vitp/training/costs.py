"""Cost plans: devices, and the operations and memory of a training step, measured with tensors without values."""

import contextlib
import dataclasses
import os
import platform
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

GIB = 2**30
UTILIZATION = 0.4  # share of its peak speed that a device is assumed to reach


@dataclass(frozen=True)
class Device:
    """Memory of a GPU in GiB and its operations per second, dense, according to its manufacturer.

    Args:
        memory: GiB.
        operations: operations per second in bfloat16.
        float32_operations: operations per second in float32 without tensor cores, `None` if unknown.
    """

    memory: float
    operations: float
    float32_operations: float | None = None

    def hours(self, operations: float, utilization: float, bf16: bool = True) -> float | None:
        """Return the hours that a number of operations takes, `None` if the speed of the device is unknown.

        Args:
            utilization: share of the device's peak speed.
        """
        speed = self.operations if bf16 else self.float32_operations
        if speed is None:
            return None
        return operations / (speed * utilization) / 3600


DEVICES = {
    "a40": Device(48, 149.7e12, 37.4e12),
    "a100-40gb": Device(40, 312e12, 19.5e12),
    "a100": Device(80, 312e12, 19.5e12),
    "a800": Device(80, 312e12, 19.5e12),
    "h100": Device(80, 989.4e12, 66.9e12),
    "h200": Device(141, 989.4e12, 66.9e12),
    "l40s": Device(48, 362e12, 91.6e12),
    "rtx4090": Device(24, 165.2e12, 82.6e12),
}


CHECKPOINTING = {
    0: "without activation checkpointing",
    4: "activation checkpointing of every 4th layer",
    2: "activation checkpointing of every 2nd layer",
    1: "activation checkpointing",
}


MEMORY_HEADER = ["GiB:", "weights", "gradients", "optimizer", "activations", "total", "of the device"]


SPARE = 0.1  # share of a device's memory that stays free, the error of the estimate


DISABLE_CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"  # environment variable of transformers


CUSTOM_DEVICE = re.compile(r"(\d+\.?\d*)\s*GiB\s*,\s*(\d+\.?\d*)\s*TFLOP/s", re.IGNORECASE)


# Bytes of optimizer state per trainable float32 weight, by a part of the optimizer's name.
ADAM_STATE = 8
STATES = {"8bit": 2, "adafactor": 0, "sgd": 0, "lion": 4}


@dataclass(frozen=True)
class StepCost:
    """Bytes of memory and floating-point operations of a batch.

    Args:
        weights: bytes of the weights.
        gradients: bytes of the gradients.
        optimizer: bytes of the optimizer state.
        activations: bytes kept for the backward pass; with checkpointing, including one recomputed layer.
        forward: operations of the forward pass by part of the model.
        backward: operations of the backward pass, including recomputed layers.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    forward: dict[str, float]
    backward: float

    @property
    def memory(self) -> float:
        """Bytes at the peak, the sum of all parts: gradients replace activations, but copies take about the same."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def operations(self) -> float:
        return sum(self.forward.values()) + self.backward

    def fits(self, memory: float) -> bool:
        """Return whether a step leaves the share `SPARE` of a memory in GiB free."""
        return self.memory / GIB <= (1 - SPARE) * memory

    def with_buckets(self, devices: int) -> "StepCost":
        """Return the cost on several devices with DDP, which copies the gradients to buckets to sum them."""
        if devices <= 1:
            return self
        return dataclasses.replace(self, gradients=2 * self.gradients)


@dataclass(eq=False)
class Scope:
    """Tensors kept for the backward pass and operations of a layer, or of the whole model.

    Args:
        inputs: bytes of the inputs of a layer by storage. Checkpointing keeps only these.
        parts: in the order of the forward pass, the kept bytes by storage, and the layers within.
        forward: operations of the forward pass, with those of the layers within.
        recomputed: operations of the forward pass until the last kept tensor, which checkpointing does again.
        backward: operations of the backward pass, without those of the layers within.
    """

    inputs: dict[Any, int] = field(default_factory=dict)
    parts: list = field(default_factory=list)
    forward: float = 0
    recomputed: float = 0
    backward: float = 0

    def renewed(self, known: set, number: int) -> "Scope":
        """Return a copy of a layer whose tensors are new, except the known ones."""

        def renew(sizes: dict[Any, int]) -> dict[Any, int]:
            return {key if key in known else (key, number): size for key, size in sizes.items()}

        inputs = renew(self.inputs)
        parts = [renew(sizes) for sizes in self.parts]
        return dataclasses.replace(self, inputs=inputs, parts=parts)


@dataclass
class Step:
    """Measured forward and backward pass of a model.

    Args:
        weights: number of weights.
        trained: number of trainable weights.
        dtype: dtype of the weights.
        whole: the model.
        layers: its layers that support checkpointing, in the order of its modules.
        forward: operations of the forward pass by part of the model.
    """

    weights: int
    trained: int
    dtype: torch.dtype
    whole: Scope
    layers: list[Scope]
    forward: dict[str, float]

    def repeat(self, layer: Scope, times: int, part: str) -> None:
        """Insert copies of a layer behind it, whose tensors are new unless an earlier layer has them too."""
        place = self.whole.parts.index(layer)
        known_storages = set()
        for earlier_part in self.whole.parts[:place]:
            known_storages |= storages_of(earlier_part)
        copies = [layer.renewed(known_storages, number) for number in range(times)]
        self.whole.parts[place + 1 : place + 1] = copies
        place = self.layers.index(layer)
        self.layers[place + 1 : place + 1] = copies
        self.forward[part] += times * layer.forward

    def cost(self, checkpoint_every: int = 0, optimizer: str = "adamw_torch") -> StepCost:
        """Return the cost of a step, see [`step_cost`]."""
        checkpointed = set(self.layers[::checkpoint_every]) if checkpoint_every else set()
        backward = self.whole.backward
        backward += sum(layer.backward for layer in self.layers)
        backward += sum(layer.recomputed for layer in checkpointed)
        gradients = self.trained * self.dtype.itemsize
        return StepCost(
            weights=self.weights * self.dtype.itemsize,
            gradients=gradients,
            optimizer=gradients * state_size(optimizer) / 4,
            activations=most_kept(self.whole, checkpointed, {}),
            forward=self.forward,
            backward=backward,
        )


def state_size(optimizer: str) -> int:
    """Return the bytes of optimizer state per trainable float32 weight."""
    for name, size in STATES.items():
        if name in optimizer:
            return size
    return ADAM_STATE


def storages_of(part: Scope | dict[Any, int]) -> set:
    """Return the storages of kept tensors, or of a layer with its inputs."""
    if isinstance(part, dict):
        return set(part)
    storages = set(part.inputs)
    for inner_part in part.parts:
        storages |= storages_of(inner_part)
    return storages


def most_kept(scope: Scope, checkpointed: set[Scope], kept_sizes: dict[Any, int]) -> int:
    """Return the largest number of bytes that are kept at once, which may be while a layer is recomputed.

    Args:
        scope: model or layer.
        checkpointed: layers that are recomputed.
        kept_sizes: bytes by storage that are kept already, to which those of the scope are added.
    """
    most = 0
    for part in scope.parts:
        if isinstance(part, dict):
            kept_sizes.update(part)
        elif part in checkpointed:
            kept_sizes.update(part.inputs)
            # A copy, because what the layer keeps while it is recomputed is freed afterwards.
            most = max(most, most_kept(part, checkpointed, dict(kept_sizes)))
        else:
            most = max(most, most_kept(part, checkpointed, kept_sizes))
    return max(most, sum(kept_sizes.values()))


def memory_cells(cost: StepCost, device: Device) -> list[str]:
    """Return the cells of a table under `MEMORY_HEADER`, without the first one."""
    cells = []
    for size in (cost.weights, cost.gradients, cost.optimizer, cost.activations, cost.memory):
        cells.append(f"{size / GIB:.2f}")
    free = device.memory - cost.memory / GIB
    cells.append(f"{free:.1f} free" if free >= 0 else f"{-free:.1f} missing")
    return cells


def describe_device(name: str | None, default: str = "a40") -> tuple[str, Device]:
    """Return the name and the properties of a device.

    Args:
        name: name in [`DEVICES`], or memory and speed such as "24GiB,71TFLOP/s". By default the GPU of this machine,
            with the speed of `default` if its own speed is unknown.
        default: name of the device without a GPU.

    Raises:
        ValueError: if the name is unknown.
    """
    custom_device = CUSTOM_DEVICE.fullmatch((name or "").strip())
    if custom_device:
        memory = float(custom_device[1])
        teraflops = float(custom_device[2])
        if memory > 0 and teraflops > 0:
            return "custom", Device(memory, teraflops * 1e12)
    if name is None and torch.cuda.is_available():
        return describe_gpu(default)
    name = (name or default).lower()
    if name not in DEVICES:
        raise ValueError(
            f"Expected plan_device to be one of {', '.join(DEVICES)}, or memory and dense operations per second such "
            f"as 24GiB,71TFLOP/s, got {name!r}."
        )
    return name, DEVICES[name]


def describe_gpu(default: str) -> tuple[str, Device]:
    """Return the name of the GPU of this machine with its memory, and its speed or that of `default`."""
    gpu = torch.cuda.get_device_properties(0)
    name = f"{gpu.name} (unknown speed, that of {default} is assumed: set --plan_device)"
    device = DEVICES[default]
    words = re.split(r"[^A-Z0-9]+", gpu.name.upper().replace("RTX ", "RTX"))
    for key, listed_device in DEVICES.items():
        if key.split("-")[0].upper() in words:
            name = gpu.name
            device = listed_device
            break
    return name, dataclasses.replace(device, memory=gpu.total_memory / GIB)


def machine_memory() -> float:
    """Return the GiB of memory of the training device."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def describe_machine() -> str:
    """Return the accelerators of this machine, or its processor and number of cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"


def fastest_setting(settings: Mapping[Hashable, tuple[StepCost, float]], memory: float) -> Hashable | None:
    """Return the fastest setting that fits into a memory in GiB, `None` if no setting fits.

    Args:
        settings: cost of a step and duration in any unit, by setting.
    """
    durations = {}
    for setting, (cost, duration) in settings.items():
        if cost.fits(memory):
            durations[setting] = duration
    return min(durations, key=durations.get, default=None)


@contextlib.contextmanager
def without_value_checks() -> Iterator[None]:
    """Disable the checks of transformers that read the values of tensors, such as the number of image tokens."""
    previous = os.environ.get(DISABLE_CHECKS)
    os.environ[DISABLE_CHECKS] = "1"
    try:
        yield
    finally:
        if previous is None:
            del os.environ[DISABLE_CHECKS]
        else:
            os.environ[DISABLE_CHECKS] = previous


class StepRecorder:
    """Recorder of the tensors and operations of one forward and backward pass, by layer.

    Args:
        counter: counter of operations.
        layers: scopes to fill, by module.

    Attributes:
        whole: scope of the whole model.
        own_storages: storages of the weights, which are not counted.
    """

    def __init__(self, counter: FlopCounterMode, layers: dict[nn.Module, Scope]):
        self.counter = counter
        self.layers = layers
        self.whole = Scope()
        self.own_storages: set[int] = set()
        self._open_scopes = [self.whole]
        self._alive: list[torch.Tensor] = []  # so that no address of a storage is used again
        self._num_counted = 0
        self._running = self.whole

    def storages(self, tensors: Iterable[Any]) -> dict[Any, int]:
        """Return the sizes of the storages of tensors by address, without those of the weights."""
        sizes = {}
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            self._alive.append(tensor)
            storage = tensor.untyped_storage()
            if storage._cdata not in self.own_storages:
                sizes[storage._cdata] = storage.nbytes()
        return sizes

    def enter(self, module: nn.Module, inputs: tuple) -> None:
        """Open the scope of a layer, as a hook before its forward pass."""
        scope = self.layers[module]
        scope.inputs = self.storages(inputs)
        scope.forward = -self.counter.get_total_flops()
        self._open_scopes[-1].parts.append(scope)
        self._open_scopes.append(scope)

    def leave(self, module: nn.Module, inputs: tuple, outputs: Any) -> None:
        """Close the scope of a layer, as a hook after its forward pass."""
        scope = self._open_scopes.pop()
        scope.forward += self.counter.get_total_flops()

    def keep(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Scope]:
        """Record a tensor that is kept for the backward pass, and return it with the scope that keeps it."""
        scope = self._open_scopes[-1]
        scope.parts.append(self.storages([tensor]))
        for layer in self._open_scopes[1:]:  # a recomputed layer stops at its last kept tensor
            layer.recomputed = layer.forward + self.counter.get_total_flops()
        return tensor, scope

    def restore(self, tensor_and_scope: tuple[torch.Tensor, Scope]) -> torch.Tensor:
        """Return a tensor that [`keep`] has kept, whose scope runs backwards now."""
        tensor, scope = tensor_and_scope
        self.attribute(scope)
        return tensor

    def begin_backward(self) -> None:
        """Count operations from now on as those of the backward pass."""
        self._num_counted = self.counter.get_total_flops()

    def attribute(self, scope: Scope) -> None:
        """Add the operations since the last call to the scope that ran, and begin another one."""
        num_operations = self.counter.get_total_flops()
        self._running.backward += num_operations - self._num_counted
        self._num_counted = num_operations
        self._running = scope


def measure_step(
    model: PreTrainedModel,
    loss: Callable[[PreTrainedModel], torch.Tensor],
    bf16: bool,
    parts: Mapping[str, str] | None = None,
) -> Step:
    """Measure forward and backward pass of a model on the meta device, with tensors that have no values.

    Args:
        loss: function that returns the loss of a batch of the model.
        bf16: whether to autocast to bfloat16.
        parts: names of modules, as PyTorch's counter of operations writes them, by part of the model.
    """
    layers = {module: Scope() for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
    counter = count_operations()
    recorder = StepRecorder(counter, layers)
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(without_value_checks())
        for module in layers:
            stack.enter_context(module.register_forward_pre_hook(recorder.enter))
            stack.enter_context(module.register_forward_hook(recorder.leave))
        model.to_empty(device="cpu")
        model.tie_weights()
        recorder.own_storages = {weight.untyped_storage()._cdata for weight in model.parameters()}
        stack.enter_context(counter)
        with torch.autograd.graph.saved_tensors_hooks(recorder.keep, recorder.restore):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                total_loss = loss(model)
            recorder.begin_backward()
            forward = forward_operations(counter, parts or {})
            total_loss.backward()
        recorder.attribute(recorder.whole)
    return Step(
        weights=sum(weight.numel() for weight in model.parameters()),
        trained=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        dtype=next(model.parameters()).dtype,
        whole=recorder.whole,
        layers=[layer for layer in layers.values() if layer.inputs],  # PEFT keeps a copy of trained modules
        forward=forward,
    )


def forward_operations(counter: FlopCounterMode, parts: Mapping[str, str]) -> dict[str, float]:
    """Return the counted operations by part of the model; `head` are those outside of the parts.

    Those of a part whose modules are called one by one are the sum of its outermost modules.
    """
    counts = counter.get_flop_counts()
    forward = {}
    for part_name, module_name in parts.items():
        counted_names = [name for name in counts if f"{name}.".startswith(f"{module_name}.")]
        forward[part_name] = 0
        for name in counted_names:
            is_within_another = any(name.startswith(f"{other_name}.") for other_name in counted_names)
            if not is_within_another:
                forward[part_name] += sum(counts[name].values())
    forward["head"] = counter.get_total_flops() - sum(forward.values())
    return forward


def count_operations() -> FlopCounterMode:
    """Return PyTorch's counter of operations, extended by attention on CPUs."""

    def attention(query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
        """Count the products of scores and values, including masked ones."""
        batch, heads, num_queries, width = query
        num_products = batch * heads * num_queries * key[2]
        return 2 * num_products * (width + value[3])

    def backward(gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
        """Count the product of the recomputed scores, and the four products of the gradients."""
        batch, heads, num_queries, width = query
        num_products = batch * heads * num_queries * key[2]
        return 2 * num_products * (3 * width + 2 * value[3])

    operations = torch.ops.aten
    formulas = {
        operations._scaled_dot_product_flash_attention_for_cpu: attention,
        operations._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)
