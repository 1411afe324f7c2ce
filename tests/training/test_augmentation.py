import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.augmentation import cutmix, normalize, random_crop, random_flip


def random_images(batch: int, size: int = 8, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(1, 256, (batch, size, size, channels), dtype=np.uint8)


def test_crops_are_windows_of_the_padded_images():
    images, padding = random_images(300), 2
    crops = np.asarray(jax.jit(random_crop, static_argnums=2)(jax.random.key(0), images, padding))
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (8, 8), axis=(1, 2))
    found = []
    for image, crop in zip(windows, crops, strict=True):
        matches = (image.transpose(0, 1, 3, 4, 2) == crop).all(axis=(2, 3, 4))
        assert matches.sum() == 1
        found.append(tuple(np.argwhere(matches)[0]))
    assert set(found) == {(i, j) for i in range(5) for j in range(5)}
    assert crops.dtype == np.uint8


def test_flips_are_mirror_images_half_of_the_time():
    images = random_images(400)
    flipped = np.asarray(random_flip(jax.random.key(0), jnp.asarray(images)))
    same = (flipped == images).all(axis=(1, 2, 3))
    mirrored = (flipped == np.flip(images, axis=2)).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_normalize():
    images, mean, std = random_images(4), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    expected = (images.astype(np.float64) / 255 - mean) / std
    normalized = normalize(jnp.asarray(images), mean, std)
    assert normalized.dtype == jnp.float32
    np.testing.assert_allclose(normalized, expected, rtol=1e-4, atol=1e-5)


def test_cutmix_mixes_labels_as_it_mixes_pixels():
    batch, size = 16, 10
    # Every pixel of image i is i, so that a mixed image tells where its pixels came from.
    images = jnp.broadcast_to(
        jnp.arange(batch, dtype=jnp.float32)[:, None, None, None], (batch, size, size, 1)
    )
    labels = jnp.eye(batch)
    mix = jax.jit(cutmix, static_argnums=3)
    shares = []
    for seed in range(200):
        mixed, mixed_labels = map(np.asarray, mix(jax.random.key(seed), images, labels, 1.0))
        partners = np.argmax(mixed_labels * (1 - np.eye(batch)), axis=1)
        foreign = mixed[..., 0] != np.arange(batch)[:, None, None]
        for i, partner in enumerate(partners):
            assert set(np.unique(mixed[i])) <= {i, partner}
            np.testing.assert_allclose(mixed_labels[i, i], 1 - foreign[i].mean(), atol=1e-6)
        np.testing.assert_allclose(mixed_labels.sum(axis=1), 1, rtol=1e-6)
        rows, columns = np.nonzero(foreign.any(axis=0))
        if len(rows):  # the foreign pixels fill one box, the same in every mixed image
            box = np.zeros((size, size), bool)
            box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
            assert all((f == box).all() or not f.any() for f in foreign)
        shares.append(foreign.any(axis=0).mean())
    # The expected share: lambda uniform, the box's center uniform, what sticks out is cut off.
    half = (size * np.sqrt(np.linspace(0, 1, 10_000))).astype(int) // 2
    center = np.arange(size)[:, None]
    side = np.minimum(size, center + half) - np.maximum(0, center - half)
    expected = (side.mean(axis=0) ** 2).mean() / size**2
    assert abs(np.mean(shares) - expected) < 0.05


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_cutmix_probability(probability):
    images, labels = jnp.asarray(random_images(8), jnp.float32), jnp.eye(8)
    mix = jax.jit(cutmix, static_argnums=3)
    mixed = [
        bool((mix(jax.random.key(seed), images, labels, probability)[0] != images).any())
        for seed in range(100)
    ]
    # One batch in a dozen stays as it is though mixed: its box is empty.
    assert sum(mixed) == 0 if probability == 0 else 25 < sum(mixed) < 60
