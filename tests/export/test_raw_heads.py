"""Bare heads, and the decoder in NumPy that stands beside their program."""

import pytest
import torch
from made_up_run import KINDS, with_threshold
from toys import detector

from d2kd.errors import UserError
from d2kd.export.detections import Detections, detect
from d2kd.export.numpy_decoder import decode, pad
from d2kd.export.parity import FULL, check_parity
from d2kd.export.raw_heads import RawHeads, decoder_settings


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"FasterRCNN"}))
def test_the_decoder_finds_what_the_detector_finds(kind):
    opts = with_threshold(kind, 0.012)
    student = detector(KINDS[kind], opts).eval()
    raw = RawHeads(student)
    settings = decoder_settings(raw)
    images = [torch.rand(3, *size) * 255 for size in ((96, 130), (40, 33))]
    found = []
    for image in images:
        batch = torch.from_numpy(pad(image.numpy(), settings))[None]
        with torch.no_grad():
            outputs = dict(zip(raw.output_names, (x.numpy() for x in raw(batch))))
        found.append(Detections(*decode(outputs, settings, image.shape[1:])))
    expected = [detect(student, image) for image in images]
    parity = check_parity(expected, found, [x.shape[1:] for x in images], FULL)
    assert parity.detections > 20 and parity.unmatched == 0


def test_a_second_stage_is_refused():
    with pytest.raises(UserError, match="--raw-heads is for dense detectors"):
        RawHeads(detector(KINDS["FasterRCNN"]))
