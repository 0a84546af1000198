"""Choice of the normalisation with which a run reads its images."""

from __future__ import annotations

from dataclasses import dataclass

from dsnet.data.normalization import Normalization
from dsnet.data.settings import IMAGENET, IMAGENET_VALUES, DataSettings, WrittenNormalization
from dsnet.data.sources import ImageSource
from dsnet.data.splits import Splits
from dsnet.training.start import StartWeights


@dataclass(frozen=True)
class ChosenNormalization:
    """A normalisation, and where it comes from."""

    normalization: Normalization
    reason: str
    """A phrase for people, such as `that of train`."""
    warning: str | None = None
    """A sentence about a normalisation that may not be meant."""


def choose_normalization(
    written: WrittenNormalization | None, source: ImageSource, splits: Splits, start: StartWeights | None
) -> ChosenNormalization:
    """The normalisation of a run: as written, else that of the start weights, else mean and
    standard deviation of the training split.

    Args:
        written: the setting `data.normalization`.
        source: the images.
        splits: their splits.
        start: the weights from which training starts; None for fresh ones.

    Raises:
        SettingError: the setting has another number of channels than the images.
    """
    known = None if start is None else start.normalization
    if written is not None:
        chosen = Normalization.from_written(written.for_channels(source.image_shape[0]))
        name = f"{IMAGENET}, " if written == IMAGENET_VALUES else ""
        reason = f"{name}by {DataSettings.SECTION}.normalization"
        if start is None or known in (None, chosen):
            return ChosenNormalization(chosen, reason)
        assert known is not None
        warning = (
            f"data.normalization ({chosen.in_words()}) replaces the normalisation with which {start.stem.name} was trained "
            f"({known.in_words()}): its weights see other inputs than in their training; leave it null to keep theirs"
        )
        return ChosenNormalization(chosen, reason, warning)
    if start is not None and known is not None:
        return ChosenNormalization(known, f"that of the training of {start.stem.name}")
    own = source.normalization(splits)
    if start is None:
        return ChosenNormalization(own, "mean and deviation of train")
    warning = (
        f"supernet.init_from: {start.stem.name} does not record how the images of its training were normalised, so that yours are "
        f"normalised by the mean and deviation of train ({own.in_words()}); if that differs, its weights see other inputs than in "
        f"their training: write data.normalization: {IMAGENET}, or {{mean: [...], std: [...]}} as in the program that trained it"
    )
    return ChosenNormalization(own, f"mean and deviation of train, as {start.stem.name} records none", warning)
