"""The splits as tensors: batches, order, and the seal on the test split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet.data.images import ImageSet
from dsnet.data.splits import make_splits
from dsnet.data.tensors import TensorData


def small_set(num_images: int = 60) -> ImageSet:
    # Every pixel of image i is i: an image can be told from its content.
    images = torch.arange(num_images, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    return ImageSet.create("small", images, torch.arange(num_images) % 3, ["a", "b", "c"])


IMAGE_SET = small_set()
SPLITS = make_splits(IMAGE_SET.labels.numpy(), seed=1)
DATA = TensorData.from_images(IMAGE_SET, SPLITS, open_test=True)


@pytest.mark.parametrize("split", ["train", "gate", "val", "test"])
def test_a_split_holds_its_images_labels_and_ids(split: str) -> None:
    ids = SPLITS[split]
    assert np.array_equal(DATA.ids(split).numpy(), ids)
    assert torch.equal(DATA.images(split)[:, 0, 0, 0].long(), DATA.ids(split))
    assert torch.equal(DATA.labels(split), DATA.ids(split) % 3)
    assert DATA.num_images(split) == len(ids)
    assert DATA.images(split).is_contiguous()


@pytest.mark.slow
@settings(deadline=None)
@given(batch_size=st.integers(1, 40))
def test_batches_in_order_put_together_are_the_split(batch_size: int) -> None:
    batches = list(DATA.batches("train", batch_size))
    assert torch.equal(torch.cat([batch.images for batch in batches]), DATA.images("train"))
    assert torch.equal(torch.cat([batch.ids for batch in batches]), DATA.ids("train"))
    assert all(len(batch.labels) == batch_size for batch in batches[:-1])


@settings(deadline=None)
@given(batch_size=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_shuffled_epoch_holds_every_image_once_with_its_own_label(batch_size: int, seed: int) -> None:
    batches = list(DATA.shuffled("train", batch_size, torch.Generator().manual_seed(seed)))
    ids = torch.cat([batch.ids for batch in batches])
    assert torch.equal(ids.sort().values, DATA.ids("train"))
    for batch in batches:
        assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.ids)
        assert torch.equal(batch.labels, batch.ids % 3)


def test_two_epochs_from_one_generator_differ_and_the_same_seed_repeats_both() -> None:
    def two_epochs() -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        return [torch.cat([b.ids for b in DATA.shuffled("train", 8, generator)]).tolist() for _ in range(2)]

    first, second = two_epochs()
    assert first != second
    assert two_epochs() == [first, second]


def test_drop_last_leaves_out_the_smaller_batch_only() -> None:
    num_images = DATA.num_images("train")  # 33
    sizes = [len(batch.ids) for batch in DATA.shuffled("train", 10, torch.Generator().manual_seed(0), drop_last=True)]
    assert sizes == [10] * (num_images // 10)
    whole = list(DATA.shuffled("train", 11, torch.Generator().manual_seed(0), drop_last=True))
    assert len(whole) == 3


def test_the_test_split_is_absent_unless_it_is_opened() -> None:
    data = TensorData.from_images(IMAGE_SET, SPLITS)
    assert sorted(data.splits) == ["gate", "train", "val"]
    with pytest.raises(ValueError, match="the test split is sealed"):
        data.images("test")


def test_a_sealed_view_holds_no_test_image_at_all() -> None:
    sealed = DATA.sealed()
    held = torch.cat([part.images[:, 0, 0, 0].long() for part in sealed.splits.values()])
    assert not set(SPLITS.test.tolist()) & set(held.tolist())
    storages = {part.images.untyped_storage().data_ptr() for part in sealed.splits.values()}
    assert DATA.images("test").untyped_storage().data_ptr() not in storages
    assert DATA.num_images("test") == len(SPLITS.test)
    for read in (sealed.images, sealed.labels, sealed.ids, sealed.num_images):
        with pytest.raises(ValueError, match="sealed"):
            read("test")
    with pytest.raises(ValueError, match="sealed"):
        next(sealed.batches("test", 4))


def test_a_sealed_view_cannot_be_given_the_test_split_back() -> None:
    with pytest.raises(TypeError):
        DATA.sealed().splits["test"] = DATA.splits["test"]  # type: ignore[index]


def test_an_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown split 'valid'; known: train, gate, val"):
        DATA.images("valid")


def test_an_empty_batch_size_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(DATA.batches("train", 0))


def test_moving_to_a_device_keeps_every_value() -> None:
    moved = DATA.to("cpu")
    assert moved.num_classes == 3
    assert moved.image_shape == (1, 2, 2)
    assert torch.equal(moved.images("val"), DATA.images("val"))
