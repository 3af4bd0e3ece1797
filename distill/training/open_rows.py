"""The rows of a run: noise-latent pairs, or real images alone, with the text encoder of their captions."""

from collections.abc import Iterator, Sequence

import torch

from d2g.core.errors import UserError
from d2g.core.logs import logger
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.pipelines import family_of
from distill.config.run import DistillConfig
from distill.config.student import StudentConfig
from distill.models.student import takes_guidance
from distill.student_files import DEFAULT_GUIDANCE, sampled_guidance
from distill.training.data import open_pairs, pair_batches, require_enough_pairs, training_pairs
from distill.training.inputs import store_specs
from distill.training.real_images import CaptionKind, caption_kind
from distill.training.real_rows import ImageRows
from distill.training.text_cache import TextCache
from distill.training.validation import held_out
from pairgen.store.dataset import PairRows
from pairgen.store.hdf5 import PairBatch
from pairgen.store.rewired import RewiredReader


def open_rows(
    config: DistillConfig, device: torch.device
) -> tuple[TextCache, CaptionKind, PairRows | ImageRows]:
    """The text encoder, what captions must be for this teacher, and the rows: pairs, or real images alone."""
    text_in_bf16 = config.encodes_text_in_bf16(device.type == "cuda")
    encode, kind = _build_encoder(config.teacher, config.data.text_cache, text_in_bf16, device)
    rows = _open_images(config, kind, device) if config.without_pairs else _open_pairs(config)
    return encode, kind, rows


def _open_pairs(config: DistillConfig) -> PairRows:
    """The pairs of the run, which fit the teacher, the student and the batch size."""
    guided, held_out_pairs = takes_guidance(config.teacher, config.student), config.train.validate_pairs
    reader = open_pairs(config.pairs, pretrained.teacher_digests(config.teacher), config.data, guided)
    held_out(len(reader), held_out_pairs)
    count = training_pairs(len(reader), config.data.max_pairs, held_out_pairs)
    require_enough_pairs(len(reader), config.train.batch_size, len(reader) - count)
    if config.data.rewire:
        logger.warning("data.rewire is set: an experiment whose student cannot learn the pairs")
        reader = RewiredReader(reader, count, config.seed)
    return reader


def _open_images(config: DistillConfig, kind: CaptionKind, device: torch.device) -> ImageRows:
    """The images of a run without pairs, at the size of the teacher."""
    shape = pretrained.latent_shape(config.teacher)
    images = ImageRows(config.gan, config.teacher, config.seed, shape, kind, device)
    if config.train.batch_size > len(images):
        raise UserError(
            f"train.batch_size is {config.train.batch_size}, but {config.gan.real} holds {len(images)} "
            "images; add images, or set a smaller batch"
        )
    return images


def _build_encoder(
    teacher: str, cached_prompts: int, bf16: bool, device: torch.device
) -> tuple[TextCache, CaptionKind]:
    """Encodes prompts with the teacher's text encoders, in bf16 if asked to; the result is fp32. And what the
    captions of images must be for this teacher.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    conditioner = pretrained.load_conditioner(teacher, dtype).to(device)

    def encode(prompts: Sequence[str]) -> Conditioning:
        return conditioner.encode(prompts).to(torch.float32)

    return TextCache(encode, cached_prompts, device), caption_kind(conditioner)


def open_batches(
    config: DistillConfig, reader: PairRows | ImageRows, nimg: int, device: torch.device
) -> Iterator[PairBatch]:
    """This rank's endless batches from image `nimg` on."""
    options, pin_memory = config.train, device.type == "cuda"
    if isinstance(reader, ImageRows):
        return reader.batches(options.batch_size, nimg, options.loader_workers, pin_memory)
    return pair_batches(
        reader,
        options.batch_size,
        config.seed,
        nimg,
        options.loader_workers,
        config.data,
        pin_memory,
        len(reader) - training_pairs(len(reader), config.data.max_pairs, options.validate_pairs),
    )


def shape_of(reader: PairRows | ImageRows) -> tuple[int, int, int]:
    """The latent shape (C, h, w) of a run's rows."""
    return reader.shape if isinstance(reader, ImageRows) else reader.spec.latent_shape


def sample_guidance(teacher: str, student: StudentConfig, reader: PairRows | ImageRows) -> float | None:
    """The guidance scale of samples that have no pairs, as `student_guidance` of the finished run; None for
    students that do not take it."""
    if not takes_guidance(teacher, student):
        return None
    if isinstance(reader, ImageRows):
        return DEFAULT_GUIDANCE
    scales = [spec.guidance for spec in store_specs(reader)]
    return sampled_guidance(scales) if family_of(teacher).embedded_guidance is None else scales[0]
