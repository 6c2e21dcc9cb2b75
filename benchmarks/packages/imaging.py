"""Networks that make or restore pictures: medical segmentation, diffusion, super-resolution."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.packages.network import Inputs, Maker, Network, image, of, volume


def noisy(channels: int, width: int = 0, positional: bool = False) -> Maker:
    """A noisy picture, its time step and, where the network wants a text, its states of ``width``."""

    def make(batch: int, size: int) -> Inputs:
        x, steps = torch.randn(batch, channels, size, size), torch.randint(0, 1000, (batch,))
        if positional:
            return x, steps
        text = {"encoder_hidden_states": torch.randn(batch, 7, width)} if width else {}
        return {"sample": x, "timestep": steps, **text}

    return make


def labelled(batch: int, size: int) -> Inputs:
    return {"hidden_states": torch.randn(batch, 4, size, size), "timestep": torch.arange(batch), "class_labels": torch.arange(batch)}


def networks() -> Iterator[Network]:
    nets = "monai.networks.nets:"
    two = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}
    three = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}
    deep = {"channels": (8, 16, 32), "strides": (2, 2)}
    yield Network("monai", "UNet 2-D", of(f"{nets}UNet", **two, **deep, num_res_units=2), image(1), 32, 48)
    yield Network("monai", "UNet 3-D", of(f"{nets}UNet", **three, **deep, num_res_units=1), volume(), 16, 24)
    yield Network("monai", "AttentionUnet 3-D", of(f"{nets}AttentionUnet", **three, **deep), volume(), 16, 24)
    yield Network("monai", "BasicUNet 3-D", of(f"{nets}BasicUNet", **three, features=(8, 8, 16, 16, 24, 8)), volume(), 32, 48, 1)
    yield Network("monai", "BasicUNetPlusPlus 2-D", of(f"{nets}BasicUNetPlusPlus", **two, features=(8, 8, 16, 16, 24, 8)), image(1), 32, 48)
    yield Network("monai", "SegResNet 3-D", of(f"{nets}SegResNet", **three, init_filters=8), volume(), 16, 24)
    unet = {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2), "filters": (8, 16, 32)}
    yield Network("monai", "DynUNet 3-D", of(f"{nets}DynUNet", **three, **unet), volume(), 16, 24)
    yield Network("monai", "VNet 3-D", of(f"{nets}VNet", out_channels=3), volume(), 32, 48, 1)
    yield Network("monai", "DenseNet121 3-D", of(f"{nets}DenseNet121", **three), volume(), 32, 48)
    senet = {"spatial_dims": 2, "in_channels": 3, "layers": (1, 1, 1, 1), "groups": 4, "reduction": 4, "num_classes": 5}
    yield Network("monai", "SENet 2-D", of(f"{nets}SENet", block="se_bottleneck", **senet), image(), 64, 96)
    unetr = {"in_channels": 1, "out_channels": 3, "img_size": (32, 32), "feature_size": 8, "hidden_size": 48, "mlp_dim": 96, "num_heads": 4}
    yield Network("monai", "UNETR 2-D", of(f"{nets}UNETR", **unetr, spatial_dims=2), image(1), 32, 32)
    yield Network("monai", "SwinUNETR 2-D", of(f"{nets}SwinUNETR", **two, feature_size=12, depths=(1, 1, 1, 1)), image(1), 64, 96)
    auto = {"in_shape": (1, 32, 32), "out_channels": 1, "latent_size": 8, "channels": (8, 16), "strides": (2, 2), "spatial_dims": 2}
    yield Network("monai", "VarAutoEncoder 2-D", of(f"{nets}VarAutoEncoder", **auto), image(1), 32, 32)

    base = "dynamic_network_architectures.architectures.unet:"
    plan = {"input_channels": 1, "n_stages": 3, "features_per_stage": (8, 16, 32), "kernel_sizes": 3, "strides": (1, 2, 2)}
    plan |= {
        "num_classes": 3,
        "n_conv_per_stage_decoder": (1, 1),
        "deep_supervision": False,
        "conv_bias": True,
        "nonlin_kwargs": {"inplace": True},
    }
    common = {
        **plan,
        "conv_op": torch.nn.Conv2d,
        "norm_op": torch.nn.InstanceNorm2d,
        "norm_op_kwargs": {"affine": True},
        "nonlin": torch.nn.LeakyReLU,
    }
    yield Network(
        "dynamic-network-architectures", "PlainConvUNet", of(f"{base}PlainConvUNet", **common, n_conv_per_stage=(2, 2, 2)), image(1), 32, 48
    )
    yield Network(
        "dynamic-network-architectures",
        "ResidualEncoderUNet",
        of(f"{base}ResidualEncoderUNet", **common, n_blocks_per_stage=(1, 2, 2)),
        image(1),
        32,
        48,
    )

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    small = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
    yield Network(
        "diffusers", "UNet2DModel", of("diffusers:UNet2DModel", sample_size=16, **small, **blocks, attention_head_dim=8), noisy(3), 16, 24
    )
    cross = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    yield Network(
        "diffusers",
        "UNet2DConditionModel",
        of("diffusers:UNet2DConditionModel", sample_size=16, **small, **cross, cross_attention_dim=24, attention_head_dim=4),
        noisy(4, 24),
        16,
        24,
    )
    coder = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
    coder |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    yield Network("diffusers", "AutoencoderKL", of("diffusers:AutoencoderKL", **coder), image(), 32, 48)
    yield Network(
        "diffusers",
        "DiT",
        of(
            "diffusers:DiTTransformer2DModel",
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=10,
            norm_num_groups=4,
        ),
        labelled,
        8,
        8,
    )
    yield Network(
        "denoising-diffusion-pytorch",
        "Unet with attention",
        of("denoising_diffusion_pytorch:Unet", dim=16, dim_mults=(1, 2), flash_attn=False),
        noisy(3, positional=True),
        16,
        32,
    )

    arch = "spandrel.architectures."
    yield Network("spandrel", "ESRGAN (RRDBNet)", of(f"{arch}ESRGAN:ESRGAN", num_filters=16, num_blocks=2, scale=2), image(), 24, 32)
    yield Network("spandrel", "SRVGGNetCompact", of(f"{arch}Compact:Compact", num_feat=16, num_conv=4, upscale=2), image(), 24, 32)
    yield Network(
        "spandrel",
        "SwinIR",
        of(
            f"{arch}SwinIR:SwinIR",
            img_size=16,
            window_size=4,
            embed_dim=24,
            depths=(2, 2),
            num_heads=(2, 2),
            upscale=2,
            upsampler="pixelshuffle",
        ),
        image(),
        16,
        24,
    )
    yield Network(
        "spandrel", "OmniSR", of(f"{arch}OmniSR:OmniSR", num_feat=16, res_num=1, block_num=1, window_size=4, up_scale=2), image(), 16, 24
    )
    yield Network("spandrel", "SPAN", of(f"{arch}SPAN:SPAN", num_in_ch=3, num_out_ch=3, feature_channels=16, upscale=2), image(), 24, 32)
    yield Network(
        "spandrel",
        "NAFNet",
        of(f"{arch}NAFNet:NAFNet", width=8, enc_blk_nums=[1, 1], middle_blk_num=1, dec_blk_nums=[1, 1]),
        image(),
        32,
        48,
    )
    yield Network("spandrel", "SAFMN", of(f"{arch}SAFMN:SAFMN", dim=16, n_blocks=2, upscaling_factor=2), image(), 32, 48)
