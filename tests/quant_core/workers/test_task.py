"""What is reported of a device that failed."""

from learned_rounding.quant_core.workers import DeviceFailure


def test_failures_are_sentences(sentences):
    for lost, repeated in ((True, 1), (True, 2), (False, 1)):
        sentences(str(DeviceFailure("cuda:1", lost, "the reason", repeated)))
