"""The agreement part of benchmarks/eval.py: our numbers beside the published packages', on equal input."""

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import table
from benchmarks.eval_images import photograph, random_inception
from benchmarks.eval_neighbours import features
from d2g.core.seeds import generator
from eval.images.resize import FILTERS, resize_clean, resize_tensorflow, resize_uint8, to_pil, to_tensor
from eval.metrics.frechet import frechet_distance
from eval.metrics.inception_score import inception_score
from eval.metrics.kernel import cmmd, polynomial_mmd
from eval.metrics.paired import cosine_distance, psnr
from eval.metrics.precision_recall import precision_recall

ROWS, DIM = 2_000, 64
Line = tuple[str, str, float, float]
"""What, the judge, ours and theirs."""


def agreement() -> list[str]:
    """A line per number and judge. Raises AssertionError where two differ by more than a millionth."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the judges' own
        numbers = [*distances(), *scores(), *neighbourhoods(), *pairs()]
        arrays = [*resizes(), *network()]
    rows = [(what, judge, f"{a:.10g}", f"{b:.10g}", f"{_apart(a, b):.1e}") for what, judge, a, b in numbers]
    for what, judge, ours, theirs in numbers:
        assert _apart(ours, theirs) <= 1e-6, f"{what}: ours {ours}, {judge} {theirs}"
    return [
        f"## Numbers, from {ROWS:,} rows of {DIM} features on either side, the same in each package",
        "",
        *table(("number", "judge", "ours", "judge's", "relative difference"), rows),
        "",
        "## Pictures and features, the largest difference of any value",
        "",
        *table(("what", "judge", "largest difference", "of values up to"), arrays),
    ]


def _apart(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / max(abs(theirs), 1e-12)


def _sets() -> tuple[Tensor, Tensor]:
    return features(ROWS, DIM, 0).double(), features(ROWS, DIM, 1, shift=0.3).double()


def distances() -> list[Line]:
    """Frechet and kernel distances."""
    from cleanfid.fid import frechet_distance as clean_fid
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kernel_mmd, mmd2
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    a, b = _sets()
    moments = (a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    root = np.trace(sqrtm((moments[1] @ moments[3]).numpy()).real)
    by_sqrtm = float((moments[0] - moments[2]).square().sum() + (moments[1] + moments[3]).trace()) - 2 * root
    by_clean_fid = clean_fid(*(part.numpy() for part in moments))  # SciPy 1.18 will refuse its arguments
    statistics = [fid_features_to_statistics(rows) for rows in (a, b)]
    fidelity = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    distance, kernel = frechet_distance(*moments), polynomial_mmd(a, b)
    poly: dict[str, Any] = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_coef0": 1}
    by_fidelity = kernel_mmd(a.numpy(), b.numpy(), **poly, kid_kernel_poly_gamma=None)
    x, y = (np.asarray(rows / rows.norm(dim=1, keepdim=True)) for rows in (a, b))

    def gaussian(p: Any, q: Any) -> Any:
        return np.exp(-(2 - 2 * p @ q.T) / 200)

    biased = mmd2(gaussian(x, x), gaussian(x, y), gaussian(y, y), mmd_est="biased")
    return [
        ("Frechet distance", "scipy sqrtm (pytorch-fid)", distance, float(by_sqrtm)),
        ("Frechet distance", "clean-fid", distance, float(by_clean_fid)),
        ("Frechet distance", "torch-fidelity", distance, fidelity),
        ("Frechet distance", "torchmetrics", distance, _compute_fid(*moments).item()),
        ("kernel distance (KID)", "torch-fidelity", kernel, float(by_fidelity)),
        ("kernel distance (KID)", "torchmetrics", kernel, poly_mmd(a, b).item()),
        ("CMMD", "torch-fidelity (mmd2, biased)", cmmd(a, b).value, 1000 * float(biased)),
    ]


def scores() -> list[Line]:
    """The Inception score, of given logits."""
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torchmetrics.image.inception import InceptionScore

    logits = 3 * torch.randn(ROWS, DIM, generator=generator(2), dtype=torch.float64)
    found, judged = inception_score(logits), isc_features_to_metric(logits, splits=10, shuffle=False)
    judge = InceptionScore(feature=torch.nn.Identity(), splits=10)
    judge.update(logits)
    with torch.random.fork_rng():  # it shuffles from the global state
        torch.manual_seed(0)
        mean = judge.compute()[0].item()
        torch.manual_seed(0)
        shuffled = inception_score(logits[torch.randperm(ROWS)])
    return [
        ("Inception score", "torch-fidelity", found.mean, judged["inception_score_mean"]),
        ("its deviation over 10 splits", "torch-fidelity", found.deviation, judged["inception_score_std"]),
        ("Inception score, shuffled", "torchmetrics", shuffled.mean, mean),
    ]


def neighbourhoods() -> list[Line]:
    """Precision, recall, density, coverage."""
    from prdc import compute_prdc
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    real, fake = _sets()
    lines: list[Line] = []
    for k in (3, 5):
        found = precision_recall(real, fake, k=k)
        with contextlib.redirect_stdout(io.StringIO()):
            by_prdc = compute_prdc(real.numpy(), fake.numpy(), k)
        lines += [
            (f"{name}, k = {k}", "prdc", getattr(found, name), float(by_prdc[name])) for name in by_prdc
        ]
        precision, recall = calculate_precision_recall_part(fake, real, neighborhood=k)  # float32 means
        lines.append((f"precision, k = {k}", "torch-fidelity", found.precision, float(precision)))
        lines.append((f"recall, k = {k}", "torch-fidelity", found.recall, float(recall)))
    return lines


def pairs() -> list[Line]:
    """DreamSim's distance of given embeddings, and the signal-to-noise ratio of pictures."""
    from dreamsim.model import PerceptualModel
    from torchmetrics.functional.image import peak_signal_noise_ratio

    class Given(PerceptualModel):  # type: ignore[misc]
        """Its own distance, of embeddings that are handed in."""

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.feat_type_list = ["cls"]

        def embed(self, embedding: Tensor) -> Tensor:
            return embedding

    a, b = _sets()
    ours, theirs = cosine_distance(a, b), Given()(a, b)
    assert (ours - theirs).abs().max() < 1e-6
    x, y = (torch.stack([_picture(48, 64, n) for n in numbers]) for numbers in (range(4), range(4, 8)))
    judged = [peak_signal_noise_ratio(p.double(), q.double(), data_range=255.0) for p, q in zip(x, y)]  # noqa: B905
    return [
        ("DreamSim distance, mean", "dreamsim", ours.mean().item(), theirs.mean().item()),
        ("PSNR, mean", "torchmetrics", psnr(x, y).mean().item(), torch.stack(judged).mean().item()),
    ]


def _picture(height: int, width: int, seed: int) -> Tensor:
    return to_tensor(photograph(height, width, seed))


def resizes() -> list[tuple[str, str, str, str]]:
    """Pixels after each resize; of black and white noise, where filters overshoot most."""
    from cleanfid.resize import make_resizer
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    noise = torch.randint(0, 2, (3, 480, 480), generator=generator(3)).mul(255).to(torch.uint8)
    found = []
    for name in ("lanczos", "bicubic"):
        for picture, shown in ((noise, "noise"), (_picture(512, 512, 0), "a photograph's spectrum")):
            by_pil = to_tensor(to_pil(picture).resize((256, 256), FILTERS[name]))
            off = (resize_uint8(picture, (256, 256), name).int() - by_pil.int()).abs().max()
            found.append((f"{name} to 256, tensor path, {shown}", "Pillow", f"{off}", "255"))
    clean = make_resizer("PIL", False, "bicubic", (299, 299))(noise.permute(1, 2, 0).numpy())
    off = (resize_clean(noise[None])[0] - torch.from_numpy(clean).permute(2, 0, 1)).abs().max()
    found.append(("bicubic to 299 in floats", "clean-fid", f"{off:.1e}", "255"))
    graph = interpolate_bilinear_2d_like_tensorflow1x(
        noise[None].float(), size=(299, 299), align_corners=False
    )
    off = (resize_tensorflow(noise[None], 299) - graph).abs().max()
    return [*found, ("TensorFlow's bilinear to 299", "torch-fidelity", f"{off:.1e}", "255")]


@torch.no_grad()
def network() -> list[tuple[str, str, str, str]]:
    """Inception of random weights, in float64 and float32."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    net = random_inception()
    pixels = torch.stack([_picture(299, 299, n) for n in range(2)])
    with tempfile.TemporaryDirectory() as folder:
        torch.save(net.state_dict(), file := Path(folder) / "weights.pth")
        judge: Callable[..., Any] = FeatureExtractorInceptionV3(
            "x", ["2048"], feature_extractor_weights_path=str(file)
        )
    net.fc = torch.nn.Identity()
    found = []
    for dtype in (torch.float32, torch.float64):
        net, judge = net.to(dtype), judge.to(dtype)  # type: ignore[attr-defined]
        judge.feature_extractor_internal_dtype = dtype  # type: ignore[attr-defined]
        theirs, ours = judge(pixels)[0], net((pixels.to(dtype) - 128) / 128)
        off = (ours.float() - theirs.float()).abs().max()
        shown = str(dtype).removeprefix("torch.")
        found.append((f"Inception features, {shown}", "torch-fidelity", f"{off:.1e}", f"{theirs.max():.3g}"))
    return found
