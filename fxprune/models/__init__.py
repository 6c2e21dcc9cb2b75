"""Networks by their spec, and the small networks that come with fxprune."""

from fxprune.models.loading import load_model
from fxprune.models.small import digits_net, resnet20, resnet32, resnet44, resnet56, vgg19, warped_digits_net

__all__ = ["digits_net", "load_model", "resnet20", "resnet32", "resnet44", "resnet56", "vgg19", "warped_digits_net"]
