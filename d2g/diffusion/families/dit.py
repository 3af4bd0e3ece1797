"""DiT: a class-conditional transformer on latents, with a learned variance."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from d2g.diffusion.conditioning import Conditioning, LabelConditioner
from d2g.diffusion.families.base import ANY_SCHEDULER, VAE_CLASSES, Components, ExportFormat, Pipeline
from d2g.diffusion.families.transformer import TransformerFamily, TransformerInputs, added, run_blocks


class DiT(TransformerFamily):
    """DiTPipeline. The label after the last class stands for no class."""

    name = "dit"
    title = "DiT"
    pipelines = ("DiTPipeline",)
    components: ClassVar[Components] = {
        "transformer": ("DiTTransformer2DModel", "Transformer2DModel"),
        "vae": VAE_CLASSES,
        "scheduler": ANY_SCHEDULER,
    }
    schedules = ("vp",)
    regression = ("vp",)
    gan = ("vp",)
    lora = ("vp",)
    exports = tuple(ExportFormat(name, ("vp",)) for name in ("safetensors", "diffusers"))
    not_exported = "no lora: its pipeline loads no adapters"
    reads_text = False
    block_types = ("BasicTransformerBlock",)
    output_layers = ("norm_out", "proj_out_1", "proj_out_2")

    def conditioner(
        self, pipeline: Pipeline, config: Any, models: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]
    ) -> LabelConditioner:
        """Takes the number of classes from the transformer's config."""
        count = int(config.num_embeds_ada_norm)
        return LabelConditioner(count, count, pipeline.class_names(count))

    def call(self, network: Any, config: Any, inputs: TransformerInputs) -> Tensor:
        """Class labels for the modulation."""
        output: Tensor = network(inputs.x, inputs.t, class_labels=_labels(inputs), return_dict=False)[0]
        return output

    def block_outputs(
        self, network: Any, config: Any, inputs: TransformerInputs, extra: Tensor | None
    ) -> list[Tensor]:
        """As DiTTransformer2DModel.forward: every block embeds time and class by itself."""
        tokens = added(network.pos_embed(inputs.x), extra)
        return run_blocks(network.transformer_blocks, tokens, timestep=inputs.t, class_labels=_labels(inputs))

    def shard_units(self, network: nn.Module) -> Iterator[nn.Module]:
        """The transformer blocks, and before the first one its embedding of time and class, which the output
        layers use too."""
        for number, block in enumerate(super().shard_units(network)):
            if number == 0:
                yield block.norm1.emb  # type: ignore[union-attr, misc]
            yield block

    def fake_conditioning(self, pipeline: Pipeline, config: Any, rows: int) -> Conditioning:
        """Labels of the first class."""
        return Conditioning.from_labels(torch.zeros(rows, dtype=torch.int64))


def _labels(inputs: TransformerInputs) -> Tensor:
    return inputs.cond.tensors["class_labels"].to(inputs.x.device)
