"""DreamSim diversity: how much the images of one prompt differ."""

from typing import TYPE_CHECKING

from eval.protocols.metric import Estimate, Metric, MetricResult

if TYPE_CHECKING:
    from eval.metrics.inputs import MetricInputs


def _compute(inputs: "MetricInputs") -> MetricResult:
    import torch

    from eval.metrics.diversity import prompt_diversity

    rows = [part["dreamsim_features"] for part in (inputs.rows, inputs.more_rows) if part]
    diversity = prompt_diversity(torch.cat(rows), [*inputs.prompts, *inputs.more_prompts])
    estimate = Estimate(value=diversity.mean, standard_error=diversity.standard_error)
    counts = {"diversity_prompts": diversity.prompts, "diversity_images": diversity.images}
    return MetricResult(estimates={"dreamsim_diversity": estimate}, counts=counts)


DREAMSIM_DIVERSITY = Metric(
    name="dreamsim_diversity",
    description="DreamSim distance between images of one prompt",
    label="DreamSim diversity",
    better="higher",
    interval="normal",
    networks=("dreamsim",),
    needs_reference=False,
    compute=_compute,
    repeats_prompts=True,
)
