"""How well an image shows its prompt: CLIP score and PickScore, means over images."""

from eval.protocols.metric import Metric, mean_of_rows

CLIP_SCORE = Metric(
    name="clip",
    description="CLIP score: does an image show its prompt",
    key="clip_score",
    label=lambda models: f"CLIP score ({models.get('clip', {}).get('name', '')})",
    better="higher",
    interval="bootstrap",
    networks=("clip",),
    needs_reference=False,
    compute=mean_of_rows("clip_score"),
    ranks_images=True,
)

PICKSCORE = Metric(
    name="pickscore",
    description="PickScore: would people prefer it for its prompt",
    label="PickScore",
    better="higher",
    interval="bootstrap",
    networks=("pickscore",),
    needs_reference=False,
    compute=mean_of_rows("pickscore"),
    ranks_images=True,
)
