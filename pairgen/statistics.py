"""Statistics of a store's rows: moments, norms, prompt lengths, and the correlation of noise and latents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import ceil, exp, lgamma, prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2g.core.errors import UserError
from d2g.core.machine_errors import raise_machine_error
from d2g.core.progress import Progress, quiet
from pairgen.store.hdf5 import IntArray, PairBatch
from pairgen.store.reader import PairReader
from pairgen.verify import in_threads

BLOCK_VALUES = 1 << 19  # latent values per block of rows
BINS = 32
OUTLIER = 6.0  # standard deviations
MAX_LISTED = 100  # outliers listed at most
LATENT_STD_RANGE = (0.3, 3.0)  # of scaled latents
MAX_OWN_CORRELATION = 0.9  # of latents and their noise; an untrained network returns its input, with about 1
MAX_NEXT_CORRELATION = 0.1  # of noise and the next row's latents; smaller ones do not harm training
MAX_OUTLIER_SHARE, MAX_TRUNCATED_SHARE = 0.01, 0.2  # of the rows

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Joint moments of noise (index 0) and latents (index 1) by channel.

    count: values per channel. mean: [C, 2]. products: sums of products of deviations [C, 2, 2].
    """

    count: int
    mean: FloatArray
    products: FloatArray

    @staticmethod
    def of(noise: FloatArray, latent: FloatArray) -> "Moments":
        """Compute the moments of noise and latents [B, C, H, W]."""
        # Noise and latents of each channel side by side, [C, 2, B H W].
        values = np.stack([noise, latent]).transpose(2, 0, 1, 3, 4).reshape(noise.shape[1], 2, -1)
        mean = values.mean(axis=-1)
        deviations = values - mean[..., None]
        return Moments(values.shape[-1], mean, deviations @ deviations.transpose(0, 2, 1))

    def merged(self, other: "Moments") -> "Moments":
        """Moments of the union of both samples (Chan, Golub and LeVeque 1983, eq. 1.5, also for products)."""
        count = self.count + other.count
        difference = other.mean - self.mean
        outer = difference[:, :, None] * difference[:, None, :] * (self.count * other.count / count)
        mean = self.mean + difference * (other.count / count)
        return Moments(count, mean, self.products + other.products + outer)

    @property
    def std(self) -> FloatArray:
        """Population standard deviation [C, 2]."""
        std: FloatArray = np.sqrt(self.products.diagonal(axis1=1, axis2=2) / self.count)
        return std

    @property
    def correlation(self) -> FloatArray:
        """Pearson correlation of noise and latents [C]; 0 where one of them is constant."""
        scale = np.sqrt(self.products[:, 0, 0] * self.products[:, 1, 1])
        return np.divide(self.products[:, 0, 1], scale, out=np.zeros(len(scale)), where=scale > 0)


@dataclass(frozen=True)
class BlockStatistics:
    """Statistics of B rows."""

    own: Moments  # of noise and latents of the same row
    next_row: Moments | None  # of noise and the next row's latents; None without such a row
    norms: FloatArray  # [B, 2] of noise and latents
    index: IntArray
    prompts: list[str]
    characters: FloatArray
    tokens: FloatArray


def store_statistics(
    folder: Path, rows: int = 0, teacher: str | None = None, progress: Progress = quiet, workers: int = 0
) -> dict[str, Any]:
    """Compute the statistics that docs/pair-format.md lists.

    rows: number of evenly spaced rows to read, 0 for all. teacher: folder or hub id with the tokenizer, by
    default the teacher that the store names. Without a tokenizer, tokens are not counted. workers: threads, 0
    for the default. Raises UserError for an empty store, damage, and a `teacher` without a tokenizer.
    """
    reader = PairReader(folder)
    if not len(reader):
        raise UserError(f"{folder} holds no pairs yet; generate some with `d2g pairs generate`")
    spec = reader.spec
    text = spec.conditioning == "text"
    tokenizer, tokens_missing = _tokenizer(teacher, spec.teacher) if text else (None, None)

    # Statistics of blocks of at least two rows: noise is also compared with the next row's latents.
    positions = evenly_spread(len(reader), rows)
    size = max(2, BLOCK_VALUES // prod(spec.latent_shape))
    parts = (positions[start : start + size] for start in range(0, len(positions), size))
    blocks = []
    for block in in_threads(_block, (_with_next_rows(reader, part) for part in parts), workers):
        tokens = _token_counts(tokenizer, block.prompts)  # here, because tokenizers are not thread-safe
        blocks.append(replace(block, prompts=[], tokens=tokens))
        progress("stats", sum(len(b.index) for b in blocks), len(positions))

    # Combine the blocks: moments by Chan's update, other values by concatenation.
    own = reduce(Moments.merged, [block.own for block in blocks])
    next_row = [block.next_row for block in blocks if block.next_row is not None]
    noise_norm, latent_norm = np.concatenate([block.norms for block in blocks]).T
    index = np.concatenate([block.index for block in blocks])

    # Prompts. Only text has a length in characters and tokens.
    prompts = prompt_use(spec.prompt_of(index))  # type: ignore[arg-type]  # arithmetic, on all at once
    if text:
        prompts["characters"] = _lengths(np.concatenate([block.characters for block in blocks]))
        prompts["tokens"] = _token_summary(tokenizer, np.concatenate([block.tokens for block in blocks]))
        prompts["tokens_missing"] = tokens_missing
    result = {
        "rows": len(positions),
        "pairs": len(reader),
        "latent": {"mean": own.mean[:, 1].tolist(), "std": own.std[:, 1].tolist()},
        "noise": {"mean": own.mean[:, 0].tolist(), "std": own.std[:, 0].tolist()},
        "latent_norm": distribution(latent_norm),
        "noise_norm": noise_norm_summary(noise_norm, prod(spec.latent_shape)),
        "correlation": {
            "noise_latent": own.correlation.tolist(),
            "noise_next_latent": reduce(Moments.merged, next_row).correlation.tolist() if next_row else None,
            "standard_error": 1 / sqrt(own.count),
        },
        "prompts": prompts,
        "outliers": _outliers(reader, positions, latent_norm, noise_norm),
    }
    faults = store_faults(result)
    return {"usable": not faults, "verdict": _verdict(result, faults), **result}


def store_faults(statistics: Mapping[str, Any]) -> list[str]:
    """List what makes pairs unfit for training, one line each; empty for usable pairs.

    statistics: the result of `store_statistics`.
    """
    faults = []
    # The teacher's latents.
    std = sum(statistics["latent"]["std"]) / len(statistics["latent"]["std"])
    if not LATENT_STD_RANGE[0] <= std <= LATENT_STD_RANGE[1]:
        faults.append(f"latents have standard deviation {std:.3g}, expected about 1: is the teacher trained?")
    correlation = statistics["correlation"]
    own = sum(correlation["noise_latent"]) / len(correlation["noise_latent"])
    if abs(own) > MAX_OWN_CORRELATION:
        faults.append(
            f"latents are their own noise (correlation {own:.2f}): the teacher is not trained, see `d2g "
            "teacher info`"
        )

    # The noise must be standard normal, and unrelated to the latents of other rows.
    if abs(statistics["noise_norm"]["sigmas"]) > OUTLIER:
        norm = statistics["noise_norm"]
        faults.append(
            f"noise has mean norm {norm['mean']:.4g}, standard normal has {norm['expected_mean']:.4g}"
        )
    by_channel = correlation["noise_next_latent"] or [0.0]
    if max(map(abs, by_channel)) > max(MAX_NEXT_CORRELATION, OUTLIER * correlation["standard_error"]):
        faults.append(f"noise correlates with the latents of the next row ({max(by_channel, key=abs):.2f})")

    # Rows and prompts.
    rows, outliers = statistics["rows"], statistics["outliers"]["count"]
    if outliers > MAX_OUTLIER_SHARE * rows:
        faults.append(f"{outliers:,} of {rows:,} rows are outliers")
    tokens = statistics["prompts"].get("tokens")
    if tokens and tokens["cut_share"] > MAX_TRUNCATED_SHARE:
        faults.append(
            f"{tokens['cut_share']:.0%} of the prompts are longer than the {tokens['limit']} tokens"
        )
    return faults


def _verdict(statistics: Mapping[str, Any], faults: Sequence[str]) -> str:
    """The verdict in words, with the numbers that it is based on."""
    if faults:
        return f"these pairs are not usable as they are: {'; '.join(faults)}"
    std = sum(statistics["latent"]["std"]) / len(statistics["latent"]["std"])
    own = statistics["correlation"]["noise_latent"]
    return (
        f"these pairs are usable: latents have standard deviation {std:.2f}, noise is standard normal, their "
        f"correlation is {sum(own) / len(own):.2f}, {statistics['prompts']['distinct']:,} prompts, "
        f"{statistics['outliers']['count']} outliers"
    )


def evenly_spread(size: int, count: int) -> Sequence[int]:
    """Return `count` evenly spaced positions in [0, size), including both ends; all positions for 0."""
    if not 0 < count < size:
        return range(size)
    return sorted({round(i * (size - 1) / max(1, count - 1)) for i in range(count)})


def _with_next_rows(reader: PairReader, positions: Sequence[int]) -> tuple[PairBatch, PairBatch | None]:
    """These rows, and the rows after them; None where each row follows the one before."""
    if len(positions) > 1 and positions[-1] - positions[0] == len(positions) - 1:
        return reader.read(positions), None
    following = [position + 1 for position in positions if position + 1 < len(reader)]
    return reader.read(positions), reader.read(following) if following else None


def _block(batches: tuple[PairBatch, PairBatch | None]) -> BlockStatistics:
    batch, following = batches
    noise, latent = batch.noise.double().numpy(), batch.latents.double().numpy()
    next_latent = latent[1:] if following is None else following.latents.double().numpy()
    norms = [np.sqrt(np.square(values).sum(axis=(1, 2, 3))) for values in (noise, latent)]
    return BlockStatistics(
        own=Moments.of(noise, latent),
        next_row=Moments.of(noise[: len(next_latent)], next_latent) if len(next_latent) else None,
        norms=np.stack(norms, axis=1),
        index=batch.index.numpy(),
        prompts=batch.prompts,
        characters=np.array([len(prompt) for prompt in batch.prompts], np.float64),
        tokens=np.empty(0),
    )


# Distributions.


def distribution(values: FloatArray, edges: FloatArray | None = None) -> dict[str, Any]:
    """Compute mean, standard deviation, extremes, median, and a histogram of values [N].

    edges: of the histogram's bins, by default BINS equal bins. `counts` leave out values beyond the edges.
    """
    counts, edges = np.histogram(values, BINS if edges is None else edges)
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "median": float(np.median(values)),
        "max": float(values.max()),
        "edges": edges.tolist(),
        "counts": counts.tolist(),
    }


def whole_edges(values: FloatArray) -> FloatArray:
    """Edges of at most BINS histogram bins of equal width, each with the same number of integers."""
    low, high = float(values.min()), float(values.max())
    width = ceil((high - low + 1) / BINS)
    return np.arange(low, high + width + 1, width) - 0.5


def chi_moments(degrees: int) -> tuple[float, float]:
    """Mean and standard deviation of the norm of `degrees` independent standard normals."""
    mean = sqrt(2) * exp(lgamma((degrees + 1) / 2) - lgamma(degrees / 2))
    return mean, sqrt(degrees - mean * mean)


def chi_cdf(values: FloatArray, degrees: int) -> FloatArray:
    """P(norm <= value) for each of `values`, for the norm of `degrees` independent standard normals."""
    half = torch.full((len(values),), degrees / 2, dtype=torch.float64)
    probabilities: FloatArray = torch.special.gammainc(half, torch.from_numpy(values).square() / 2).numpy()
    return probabilities


def noise_norm_summary(norms: FloatArray, degrees: int) -> dict[str, Any]:
    """Compare the norms [N] of noise with the chi distribution of `degrees` degrees of freedom.

    Returns `distribution` of the norms, with `expected_mean`, `expected_std` and `expected` counts, and
    `sigmas`: the deviation of the mean in standard errors.
    """
    # The histogram spans OUTLIER standard deviations on either side of the expected mean.
    mean, std = chi_moments(degrees)
    edges = np.linspace(max(0.0, mean - OUTLIER * std), mean + OUTLIER * std, BINS + 1)
    summary = distribution(norms, edges)
    share = np.diff(chi_cdf(edges, degrees))
    return summary | {
        "expected_mean": mean,
        "expected_std": std,
        "expected": (share * len(norms)).tolist(),
        "sigmas": (summary["mean"] - mean) / (std / sqrt(len(norms))),
    }


def _outliers(
    reader: PairReader, positions: Sequence[int], latent_norm: FloatArray, noise_norm: FloatArray
) -> dict[str, Any]:
    """Count the rows whose norm of latents or noise is an outlier, and list the MAX_LISTED farthest.

    An outlier is more than OUTLIER standard deviations from the mean: of all latents for latents, of the chi
    distribution for noise.
    """
    # Deviations from the means, in standard deviations.
    mean, std = chi_moments(prod(reader.spec.latent_shape))
    noise_sigmas = (noise_norm - mean) / std
    latent_sigmas = (latent_norm - latent_norm.mean()) / (float(latent_norm.std()) or 1.0)
    worst = np.maximum(np.abs(noise_sigmas), np.abs(latent_sigmas))
    # List the farthest rows, with their prompts.
    rows = np.flatnonzero(worst > OUTLIER)
    listed = rows[np.argsort(-worst[rows], kind="stable")][:MAX_LISTED].tolist()
    batch = reader.read([positions[row] for row in listed]) if listed else None
    texts = [] if batch is None else zip(listed, batch.index.tolist(), batch.prompts, strict=True)
    outliers = [
        {
            "index": number,
            "prompt": prompt,
            "latent_norm": float(latent_norm[row]),
            "latent_sigmas": float(latent_sigmas[row]),
            "noise_sigmas": float(noise_sigmas[row]),
        }
        for row, number, prompt in texts
    ]
    return {"count": len(rows), "rows": outliers}


# Prompts.


def prompt_use(numbers: IntArray) -> dict[str, Any]:
    """Count distinct prompts, and compute the share of pairs that share their prompt with another pair.

    numbers: the prompt number of each pair [N].
    """
    distinct, counts = np.unique(numbers, return_counts=True)
    return {"distinct": len(distinct), "repeated_share": float(counts[counts > 1].sum() / len(numbers))}


def _lengths(values: FloatArray) -> dict[str, Any]:
    return distribution(values, whole_edges(values))


def _tokenizer(teacher: str | None, recorded: str) -> tuple[Any, str | None]:
    from d2g.diffusion.pretrained import load_tokenizer

    try:
        return load_tokenizer(teacher or recorded), None
    except UserError as error:
        raise_machine_error(error, memory=False)
        if teacher is not None:
            raise
        return None, str(error)


def _token_counts(tokenizer: Any, prompts: Sequence[str]) -> FloatArray:
    """Token count of each prompt, including special tokens, untruncated; empty without a tokenizer."""
    if tokenizer is None:
        return np.empty(0)
    unique = list(dict.fromkeys(prompts))
    encodings = tokenizer(unique, verbose=False).input_ids
    lengths = {text: len(ids) for text, ids in zip(unique, encodings, strict=True)}
    return np.array([lengths[text] for text in prompts], np.float64)


def _token_summary(tokenizer: Any, counts: FloatArray) -> dict[str, Any] | None:
    """`distribution` of token counts, the teacher's token `limit`, and the share of truncated prompts."""
    if tokenizer is None:
        return None
    limit = int(tokenizer.model_max_length)
    return _lengths(counts) | {"limit": limit, "cut_share": float((counts > limit).mean())}
