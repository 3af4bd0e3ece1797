"""Lines for --dry-run about what a discriminator of pixels sees."""

from d2g.diffusion import pretrained
from distill.config.run import DistillConfig
from distill.models.discriminators import DISCRIMINATORS
from distill.models.pixel_features import PixelFeatures
from distill.planning.fake_networks import planning_config


def feature_notes(config: DistillConfig, model: str) -> list[str]:
    """The heads, feature networks and crops of a discriminator on frozen features; [] for the others.

    model: a key of `reference_models.NAMES`, which stands in for a teacher that is not on this disk.
    """
    open_pixel_features = DISCRIMINATORS[config.gan.discriminator].open_pixel_features
    with planning_config(config, model) as planned:
        if not config.adversarial or open_pixel_features is None or planned is None:
            return []
        features = open_pixel_features(planned.teacher, planned.gan, True)
        assert isinstance(features, PixelFeatures)
        _, height, width = pretrained.latent_shape(planned.teacher)
        millions = sum(p.numel() for p in features.networks.parameters()) / 1e6
    crop = f"{min(features.side, height)}x{min(features.side, width)} of {height}x{width} latents"
    return [
        f"discriminator {config.gan.discriminator}: {len(features.names)} heads on "
        f"{', '.join(config.gan.feature_networks)} ({millions:.1f} M frozen parameters) at "
        f"{config.gan.feature_size} px, from {crop}"
    ]
