"""Channel statistics that published image networks are trained with."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of RGB in [0, 1] that ImageNet networks are trained with."""
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation of RGB in [0, 1] that OpenAI's CLIP is trained with."""
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and standard deviation that map RGB in [0, 1] to [-1, 1]."""
