"""Runs `train` on fake CUDA tensors, without a GPU, and prints where a GPU would keep the host waiting.

    PYTHONPATH=.:tests python tests/fake_cuda.py ode|gan [a.b=c ...]
    PYTHONPATH=.:tests python tests/fake_cuda.py ranks COUNT ode|gan [a.b=c ...]
    PYTHONPATH=.:tests python tests/fake_cuda.py families KIND ...
    PYTHONPATH=.:tests python tests/fake_cuda.py pixels
    PYTHONPATH=.:tests python tests/fake_cuda.py validation
    PYTHONPATH=.:tests python tests/fake_cuda.py memory PRESET ode|gan [a.b=c ...]
    PYTHONPATH=.:tests python tests/fake_cuda.py memory-ranks COUNT PRESET ode|gan [a.b=c ...]

CPU tensors are real, CUDA tensors are FakeTensors. Mixing the two raises, as on a GPU. A value that the host
asks of the device is made up (1), and the line that asked is counted. A copy to pinned memory holds garbage
until the host has waited for an event behind it. Attention takes a GPU's kernels. Tried with torch 2.11.0 and
2.15.0, without a driver. Settings follow the stage, as for --set. Prints one JSON object: `steps`, the waits
of each step by function of the project; `report`, those of the report at the end; `late`, what the host read
of each step before; `all_reduces`, gradients that DDP averaged in each step, the first one included; `tf32`,
whether fp32 products may use TF32 after each step; `contiguous_filters`, convolutions of
forward passes whose filters are not channels-last; `embeddings`, dtypes of the embeddings of tokens or
classes; images/s and MFU of an H100. `pixels` has a discriminator
on a vision transformer, and CLIP guidance; `validation` draws previews and measures FID. `families` samples
pairs and trains both stages of tiny teachers (the kinds of tests/tiny_teachers.py; a cascade's prior before
its decoder), and prints such an object by kind and stage;
`pairs`: waits of a second batch. tests/fake_cuda_commands.py runs the other commands.
`memory` takes two steps of a preset at the size of its published model, with R1, and prints GiB at the peak:
`tracked` (storages that live at once) and `forecast` (distill.planning.memory), both without text encoders;
`flop_per_step`, recomputed layers among them; and `operators_per_step`, views among them.
`ranks` and `memory-ranks` do so as the first of COUNT ranks, in a group whose collectives send nothing. DDP
then has torch's reducer in Python (docs/scaling.md), which has no buckets: its memory is not that of DDP.
"""

import atexit
import ctypes
import gc
import json
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.optim.optimizer as optimizers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

aten = torch.ops.aten
ASK_DEVICE = torch.ops.prim.device.default
"""More than half of all calls: fake tensors know their device in Python."""
ROOT = str(Path(__file__).resolve().parents[1])
CARDS = ["NVIDIA H100 80GB HBM3"]
"""The last one is the card."""
HAS_PRIMARY_CONTEXT = 4
"""Slot of hasPrimaryContext in at::CUDAHooksInterface's table of virtual functions (torch 2.11 to 2.15)."""

_answer_no = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda hooks, index: False)


def pretend_cuda() -> None:
    """Make torch accept fake CUDA tensors in a backward pass, in a CUDA build without a driver."""
    torch._C._ensureCUDADeviceGuardSet()  # a guard that does nothing
    # The autograd engine asks whether device 0 has a context, and raises if there is no device 0. Answer no.
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    library._ZN2at6detail12getCUDAHooksEv.restype = ctypes.c_void_p
    hooks = ctypes.cast(library._ZN2at6detail12getCUDAHooksEv(), ctypes.POINTER(ctypes.c_void_p))
    original = hooks[0]
    assert original is not None
    table = (ctypes.c_void_p * 130)()
    ctypes.memmove(table, original - 16, 130 * 8)
    table[2 + HAS_PRIMARY_CONTEXT] = ctypes.cast(_answer_no, ctypes.c_void_p).value
    atexit.register(hooks.__setitem__, 0, original)  # Python's function is gone before torch is
    pretend_cuda.table = table  # type: ignore[attr-defined]  # keeps it alive
    hooks[0] = ctypes.addressof(table) + 16

    any_torch: Any = torch
    any_torch.cuda._lazy_init = lambda: None
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") goes by way of the CPU
    torch.backends.cudnn.enabled = False  # cudnn_grid_sampler has no fake form
    # Otherwise autocast("cuda") switches itself off.
    any_torch.amp.autocast_mode.amp_definitely_not_available = lambda: False
    any_torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    any_torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    optimizers._foreach_supported_types.append(FakeTensor)  # optimizers as on CUDA
    any_torch.nn.Module._apply = _apply
    any_torch.cuda.Event, any_torch.cuda.Stream, current = FakeEvent, FakeStream, FakeStream()
    any_torch.cuda.current_stream = lambda device=None: current
    any_torch.cuda.stream = nullcontext
    any_torch.cuda.current_device = lambda: 0
    any_torch.cuda.get_device_capability = lambda device=None: (9, 0)
    any_torch.cuda.synchronize = lambda device=None: None
    any_torch.cuda.get_rng_state = lambda device=None: torch.zeros(1)
    any_torch.cuda.set_rng_state = lambda state, device=None: None
    any_torch.cuda.get_device_name = lambda device=None: CARDS[-1]


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Module.to for fake parameters, which torch can neither swap nor set the data of."""
    replaced: dict[int, nn.Parameter] = {}
    for module in self.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) not in replaced:
                with torch.no_grad():
                    new = fn(p)
                replaced[id(p)] = p if new is p else nn.Parameter(new.detach(), p.requires_grad)
            module._parameters[name] = None if p is None else replaced[id(p)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fn(buffer)
    return self


def project_line() -> str:
    """File and function of the innermost frame of the project."""
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(ROOT) and f.filename != __file__]
    ours = [f for f in frames if ".venv" not in f.filename]
    return f"{os.path.relpath(ours[-1].filename, ROOT)} {ours[-1].name}" if ours else "?"


class FakeEvent:
    """A CUDA event. Copies to pinned memory that were queued before it arrive when the host waits for it."""

    mode: "FakeCuda"

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def elapsed_time(self, end: "FakeEvent") -> float:
        """Milliseconds, made up."""
        return 1.0

    def record(self, stream: object = None) -> "FakeEvent":
        self.step, self.copies = self.mode.step, list(self.mode.queued_copies)
        return self

    def synchronize(self) -> None:
        for target, value in self.copies:
            target.fill_(value)
        kind = self.mode.waits if self.step == self.mode.step else self.mode.late
        kind[f"{project_line()}: waits for an event"] += 1


class FakeStream:
    """A CUDA stream. Streams wait for each other on the device, the host does not."""

    stream_id, device_index, device_type = 0, 0, 1

    def __init__(self, device: object = None, priority: int = 0) -> None:
        pass

    def wait_event(self, event: FakeEvent) -> None:
        pass

    def wait_stream(self, stream: "FakeStream") -> None:
        pass

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        return (event or FakeEvent()).record()


GARBAGE = 99
"""What a copy to pinned memory holds before it has arrived."""


class FakeCuda(TorchDispatchMode):
    """CPU operations run, operations on CUDA are faked. `waits` counts where the host waits for CUDA,
    `operators` the operations of both."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: Counter[str] = Counter()
        self.late: Counter[str] = Counter()
        self.all_reduces = self.operators = self.contiguous_filters = 0
        self.embedding_dtypes, self.pinned = set[torch.dtype](), set[int]()
        self.queued_copies: list[tuple[Tensor, float]] = []
        self.step = 0
        FakeEvent.mode = self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_wrapped(types):
            return NotImplemented  # its own dispatch comes back with what is inside
        if func is ASK_DEVICE or is_asked_for_shapes():
            return func(*args, **kwargs)
        if func is torch.ops._c10d_functional.all_reduce.default:
            self.all_reduces += 1
        self.operators += 1
        if func is aten._pin_memory.default:
            pinned = args[0].clone()
            self.pinned.add(pinned.data_ptr())
            return pinned
        # CPU operations run as they are.
        is_fake = FakeTensor in types and any(
            isinstance(t, FakeTensor) and t.fake_mode is self.fake for t in tree_iter((args, kwargs))
        )
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if not is_fake and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        in_forward_pass = torch._C._current_graph_task_id() == -1
        if func is aten.convolution.default and args[1].shape[-1] > 1 and in_forward_pass:
            self.contiguous_filters += not args[1].is_contiguous(memory_format=torch.channels_last)
        if func is aten.embedding.default:
            self.embedding_dtypes.add(args[0].dtype)
        # The host asks for a value: make one up.
        if func is aten._local_scalar_dense.default:
            self.waits[f"{project_line()}: reads a value"] += 1
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func in (aten._to_copy.default, aten.copy_.default):
            is_new = func is aten._to_copy.default
            source, target = (args[0], device) if is_new else (args[1], args[0].device)
            direction = (source.device.type, target.type if target is not None else source.device.type)
            if direction == ("cuda", "cpu") and not is_new and self._is_queued(args[0], args[2:], kwargs):
                self.queued_copies.append((args[0], 0))
                return args[0].fill_(GARBAGE)
            if direction == ("cuda", "cpu"):
                self.waits[f"{project_line()}: copies to the host"] += 1
                dtype = kwargs.get("dtype") or source.dtype
                zeros = torch.zeros(source.shape if is_new else args[0].shape, dtype=dtype)
                return zeros if is_new else args[0].copy_(zeros)
            if direction == ("cpu", "cuda"):
                if not (kwargs.get("non_blocking") and source.data_ptr() in self.pinned):
                    self.waits[f"{project_line()}: copies from pageable memory"] += 1
        return self.fake.__torch_dispatch__(func, types, args, kwargs)

    def _is_queued(self, target: Tensor, flags: Any, kwargs: Any) -> bool:
        """Whether a copy to the host runs behind the host's back."""
        return bool(kwargs.get("non_blocking") or any(flags)) and target.data_ptr() in self.pinned


def is_wrapped(types: Sequence[type]) -> bool:
    """Whether an operation has sharded tensors, or results of collectives that nobody has waited for."""
    return any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types)


def is_asked_for_shapes() -> bool:
    """Whether DTensor runs an operation on fake tensors of its own, to learn the shape of the result."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


class GpuAttention:
    """Context in which attention takes the kernels of a recent GPU. Without a driver torch takes the math
    kernel, which keeps every probability for the backward pass. (A TorchFunctionMode is off inside of
    backward passes, where layers are recomputed.)"""

    def __enter__(self) -> None:
        self.original: Any = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self._choose  # type: ignore[assignment]

    def __exit__(self, *error: object) -> None:
        F.scaled_dot_product_attention = self.original

    def _choose(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        attend = self._attend if isinstance(query, FakeTensor) else self.original
        return attend(query, *args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **others: Any,
    ) -> Tensor:
        half = query.dtype in (torch.bfloat16, torch.float16)
        scale = {"scale": others.get("scale")}
        if half and attn_mask is None and torch.backends.cuda.flash_sdp_enabled():
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, **scale
            )[0]
        if torch.backends.cuda.mem_efficient_sdp_enabled():
            return aten._scaled_dot_product_efficient_attention(
                query, key, value, attn_mask, True, dropout_p, is_causal, **scale
            )[0]
        attended: Tensor = self.original(query, key, value, attn_mask, dropout_p, is_causal, **others)
        return attended


def main(stage: str, *settings: str, ranks: int = 1) -> None:
    import jobs
    import tiny

    folder = Path(tempfile.mkdtemp())
    teacher = tiny.save_teacher(folder / "teacher")
    batch = 4 if ranks == 1 else 2 * ranks
    pairs = jobs.make_pairs(Path(teacher), folder, num_pairs=max(12, batch))
    begin()
    if ranks > 1:
        pretend_ranks(ranks)
    rows = (f"train.batch_size={batch}", f"train.images={3 * batch}")
    print(json.dumps(waits_of_training(folder, teacher, pairs, stage, (*rows, *settings))))


def pretend_ranks(count: int) -> None:
    """Make this process rank 0 of a group whose collectives send nothing.

    DDP gets its reducer in Python: the one in C++ asks the driver. It reduces each gradient by itself,
    without buckets, and respects no_sync. DDP's comparison of the parameters of all ranks is left out: the
    host reads it, and the group has no answer.
    """
    import torch._dynamo
    import torch.nn.parallel.distributed as ddp
    import torch.testing._internal.distributed.fake_pg  # registers the backend
    from torch._C._distributed_c10d import FakeStore

    any_dynamo: Any = torch._dynamo.config
    any_dynamo.optimize_ddp = "python_reducer"
    any_ddp: Any = ddp
    any_ddp._verify_param_shape_across_processes = lambda *arguments: None

    torch.distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())


def families(*kinds: str) -> None:
    import tiny_teachers
    from pairgen.generate import generate_pairs
    from pairgen.job import open_job

    gc.disable()  # fakes take no memory, and a collection looks at all of their objects
    root, results = Path(tempfile.mkdtemp()), dict[str, Any]()
    stores = {}
    for kind in kinds:
        # Pairs on the CPU, of which the runs read real numbers.
        folder = root / kind
        teacher = tiny_teachers.save_kind(kind, folder / "teacher")
        before = root / kind.replace("_decoder", "_prior") / "pairs" if kind.endswith("_decoder") else None
        stores[kind] = tiny_teachers.pair_config(teacher, folder, before)
        generate_pairs(stores[kind], folder / "pairs")
    begin()
    for kind, config in stores.items():
        folder = root / kind
        mode = FakeCuda()
        with torch.autograd.set_multithreading_enabled(False), mode, GpuAttention():
            job = open_job(config, torch.device("cuda", 0))
            for rows in ([0, 1, 2], [3, 4, 5]):
                mode.waits.clear()  # the first batch copies constants
                job.rows(rows, job.encode(rows))
        results[kind] = {"pairs": dict(mode.waits)}
        for stage in ("ode", "gan"):
            chosen = tiny_teachers.stage_settings(kind, stage)
            # E-LatentLPIPS is in stage 1. FLOP, which a known card's MFU takes, are in test_flops.py.
            CARDS.append("unknown")
            chosen += ["regression.losses=mse:1"] if stage == "gan" else []
            arguments = (config.teacher, folder / "pairs", stage, chosen)
            results[kind][stage] = waits_of_training(folder / stage, *arguments, steps=2)
    print(json.dumps(results))


def pixels() -> None:
    """Train the GAN stage with networks that look at decoded images: CLIP guidance, and D on a ViT."""
    import jobs
    import tiny
    import vision_models

    folder = Path(tempfile.mkdtemp())
    teacher = tiny.save_teacher(folder / "teacher")
    pairs = jobs.make_pairs(Path(teacher), folder)
    vit, clip = vision_models.save_vit("vit", folder / "vit"), vision_models.save_clip_model(folder / "clip")
    begin()
    guided = ("clip_guidance.weight=0.2", "clip_guidance.crop=8", f"clip_guidance.model={clip}")
    heads = (f"gan.feature_networks={vit}", "gan.feature_size=16", "gan.token_heads=2", "gan.mix_z=0")
    chosen = ("regression.losses=mse:1", "gan.discriminator=projected", *guided, *heads)
    print(json.dumps(waits_of_training(folder, teacher, pairs, "gan", chosen)))


def validation() -> None:
    """Train with previews, and validate on held-out pairs and by FID."""
    from PIL import Image

    import eval_jobs
    import jobs
    import tiny
    from eval.runner.validation import validation_hook

    folder = Path(tempfile.mkdtemp())
    teacher = tiny.save_teacher(folder / "teacher")
    pairs = jobs.make_pairs(Path(teacher), folder)
    jobs.make_clip(Path(teacher), folder / "clip")
    (folder / "photographs").mkdir()
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(folder / "photographs" / f"{number:02}.png")
    begin()
    validate = validation_hook(eval_jobs.config(folder, metrics=("fid",)), teacher)
    chosen = ("train.validate_pairs=4", "train.validate_images=4", "train.preview_prompts=4")
    chosen = (*chosen, "train.report_images=4", "train.precision=bf16")
    print(json.dumps(waits_of_training(folder, teacher, pairs, "ode", chosen, validate=validate)))


def begin() -> None:
    """Let the project use fake CUDA tensors."""
    from d2g.core.distributed import checkpoint, process_group
    from d2g.core.precision import set_exact_fp32
    from distill.training import state

    def own_device(long_waits: bool = False) -> torch.device:
        device = torch.device("cuda", 0)
        set_exact_fp32(device)
        return device

    pretend_cuda()
    any_group: Any = process_group
    any_group.init = any_group.own_device = own_device
    # torch.distributed.checkpoint looks at storages, which fakes do not have.
    any_state: Any = state.State
    any_state.save = lambda *arguments: None
    any_checkpoint: Any = checkpoint
    any_checkpoint.save = lambda folder, *arguments, **others: folder


def waits_of_training(
    folder: Path,
    teacher: str,
    pairs: Path,
    stage: str,
    settings: Sequence[str],
    steps: int = 3,
    validate: Any = None,
) -> dict[str, Any]:
    """Some steps of the preset `trial`: what the module prints of all but the first."""
    from d2g.core.config import override
    from distill.config.presets import preset
    from distill.training.train import train

    config = replace(preset("trial", stage), teacher=teacher, pairs=str(pairs))
    config = replace(config, init="teacher" if stage == "gan" else "")
    options = replace(config.train, batch_size=4, images=4 * steps, loader_workers=0, checkpoint_images=10**9)
    options = replace(options, plot=False)
    config = override(replace(config, train=replace(options, report_images=10**9)), settings)
    mode, waits, late, all_reduces, tf32 = FakeCuda(), [], [], list[int](), list[bool]()

    def progress(label: str, done: int, total: int) -> None:
        waits.append(dict(mode.waits))
        late.append(dict(mode.late))
        all_reduces.append(mode.all_reduces)
        tf32.append(torch.backends.cuda.matmul.allow_tf32)
        mode.all_reduces = 0
        mode.waits.clear()
        mode.late.clear()
        mode.step += 1

    try:
        with torch.autograd.set_multithreading_enabled(False), mode, GpuAttention():
            train(config, folder / "out", progress, validate)
    except Exception as error:  # no checkpoint was written: `train` says so at its end
        if "nothing to train" not in str(error):
            raise
    line = json.loads((folder / "out" / "stats.jsonl").read_text().splitlines()[-1])
    speed = {name: line.get(f"time/{name}") for name in ("images_per_sec", "mfu")}
    counts = {"steps": waits[1:], "late": late[1:], "report": dict(mode.waits), "all_reduces": all_reduces}
    formats = {
        "contiguous_filters": mode.contiguous_filters,
        "embeddings": sorted(map(str, mode.embedding_dtypes)),
    }
    return {**counts, **speed, "tf32": tf32, **formats}


def live_bytes() -> Any:
    """Counts bytes on CUDA, with DTensors by their shards, and with what FSDP2 frees and takes again."""
    from distill.planning.saved_activations import LiveBytes

    class Live(LiveBytes):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if is_wrapped(types):
                return NotImplemented  # its own dispatch comes back with what is inside
            if is_asked_for_shapes():
                return func(*args, **(kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)

        def resize(self, storage: Any, size: int) -> Any:
            result = original(storage, size)
            if storage._cdata in self.sizes:
                self.live += storage.nbytes() - self.sizes[storage._cdata]
                self.sizes[storage._cdata] = storage.nbytes()
                self.peak = max(self.peak, self.live)
            return result

    live, original = Live("cuda"), torch.UntypedStorage.resize_
    any_storage: Any = torch.UntypedStorage
    any_storage.resize_ = lambda storage, size: live.resize(storage, size)
    return live


def step_flops() -> Any:
    """Counts FLOP of a step, with attention as distill.planning.flops.count has it: as plain products."""
    from distill.planning.flops import Flops

    class StepFlops(Flops):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if is_wrapped(types):
                return NotImplemented  # its own dispatch comes back with what is inside
            if is_asked_for_shapes():
                return func(*args, **(kwargs or {}))
            before = self.total
            result = super().__torch_dispatch__(func, types, args, kwargs)
            # Of five products, the backward pass of these kernels recomputes one.
            if func in ATTENTION_BACKWARD:
                self.total -= (self.total - before) / 5
            return result

    return StepFlops()


ATTENTION_BACKWARD = (
    aten._scaled_dot_product_flash_attention_backward.default,
    aten._scaled_dot_product_efficient_attention_backward.default,
)


def memory(name: str, stage: str, *settings: str, ranks: int = 1) -> None:
    from benchmarks.training_step import RandomStep, text_encoders_gib
    from d2g.core.config import override
    from distill.config.presets import DISTILL_PRESETS
    from distill.planning.fake_networks import to_fake
    from distill.planning.memory import predict
    from distill.planning.reference_models import configs_only

    recipe, folder = DISTILL_PRESETS[name], Path(tempfile.mkdtemp())
    teacher = configs_only(recipe.model, folder / "teacher")
    config = override(replace(recipe[stage], teacher=teacher), settings)
    forecast = predict(config, ranks)
    pretend_cuda()
    if ranks > 1:
        pretend_ranks(ranks)
    live, flops = live_bytes(), step_flops()
    with torch.autograd.set_multithreading_enabled(False), FakeCuda() as mode, live, flops, GpuAttention():
        step = RandomStep(config, torch.device("cuda", 0), folder, lambda net, _: to_fake(net, "cuda"))
        before = live.peak = live.live  # not that of building the networks
        for _ in range(2):
            step.state.steps = 0  # R1 comes in both steps, and in the second one beside optimizer states
            mode.operators, flops.total = 0, 0.0
            step()
    gib = 2.0**30
    print(
        json.dumps(
            {
                "tracked": live.peak / gib,
                "forecast": forecast.total - text_encoders_gib(config),
                "tracked_before_the_step": before / gib,
                "forecast_working": forecast.working,
                "flop_per_step": flops.total,
                "operators_per_step": mode.operators,
            }
        )
    )


if __name__ == "__main__":
    modes: dict[str, Callable[..., None]] = {
        "memory": memory,
        "families": families,
        "pixels": pixels,
        "validation": validation,
        "ranks": lambda count, *arguments: main(*arguments, ranks=int(count)),
        "memory-ranks": lambda count, *arguments: memory(*arguments, ranks=int(count)),
    }
    if sys.argv[1] in modes:
        modes[sys.argv[1]](*sys.argv[2:])
    else:
        main(*sys.argv[1:])
