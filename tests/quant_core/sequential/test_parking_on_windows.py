"""Files of suspended calls where the system removes no mapped file."""

import torch

from learned_rounding.quant_core.sequential.parking import Parking


class Call:
    """A suspended call of a block, with the fields that Parking reads."""

    def __init__(self, tensor: torch.Tensor):
        self.args, self.kwargs = (tensor,), {}


def test_file_is_removed_when_its_call_goes_on(windows, tmp_path):
    tensor = torch.arange(float(1 << 18))
    call = Call(tensor)
    parking = Parking(torch.nn.Module(), torch.device("cpu"), 0, 0, tmp_path)
    parking.park(call)
    assert len(list(tmp_path.iterdir())) == 1
    parking.release(call)
    parking.restore(call)
    assert torch.equal(tensor, torch.arange(float(1 << 18)))
    assert list(tmp_path.iterdir()) == []
