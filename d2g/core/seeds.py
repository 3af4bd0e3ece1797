"""Random numbers as a function of keys: pair noise of (seed, index), generators of (seed, stream, ...).

Pair noise is reproducible bit for bit. NumPy guarantees the raw stream of its Philox bit generator; the
normal transform below uses only operations that IEEE 754 rounds in one way (+, -, *, /, sqrt) and integers.
NumPy's log and cos differ in the last bit between CPUs and releases, and torch.randn between devices.
docs/pair-format.md specifies the same arithmetic for other readers: change both or neither.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from enum import IntEnum, unique
from math import factorial, prod
from operator import index as as_integer

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2g.core.errors import SettingError

_F64 = NDArray[np.float64]
U64 = NDArray[np.uint64]

_KEY_LIMIT = 2**63  # seeds and indices are below it: int64 columns and torch generators hold them
_BLOCK_WORDS = 2**15  # words transformed at a time, so that operands of 128 KiB stay in the cache
LN2, PI = 0.6931471805599453, 3.141592653589793
# 4 atanh(s) = 4s + s * sum of ATANH[k] s^(2k+2), |s| < 0.1716; sin(a) = a + a * sum of SIN[k] a^(2k+2),
# |a| < pi / 4: as many Taylor terms as can change a float64.
ATANH = [4 / (2 * k + 1) for k in range(1, 11)]
SIN = [(-1) ** k / factorial(2 * k + 1) for k in range(1, 9)]


@unique
class Stream(IntEnum):
    """Random streams: the integer after the seed in `generator(seed, stream, ...)`, one for each purpose.

    The values are arbitrary but fixed: changing one changes the numbers of every run.
    """

    SHUFFLE = 0x5EED
    """Order of the training pairs."""
    DISCRIMINATOR_INIT = 0xD15C
    """Initial weights of the discriminator's own layers."""
    GENERATOR_INIT = 0x6E17
    """Initial weights of a student that is not the teacher's network."""
    GENERATOR_NOISE = 0x6E02
    """Noise of such a student in training, by row since the run began."""
    LORA_INIT = 0x10BA
    """Initial weights of the adapters."""
    DROPOUT = 0xD209
    """Dropout masks of the student, by row."""
    R1_NOISE = 0xA991
    """Offsets of the approximate R1 penalty, by row."""
    NOISE_AUGMENTATION = 0x2015E
    """Noise that is added to the discriminator's inputs, by row, for real (0) and fake (1) rows."""
    CASCADE_PRIOR = 0xCA5C
    """Noise of the first stage of a cascade when both stages draw, by image."""
    REAL_IMAGE_POSTERIOR = 0x2EA1
    """Samples of the VAE posterior of real images, by image."""
    REAL_IMAGE_NOISE = 0x2EA2
    """Noise inputs of the discriminator that belong to real images, by image."""
    VALIDATION_TRANSFORMS = 0x7A11D
    """Augmentations of the validation distance, by pair."""
    HELD_OUT_SPLIT = 0x5B117
    """Which items are held out: latents in small LatentLPIPS training, images in `d2g lpips triplets`."""
    LATENT_SHIFT = 0xA06
    """Random translations of training latents, by images seen."""
    CLASSIFIER_DROPOUT = 0xD50
    """Dropout of the classifier on latents, by images seen."""
    CROP = 0xC709
    """Random crops of training images, by image and crop."""
    CROP_POSTERIOR = 0x905E
    """Samples of the VAE posterior of training crops, by image and crop."""
    SYNTHETIC_TRIPLETS = 0x2AFC
    """Distortions of synthetic triplets in small LatentLPIPS training, by chunk."""
    TRIPLET_PATCH = 0x9A7C
    """Place and size of the patches of `d2g lpips triplets`, by patch."""
    TRIPLET_DISTORTION = 0x3A1
    """Distortions of `d2g lpips triplets`, by patch and kind."""
    SCALE_REFERENCES = 0x0DD5
    """Which references set the scale of calibrated heads."""
    OVERFIT_TRANSFORMS = 0x0F17
    """Augmentations of `d2g lpips overfit`, by step."""
    SCORE_BOOTSTRAP = 0xB007
    """Bootstrap of `d2g lpips score`, by group of splits."""
    CLIP_SPLIT = 0xC11B
    """Which images are held out when a small CLIP is trained."""
    CHURN = 0xC4012
    """Fresh noise of a stochastic solver, by step and pair."""
    CONSISTENCY_NOISE = 0xC0D1
    """Noise that consistency distillation adds to images, by row."""
    REWIRING = 0x2E37
    """Which noise goes with which latents in rewired pairs."""
    TEACHER_VERDICT = 0x7EAC
    """Timesteps of the rows on which a trained teacher's loss is measured."""


@unique
class StepStream(IntEnum):
    """Random streams of one training step: the last integer in `generator(seed, nimg, stream)`.

    Each kind of draw has its own stream, so that switching one off does not change the others.
    """

    TRANSFORMS = 1
    """Augmentations of the regression distance."""
    MIX = 2
    """Which fake rows are replaced by mismatched real rows."""
    NOISE_LEVELS = 3
    """Timesteps of the discriminator's inputs."""
    PENALTY_ROWS = 4
    """Rows of the batch that the single-sample R1 penalty uses."""
    VIEWS = 5
    """Crops and augmentations of a discriminator of pixels, for real, fake and the student's rows."""
    GUIDANCE_CROPS = 6
    """Crops of the student's images that CLIP guides."""
    CONSISTENCY_LEVELS = 7
    """Noise levels of consistency distillation."""


@unique
class EvalStream(IntEnum):
    """Random streams of an evaluation: the last integer in `generator(seed, stream)`."""

    KERNEL_SUBSETS = 1
    """Subsets of the kernel distance."""
    BOOTSTRAP_MEAN = 2
    """Bootstrap of means over images."""
    BOOTSTRAP_FRECHET = 3
    """Bootstrap of the Frechet distance."""
    FRECHET_SUBSETS = 4
    """Subsets from which the Frechet distance is extrapolated to infinitely many images."""
    INCEPTION_SPLITS = 5
    """Splits of the inception score."""
    FLOOR = 6
    """The split of real pictures into two sets that are compared with each other."""


def checked_key(name: str, value: int) -> int:
    """`value` as an int. Raises SettingError outside 0 to 2^63 - 1."""
    if not 0 <= (number := as_integer(value)) < _KEY_LIMIT:
        raise SettingError(f"{name} is {number}; give an integer from 0 to 2^63 - 1")
    return number


def _series(z: _F64, terms: Sequence[float]) -> _F64:
    """terms[0] z + terms[1] z^2 + …, by Horner's method."""
    total = z * terms[-1]
    for term in reversed(terms[:-1]):
        total += term
        total *= z
    return total


def _radius(words: U64) -> _F64:
    """sqrt(-2 ln u), where the top 52 bits give u, an odd multiple of 2^-53: never 0 or 1."""
    bits = ((words >> 11) | 1).astype(np.float64).view(np.int64)
    # u 2^53 = m 2^power with m from sqrt(1/2) to sqrt(2): the constant is the bits of sqrt(1/2).
    power = (bits - 0x3FE6A09E667F3BCD) >> 52
    # -2 ln u: the part of m by the series of atanh, then the part of the power of two.
    m = (bits - (power << 52)).view(np.float64)
    s = (1 - m) / (1 + m)  # -2 ln m = 4 atanh(s)
    square = _series(s * s, ATANH)
    square *= s
    square += 4 * s
    square += (53 - power) * (2 * LN2)
    return np.asarray(np.sqrt(square))


def box_muller(words: U64) -> _F64:
    """Standard normals from 64-bit words [..., 2k], in the same shape, each within 4 ulp of the formula.

    Words w0, w1 give sqrt(-2 ln u) cos(2 pi v) and sqrt(-2 ln u) sin(2 pi v) (Box and Muller, 1958), where
    u = (floor(w0 / 2^12) + 1/2) / 2^52 and v = (floor(w1 / 2^11) + 1/2) / 2^53. No value exceeds 8.572.
    """
    # Split the angle 2 pi v into a quarter turn and a remainder of at most pi / 4.
    radius, v = _radius(words[..., 0::2]), words[..., 1::2]
    quarter = (v + 2**61) >> 62  # the nearest multiple of pi / 2; `angle` is the remainder
    angle = (((v << 2).view(np.int64) >> 12) | 1) * (PI * 2.0**-53)
    # The Taylor series holds for the remainder; the cosine follows from the sine.
    sin = _series(angle * angle, SIN)
    sin *= angle
    sin += angle
    cos = np.sqrt(1 - sin * sin)  # sin^2 <= 1/2, so no cancellation
    # Odd quarter turns exchange sine and cosine; the quarter also decides the signs.
    odd = (quarter & 1).astype(bool)
    normals = np.empty(words.shape)
    np.multiply(radius, np.where(odd, sin, cos), out=normals[..., 0::2])
    np.multiply(radius, np.where(odd, cos, sin), out=normals[..., 1::2])
    signs = normals.view(np.uint64)
    signs[..., 0::2] ^= ((quarter + 1) >> 1) << 63  # the cosine is negative in quarters 1 and 2
    signs[..., 1::2] ^= (quarter >> 1) << 63  # the sine in quarters 2 and 3
    return normals


def _words(seed: int, index: int, count: int) -> U64:
    """The first `count` raw words of Philox-4x64 under the key (seed, index)."""
    return np.random.Philox(key=np.array([seed, index], dtype=np.uint64)).random_raw(count)


def noise(
    seed: int, indices: Iterable[int], shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Noise rows [B, *shape] ~ N(0, 1) on the CPU. Row i depends on (seed, indices[i]) only, and a smaller
    shape takes the first values of a larger one.

    The noise is computed in float64, then rounded to float32 and from that to `dtype`. Raises SettingError
    unless seed and indices are integers from 0 to 2^63 - 1.
    """
    seed, count = checked_key("noise: seed", seed), prod(shape)
    rows = [checked_key("noise: index", index) for index in indices]
    # Box-Muller consumes words in pairs.
    words = count + count % 2
    normals = np.empty((len(rows), count), dtype=np.float32)
    # Work in blocks that fit the cache. Rows are independent, so the blocks do not change the values.
    step = max(1, _BLOCK_WORDS // max(1, words))
    for start in range(0, len(rows), step):
        raw = np.stack([_words(seed, row, words) for row in rows[start : start + step]])
        for at in range(0, words, _BLOCK_WORDS):
            values = box_muller(raw[:, at : at + _BLOCK_WORDS])[:, : count - at]
            normals[start : start + step, at : at + _BLOCK_WORDS] = values
    return torch.from_numpy(normals.reshape(len(rows), *shape)).to(dtype)


def seed_sequence(*key: int) -> np.random.SeedSequence:
    """NumPy's SeedSequence over all integers of `key`; different keys give different sequences.

    SeedSequence itself concatenates 32-bit words and ignores trailing zeros: (1,) equals (1, 0), and (2^32,)
    equals (0, 1). A leading length and two words per integer tell them apart. Raises SettingError unless all
    are integers from 0 to 2^63 - 1.
    """
    parts = [checked_key("random key", part) for part in key]
    halves = [half for part in parts for half in (part % 2**32, part >> 32)]
    return np.random.SeedSequence([len(parts), *halves])


def generator(*key: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator whose seed mixes all of `key` (see seed_sequence)."""
    state = seed_sequence(*key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) & (2**63 - 1))


def fork_rng(device: str | torch.device) -> AbstractContextManager[None]:
    """Context that restores torch's global random state of the CPU and of `device` at its end. Without
    devices, torch.random.fork_rng reads that of every GPU of the machine, and warns of it."""
    device = torch.device(device)
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def seed_step(seed: int, rank: int, nimg: int) -> torch.Generator:
    """The generator of one training step. Each step derives its own, so that a resumed run equals an
    unbroken one.
    """
    return generator(seed, rank, nimg)
