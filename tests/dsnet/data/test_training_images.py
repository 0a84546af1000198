"""Training images from memory and from files: same bits for the same rows and seed, on any number
of threads."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dsnet.data.augment import augment
from dsnet.data.boxes import draw_boxes
from dsnet.data.image_folder import decode_file
from dsnet.data.resized_crop import crop_boxes
from dsnet.data.settings import Augmentation
from dsnet.data.training_images import InMemoryImages, StreamedImages, TrainingImages
from dsnet.errors import DataError
from dsnet.image_size import ImageSize, height_and_width
from dsnet.seeds import derive_seed

CPU = torch.device("cpu")
NUM_IMAGES, SIZE = 24, 16
AUGMENTATION = Augmentation(flip=True, randaugment_ops=1, erasing=0.5)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """PNG and JPEG files of several sizes."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    names = []
    for number in range(NUM_IMAGES):
        pixels = random.integers(0, 256, (20 + number, 45 - number, 3), dtype=np.uint8)
        names.append(str(folder / f"{number}.{'png' if number % 2 else 'jpg'}"))
        Image.fromarray(pixels).save(names[-1])
    return tuple(names)


def streamed(files: tuple[str, ...], **changes: Any) -> StreamedImages:
    images = StreamedImages(files, torch.arange(len(files)) % 3, SIZE, AUGMENTATION, num_ahead=8)
    return replace(images, **changes)


def in_memory() -> InMemoryImages:
    pixels = torch.randint(
        0, 256, (NUM_IMAGES, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    return InMemoryImages(pixels, torch.arange(NUM_IMAGES) % 3, AUGMENTATION)


def batches(*numbers: int) -> list[tuple[Tensor, int]]:
    """Batch `number` of an epoch: seven rows (the last five) of a permutation, and a seed."""
    rows = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(4)).split(7)
    return [(rows[number], 100 + number) for number in numbers]


def gathered(images: TrainingImages, wanted: Iterable[tuple[Tensor, int]]) -> list[tuple[Tensor, Tensor]]:
    return list(images.augmented(wanted, CPU))


def assert_same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> None:
    assert len(first) == len(second) > 0
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


class TrainingImagesContract:
    """Contract of every way to store the training split."""

    @pytest.fixture
    def images(self, files: tuple[str, ...]) -> TrainingImages:
        raise NotImplementedError

    def test_batches_are_bytes_with_their_labels_in_the_order_asked_for(self, images: TrainingImages) -> None:
        wanted = batches(0, 1, 2, 3)
        results = gathered(images, wanted)
        assert [len(labels) for _, labels in results] == [7, 7, 7, 3]
        for (rows, _), (pixels, labels) in zip(wanted, results, strict=True):
            assert pixels.dtype == torch.uint8
            assert pixels.shape == (len(rows), 3, SIZE, SIZE)
            assert torch.equal(labels, images.labels[rows])

    def test_a_batch_depends_on_its_rows_and_seed_alone(self, images: TrainingImages) -> None:
        epoch = gathered(images, batches(0, 1, 2, 3))
        assert_same(gathered(images, batches(2, 3)), epoch[2:])
        (rows, seed) = batches(1)[0]
        other = gathered(images, [(rows, seed + 1)])[0][0]
        assert not torch.equal(other, epoch[1][0])

    def test_a_pickled_copy_gives_the_same_bits(self, images: TrainingImages) -> None:
        expected = gathered(images, batches(0, 3))
        copy = pickle.loads(pickle.dumps(images))  # noqa: S301 (our own bytes)
        assert_same(gathered(copy, batches(0, 3)), expected)

    def test_clean_images_are_the_same_whenever_and_however_they_are_asked_for(self, images: TrainingImages) -> None:
        rows = torch.tensor([5, 0, 23, 11, 5])
        whole = next(iter(images.clean([rows], CPU)))
        parts = torch.cat(list(images.clean(rows.split(2), CPU)))
        assert torch.equal(whole, parts)
        assert torch.equal(whole[0], whole[4])
        assert not torch.equal(whole[0], whole[1])

    def test_the_global_generator_is_not_touched(self, images: TrainingImages) -> None:
        before = torch.random.get_rng_state()
        gathered(images, batches(0))
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_batches_may_be_without_end(self, images: TrainingImages) -> None:
        def endless() -> Iterator[tuple[Tensor, int]]:
            while True:
                yield from batches(0, 1)

        with closing(cast(Any, images.augmented(endless(), CPU))) as results:
            found = [next(results) for _ in range(3)]
        assert_same(found, gathered(images, batches(0, 1, 0)))


class TestInMemoryImages(TrainingImagesContract):
    @pytest.fixture
    def images(self, files: tuple[str, ...]) -> TrainingImages:
        return in_memory()

    def test_images_are_those_of_the_rows_augmented(self) -> None:
        images = in_memory()
        (rows, seed) = batches(0)[0]
        found, _ = gathered(images, [(rows, seed)])[0]
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(found, augment(images.images[rows], generator, AUGMENTATION))
        assert torch.equal(next(iter(images.clean([rows], CPU))), images.images[rows])

    def test_copies_on_devices_do_not_travel(self) -> None:
        images = in_memory()
        size = len(pickle.dumps(images))
        gathered(images, batches(0))
        assert len(pickle.dumps(images)) == size


class TestStreamedImages(TrainingImagesContract):
    @pytest.fixture
    def images(self, files: tuple[str, ...]) -> TrainingImages:
        return streamed(files)

    @pytest.mark.parametrize("changes", [{"num_threads": 1}, {"num_threads": 5}, {"num_ahead": 1}, {"num_ahead": 999}])
    def test_threads_and_read_ahead_change_nothing(self, files: tuple[str, ...], changes: dict[str, int]) -> None:
        expected = gathered(streamed(files), batches(0, 1, 2, 3))
        assert_same(gathered(streamed(files, **changes), batches(0, 1, 2, 3)), expected)

    @pytest.mark.parametrize("size", [SIZE, (12, 20)])
    def test_without_further_options_an_image_is_its_resized_crop(
        self, files: tuple[str, ...], size: ImageSize
    ) -> None:
        height, width = height_and_width(size)
        images = streamed(files, augmentation=Augmentation(crop_padding=3, crop_scale=None), image_size=size)
        (rows, seed) = batches(0)[0]
        found, _ = gathered(images, [(rows, seed)])[0]
        draw = draw_boxes(len(rows), torch.Generator().manual_seed(derive_seed(seed, "crops")))
        corners = []
        for position, row in enumerate(rows.tolist()):
            with Image.open(files[row]) as image:
                box = crop_boxes(draw[position], (image.height, image.width), (0.08, 1.0), width / height)
                top, left = int(box.top), int(box.left)
                corners.append((left, top, left + int(box.width), top + int(box.height)))
                expected = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR, box=corners[-1])
            assert np.array_equal(found[position].numpy(), np.asarray(expected).transpose(2, 0, 1))
        assert len(set(corners)) == len(corners)

    def test_the_scale_of_the_crop_is_that_asked_for(self, files: tuple[str, ...]) -> None:
        square = files[12]  # 32 x 33 pixels
        images = streamed((square,) * 8, augmentation=Augmentation(crop_scale=(1.0, 1.0)))
        found, _ = gathered(images, [(torch.arange(8), 0)])[0]
        with Image.open(square) as image:
            whole = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        assert (found.numpy() == np.asarray(whole).transpose(2, 0, 1)).all(axis=(1, 2, 3)).any()

    def test_clean_images_are_decoded_as_those_of_the_other_splits(self, files: tuple[str, ...]) -> None:
        for size in (SIZE, (20, 12)):
            clean = next(iter(streamed(files, image_size=size).clean([torch.tensor([3, 8])], CPU)))
            assert np.array_equal(clean[0].numpy(), decode_file(Path(files[3]), size))
            assert np.array_equal(clean[1].numpy(), decode_file(Path(files[8]), size))

    @pytest.mark.parametrize("content", [b"no image", None])
    def test_a_file_that_cannot_be_decoded_is_named(
        self, files: tuple[str, ...], tmp_path: Path, content: bytes | None
    ) -> None:
        broken = tmp_path / "broken.jpg"
        if content is not None:
            broken.write_bytes(content)
        images = streamed((*files, str(broken)))
        rows = torch.tensor([1, len(files), 2])
        with pytest.raises(DataError, match=r"broken\.jpg: .*replace or remove it"):
            gathered(images, [(rows, 0)])
        with pytest.raises(DataError, match=r"broken\.jpg: .*replace or remove it"):
            list(images.clean([rows], CPU))
        assert not self._decoders()

    def test_batches_are_taken_a_bounded_way_ahead(self, files: tuple[str, ...]) -> None:
        taken: list[int] = []

        def epoch() -> Iterator[tuple[Tensor, int]]:
            for number in range(100):
                taken.append(number)
                yield torch.arange(8), number

        results = cast(Any, streamed(files, num_ahead=16).augmented(epoch(), CPU))
        assert taken == []
        for number in range(3):
            next(results)
            assert len(taken) <= number + 1 + 3  # 16 images, and the batch that is begun
        results.close()

    def test_stopping_early_leaves_no_thread_behind(self, files: tuple[str, ...]) -> None:
        for _ in streamed(files).augmented(batches(0, 1, 2, 3), CPU):
            assert self._decoders()
            break
        assert not self._decoders()

    def test_a_pickle_holds_no_pixels(self, files: tuple[str, ...]) -> None:
        images = streamed(files)
        gathered(images, batches(0))
        assert len(pickle.dumps(images)) < 1500 + sum(map(len, files)) + 16 * len(files)

    @staticmethod
    def _decoders() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("dsnet-decode")]
