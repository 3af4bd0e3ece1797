"""DreamSim's ensemble (Fu et al. 2023), three ViT-B/16 with LoRA, from its published checkpoints.

Why not the package `dreamsim`: it loads the DINO branch through `torch.hub.load`, which fetches and runs code
from GitHub even where all weights are local files, it changes torch.hub's folder for the whole process, and
it downloads without checking digests. The tests compare this module with the package.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2g.core.errors import UserError
from d2g.core.json_files import read_json_object
from d2g.vision.normalization import IMAGENET, OPENAI
from d2g.vision.weights import fill_parameters, read_checkpoint, read_state, weights_folder
from eval.images.resize import prepare_batch
from eval.networks.base import Device, FeatureNet, normalize_channels, parameters_sha256

DREAMSIM_SIZE = 224
HEAD = 64
"""Channels per attention head of every ViT-B."""
ADAPTER = "ensemble_lora"
CHECKPOINT = (
    "dreamsim_ensemble_checkpoint.zip (release v0.2.0-checkpoints of ssundaram21/dreamsim on GitHub, MIT)"
)
DINO = "dino_vitbase16_pretrain.pth"
"""DINO's ViT-B/16 (facebookresearch/dino, Apache-2.0), which is not part of DreamSim's zip file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """One ViT of the ensemble.

    `projected`: the feature is the normalized class token times a matrix, as in CLIP; otherwise it is the
    class token after the last block, before the last norm.
    """

    file: str
    projected: bool
    quick: bool = False
    """Use OpenAI's quick GELU."""


BRANCHES = (
    Branch(file=DINO, projected=False),
    Branch(file="clip_vitb16_pretrain.pth.tar", projected=True, quick=True),
    Branch(file="open_clip_vitb16_pretrain.pth.tar", projected=True),
)


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, eps: float, quick: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.quick = quick

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](mixed)
        hidden = self.mlp["fc1"](self.norm2(x))
        active = hidden * torch.sigmoid(1.702 * hidden) if self.quick else F.gelu(hidden)
        out: Tensor = x + self.mlp["fc2"](active)
        return out


class ViT(nn.Module):
    """A vision transformer with DINO's parameter names; a state dict gives its sizes."""

    def __init__(self, state: Mapping[str, Tensor], branch: Branch) -> None:
        super().__init__()
        kernel = state["patch_embed.proj.weight"]
        width, eps = len(kernel), 1e-5 if branch.projected else 1e-6
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        hidden = len(state["blocks.0.mlp.fc1.weight"])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros_like(state["pos_embed"]))
        patches = nn.Conv2d(3, width, kernel.shape[2], kernel.shape[2])
        self.patch_embed = nn.ModuleDict({"proj": patches})
        # CLIP normalizes where DINO has dropout.
        self.pos_drop = nn.LayerNorm(width, eps=eps) if branch.projected else nn.Identity()
        self.blocks = nn.ModuleList(_Block(width, hidden, eps, branch.quick) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, 224, 224] -> tokens [B, L, D] before the last norm."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = self.pos_drop(x)
        for block in self.blocks:
            x = block(x)
        tokens: Tensor = x
        return tokens


class DreamSim(nn.Module):
    """The embedding of the ensemble. The distance of two images is 1 - the cosine of their embeddings."""

    def __init__(self, states: list[dict[str, Tensor]], folder: Path) -> None:
        super().__init__()
        self.projections = nn.ParameterList()
        self.branches = nn.ModuleList()
        for branch, state in zip(BRANCHES, states, strict=True):
            projection = state.pop("proj") if branch.projected else torch.empty(0)
            self.projections.append(nn.Parameter(projection))
            self.branches.append(ViT(state, branch))
            fill_parameters(self.branches[-1], state, folder / branch.file, f"DreamSim's {branch.file}")

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, 224, 224] -> embeddings [B, D] with mean 0 and length 1."""
        parts = []
        for branch, vit, projection in zip(BRANCHES, self.branches, self.projections, strict=True):
            tokens = vit(normalize_channels(images, OPENAI if branch.projected else IMAGENET))
            token = tokens[:, 0]
            parts.append(vit.get_submodule("norm")(token) @ projection if branch.projected else token)
        joined = torch.cat(parts, 1)
        return F.normalize(joined - joined.mean(1, keepdim=True), dim=1)


def load_dreamsim(weights: str | Path | None = None, device: Device = "cpu") -> FeatureNet:
    """DreamSim's embeddings [B, 1792]; the distance is 1 - their cosine.

    `weights`: the folder with the unpacked zip file and DINO's file (beside it, or in checkpoints/, where the
    package puts it); None: dreamsim/ in torch.hub's folder. Images are resized to 224 px without cropping,
    with PIL's bicubic filter. Raises UserError for missing, damaged or wrong files.
    """
    folder = weights_folder() / "dreamsim" if weights is None else Path(weights)
    if not (folder / ADAPTER).is_dir():
        raise UserError(
            f"no DreamSim in {folder}: fetch {CHECKPOINT} and unpack it there, or give its folder"
        )
    # Three branches with their adapters, concatenated.
    states = [_branch_state(folder, branch) for branch in BRANCHES]
    model = DreamSim(states, folder)
    _add_lora(model, folder / ADAPTER)
    model = model.to(device).eval().requires_grad_(False)
    with torch.no_grad():
        dim = model(torch.zeros(1, 3, DREAMSIM_SIZE, DREAMSIM_SIZE, dtype=torch.uint8, device=device)).shape[
            1
        ]
    return FeatureNet(
        name="dreamsim",
        dim=dim,
        sha256=parameters_sha256(model),
        function=lambda images: model(prepare_batch(images.to(device), f"squash{DREAMSIM_SIZE}-bicubic")),
    )


def _branch_state(folder: Path, branch: Branch) -> dict[str, Tensor]:
    what = f"DreamSim's {branch.file}"
    if branch.projected:
        content = read_checkpoint(folder / branch.file, what)
        state = content.get("state_dict")
        if not isinstance(state, dict) or "proj" not in state:
            raise UserError(f"{folder / branch.file} is not {what}; unpack the zip again")
        return dict(state)
    places = [folder / "checkpoints" / DINO, folder / DINO]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(
            f"no {DINO} in {folder}: fetch DINO's ViT-B/16 backbone (facebookresearch/dino) and put it there"
        )
    return read_state(file, "DINO's ViT-B/16 backbone")


class AdapterConfig(TypedDict):
    """What is read of adapter_config.json."""

    lora_alpha: float
    r: int


def _add_lora(model: DreamSim, folder: Path) -> None:
    """Merge the low-rank updates (Hu et al. 2021) into the weights: W + alpha / r * B A."""
    files = [file for name in ("safetensors", "bin") if (file := folder / f"adapter_model.{name}").is_file()]
    if not files or not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} lacks adapter_config.json and adapter_model.safetensors; unpack the zip again"
        )
    state = read_state(files[0], "DreamSim's LoRA adapter")
    config = read_json_object(folder / "adapter_config.json", "unpack the zip again", AdapterConfig)
    prefix, suffix = "base_model.model.extractor_list.", ".lora_A.weight"
    # Each pair of tensors A and B belongs to one weight of one branch.
    for name in sorted(state):
        if name.endswith(".lora_B.weight"):
            continue
        number, _, path = name.removeprefix(prefix).removesuffix(suffix).partition(".model.")
        lower, upper = state[name], state.get(name.replace("lora_A", "lora_B"))
        if (
            not (name.startswith(prefix) and name.endswith(suffix) and number in {"0", "1", "2"})
            or upper is None
        ):
            raise UserError(f"{files[0]}: unknown tensor {name!r}; expected DreamSim's ensemble adapter")
        weight = model.branches[int(number)].get_parameter(f"{path}.weight")
        with torch.no_grad():
            weight.add_(upper.float() @ lower.float(), alpha=config["lora_alpha"] / config["r"])
