"""Training steps of published sizes with random weights: the real step, without files of weights or pairs.

benchmarks/gpu.py times it, and tests/fake_cuda.py runs it on fake tensors to check the memory forecast.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2g.core.distributed import process_group, sharded_checkpoint
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.pipelines import open_pipeline
from d2g.diffusion.pretrained import load_on_meta
from distill.config.run import DistillConfig
from distill.losses.noise_augmentation import build_noise_augmentation
from distill.losses.regression.base import FrozenNetworks
from distill.losses.regression.regression import Regression
from distill.models.discriminators import DISCRIMINATORS
from distill.models.student import Student, meta_student, set_trainable
from distill.training.finite_check import FiniteCheck
from distill.training.logit_stats import LogitStats
from distill.training.microbatch import StepPreparation
from distill.training.real_images import TEXT
from distill.training.real_rows import RealRows
from distill.training.state import State, state_of
from distill.training.step import StepContext, train_step
from distill.training.text_cache import TextCache
from latent_lpips.config import LPIPSConfig
from latent_lpips.distance import LatentLPIPS
from pairgen.store.hdf5 import PairBatch

Fill = Callable[[nn.Module, torch.device], None]


def fill_randomly(network: nn.Module, device: torch.device) -> None:
    """Give a network on meta random weights on the device: Kaiming's scale, norms and other vectors of 1,
    biases of 0. No weight is zero otherwise: products of zeros take a GPU less time."""
    network.to_empty(device=device)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.dim() > 1:
                p.normal_(std=1 / math.sqrt(p[0].numel()))
            else:
                p.fill_(float(not name.endswith("bias")))
        for buffer in network.buffers():
            buffer.zero_()


def text_encoders_gib(config: DistillConfig) -> float:
    """GiB of the text encoders on a GPU, which the forecast has and RandomStep has not."""
    components = [c for c in open_pipeline(config.teacher).components if c.startswith("text_encoder")]
    bytes_per_weight = 2 if config.encodes_text_in_bf16(on_gpu=True) else 4
    weights = sum(p.numel() for c in components for p in load_on_meta(config.teacher, c).parameters())
    return float(bytes_per_weight * weights / 2**30)


class RandomStep:
    """Training steps of a config on each process. Text encoders are left out: their output is random.

    fill: gives networks on meta their weights. The teacher needs configs only.
    """

    def __init__(
        self, config: DistillConfig, device: torch.device, folder: Path, fill: Fill = fill_randomly
    ) -> None:
        self.config, self.device = config, device
        self.student: Student = meta_student(
            config.teacher, config.student_timestep, config.student, config.seed
        )
        self.state = self._state(fill)
        regression = self._regression(fill)
        gan = config.gan if config.stage == "gan" else None
        noise_augment = build_noise_augmentation(gan, config.teacher, config.seed, device)
        logit_stats = LogitStats()
        shape = self.student.latent_shape
        writer = sharded_checkpoint.Writer(folder)
        self.finite = FiniteCheck(folder, "", self.state, logit_stats, writer, device)
        encode = TextCache(self._encode, 0, device)
        self.prepare = StepPreparation(
            seed=config.seed,
            batch_size=config.train.batch_size,
            microbatches=config.engine.gradient_accumulation,
            dropout=config.student.dropout > 0,
            gan=gan,
            regression=regression,
            noise_augment=noise_augment,
            encode=encode,
            device=device,
            student=self.student,
        )
        self.context = StepContext(
            state=self.state,
            regression=regression,
            noise_augment=noise_augment,
            mix_in_real_images=RealRows(None, config.teacher, config.seed, shape, TEXT, encode, device),
            gan=config.gan,
            clip_guidance=None,
            clip_weight=0.0,
            student_optim=config.optim,
            batch_size=config.train.batch_size,
            images=config.train.images,
            own_generator_passes=config.engine.own_generator_passes,
            consistency=None,
            logit_stats=logit_stats,
            autocast=lambda: torch.autocast(device.type, torch.bfloat16, enabled=config.train.bf16),
            waiting=nullcontext,
            stop_updates=self.finite.stop_updates,
        )
        self.batch = self._batch(shape)

    def __call__(self, at_once: bool = False) -> None:
        """Take a step; with `at_once`, wait until it is done."""
        self.finite.begin_step(self.batch)
        train_step(self.context, *self.prepare(self.batch, self.state.nimg))
        self.state.nimg += self.config.train.batch_size
        self.state.steps += 1
        self.finite.end_step(at_once)

    def _state(self, fill: Fill) -> State:
        config = self.config

        def discriminator() -> nn.Module:
            network = DISCRIMINATORS[config.gan.discriminator].build_on_meta(config.teacher, config.gan)
            fill(network, self.device)
            return network

        def student() -> Student:
            fill(self.student, self.device)
            set_trainable(self.student, config.student)
            return self.student

        return state_of(config, self.device, student, discriminator)

    def _regression(self, fill: Fill) -> Regression:
        bf16 = self.config.train.bf16
        with torch.device("meta"):
            metric = LatentLPIPS(LPIPSConfig(channels=self.student.latent_shape[0]))
            metric.fold("bf16" if bf16 else "fp32")
        fill(metric, self.device)
        return Regression(self.config.regression, FrozenNetworks(metric, None))

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        student = self.student
        pipeline: Any = open_pipeline(self.config.teacher)
        cond = student.family.fake_conditioning(pipeline, student.network.config, len(prompts))
        return cond.map(lambda t: torch.zeros(t.shape, dtype=t.dtype, device=self.device))

    def _batch(self, shape: tuple[int, int, int]) -> PairBatch:
        rows = self.config.train.batch_size // process_group.world_size()
        rng = torch.Generator().manual_seed(process_group.rank())
        noise, latents = (torch.randn(rows, *shape, generator=rng).half() for _ in range(2))
        index = torch.arange(rows)
        return PairBatch(
            index=index, noise=noise, latents=latents, prompts=[f"prompt {n}" for n in range(rows)]
        )
