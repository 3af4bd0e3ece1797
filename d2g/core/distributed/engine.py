"""A network under DDP, FSDP2 or in one process, with exact gradients when backward runs more than once.

A second backward pass through DDP is not averaged, and one through FSDP2 reads freed storage (pytorch.md
"R1 under DDP" and "R1 under FSDP2"). Here such passes run on the bare module: under DDP their gradients stay
local until the last pass averages them all; under FSDP2 the gathered weights stay until the pass is over.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from d2g.core.distributed import process_group
from d2g.core.errors import SettingError

Kind = Literal["ddp", "fsdp"]

BLOCK_SHAPES = 128
"""Compilations of one block's code by `compile_blocks`: its shapes, times which weights are trained."""


class DistributedModule:
    """A network in training under DDP or FSDP2, called like the network itself.

    `module` is the bare network, whose parameters the optimizer gets; under FSDP2 they are DTensors, so
    create the optimizer after this. Every rank starts with rank 0's weights.
    """

    def __init__(
        self,
        module: nn.Module,
        kind: Kind,
        device: torch.device,
        *,
        layers: Iterable[nn.Module] = (),
        roots: Iterable[nn.Module] = (),
        replicas: int = 1,
        half: torch.dtype | None = None,
        compile_backend: str = "",
        compiled_blocks: bool = False,
        channels_last: bool = False,
    ) -> None:
        """Wrap the network for this process group.

        - layers: modules that FSDP2 gathers one at a time.
        - roots: modules that hold the remaining parameters. FSDP2 casts to `half` at their boundary;
          everything around them stays in fp32.
        - replicas: number of groups of ranks that each hold all weights (hybrid sharding).
        - compile_backend: a torch.compile backend; "" is eager.
        - compiled_blocks: whether `compile_blocks` has compiled parts of the network.
        - channels_last: store convolution weights channels-last, as CUDA's matrix units read them. Not for
          FSDP2, which shards contiguous tensors only.
        """
        self.module, self.kind = module, kind
        self.call: Callable[..., Any] = module
        # Shard the network, or replicate it; a single process needs no wrapper.
        if kind == "fsdp":
            self._shard(list(layers), list(roots), device, replicas, half)
        else:
            module.to(device)
            if channels_last:
                _store_channels_last(module)
            if process_group.world_size() > 1:
                ids = [device] if device.type == "cuda" else None
                # Depthwise convolutions have one channel per filter: other strides are the same layout.
                warnings.filterwarnings("ignore", "Grad strides do not match bucket", UserWarning)
                self.call = DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
                # Gloo sums in varying orders: fix the order, so that a resumed run equals an unbroken one.
                if device.type == "cpu" and process_group.world_size() > 2:
                    self.call.register_comm_hook(None, process_group.average_in_order)
        # Compile both forms: with the wrapper for averaged passes, without it for local ones.
        self.compiled = bool(compile_backend) or compiled_blocks
        self.local_call: Callable[..., Any] = module
        if compile_backend:
            self.local_call = torch.compile(module, backend=compile_backend)
            self.call = (
                self.local_call if self.call is module else torch.compile(self.call, backend=compile_backend)
            )

    def __call__(self, *args: Any) -> Any:
        """The network's forward pass, as the engine runs it."""
        return self.call(*args)

    def _shard(
        self,
        layers: list[nn.Module],
        roots: list[nn.Module],
        device: torch.device,
        replicas: int,
        half: torch.dtype | None,
    ) -> None:
        # Gather in `half`, but average gradients in fp32.
        mesh = _mesh(device, replicas)
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
        # Shard first, then broadcast rank 0's weights into the shards.
        full_state = self.module.state_dict() if process_group.rank() == 0 else {}
        constants = _constants(self.module)
        for part in (*layers, *roots):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        self.module.to_empty(device=device)
        for name, value in _constants(self.module).items():
            if process_group.rank() == 0:
                value.copy_(constants[name])
        process_group.broadcast(_constants(self.module).values())
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
        set_model_state_dict(self.module, full_state, options=options)

    @property
    def sharded(self) -> list[FSDPModule]:
        """The modules that FSDP2 gathers and frees."""
        return [part for part in self.module.modules() if isinstance(part, FSDPModule)]

    @contextmanager
    def no_sync(self, enabled: bool = True) -> Iterator[None]:
        """Backward passes inside the block add to this rank's gradients; the next one outside averages all.

        FSDP2 averages and adds in each pass, which gives the same gradients.
        """
        inside: AbstractContextManager[Any] = nullcontext()
        if enabled and isinstance(self.wrapper, DistributedDataParallel):
            inside = self.wrapper.no_sync()
        with inside:
            yield

    def forward_frozen(self, *args: Any) -> Any:
        """A forward pass that bypasses DDP, for parameters that do not require gradients."""
        return self.local_call(*args)

    @property
    def wrapper(self) -> nn.Module:
        """The DDP wrapper, or the network itself."""
        inner = getattr(self.call, "_orig_mod", self.call)
        assert isinstance(inner, nn.Module)
        return inner

    @contextmanager
    def bare_module(self) -> Iterator[nn.Module]:
        """The network for passes whose gradient is differentiated again.

        It is eager and unwrapped, and its attention has a second derivative, also where activations are
        recomputed (pytorch.md "Second derivative of attention"). Call backward inside. Under DDP an averaged
        pass must follow before the optimizer's step.
        """
        with ExitStack() as stack:
            if self.compiled:  # set_stance loads dynamo, which takes seconds, so only when needed
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(self.no_sync())
            for part in self.sharded:
                part.set_reshard_after_backward(False, recurse=False)
            yield self.module
            for p in self.parameters():  # DDP needs gradients with their parameters' memory layout
                if p.grad is not None and p.grad.stride() != p.stride():
                    p.grad = torch.empty_like(p).copy_(p.grad)
            # Without this the optimizer would update the shards, and the next pass use the old weights.
            for part in self.sharded:
                part.reshard()
                part.set_reshard_after_backward(True, recurse=False)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that require gradients."""
        return [p for p in self.module.parameters() if p.requires_grad]

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale gradients so that their norm over all parameters and ranks is at most `max_norm`.

        Returns the norm before scaling.
        """
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if math.isfinite(max_norm):
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), max_norm, norm)
        return full_tensor(norm)


@torch.no_grad()
def _store_channels_last(module: nn.Module) -> None:
    """Store the tensors of four dimensions channels-last. `Module.to` would fail on a bank of kernels, which
    has five."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def _constants(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that are not in the state dict, such as tables of positions."""
    saved = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name not in saved}


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or the tensor itself if it is not sharded; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of `full`, sharded like `like` (all of it if `like` is not). No communication."""
    if not isinstance(like, DTensor):
        return full.to(like)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        full.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None
    )


def _mesh(device: torch.device, replicas: int) -> DeviceMesh:
    world = process_group.world_size()
    if world % replicas:
        raise SettingError(f"there are {replicas} replicas; expected a divisor of the {world} processes")
    process_group.init_single_process()
    with process_group.stdout_to_stderr():  # a mesh of two dimensions makes groups
        if replicas == 1:
            return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
        shape = (replicas, world // replicas)
        return init_device_mesh(device.type, shape, mesh_dim_names=("replica", "shard"))


def store_frozen_in_bf16(module: nn.Module) -> None:
    """Convert weights and biases of linear layers and convolutions that require no gradients to bf16.

    Under bf16 autocast these layers round them anyway, so that their outputs keep every bit.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            for name, parameter in layer.named_parameters(recurse=False):
                if not parameter.requires_grad:
                    setattr(layer, name, nn.Parameter(parameter.detach().bfloat16(), requires_grad=False))


def compile_blocks(layers: Iterable[nn.Module], backend: str) -> None:
    """Compile the forward pass of each of these layers by itself (regional compilation).

    Layers with the same code and shapes share one compilation. Call it before `recompute` and before the
    layers are wrapped: FSDP2's hooks and recomputation stay around the compiled code. Shapes stay static, as
    they are in training.
    """
    import torch._dynamo  # takes seconds, so only when compiling

    # Resnets of a U-Net alone have more shapes than the 8 after which dynamo gives up on a function.
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, BLOCK_SHAPES)
    # Dynamo looks at the .grad of a block's input, which is no leaf.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)


def recompute(layers: Iterable[nn.Module]) -> None:
    """Activation checkpointing: keep only the inputs of these layers and run them again in backward.

    Non-reentrant, the only form that allows a second derivative (pytorch.md "Activation checkpointing"). The
    random state of torch is saved for layers with dropout only: on a GPU that costs a copy per layer.
    """
    for layer in layers:
        has_dropout = any(isinstance(m, _DropoutNd) and m.p > 0 for m in layer.modules())
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=has_dropout
        )
