"""The backbones that the tests build, as plain data: `cli.py list models` reads it without importing torch.

Any other timm name works as well (`python -c "import timm; print(timm.list_models())"`), also with a
pretrained tag such as `resnetv2_50x1_bit.goog_in21k`; the list below says what has been measured here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Backbone:
    """One tested backbone.

    Attributes:
        name: The name in timm.
        parameters: Parameters without a classifier, in millions, counted with `num_classes=0`.
        input_size: Height and width in pixels that timm's default weights were evaluated at.
        use: What it is for.
    """

    name: str
    parameters: float
    input_size: int
    use: str


CATALOGUE: tuple[Backbone, ...] = (
    Backbone("resnetv2_50x1_bit", 23.500, 224, "BiT ResNet-50x1, the small net of the scale study"),
    Backbone(
        "resnetv2_152x4_bit",
        928.340,
        480,
        "BiT ResNet-152x4, the large net of the scale study; 40 times the 50x1",
    ),
    Backbone("resnet50", 23.508, 224, "the net of the data study (supervised, SimCLR, CLIP)"),
    Backbone("convnext_tiny", 27.820, 224, "a modern convolutional net of ResNet-50's size"),
    Backbone(
        "vit_small_patch16_224",
        21.666,
        224,
        "a vision transformer of ResNet-50's size; fixed 224-pixel input",
    ),
    Backbone("resnet18", 11.177, 224, "a small net for one GPU"),
    Backbone("resnet10t", 4.922, 176, "a net that trains on a CPU in minutes"),
    Backbone("test_resnet", 0.373, 160, "a net for trying things out on a CPU, BatchNorm"),
    Backbone("test_vit", 0.306, 160, "a transformer for trying things out on a CPU; fixed 160-pixel input"),
    Backbone("test_convnext", 0.207, 160, "a net for trying things out on a CPU, LayerNorm"),
)
