"""Augmentation of a batch inside the compiled step."""

import jax
import jax.numpy as jnp


def random_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Pads images of shape `(batch, height, width, channels)` with zeros, crops them randomly."""
    batch, height, width, channels = images.shape
    pad = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(images, pad)
    corners = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        start = (corner[0], corner[1], jnp.zeros_like(corner[0]))
        return jax.lax.dynamic_slice(image, start, (height, width, channels))

    return jax.vmap(crop)(padded, corners)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image of shape `(batch, height, width, channels)` with probability 1/2."""
    flip = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Converts pixels to float32 of mean 0 and deviation 1 per channel (the last axis)."""
    center, scale = 255 * jnp.asarray(mean), 255 * jnp.asarray(std)
    return (images.astype(jnp.float32) - center) / scale


def cutmix(
    key: jax.Array, images: jax.Array, labels: jax.Array, probability: float
) -> tuple[jax.Array, jax.Array]:
    """CutMix: replaces a box of each image by that of another image, and mixes their labels.

    The box, the same for the whole batch, has an expected share of 1 - lambda of the image, lambda
    being uniform in [0, 1] (beta = 1), and is cut off at the image's edge. Labels are mixed in
    proportion to the areas.

    Args:
      key: a PRNG key.
      images: shape `(batch, height, width, channels)`.
      labels: probabilities of shape `(batch, num_classes)`.
      probability: how likely it is that the batch is mixed at all.

    Returns:
      Images and labels, of the same shapes.

    References:
      Yun et al., `CutMix <https://arxiv.org/abs/1905.04899>`_, 2019, algorithm A1
    """
    batch, height, width, _ = images.shape
    keys = jax.random.split(key, 5)
    keep = jax.random.uniform(keys[0])
    mix = jax.random.bernoulli(keys[1], probability)

    def span(key: jax.Array, size: int) -> jax.Array:
        center = jax.random.randint(key, (), 0, size)
        half = (size * jnp.sqrt(1 - keep)).astype(jnp.int32) // 2
        position = jnp.arange(size)
        return (center - half <= position) & (position < center + half)

    box = mix & span(keys[2], height)[:, None] & span(keys[3], width)
    share = jnp.mean(box, dtype=jnp.float32)
    other = jax.random.permutation(keys[4], batch)
    images = jnp.where(box[:, :, None], images[other], images)
    return images, (1 - share) * labels + share * labels[other]
