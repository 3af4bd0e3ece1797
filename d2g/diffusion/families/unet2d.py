"""UNet2DModel in pixel space (DDIMPipeline, DDPMPipeline): class-conditional or unconditional, VP or EDM."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from d2g.core.errors import UserError
from d2g.diffusion.conditioning import (
    Conditioner,
    Conditioning,
    LabelConditioner,
    UnconditionalConditioner,
)
from d2g.diffusion.families.base import ANY_SCHEDULER, Components, ExportFormat, Pipeline
from d2g.diffusion.families.unet import UNetFamily


class UNet2D(UNetFamily):
    """DDIMPipeline and DDPMPipeline, whose repositories may keep both components at the root.

    The network has no null class of its own; model_index.json may name the last class as `null_class`.
    """

    name = "unet2d"
    title = "UNet2DModel in pixel space"
    pipelines: tuple[str, ...] = ("DDIMPipeline", "DDPMPipeline")
    components: ClassVar[Components] = {"unet": ("UNet2DModel",), "scheduler": ANY_SCHEDULER}
    autoencoder: str | None = None
    flat_layout = True
    reads_text = False
    scheduler_classes: ClassVar[Mapping[str, str]] = {"DDIMPipeline": "DDIMScheduler"}
    exports = (
        ExportFormat("safetensors", ("vp", "edm")),
        ExportFormat("onnx", ("vp", "edm")),
        ExportFormat(
            "diffusers",
            ("vp",),
            unconditional_only=True,
            reason="no scheduler starts at sigma_max, no pipeline passes a class or loads adapters",
        ),
    )

    def conditioner(
        self, pipeline: Pipeline, config: Any, models: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]
    ) -> Conditioner:
        """Class labels if the U-Net embeds classes. Raises UserError if null_class is not the last class."""
        embeddings, null = config.num_class_embeds, pipeline.index.get("null_class")
        if null is not None and (embeddings is None or null != embeddings - 1):
            raise UserError(
                f"teacher {pipeline.folder}: model_index.json has null_class={null}, but the UNet has "
                f"{embeddings or 'no'} classes; expected the last of them"
            )
        if embeddings is None:
            return UnconditionalConditioner()
        count = embeddings - (null is not None)
        return LabelConditioner(count, null, pipeline.class_names(count))

    def embeddings(
        self, network: Any, x: Tensor, t: Tensor, cond: Conditioning, downscale: int
    ) -> tuple[Tensor, Tensor | None]:
        """As UNet2DModel.forward: time and class, and no text."""
        embedding = network.time_embedding(network.time_proj(t).to(x.dtype))
        classes = self.class_embedding(network, cond)
        return embedding if classes is None else embedding + classes.to(embedding.dtype), None

    def class_embedding(self, network: Any, cond: Conditioning) -> Tensor | None:
        """The network's own embeddings of class labels."""
        if network.class_embedding is None:
            return None
        table: nn.Embedding = network.class_embedding
        embedding: Tensor = table(cond.tensors["class_labels"].to(table.weight.device))
        return embedding
