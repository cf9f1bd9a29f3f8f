"""Shapes of all parameters of two networks, for ops over lists of tensors."""

from __future__ import annotations

from bench.operation import Size

Shape = tuple[int, ...]


def transformer(width: int, blocks: int) -> list[Shape]:
    """A ViT with patches of 16 pixels at 224 pixels, without its head."""
    norm: list[Shape] = [(width,), (width,)]
    block: list[Shape] = [
        *norm,
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        *norm,
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
        (width,),
    ]
    return [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,), *(blocks * block), *norm]


def residual_network(width: int) -> list[Shape]:
    """ResNet-50 whose last map has ``width`` channels (2048), without its head."""
    stem = width // 32
    shapes: list[Shape] = [(stem, 3, 7, 7), (stem,), (stem,)]
    channels = stem
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = stem << stage
        for number in range(blocks):
            convolutions: list[Shape] = [
                (inner, channels, 1, 1),
                (inner, inner, 3, 3),
                (4 * inner, inner, 1, 1),
            ]
            if number == 0:
                convolutions.append((4 * inner, channels, 1, 1))
            for convolution in convolutions:
                shapes += [convolution, convolution[:1], convolution[:1]]
            channels = 4 * inner
    return shapes


def shapes_of(size: Size) -> list[Shape]:
    """K transformer blocks of width D, or the residual network of width D where K is 0."""
    return transformer(size.D, size.K) if size.K else residual_network(size.D)


def values_of(size: Size) -> int:
    """How many numbers all parameters hold."""
    total = 0
    for shape in shapes_of(size):
        product = 1
        for extent in shape:
            product *= extent
        total += product
    return total


NETWORKS = (Size(D=768, K=12), Size(D=2048))  # ViT-B: 343 MB in fp32; ResNet-50: 94 MB
SMALL_NETWORKS = (Size(D=48, K=2), Size(D=64))
