"""DiT: a class-conditional transformer on latents, with a learned variance."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from d2g.diffusion.conditioning import Conditioning, LabelConditioner
from d2g.diffusion.families.base import ANY_SCHEDULER, VAE_CLASSES, Components, Family, Pipeline


class DiT(Family):
    """DiTPipeline. The label after the last class stands for no class."""

    name = "dit"
    title = "DiT"
    pipelines = ("DiTPipeline",)
    components: ClassVar[Components] = {
        "transformer": ("DiTTransformer2DModel", "Transformer2DModel"),
        "vae": VAE_CLASSES,
        "scheduler": ANY_SCHEDULER,
    }
    network = "transformer"
    schedules = ("vp",)
    reads_text = False

    def conditioner(
        self, pipeline: Pipeline, config: Any, models: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]
    ) -> LabelConditioner:
        """Takes the number of classes from the transformer's config."""
        count = int(config.num_embeds_ada_norm)
        return LabelConditioner(count, count, pipeline.class_names(count))

    def forward(
        self,
        network: Any,
        config: Any,
        x: Tensor,
        t: Tensor | float,
        cond: Conditioning,
        downscale: int,
        guidance_embedding: Tensor | None = None,
    ) -> Tensor:
        """Class labels for the modulation."""
        output: Tensor = network(x, t, class_labels=cond.tensors["class_labels"], return_dict=False)[0]
        return output
