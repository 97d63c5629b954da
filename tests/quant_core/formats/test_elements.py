"""Element formats against an oracle that only knows the representable numbers."""

import torch

from learned_rounding.quant_core import formats
from learned_rounding.quant_core.formats import E2M1, E4M3, E5M2
from learned_rounding.tests.kernels.element_formats import ELEMENTS as ELEMENT_FORMATS

ELEMENTS = tuple(ELEMENT_FORMATS.values())
OCP_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # OCP MX v1.0, table 5


def representable(elements) -> torch.Tensor:
    """All representable numbers by rising value, float64; −0 is left out."""
    if elements is E2M1:
        positive = torch.tensor(OCP_E2M1, dtype=torch.float64)
    elif elements.floating:
        raw = torch.arange(128, dtype=torch.int16).to(torch.uint8).view(elements.dtype).double()
        positive = raw[torch.isfinite(raw) & (raw <= elements.max)]
    else:
        positive = torch.arange(elements.max + 1, dtype=torch.float64)
    return torch.cat([-positive.flip(0)[:-1], positive])


def nearest_even(elements, numbers: torch.Tensor) -> torch.Tensor:
    """The nearest representable number; of two equally near ones, the one at an even position from zero."""
    values = representable(elements)
    position = torch.arange(len(values)) - len(values) // 2
    distance = (numbers.double()[:, None] - values).abs()
    even = (position % 2 == 0).double()
    # A tie is exact in float64, so a bonus far below any real difference of distances decides it and nothing else.
    return values[(distance - even * 1e-12 * distance.clamp_min(1e-30)).argmin(dim=1)]


def test_encode_rounds_to_nearest_even(subtests):
    for elements in ELEMENTS:
        values = representable(elements)
        ties, step = (values[1:] + values[:-1]) / 2, values.diff()
        anywhere = torch.linspace(-1.1 * elements.max, 1.1 * elements.max, 997, dtype=torch.float64)
        numbers = torch.cat([values, ties, ties + step / 16, ties - step / 16, anywhere]).float()
        with subtests.test(elements.name):
            assert torch.equal(elements.encode(numbers.clone()).double(), nearest_even(elements, numbers))


def test_dtype_holds_every_representable_number(subtests):
    for elements in ELEMENTS:
        values = representable(elements)
        with subtests.test(elements.name):
            assert torch.equal(values.float().to(elements.dtype).double(), values)


def test_values_beyond_the_largest_magnitude_clamp(subtests):
    """Never NaN (which a plain cast to e4m3fn gives), never −128, never a wrapped int8."""
    for elements in ELEMENTS:
        end = elements.max
        far = torch.tensor([end * 1.01, end * 1.5, 1e9, 3e38, float("inf")])
        with subtests.test(elements.name):
            assert elements.encode(far.clone()).float().tolist() == [end] * 5
            assert elements.encode(-far).float().tolist() == [-end] * 5


def test_a_negative_number_that_rounds_to_zero_keeps_its_sign(subtests):
    for elements in (E4M3, E2M1):
        with subtests.test(elements.name):
            assert torch.signbit(elements.encode(torch.tensor([-1e-6])).float()).all()


def test_e4m3_rounds_as_a_cast():
    numbers = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 60
    expected = numbers.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(E4M3.encode(numbers.clone()).view(torch.uint8), expected.view(torch.uint8))


def test_round_to_nearest_on_e2m1_has_the_error_of_four_bits():
    """A cast to the dtype that holds E2M1 would report the error of eight bits."""
    numbers = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    scaled = numbers * 1.5
    error = (E2M1.encode(scaled.clone()).float() - scaled).norm() / scaled.norm()
    assert 0.08 < error < 0.13


def test_only_float_formats_are_floating():
    assert [elements for elements in ELEMENTS if elements.floating] == [E4M3, E5M2, E2M1]


def test_neighbours_enclose_a_value(subtests):
    for elements in ELEMENTS:
        values = representable(elements)
        between = torch.cat([(values[1:] + values[:-1]) / 2, values[:-1] + values.diff() * 0.9]).float()
        low, high = elements.neighbours(between)
        place = torch.searchsorted(values, between.double()) - 1
        with subtests.test(elements.name):
            assert torch.equal(low.double(), values[place])
            assert torch.equal(high.double(), values[place + 1])


def test_one_neighbour_of_a_representable_number_is_itself(subtests):
    for elements in ELEMENTS:
        values = representable(elements)
        low, high = elements.neighbours(values.float())
        with subtests.test(elements.name):
            assert ((low.double() == values) | (high.double() == values)).all()


def test_both_neighbours_beyond_the_end_are_the_end(subtests):
    for elements in ELEMENTS:
        for end in (elements.max, -elements.max):
            low, high = elements.neighbours(torch.tensor([end * 1.5, end * 1e3]))
            with subtests.test(elements.name, end=end):
                assert low.tolist() == [end] * 2
                assert high.tolist() == [end] * 2


def test_every_element_format_is_public_and_in_a_format(subtests):
    """The tests of elements and kernels, and the compilation of kernels, take all of them by their names."""
    used = {format.elements for format in formats.FORMATS.values()}
    for name, elements in ELEMENT_FORMATS.items():
        with subtests.test(name):
            assert elements.name.lower() == name
            assert getattr(formats, elements.name) is elements
            assert elements in used
